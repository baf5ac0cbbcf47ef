"""Pooling by whole planes, some images at a time: one pass for each tap of the window, or for each row and column.

Which tap won is kept with arithmetic on bytes and bits: NumPy's masked assignments take ten times as long.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import Spec, compute_dtype, float64

from .._layout import own_memory
from .._pooling import Divisor, adaptive_avg_pool2d, avg_pool2d, max_pool2d
from .._window import Window, output_order
from ._images import along_both, empty_like, over_blocks

REFUSALS = {"float64": "float64 is left to the definition"}


class _Taps:
    """Where the taps of a window fall on images that reach as far as the windows do."""

    def __init__(self, of: Window, image: tuple[int, ...], size: tuple[int, ...]):
        self.of, self.image, self.size, self.kernel = of, image, size, of.kernel
        ends = of.reach(size)
        self.full = tuple(max(n + p, e) if p or e > n else n for n, p, e in zip(image, of.padding, ends))
        self.apart = max(of.laps) == 1
        """No pixel lies in two windows."""

    def rows(self, tap: int) -> slice:
        return self._slice(tap, 0)

    def columns(self, tap: int) -> slice:
        return self._slice(tap, 1)

    def _slice(self, tap: int, axis: int) -> slice:
        start, step = tap * self.of.dilation[axis], self.of.stride[axis]
        return slice(start, start + step * (self.size[axis] - 1) + 1, step)

    def each(self) -> list[tuple[int, slice, slice]]:
        """(number, rows, columns) of each tap."""
        kh, kw = self.kernel
        return [(r * kw + q, self.rows(r), self.columns(q)) for r in range(kh) for q in range(kw)]

    def inside(self, full: np.ndarray) -> np.ndarray:
        (top, left), (h, w) = self.of.padding, self.image
        return full[:, :, top : top + h, left : left + w]

    def widen(self, x: np.ndarray, kind: np.dtype, fill: float) -> np.ndarray:
        """x in dtype ``kind`` with ``fill`` around it; x itself where it is so already."""
        if self.full == self.image:
            return x.astype(kind, copy=False)
        wide = empty_like(x, self.full, kind)
        wide.fill(fill)
        self.inside(wide)[...] = x
        return wide

    def first_taps(self) -> np.ndarray:
        """The number of the first tap on the image for each window, −1 for a window with none: (OH, OW)."""
        first = []
        for n, o, k, s, p, d in zip(self.image, self.size, *self.of):
            start = np.arange(o) * s - p
            tap = np.maximum(0, -(start // d))
            first.append(np.where((tap < k) & (start + tap * d < n), tap, -1))
        rows, columns = first[0][:, None], first[1][None, :]
        return np.where((rows < 0) | (columns < 0), -1, rows * self.kernel[1] + columns)

    def places(self, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(a, b): h · W + w of tap t of window (i, j) is a[i, j] + b[t]; b has a last element for the tap −1."""
        top, left = (np.arange(o) * s - p for o, s, p in zip(self.size, self.of.stride, self.of.padding))
        down, right = (np.arange(k) * d for k, d in zip(self.kernel, self.of.dilation))
        windows = np.where(first < 0, -1, top[:, None] * self.image[1] + left)
        return windows, np.append(down[:, None] * self.image[1] + right, 0)


# --- max_pool2d ------------------------------------------------------------------------------------------------------


def _max_forward(x: np.ndarray, y: np.ndarray, tap: Any, indices: Any, window: Window, empty: Any) -> None:
    taps, kind = _Taps(window, x.shape[2:], y.shape[2:]), compute_dtype(x.dtype)
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


def _maxima(x: np.ndarray, y: np.ndarray, taps: _Taps, kind: np.dtype) -> None:
    """y: each row's maxima over the columns of the windows, and of these the maxima over the rows."""
    wide = taps.widen(x, kind, -np.inf)
    across = wide[..., taps.columns(0)].copy("K")
    for q in range(1, taps.kernel[1]):
        np.maximum(across, wide[..., taps.columns(q)], out=across)
    best = across[:, :, taps.rows(0)].copy("K")
    for r in range(1, taps.kernel[0]):
        np.maximum(best, across[:, :, taps.rows(r)], out=best)
    y[...] = best


def _winners(x: np.ndarray, y: np.ndarray, won: np.ndarray, first: np.ndarray, taps: _Taps, kind: np.dtype) -> None:
    """y, and which tap gave it."""
    wide = taps.widen(x, kind, -np.inf)
    best = empty_like(y, taps.size, kind)
    best.fill(-np.inf)
    won[...] = first + 1
    better, number = empty_like(y, taps.size, bool), np.empty_like(won)
    for tap, rows, columns in taps.each():
        under = wide[:, :, rows, columns]
        np.greater(under, best, out=better)
        np.maximum(best, under, out=best)
        np.multiply(better, won.dtype.type(tap + 1), out=number)
        np.maximum(won, number, out=won)  # taps come in rising order
    won -= 1
    if np.isnan(best.sum()):  # some NaN: the last one in its window wins
        for tap, rows, columns in taps.each():
            np.copyto(won, tap, where=np.isnan(wide[:, :, rows, columns]))
    y[...] = best


def _max_backward(dy: np.ndarray, tap: np.ndarray, dx: np.ndarray, window: Window) -> None:
    taps, kind = _Taps(window, dx.shape[2:], dy.shape[2:]), compute_dtype(dx.dtype)
    bits = np.dtype(f"i{kind.itemsize}")

    def work(dx: np.ndarray, won: np.ndarray, dy: np.ndarray) -> None:
        g = empty_like(won, taps.size, kind)
        g[...] = dy
        direct = taps.full == taps.image and dx.dtype == kind
        wide = dx if direct else empty_like(dx, taps.full, kind)
        wide.fill(0)
        share = np.empty_like(g)
        for number, rows, columns in taps.each():
            under = wide[:, :, rows, columns]
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


# --- avg_pool2d ------------------------------------------------------------------------------------------------------


def _weights(taps: _Taps, kind: np.dtype, divisor: Divisor) -> Any:
    """1 / divisor of each window: (OH, OW), or one number where all are equal."""
    if divisor.override is not None:
        return kind.type(1 / divisor.override)
    counts = []
    for n, o, k, s, p in zip(taps.image, taps.size, *taps.of[:3]):
        start = np.arange(o) * s - p
        end = np.minimum(start + k, n + p)
        counts.append(end - start if divisor.include_pad else np.minimum(end, n) - np.maximum(start, 0))
    return (1 / np.outer(*counts)).astype(kind)


def _avg_forward(x: np.ndarray, y: np.ndarray, window: Window, divisor: Divisor) -> None:
    taps, kind = _Taps(window, x.shape[2:], y.shape[2:]), compute_dtype(x.dtype)
    weights = _weights(taps, kind, divisor)

    def work(y: np.ndarray, x: np.ndarray) -> None:
        wide = taps.widen(x, kind, 0)
        across = wide[..., taps.columns(0)].copy("K")
        for q in range(1, taps.kernel[1]):
            across += wide[..., taps.columns(q)]
        total = across[:, :, taps.rows(0)].copy("K")
        for r in range(1, taps.kernel[0]):
            total += across[:, :, taps.rows(r)]
        np.multiply(total, weights, out=y, casting="same_kind")

    over_blocks(work, [y], [x])


def _avg_backward(dy: np.ndarray, dx: np.ndarray, window: Window, divisor: Divisor) -> None:
    taps, kind = _Taps(window, dx.shape[2:], dy.shape[2:]), compute_dtype(dx.dtype)
    weights = _weights(taps, kind, divisor)

    def work(dx: np.ndarray, dy: np.ndarray) -> None:
        g = empty_like(dx, taps.size, kind)
        np.multiply(dy, weights, out=g)
        direct = taps.full == taps.image and dx.dtype == kind
        wide = dx if direct else empty_like(dx, taps.full, kind)
        wide.fill(0)
        if taps.apart:
            for _, rows, columns in taps.each():
                wide[:, :, rows, columns] = g
        else:
            across = empty_like(dx, (taps.full[0], taps.size[1]), kind)
            across.fill(0)
            for r in range(taps.kernel[0]):
                across[:, :, taps.rows(r)] += g
            for q in range(taps.kernel[1]):
                wide[..., taps.columns(q)] += across
        if not direct:
            dx[...] = taps.inside(wide)

    over_blocks(work, [dx], [dy])


# --- adaptive_avg_pool2d ---------------------------------------------------------------------------------------------


def _parts(size: int, count: int) -> list[slice]:
    return [slice(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def _shares(rows: list[slice], columns: list[slice], kind: np.dtype) -> np.ndarray:
    """1 / pixels of each window: (OH, OW); NaN for a window without one."""
    counts = np.outer(*([p.stop - p.start for p in parts] for parts in (rows, columns)))
    return np.where(counts, 1 / np.maximum(counts, 1), np.nan).astype(kind)


def _adaptive_forward(x: np.ndarray, y: np.ndarray, empty: Any) -> None:
    kind, (rows, columns) = compute_dtype(x.dtype), map(_parts, x.shape[2:], y.shape[2:])
    shares = _shares(rows, columns, kind)

    def work(y: np.ndarray, x: np.ndarray) -> None:
        if y.shape[2:] == (1, 1):
            total = x.sum((2, 3), dtype=kind, keepdims=True)
        else:
            across = empty_like(x, (len(rows), x.shape[3]), kind)
            for i, part in enumerate(rows):
                np.add.reduce(x[:, :, part], 2, kind, out=across[:, :, i])
            total = empty_like(x, y.shape[2:], kind)
            for j, part in enumerate(columns):
                np.add.reduce(across[..., part], 3, out=total[..., j])
        np.multiply(total, shares, out=y, casting="same_kind")

    over_blocks(work, [y], [x])


def _adaptive_backward(dy: np.ndarray, dx: np.ndarray) -> None:
    kind, (rows, columns) = compute_dtype(dx.dtype), map(_parts, dx.shape[2:], dy.shape[2:])
    shares = _shares(rows, columns, kind)

    def work(dx: np.ndarray, dy: np.ndarray) -> None:
        g = dy * shares
        if dy.shape[2:] == (1, 1):
            dx[...] = g
            return
        along_both(lambda wide, narrow, axis: _spread(wide, narrow, (rows, columns)[axis - 2], axis), g, dx, kind)

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


max_pool2d_forward, max_pool2d_backward = map(own_memory, max_pool2d(_max_forward, _max_backward))
_average = avg_pool2d(_avg_forward, _avg_backward)
avg_pool2d_forward, avg_pool2d_backward = map(own_memory, _average)
adaptive_avg_pool2d_forward, adaptive_avg_pool2d_backward = map(
    own_memory, adaptive_avg_pool2d(_average, _adaptive_forward, _adaptive_backward)
)


def avg_pool2d_refuses(x: Spec, *, needs: tuple, **options: Any) -> str | None:
    return REFUSALS["float64"] if x.dtype == float64 else None


adaptive_avg_pool2d_refuses = avg_pool2d_refuses
