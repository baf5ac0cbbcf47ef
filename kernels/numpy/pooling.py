"""Pooling by whole planes, some images at a time: one pass for each tap of the window, or for each row and column.

Which tap won is kept with arithmetic on bytes and bits: NumPy's masked assignments take ten times as long.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import Spec, compute_dtype, empty_numpy, float64, int64, spec

from ._images import empty_like, output_order, over_blocks

REFUSALS = {"float64": "float64 is left to the definition"}


def _out_size(x: Any, kernel: tuple, stride: tuple, padding: tuple, dilation: tuple, ceil: bool) -> tuple[int, int]:
    sizes = []
    for n, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation):
        out = (n + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil else 0)) // s + 1
        sizes.append(out - 1 if ceil and (out - 1) * s >= n + p else out)
    return tuple(sizes)  # type: ignore[return-value]


class _Window:
    """Where the taps of a window fall on images that reach as far as the windows do."""

    def __init__(self, x: Any, size: tuple, kernel: tuple, stride: tuple, padding: tuple, dilation: tuple = (1, 1)):
        self.kernel, self.stride, self.padding, self.dilation, self.size = kernel, stride, padding, dilation, size
        self.image = x.shape[2:]
        reach = [s * (o - 1) + d * (k - 1) + 1 for s, o, d, k in zip(stride, size, dilation, kernel)]
        self.full = tuple(max(n + p, e) if p or e > n else n for n, p, e in zip(self.image, padding, reach))
        self.apart = all(s >= d * (k - 1) + 1 for s, k, d in zip(stride, kernel, dilation))
        """No pixel lies in two windows."""

    def rows(self, tap: int) -> slice:
        return self._slice(tap, 0)

    def columns(self, tap: int) -> slice:
        return self._slice(tap, 1)

    def _slice(self, tap: int, axis: int) -> slice:
        start, step = tap * self.dilation[axis], self.stride[axis]
        return slice(start, start + step * (self.size[axis] - 1) + 1, step)

    def taps(self) -> list[tuple[int, slice, slice]]:
        """(number, rows, columns) of each tap."""
        kh, kw = self.kernel
        return [(r * kw + q, self.rows(r), self.columns(q)) for r in range(kh) for q in range(kw)]

    def inside(self, full: np.ndarray) -> np.ndarray:
        (top, left), (h, w) = self.padding, self.image
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
        for n, o, k, s, p, d in zip(self.image, self.size, self.kernel, self.stride, self.padding, self.dilation):
            start = np.arange(o) * s - p
            tap = np.maximum(0, -(start // d))
            first.append(np.where((tap < k) & (start + tap * d < n), tap, -1))
        rows, columns = first[0][:, None], first[1][None, :]
        return np.where((rows < 0) | (columns < 0), -1, rows * self.kernel[1] + columns)

    def places(self, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(a, b): h · W + w of tap t of window (i, j) is a[i, j] + b[t]; b has a last element for the tap −1."""
        top, left = (np.arange(o) * s - p for o, s, p in zip(self.size, self.stride, self.padding))
        down, right = (np.arange(k) * d for k, d in zip(self.kernel, self.dilation))
        windows = np.where(first < 0, -1, top[:, None] * self.image[1] + left)
        return windows, np.append(down[:, None] * self.image[1] + right, 0)


# --- max_pool2d ------------------------------------------------------------------------------------------------------


def max_pool2d_forward(
    x: np.ndarray,
    *,
    needs: tuple = (),
    kernel_size: tuple,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    ceil_mode: bool,
    return_indices: bool,
) -> tuple[tuple, dict]:
    size = _out_size(x, kernel_size, stride, padding, dilation, ceil_mode)
    window = _Window(x, size, kernel_size, stride, padding, dilation)
    order, kind = output_order(spec(x)), compute_dtype(x.dtype)  # type: ignore[arg-type]
    y = empty_numpy(Spec((*x.shape[:2], *size), x.dtype, order))
    if not needs and not return_indices:
        over_blocks(lambda y, x: _maxima(x, y, window, kind), [y], [x])
        return (y,), {}
    taps = kernel_size[0] * kernel_size[1]
    won = empty_numpy(
        Spec(y.shape, np.dtype(np.int8 if taps <= 127 else np.int16 if taps <= 32767 else np.int32), order)
    )
    first = window.first_taps().astype(won.dtype)
    saved = {"tap": won} if needs else {}
    if not return_indices:
        over_blocks(lambda y, won, x: _winners(x, y, won, first, window, kind), [y, won], [x])
        return (y,), saved
    indices = empty_numpy(Spec(y.shape, int64, order))
    windows, taps_at = window.places(first)

    def work(y: np.ndarray, won: np.ndarray, indices: np.ndarray, x: np.ndarray) -> None:
        _winners(x, y, won, first, window, kind)
        np.add(windows, taps_at[won], out=indices)

    over_blocks(work, [y, won, indices], [x])
    return (y, indices), saved


def _maxima(x: np.ndarray, y: np.ndarray, window: _Window, kind: np.dtype) -> None:
    """y: each row's maxima over the columns of the windows, and of these the maxima over the rows."""
    wide = window.widen(x, kind, -np.inf)
    across = wide[..., window.columns(0)].copy("K")
    for q in range(1, window.kernel[1]):
        np.maximum(across, wide[..., window.columns(q)], out=across)
    best = across[:, :, window.rows(0)].copy("K")
    for r in range(1, window.kernel[0]):
        np.maximum(best, across[:, :, window.rows(r)], out=best)
    y[...] = best


def _winners(x: np.ndarray, y: np.ndarray, won: np.ndarray, first: np.ndarray, window: _Window, kind: np.dtype) -> None:
    """y, and which tap gave it."""
    wide = window.widen(x, kind, -np.inf)
    best = empty_like(y, window.size, kind)
    best.fill(-np.inf)
    won[...] = first + 1
    better, number = empty_like(y, window.size, bool), np.empty_like(won)
    for tap, rows, columns in window.taps():
        under = wide[:, :, rows, columns]
        np.greater(under, best, out=better)
        np.maximum(best, under, out=best)
        np.multiply(better, won.dtype.type(tap + 1), out=number)
        np.maximum(won, number, out=won)  # taps come in rising order
    won -= 1
    if np.isnan(best.sum()):  # some NaN: the last one in its window wins
        for tap, rows, columns in window.taps():
            np.copyto(won, tap, where=np.isnan(wide[:, :, rows, columns]))
    y[...] = best


def max_pool2d_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    kernel_size: tuple,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    ceil_mode: bool,
    return_indices: bool,
) -> tuple:
    dy, (x,), won = dys[0], inputs, saved["tap"]
    window, kind = _Window(x, dy.shape[2:], kernel_size, stride, padding, dilation), compute_dtype(x.dtype)
    dx = empty_numpy(x.like())
    bits = np.dtype(f"i{kind.itemsize}")

    def work(dx: np.ndarray, won: np.ndarray, dy: np.ndarray) -> None:
        g = empty_like(won, window.size, kind)
        g[...] = dy
        direct = window.full == window.image and dx.dtype == kind
        wide = dx if direct else empty_like(dx, window.full, kind)
        wide.fill(0)
        share = np.empty_like(g)
        for tap, rows, columns in window.taps():
            under = wide[:, :, rows, columns]
            # Of its bits all or none: 0 · ∞ would be NaN.
            chosen = won == tap
            if window.apart:
                np.multiply(g.view(bits), chosen, out=under.view(bits))
            else:
                np.multiply(g.view(bits), chosen, out=share.view(bits))
                under += share
        if not direct:
            dx[...] = window.inside(wide)

    over_blocks(work, [dx], [won, dy])
    return (dx,)


# --- avg_pool2d ------------------------------------------------------------------------------------------------------


def _weights(window: _Window, kind: np.dtype, include_pad: bool, override: int | None) -> Any:
    """1 / divisor of each window: (OH, OW), or one number where all are equal."""
    if override is not None:
        return kind.type(1 / override)
    counts = []
    for n, o, k, s, p in zip(window.image, window.size, window.kernel, window.stride, window.padding):
        start = np.arange(o) * s - p
        end = np.minimum(start + k, n + p)
        counts.append(end - start if include_pad else np.minimum(end, n) - np.maximum(start, 0))
    return (1 / np.outer(*counts)).astype(kind)


def avg_pool2d_forward(
    x: np.ndarray,
    *,
    needs: tuple = (),
    kernel_size: tuple,
    stride: tuple,
    padding: tuple,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> tuple[tuple, dict]:
    size = _out_size(x, kernel_size, stride, padding, (1, 1), ceil_mode)
    window, kind = _Window(x, size, kernel_size, stride, padding), compute_dtype(x.dtype)
    weights = _weights(window, kind, count_include_pad, divisor_override)
    y = empty_numpy(Spec((*x.shape[:2], *size), x.dtype, output_order(spec(x))))  # type: ignore[arg-type]

    def work(y: np.ndarray, x: np.ndarray) -> None:
        wide = window.widen(x, kind, 0)
        across = wide[..., window.columns(0)].copy("K")
        for q in range(1, kernel_size[1]):
            across += wide[..., window.columns(q)]
        total = across[:, :, window.rows(0)].copy("K")
        for r in range(1, kernel_size[0]):
            total += across[:, :, window.rows(r)]
        np.multiply(total, weights, out=y, casting="same_kind")

    over_blocks(work, [y], [x])
    return (y,), {}


def avg_pool2d_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    kernel_size: tuple,
    stride: tuple,
    padding: tuple,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> tuple:
    (dy,), (x,) = dys, inputs
    window, kind = _Window(x, dy.shape[2:], kernel_size, stride, padding), compute_dtype(x.dtype)
    weights = _weights(window, kind, count_include_pad, divisor_override)
    dx = empty_numpy(x.like())

    def work(dx: np.ndarray, dy: np.ndarray) -> None:
        g = empty_like(dx, window.size, kind)
        np.multiply(dy, weights, out=g)
        direct = window.full == window.image and dx.dtype == kind
        wide = dx if direct else empty_like(dx, window.full, kind)
        wide.fill(0)
        if window.apart:
            for _, rows, columns in window.taps():
                wide[:, :, rows, columns] = g
        else:
            across = empty_like(dx, (window.full[0], window.size[1]), kind)
            across.fill(0)
            for r in range(kernel_size[0]):
                across[:, :, window.rows(r)] += g
            for q in range(kernel_size[1]):
                wide[..., window.columns(q)] += across
        if not direct:
            dx[...] = window.inside(wide)

    over_blocks(work, [dx], [dy])
    return (dx,)


def avg_pool2d_refuses(x: Spec, *, needs: tuple, **options: Any) -> str | None:
    return REFUSALS["float64"] if x.dtype == float64 else None


# --- adaptive_avg_pool2d ---------------------------------------------------------------------------------------------


def _divided(x: Any, output_size: tuple) -> dict | None:
    """The options of the ``avg_pool2d`` that does the same, where several parts divide the image."""
    if output_size == (1, 1) or 0 in output_size or any(n % o for n, o in zip(x.shape[2:], output_size)):
        return None
    window = tuple(n // o for n, o in zip(x.shape[2:], output_size))
    plain = {"padding": (0, 0), "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
    return {"kernel_size": window, "stride": window, **plain}


def _parts(size: int, count: int) -> list[slice]:
    return [slice(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def _shares(rows: list[slice], columns: list[slice], kind: np.dtype) -> np.ndarray:
    """1 / pixels of each window: (OH, OW); NaN for a window without one."""
    counts = np.outer(*([p.stop - p.start for p in parts] for parts in (rows, columns)))
    return np.where(counts, 1 / np.maximum(counts, 1), np.nan).astype(kind)


def adaptive_avg_pool2d_forward(x: np.ndarray, *, needs: tuple = (), output_size: tuple) -> tuple[tuple, dict]:
    if divided := _divided(x, output_size):
        return avg_pool2d_forward(x, needs=needs, **divided)
    kind, (rows, columns) = compute_dtype(x.dtype), map(_parts, x.shape[2:], output_size)
    shares = _shares(rows, columns, kind)
    y = empty_numpy(Spec((*x.shape[:2], *output_size), x.dtype, output_order(spec(x))))  # type: ignore[arg-type]

    def work(y: np.ndarray, x: np.ndarray) -> None:
        if output_size == (1, 1):
            total = x.sum((2, 3), dtype=kind, keepdims=True)
        else:
            across = empty_like(x, (len(rows), x.shape[3]), kind)
            for i, part in enumerate(rows):
                np.add.reduce(x[:, :, part], 2, kind, out=across[:, :, i])
            total = empty_like(x, output_size, kind)
            for j, part in enumerate(columns):
                np.add.reduce(across[..., part], 3, out=total[..., j])
        np.multiply(total, shares, out=y, casting="same_kind")

    over_blocks(work, [y], [x])
    return (y,), {}


def adaptive_avg_pool2d_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, output_size: tuple) -> tuple:
    (dy,), (x,) = dys, inputs
    if divided := _divided(x, output_size):
        return avg_pool2d_backward(dys, saved, inputs=inputs, needs=needs, **divided)
    kind, (rows, columns) = compute_dtype(x.dtype), map(_parts, x.shape[2:], output_size)
    shares = _shares(rows, columns, kind)
    dx = empty_numpy(x.like())

    def work(dx: np.ndarray, dy: np.ndarray) -> None:
        g = dy * shares
        if output_size == (1, 1):
            dx[...] = g
            return
        across = empty_like(dx, (dx.shape[2], output_size[1]), kind)
        _spread(across, g, rows, 2)
        wide = dx if dx.dtype == kind else empty_like(dx, dx.shape[2:], kind)
        _spread(wide, across, columns, 3)
        if wide is not dx:
            dx[...] = wide

    over_blocks(work, [dx], [dy])
    return (dx,)


def _spread(wide: np.ndarray, narrow: np.ndarray, parts: list[slice], axis: int) -> None:
    """``wide``: along the axis the sum of ``narrow`` over the parts that each place lies in."""
    wide, narrow = np.moveaxis(wide, axis, 0), np.moveaxis(narrow, axis, 0)
    done = 0
    for i, part in enumerate(parts):
        wide[part.start : done] += narrow[i]
        wide[max(done, part.start) : part.stop] = narrow[i]
        done = max(done, part.stop)
    wide[done:] = 0  # there are no parts


def adaptive_avg_pool2d_refuses(x: Spec, *, needs: tuple, **options: Any) -> str | None:
    return REFUSALS["float64"] if x.dtype == float64 else None
