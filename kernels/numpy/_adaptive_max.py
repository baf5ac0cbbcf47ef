"""Maxima of so many parts, along one axis after the other, the last first: so the first of equal ones stays the first."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpulayers.arrays import compute_dtype

from . import _blocks
from ._windows import parts_of
from ._won import back, outputs, returned, rows_of


def _along(v: np.ndarray, place: Any, parts: list[slice], axis: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(maxima of an axis' parts, where they lie): ``place`` says where v's numbers do along the axes after, which take
    ``step`` places."""
    first = np.array([p.start for p in parts])
    length = np.array([p.stop - p.start for p in parts])
    even, before = (length == length[0]).all() and (np.diff(first) == length[0]).all(), (slice(None),) * axis

    def under(tap: int) -> np.ndarray:
        if even:
            return v[(*before, slice(tap, None, int(length[0])))]
        return np.take(v, first + np.minimum(tap, length - 1), axis)

    best = under(0).copy()
    won, number, better = (np.zeros(best.shape, t) for t in (np.int32, np.int32, bool))
    for tap in range(1, int(length.max())):
        of = under(tap)
        np.greater(of, best, out=better)
        np.maximum(best, of, out=best)
        np.multiply(better, np.int32(tap), out=number)
        np.maximum(won, number, out=won)
    behind = (-1, *(1,) * (v.ndim - 1 - axis))
    if np.isnan(best.sum()):  # some NaN: the last one in its part wins
        for tap in range(int(length.max())):
            np.copyto(won, tap, where=np.isnan(under(tap)))
        np.minimum(won, (length - 1).reshape(behind), out=won)
    won += first.reshape(behind).astype(np.int32)
    if place is None:
        return best, won
    return best, won * np.int32(step) + np.take_along_axis(place, won, axis)


def _whole(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of whole images (n, *sizes, channels), as one part."""
    flat = v.reshape(len(v), -1, v.shape[-1])
    won = flat[..., 0].argmax(1)[:, None] if v.shape[-1] == 1 else flat.argmax(1)
    best = np.take_along_axis(flat, won[:, None], 1)
    if np.isnan(best.sum()):
        none = np.isnan(flat)
        won = np.where(none.any(1), flat.shape[1] - 1 - none[:, ::-1].argmax(1), won)
    shape = (len(v), *(1,) * (v.ndim - 2), v.shape[-1])
    return best.reshape(shape), won.reshape(shape)


def adaptive_max_pool_forward(
    x: np.ndarray, *, needs: tuple = (), output_size: tuple, return_indices: bool
) -> tuple[tuple, dict]:
    found, last = outputs(x, output_size, needs, return_indices)
    sizes, given, (y, index, indices) = (
        x.shape[2:],
        rows_of(x, last),
        [a if a is None else rows_of(a, last) for a in found],
    )
    parts = parts_of(sizes, output_size)

    def work(lo: int, hi: int) -> None:
        best, place = given[lo:hi].astype(compute_dtype(x.dtype), copy=False), None
        if set(output_size) == {1}:
            best, place = _whole(best)
        else:
            for axis in reversed(range(len(sizes))):
                best, place = _along(best, place, parts[axis], 1 + axis, math.prod(sizes[axis + 1 :]))
        y[lo:hi] = best
        for a in (index, indices):
            if a is not None:
                a[lo:hi] = place

    if y.size:
        _blocks.over(len(given), _blocks.block_rows(given[:1].size), work, given.size)
    return returned(*found)


def adaptive_max_pool_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, output_size: tuple, return_indices: bool
) -> tuple:
    return (back(dys[0], saved["index"], inputs[0]),)
