"""Pooling by whole planes, some images at a time: one pass for each tap of the window, or for each row and column.

Which tap won is kept with arithmetic on bytes and bits: NumPy's masked assignments take ten times as long.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpulayers.arrays import Spec, compute_dtype, float64

from .._layout import own_memory
from .._pooling import Divisor, adaptive_avg_pool, avg_pool, max_pool
from .._window import Window, output_order
from ._adaptive_max import adaptive_max_pool_backward as adaptive_max_pool_backward
from ._adaptive_max import adaptive_max_pool_forward as adaptive_max_pool_forward
from ._fractional_max import fractional_max_pool_backward as fractional_max_pool_backward
from ._fractional_max import fractional_max_pool_forward as fractional_max_pool_forward
from ._images import along_axes, empty_like, over_blocks
from ._lp_pool import lp_pool_backward as lp_pool_backward
from ._lp_pool import lp_pool_forward as lp_pool_forward
from ._unpooling import max_unpool_backward as max_unpool_backward
from ._unpooling import max_unpool_forward as max_unpool_forward
from ._windows import Taps, parts_of, spread_out, weights_of

REFUSALS = {"float64": "float64 is left to the definition"}


# --- max_pool ------------------------------------------------------------------------------------------------------


def _max_forward(x: np.ndarray, y: np.ndarray, tap: Any, indices: Any, window: Window, empty: Any) -> None:
    taps, kind = Taps(window, x.shape[2:], y.shape[2:]), compute_dtype(x.dtype)
    if tap is None and indices is None:
        over_blocks(lambda y, x: _maxima(x, y, taps, kind), [y], [x])
        return
    won = empty(y.shape, window.tap_dtype, output_order(x)) if tap is None else tap
    first = taps.first_taps().astype(won.dtype)
    if indices is None:
        over_blocks(lambda y, won, x: _winners(x, y, won, first, taps, kind), [y, won], [x])
        return
    windows, taps_at = taps.places(first)

    def work(y: np.ndarray, won: np.ndarray, indices: np.ndarray, x: np.ndarray) -> None:
        _winners(x, y, won, first, taps, kind)
        np.add(windows, taps_at[won], out=indices)

    over_blocks(work, [y, won, indices], [x])


def _maxima(x: np.ndarray, y: np.ndarray, taps: Taps, kind: np.dtype) -> None:
    """y: each row's maxima over the columns of the windows, and of these the maxima over the rows."""
    best = taps.widen(x, kind, -np.inf)
    for axis in reversed(range(len(taps.kernel))):
        wide, best = best, best[taps.along(axis, 0)].copy("K")
        for tap in range(1, taps.kernel[axis]):
            np.maximum(best, wide[taps.along(axis, tap)], out=best)
    y[...] = best


def _winners(x: np.ndarray, y: np.ndarray, won: np.ndarray, first: np.ndarray, taps: Taps, kind: np.dtype) -> None:
    """y, and which tap gave it."""
    wide = taps.widen(x, kind, -np.inf)
    best = empty_like(y, taps.size, kind)
    best.fill(-np.inf)
    won[...] = first + 1
    better, number = empty_like(y, taps.size, bool), np.empty_like(won)
    for tap, at in taps.each():
        under = wide[at]
        np.greater(under, best, out=better)
        np.maximum(best, under, out=best)
        np.multiply(better, won.dtype.type(tap + 1), out=number)
        np.maximum(won, number, out=won)  # taps come in rising order
    won -= 1
    if np.isnan(best.sum()):  # some NaN: the last one in its window wins
        for tap, at in taps.each():
            np.copyto(won, tap, where=np.isnan(wide[at]))
    y[...] = best


def _max_backward(dy: np.ndarray, tap: np.ndarray, dx: np.ndarray, window: Window) -> None:
    taps, kind = Taps(window, dx.shape[2:], dy.shape[2:]), compute_dtype(dx.dtype)
    bits = np.dtype(f"i{kind.itemsize}")

    def work(dx: np.ndarray, won: np.ndarray, dy: np.ndarray) -> None:
        g = empty_like(won, taps.size, kind)
        g[...] = dy
        direct = taps.full == taps.image and dx.dtype == kind
        wide = dx if direct else empty_like(dx, taps.full, kind)
        wide.fill(0)
        share = np.empty_like(g)
        for number, at in taps.each():
            under = wide[at]
            # Of its bits all or none: 0 · ∞ would be NaN.
            chosen = won == number
            if taps.apart:
                np.multiply(g.view(bits), chosen, out=under.view(bits))
            else:
                np.multiply(g.view(bits), chosen, out=share.view(bits))
                under += share
        if not direct:
            dx[...] = taps.inside(wide)

    over_blocks(work, [dx], [tap, dy])


# --- avg_pool ------------------------------------------------------------------------------------------------------


def _avg_forward(x: np.ndarray, y: np.ndarray, window: Window, divisor: Divisor) -> None:
    taps, kind = Taps(window, x.shape[2:], y.shape[2:]), compute_dtype(x.dtype)
    weights = weights_of(taps, kind, divisor)

    def work(y: np.ndarray, x: np.ndarray) -> None:
        total = taps.widen(x, kind, 0)
        for axis in reversed(range(len(taps.kernel))):
            wide, total = total, total[taps.along(axis, 0)].copy("K")
            for tap in range(1, taps.kernel[axis]):
                total += wide[taps.along(axis, tap)]
        np.multiply(total, weights, out=y, casting="same_kind")

    over_blocks(work, [y], [x])


def _avg_backward(dy: np.ndarray, dx: np.ndarray, window: Window, divisor: Divisor) -> None:
    taps, kind = Taps(window, dx.shape[2:], dy.shape[2:]), compute_dtype(dx.dtype)
    weights = weights_of(taps, kind, divisor)

    def work(dx: np.ndarray, dy: np.ndarray) -> None:
        g = empty_like(dx, taps.size, kind)
        np.multiply(dy, weights, out=g)
        direct = taps.full == taps.image and dx.dtype == kind
        wide = dx if direct else empty_like(dx, taps.full, kind)
        if taps.apart:
            wide.fill(0)
            for _, at in taps.each():
                wide[at] = g
        else:
            along_axes(taps.spread, g, wide, kind)
        if not direct:
            dx[...] = taps.inside(wide)

    over_blocks(work, [dx], [dy])


# --- adaptive_avg_pool ---------------------------------------------------------------------------------------------


def _shares(parts: list[list[slice]], kind: np.dtype) -> np.ndarray:
    """1 / pixels of each part: (OH, OW); NaN for one without any."""
    lengths = [np.array([p.stop - p.start for p in along], np.int64) for along in parts]
    counts = math.prod(spread_out(c, axis, len(parts)) for axis, c in enumerate(lengths))
    return np.where(counts, 1 / np.maximum(counts, 1), np.nan).astype(kind)


def _adaptive_forward(x: np.ndarray, y: np.ndarray, empty: Any) -> None:
    kind, parts = compute_dtype(x.dtype), parts_of(x.shape[2:], y.shape[2:])
    shares, axes = _shares(parts, kind), tuple(range(2, x.ndim))

    def work(y: np.ndarray, x: np.ndarray) -> None:
        total = x
        if set(y.shape[2:]) == {1}:
            total = x.sum(axes, dtype=kind, keepdims=True)
        else:
            for axis, along in zip(axes, parts):
                wide, total = total, empty_like(x, (*y.shape[2 : axis + 1], *x.shape[axis + 1 :]), kind)
                behind = (slice(None),) * (x.ndim - 1 - axis)
                for i, part in enumerate(along):
                    np.add.reduce(wide[(..., part, *behind)], axis, kind, out=total[(..., i, *behind)])
        np.multiply(total, shares, out=y, casting="same_kind")

    over_blocks(work, [y], [x])


def _adaptive_backward(dy: np.ndarray, dx: np.ndarray) -> None:
    kind, parts = compute_dtype(dx.dtype), parts_of(dx.shape[2:], dy.shape[2:])
    shares = _shares(parts, kind)

    def work(dx: np.ndarray, dy: np.ndarray) -> None:
        g = dy * shares
        if set(dy.shape[2:]) == {1}:
            dx[...] = g
            return
        along_axes(lambda wide, narrow, axis: _spread(wide, narrow, parts[axis - 2], axis), g, dx, kind)

    over_blocks(work, [dx], [dy])


def _spread(wide: np.ndarray, narrow: np.ndarray, parts: list[slice], axis: int) -> None:
    """``wide``: along the axis the sum of ``narrow`` over the parts that each place lies in."""
    wide, narrow = np.moveaxis(wide, axis, 0), np.moveaxis(narrow, axis, 0)
    done = 0
    for i, part in enumerate(parts):
        wide[part.start : done] += narrow[i]
        wide[max(done, part.start) : part.stop] = narrow[i]
        done = max(done, part.stop)
    wide[done:] = 0  # there are no parts


# --- launchers -------------------------------------------------------------------------------------------------------


max_pool_forward, max_pool_backward = map(own_memory, max_pool(_max_forward, _max_backward))
_average = avg_pool(_avg_forward, _avg_backward)
avg_pool_forward, avg_pool_backward = map(own_memory, _average)
adaptive_avg_pool_forward, adaptive_avg_pool_backward = map(
    own_memory, adaptive_avg_pool(_average, _adaptive_forward, _adaptive_backward)
)


def avg_pool_refuses(x: Spec, *, needs: tuple, **options: Any) -> str | None:
    return REFUSALS["float64"] if x.dtype == float64 else None


def fractional_max_pool_refuses(
    x: Spec, seed: Spec | None = None, samples: Spec | None = None, *, needs: tuple, **options: Any
) -> str | None:
    return REFUSALS["float64"] if x.dtype == float64 else None


def max_unpool_refuses(x: Spec, indices: Spec, *, needs: tuple, **options: Any) -> str | None:
    return REFUSALS["float64"] if x.dtype == float64 else None


adaptive_avg_pool_refuses = adaptive_max_pool_refuses = lp_pool_refuses = avg_pool_refuses
