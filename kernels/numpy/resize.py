"""Resizing a block of images at a time, axis by axis: what each tap of a table takes, all places of the axis at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers._taps import Taps, taps, transposed
from gpulayers.arrays import Spec, compute_dtype, empty_numpy, float64

from .._window import channels_last, output_order
from . import _blocks
from ._grid_sample import grid_sample_backward as grid_sample_backward
from ._grid_sample import grid_sample_forward as grid_sample_forward

REFUSALS = {"float64": "float64 is left to the definition"}


def _axis(v: np.ndarray, axis: int, table: Taps) -> np.ndarray:
    """``v`` with one axis made anew."""
    shape = (-1, *(1,) * (v.ndim - 1 - axis))
    total = None
    for index, weight in zip(table.places.T, table.weights.T):
        term = np.take(v, index, axis, mode="clip")
        if (weight != 1).any():
            term *= weight.reshape(shape)
        if (index < 0).any():
            term[(slice(None),) * axis + (index < 0,)] = 0
        total = term if total is None else np.add(total, term, out=total)
    assert total is not None
    return total


def _rows(x: np.ndarray, last: bool) -> np.ndarray:
    """(rows, *sizes, neighbours): each row resized by itself."""
    if last:
        return x.transpose(channels_last(x.ndim))
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:], 1)


def _resample(x: np.ndarray, y: np.ndarray, tables: list[Taps]) -> None:
    """y from x, y dense in a row-major or channels-last order."""
    last = not y.flags.c_contiguous
    given, result = _rows(x, last), _rows(y, last)
    n, copies = len(result), all(t.places.shape[1] == 1 and (t.weights == 1).all() and t.whole for t in tables)
    kind = x.dtype if copies else compute_dtype(x.dtype)
    # What shrinks comes first: the axes after it have less to read.
    order = sorted(range(len(tables)), key=lambda a: result.shape[1 + a] / max(given.shape[1 + a], 1))
    each = max(given.size, result.size) // max(n, 1)

    def block(lo: int, hi: int) -> None:
        v = given[lo:hi].astype(kind, copy=False)
        for a in order:
            v = _axis(v, 1 + a, tables[a])
        result[lo:hi] = v

    _blocks.over(n, _blocks.block_rows(each), block, n * each)


def _tables(make: Any, sizes: tuple, size: tuple, scales: tuple, *mode: Any) -> list[Taps]:
    return [make(n, out, *mode, scale, np.float32) for n, out, scale in zip(sizes, size, scales)]


def interpolate_forward(
    x: np.ndarray,
    *,
    needs: tuple = (),
    size: tuple,
    mode: str,
    align_corners: bool,
    antialias: bool,
    scales: tuple,
) -> tuple[tuple, dict]:
    y = empty_numpy(Spec((*x.shape[:2], *size), x.dtype, output_order(x)))
    _resample(x, y, _tables(taps, x.shape[2:], size, scales, mode, align_corners, antialias))
    return (y,), {}


def interpolate_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    size: tuple,
    mode: str,
    align_corners: bool,
    antialias: bool,
    scales: tuple,
) -> tuple:
    (dy,), (x,) = dys, inputs
    like = x.like()
    regular = like.order in (None, channels_last(x.ndim))
    dx = empty_numpy(like if regular else Spec(x.shape, x.dtype))
    _resample(dy, dx, _tables(transposed, x.shape[2:], size, scales, mode, align_corners, antialias))
    if regular:
        return (dx,)
    laid = empty_numpy(like)
    laid[...] = dx
    return (laid,)


def interpolate_refuses(x: Spec, *, needs: tuple, **options: Any) -> str | None:
    return REFUSALS["float64"] if x.dtype == float64 else None


def grid_sample_refuses(x: Spec, grid: Spec, *, needs: tuple, **options: Any) -> str | None:
    return REFUSALS["float64"] if x.dtype == float64 else None
