"""Where grid_sample looks: the neighbours of every place on an image, their weights and slopes; on NumPy's arrays and CuPy's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from gpulayers.arrays import namespace, up

_A = -0.75


class Tap(NamedTuple):
    """One of the neighbours along an axis of every place, (N, P)."""

    index: Any
    inside: Any
    weight: Any
    slope: Any
    """Of the weight, by grid's coordinate."""


def _padded(v: Any, slope: Any, size: int, padding: str, align: bool) -> tuple[Any, Any]:
    """Coordinates that lie on the image, and what a step of them comes to."""
    xp = namespace(v)
    if padding == "zeros":
        return v, slope
    if padding == "reflection":
        low, span = (0.0, size - 1) if align else (-0.5, size)
        if span == 0:
            return v * 0, slope * 0
        slope, v = xp.where(v < low, -slope, slope), abs(v - low)
        flips = xp.floor(v / span)
        odd = flips - 2 * xp.floor(flips / 2) > 0
        v = v - flips * span
        slope, v = xp.where(odd, -slope, slope), xp.where(odd, span - v, v) + low
    slope = xp.where((v > 0) & (v < size - 1), slope, slope * 0)
    return xp.clip(v, 0.0, float(size - 1)), slope


def _cubic(d: Any) -> tuple[Any, Any]:
    """(weight, slope) of taps at the distances −1 − t, −t, 1 − t, 2 − t, of Keys' kernel, by the coordinate."""
    xp, far = namespace(d), abs(d)
    near = far < 1
    weight = xp.where(near, ((_A + 2) * far - (_A + 3)) * far * far + 1, ((far - 5) * far + 8) * far * _A - 4 * _A)
    rate = xp.where(near, (3 * (_A + 2) * far - 2 * (_A + 3)) * far, ((3 * far - 10) * far + 8) * _A)
    return weight, xp.where(d > 0, -rate, rate)


def _taps(g: Any, size: int, mode: str, padding: str, align: bool) -> list[Tap]:
    """The neighbours of every place along one axis; g: coordinates from −1 to 1, (N, P)."""
    xp = namespace(g)
    v = (g + 1) * ((size - 1) / 2) if align else ((g + 1) * size - 1) / 2
    slope = xp.full(v.shape, (size - 1) / 2 if align else size / 2, v.dtype)
    if mode == "bicubic":
        known = abs(v) < math.inf
        v = xp.where(known, xp.clip(v, -(2.0**30), 2.0**30), xp.full(v.shape, math.nan, v.dtype))
    else:
        if padding == "reflection":
            v = xp.where(abs(v) < math.inf, v, xp.full(v.shape, math.nan, v.dtype))
        v, slope = _padded(v, slope, size, padding, align)
        known = abs(v) < 2.0**30
        v = xp.where(known, v, xp.full(v.shape, -100.0 if padding == "zeros" else 0.0, v.dtype))
    first = xp.rint(v) if mode == "nearest" else xp.floor(v)
    t, found = v - first, []
    for k in {"nearest": (0,), "bilinear": (0, 1), "bicubic": (-1, 0, 1, 2)}[mode]:
        at = first + k
        if mode == "nearest":
            weight, rate = xp.full(t.shape, 1.0, t.dtype), xp.full(t.shape, 0.0, t.dtype)
        elif mode == "bilinear":
            weight, rate = (t, slope) if k else (1 - t, -slope)
        else:
            weight, rate = _cubic(k - t)
            rate = rate * slope
            at, _ = _padded(at, at, size, padding, align)
            at = xp.where(known, xp.rint(at) if align else xp.floor(at), xp.full(at.shape, -1.0, at.dtype))
        inside = (at >= 0) & (at < size)
        found.append(Tap(xp.clip(at, 0.0, size - 1.0).astype("int64"), inside, weight, rate))
    return found


def neighbours(x: Any, grid: Any, mode: str, padding: str, align: bool) -> list[list[Tap]]:
    places = up(grid).reshape(grid.shape[0], math.prod(grid.shape[1:-1]), grid.shape[-1])
    sizes = x.shape[2:]
    return [_taps(places[..., len(sizes) - 1 - a], n, mode, padding, align) for a, n in enumerate(sizes)]


def corners(axes: list[list[Tap]], sizes: tuple) -> Iterator[tuple[tuple[Tap, ...], Any, Any]]:
    """(a tap of each axis, the pixel's number, whether it is on the image) for each of a place's neighbours."""
    for taps in itertools.product(*axes):
        index, inside = taps[0].index, taps[0].inside
        for tap, size in zip(taps[1:], sizes[1:]):
            index, inside = index * size + tap.index, inside & tap.inside
        yield taps, index, inside
