"""Padding by slices: the image at once, then the rows and columns around it one by one."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gpulayers.arrays import Spec, compute_dtype, empty_numpy, float64

from .._window import output_order
from ._images import along_axes, over_blocks

REFUSALS = {"float64": "float64 is left to the definition"}


class _Axis(NamedTuple):
    """What stands where along one axis."""

    own: slice
    """The places of y that are x's own rows (or columns)."""
    shown: slice
    """Those of x that stand there."""
    around: list[tuple[int, int]]
    """(place of y, which of x it shows) for the others; −1 for a constant."""


def _axis(size: int, around: tuple[int, int], mode: str) -> _Axis:
    before, after = around
    first, last = max(0, -before), max(size - max(0, -after), max(0, -before))
    places = range(size + before + after)
    start, stop = max(0, first + before), max(0, last + before)
    outside = [(o, _source(o - before, size, first, last, mode)) for o in places if not start <= o < stop]
    return _Axis(slice(start, stop), slice(start - before, stop - before), outside)


def _source(at: int, size: int, first: int, last: int, mode: str) -> int:
    if mode == "constant":
        return -1
    if mode == "reflect":
        return size - 1 - abs(size - 1 - abs(at))
    if mode == "replicate":
        return min(max(at, 0), size - 1)
    return (at - first) % (last - first) + first


def pad_forward(x: np.ndarray, *, needs: tuple = (), padding: tuple, mode: str, value: float) -> tuple[tuple, dict]:
    axes = [_axis(n, p, mode) for n, p in zip(x.shape[2:], padding)]
    size = [n + sum(p) for n, p in zip(x.shape[2:], padding)]
    y = empty_numpy(Spec((*x.shape[:2], *size), x.dtype, output_order(x)))
    over_blocks(lambda y, x: _fill(y, x, axes, value), [y], [x])
    return (y,), {}


def _fill(y: np.ndarray, x: np.ndarray, axes: list[_Axis], value: float) -> None:
    """y of x: along the first of ``axes``, and of each row (or column) along the others. Those before are done."""
    if not axes:
        y[...] = x
        return
    axis, *others = axes
    behind = (slice(None),) * len(others)
    _fill(y[(..., axis.own, *behind)], x[(..., axis.shown, *behind)], others, value)
    for place, source in axis.around:
        if source < 0:
            y[(..., place, *behind)] = value
        else:
            _fill(y[(..., place, *behind)], x[(..., source, *behind)], others, value)


def pad_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, padding: tuple, mode: str, value: float
) -> tuple:
    (dy,), (x,) = dys, inputs
    axes = [_axis(n, p, mode) for n, p in zip(x.shape[2:], padding)]
    kind = compute_dtype(x.dtype)
    dx = empty_numpy(x.like())

    def work(dx: np.ndarray, dy: np.ndarray) -> None:
        if mode == "constant":
            dx[(..., *[axis.shown for axis in axes])] = dy[(..., *[axis.own for axis in axes])]
            for number, axis in enumerate(axes, 2):
                _clear(dx, axis.shown, number)
            return
        along_axes(lambda wide, narrow, number: _place(wide, narrow, axes[number - 2], number), dy, dx, kind)

    over_blocks(work, [dx], [dy])
    return (dx,)


def _place(dx: np.ndarray, dy: np.ndarray, axis: _Axis, number: int) -> None:
    """dx: along the axis the sum of dy over the places that show each row (or column)."""
    dx, dy = np.moveaxis(dx, number, 0), np.moveaxis(dy, number, 0)
    dx[axis.shown] = dy[axis.own]
    _clear(dx, axis.shown, 0)
    for place, source in axis.around:
        if source >= 0:
            dx[source] += dy[place]


def _clear(dx: np.ndarray, there: slice, number: int) -> None:
    """Zeros outside of ``there``: what was cut off."""
    dx = np.moveaxis(dx, number, 0)
    dx[: there.start] = 0
    dx[there.stop :] = 0


def pad_refuses(x: Spec, *, needs: tuple, **options: Any) -> str | None:
    return REFUSALS["float64"] if x.dtype == float64 else None
