"""Rows of a table, gathered in blocks; gradients summed over the sorted indices."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import Spec

from . import _blocks, _segments


def embedding_forward(
    weight: np.ndarray, indices: np.ndarray, *, needs: tuple = (), padding_idx: int | None, scale_grad_by_freq: bool
) -> tuple[tuple, dict]:
    y = np.empty((*indices.shape, weight.shape[1]), weight.dtype)
    flat, out = np.ascontiguousarray(indices).reshape(-1), y.reshape(-1, weight.shape[1])

    def work(lo: int, hi: int) -> None:
        np.take(weight, flat[lo:hi], 0, out=out[lo:hi], mode="clip")

    if y.size:
        _blocks.each(len(flat), _blocks.block_rows(weight.shape[1], y.itemsize), work, y.size)
    return (y,), {"indices": indices} if needs else {}


def scattered(
    dy: np.ndarray,
    indices: np.ndarray,
    weight: Spec,
    padding: int | None,
    frequent: bool,
    bags: Any = None,
    factors: Any = None,
) -> np.ndarray:
    """dweight from dy's rows, (B, D): the bag's of each index (N,), by its factor; without bags, each index has its own."""
    dweight = np.zeros(weight.shape, weight.dtype)
    places = _segments.order(indices, weight.shape[0])
    keys = indices[places]
    if padding is not None:
        kept = keys != padding
        keys, places = keys[kept], places[kept]
    if not keys.size:
        return dweight
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    counts, rows = np.diff(first, append=len(keys)), keys[first]
    by = None if factors is None else factors[places]
    if frequent:
        by = np.repeat(1 / counts, counts) * (1 if by is None else by)
    _segments.add_up(dy, places if bags is None else bags[places], by, counts, dweight, rows)
    return dweight


def embedding_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, padding_idx: int | None, scale_grad_by_freq: bool
) -> tuple:
    (dy,), weight, indices = dys, inputs[0], saved["indices"].reshape(-1)
    rows = dy.reshape(len(indices), weight.shape[1])
    return scattered(rows, indices, weight, padding_idx, scale_grad_by_freq), None
