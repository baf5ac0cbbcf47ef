"""Images looked up at any places, an image at a time: what every place takes from one neighbour after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from gpulayers._lookups import corners, neighbours
from gpulayers.arrays import Spec, compute_dtype, empty_numpy

from .._window import output_order
from . import _blocks


class _Corner(NamedTuple):
    """One neighbour of every place of an image: (P,) each."""

    at: np.ndarray
    weight: np.ndarray
    outside: np.ndarray
    """The numbers of the places that have none there."""
    taps: tuple


def _corners(x: Any, grid: np.ndarray, n: int, how: tuple) -> Iterator[_Corner]:
    sizes = tuple(x.shape[2:])
    axes = neighbours(x, grid[n : n + 1], *how)
    for taps, index, inside in corners(axes, sizes):
        weight = math.prod(tap.weight[0] for tap in taps)
        yield _Corner(index[0], weight, np.flatnonzero(~inside[0]), taps)


def _image(x: np.ndarray, n: int, last: bool, kind: np.dtype) -> np.ndarray:
    """(pixels, channels) of one image, or (channels, pixels)."""
    own = x[n].reshape(x.shape[1], -1)
    return np.ascontiguousarray(own.T if last else own, kind)


def _cut(part: np.ndarray, corner: _Corner, last: bool) -> None:
    """Nothing where a place has no such neighbour, whatever was there."""
    if corner.outside.size:
        part[corner.outside if last else (slice(None), corner.outside)] = 0


def grid_sample_forward(
    x: np.ndarray, grid: np.ndarray, *, needs: tuple = (), mode: str, padding_mode: str, align_corners: bool
) -> tuple[tuple, dict]:
    order, kind, how = output_order(x), compute_dtype(x.dtype), (mode, padding_mode, align_corners)
    y, last = empty_numpy(Spec((*x.shape[:2], *grid.shape[1:-1]), x.dtype, order)), order is not None

    def work(first: int, end: int) -> None:
        for n in range(first, end):
            pixels, total = _image(x, n, last, kind), None
            for corner in _corners(x, grid, n, how):
                part = np.take(pixels, corner.at, 0 if last else 1, mode="clip")
                part *= corner.weight[:, None] if last else corner.weight
                _cut(part, corner, last)
                total = part if total is None else np.add(total, part, out=total)
            y[n] = (total.T if last else total).reshape(y.shape[1:])

    _blocks.over(len(x), 1, work, y.size)
    return (y,), {"x": x, "grid": grid} if needs else {}


def grid_sample_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, mode: str, padding_mode: str, align_corners: bool
) -> tuple:
    (dy,), x, grid, how = dys, saved["x"], saved["grid"], (mode, padding_mode, align_corners)
    kind, last, count = compute_dtype(x.dtype), output_order(x) is not None, x.ndim - 2
    dx, dgrid = (empty_numpy(s.like()) if name in needs else None for name, s in zip(("x", "grid"), inputs))

    def work(first: int, end: int) -> None:
        for n in range(first, end):
            g, pixels = _image(dy, n, last, kind), _image(x, n, last, kind)
            total, slopes = np.zeros(pixels.size, kind), np.zeros((count, g.size // x.shape[1]), kind)
            channels = np.arange(x.shape[1])
            for corner in _corners(x, grid, n, how):
                if dgrid is not None:
                    part = np.take(pixels, corner.at, 0 if last else 1, mode="clip")
                    part *= g
                    along = part.sum(1 if last else 0)
                    along[corner.outside] = 0
                    for a, tap in enumerate(corner.taps):
                        others = [o.weight[0] for b, o in enumerate(corner.taps) if b != a]
                        slopes[count - 1 - a] += along * tap.slope[0] * math.prod(others)
                if dx is not None:
                    part = g * (corner.weight[:, None] if last else corner.weight)
                    _cut(part, corner, last)
                    at = (
                        corner.at[:, None] * len(channels) + channels
                        if last
                        else channels[:, None] * pixels.shape[1] + corner.at
                    )
                    np.add.at(total, at.reshape(-1), part.reshape(-1))
            if dx is not None:
                found = total.reshape(pixels.shape)
                dx[n] = (found.T if last else found).reshape(dx.shape[1:])
            if dgrid is not None:
                dgrid[n] = slopes.T.reshape(dgrid.shape[1:])

    _blocks.over(len(x), 1, work, dy.size)
    return dx, dgrid
