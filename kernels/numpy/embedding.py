"""Rows of a table, gathered in blocks; gradients summed over the sorted indices."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gpulayers.arrays import Spec, compute_dtype

from . import _blocks, _segments

_ALONE = 4 << 20
"""Bytes below which one thread copies rows faster than two: a copy is done before the second one has begun."""


def embedding_forward(
    weight: np.ndarray, indices: np.ndarray, *, needs: tuple = (), padding_idx: int | None, scale_grad_by_freq: bool
) -> tuple[tuple, dict]:
    y = np.empty((*indices.shape, weight.shape[1]), weight.dtype)
    if 0 < y.nbytes <= _ALONE:
        np.take(weight, indices, 0, out=y, mode="clip")
    elif y.size:
        flat, out = np.ascontiguousarray(indices).reshape(-1), y.reshape(-1, weight.shape[1])

        def work(lo: int, hi: int) -> None:
            np.take(weight, flat[lo:hi], 0, out=out[lo:hi], mode="clip")

        _blocks.each(len(flat), _blocks.block_rows(weight.shape[1], y.itemsize), work)
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


# --- bags ------------------------------------------------------------------------------------------------------------


class _Bags(NamedTuple):
    """The indices that belong to a bag, bag by bag."""

    places: np.ndarray
    """Where they stand among all indices, flat."""
    rows: np.ndarray
    of: np.ndarray
    """The bag of each."""
    sizes: np.ndarray
    """Of every bag."""


def _bags(indices: np.ndarray, offsets: Any, padding: int | None, include_last_offset: bool) -> _Bags:
    flat = np.ascontiguousarray(indices).reshape(-1)
    if offsets is None:
        sizes = np.full(indices.shape[0], indices.shape[1])
    else:
        sizes = np.diff(offsets) if include_last_offset else np.diff(offsets, append=len(flat))
    of = np.repeat(np.arange(len(sizes)), sizes)
    places = np.arange(len(of))
    if padding is not None:
        places = np.flatnonzero(flat[: len(of)] != padding)
        of = of[places]
        sizes = np.bincount(of, minlength=len(sizes))
    return _Bags(places, flat[places], of, sizes)


def _maxima(weight: np.ndarray, bags: _Bags, y: np.ndarray, winners: np.ndarray) -> None:
    """The first maximum of each bag: the k-th row of all bags at once."""
    first = np.cumsum(bags.sizes) - bags.sizes
    for k in range(int(bags.sizes.max(initial=0))):
        some = np.flatnonzero(bags.sizes > k)
        at = first[some] + k
        rows, before = np.take(weight, bags.rows[at], 0).astype(y.dtype, copy=False), y[some]
        better = (rows > before) if k else np.ones(rows.shape, bool)
        y[some] = np.where(better, rows, before)
        winners[some] = np.where(better, bags.places[at][:, None], winners[some])


def embedding_bag_forward(
    weight: np.ndarray,
    indices: np.ndarray,
    offsets: Any = None,
    per_sample_weights: Any = None,
    *,
    needs: tuple = (),
    mode: str,
    padding_idx: int | None,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
) -> tuple[tuple, dict]:
    bags = _bags(indices, offsets, padding_idx, include_last_offset)
    y = np.zeros((len(bags.sizes), weight.shape[1]), compute_dtype(weight.dtype))
    saved = {"indices": indices} | ({} if offsets is None else {"offsets": offsets})
    if "per_sample_weights" in needs:
        saved["weight"] = weight
    if mode == "max":
        saved["winners"] = np.full(y.shape, -1, np.int64)
        _maxima(weight, bags, y, saved["winners"])
    else:
        full = np.flatnonzero(bags.sizes)
        by = None if per_sample_weights is None else per_sample_weights.reshape(-1)[bags.places]
        _segments.add_up(weight, bags.rows, by, bags.sizes[full], y, full)
        if mode == "mean":
            saved["sizes"] = bags.sizes.astype(np.int64, copy=False)
            y /= np.maximum(bags.sizes, 1).astype(y.dtype)[:, None]
        elif per_sample_weights is not None and "weight" in needs:
            saved["per_sample_weights"] = per_sample_weights
    return (y.astype(weight.dtype, copy=False),), saved if needs else {}


def embedding_bag_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    mode: str,
    padding_idx: int | None,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
) -> tuple:
    (dy,), indices, kind = dys, saved["indices"], compute_dtype(inputs[0].dtype)
    bags = _bags(indices, saved.get("offsets"), padding_idx, include_last_offset)
    dweight = dfactors = None
    if "weight" in needs:
        rows, of, by = dy, bags.of, saved.get("per_sample_weights")
        if mode == "max":
            won = saved["winners"][bags.of] == bags.places[:, None]
            rows, of = np.where(won, dy[bags.of], np.zeros((), dy.dtype)), np.arange(len(bags.of))
        elif mode == "mean":
            by = (1 / np.maximum(saved["sizes"], 1)).astype(kind)[bags.of]
        else:
            by = None if by is None else by.reshape(-1)[bags.places]
        dweight = scattered(rows, bags.rows, inputs[0], None, scale_grad_by_freq, of, by)
    if "per_sample_weights" in needs:
        dfactors = np.zeros(indices.size, inputs[3].dtype)
        rows = np.take(saved["weight"], bags.rows, 0).astype(kind, copy=False)
        dfactors[bags.places] = np.vecdot(rows, dy[bags.of].astype(kind, copy=False))
        dfactors = dfactors.reshape(indices.shape)
    return dweight, None, None, dfactors


def one_hot_refuses(indices: Any, *, needs: tuple = (), num_classes: int) -> str | None:
    return None


def one_hot_forward(indices: np.ndarray, *, needs: tuple = (), num_classes: int) -> tuple[tuple, dict]:
    y = np.zeros((indices.size, num_classes), np.int64)
    y[np.arange(indices.size), indices.reshape(-1)] = 1
    return (y.reshape(*indices.shape, num_classes),), {}
