"""Pooling of images: the maximum or the mean under a window, the mean over so many parts of the image."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import Spec, arranged, int64, namespace, up
from gpulayers.definition import KindError, Rule, ShapeError
from gpulayers.ops._op import Op, require_float
from gpulayers.ops._window import Pair, ordered_as, output_order, pair, require_image, window


def _output_size(size: Any, kernel: int, stride: int, padding: int, dilation: int, ceil: bool, axis: str) -> Any:
    """OH or OW; with ``ceil`` a last window that starts inside the image or its left padding counts too."""
    if size is None:
        return None
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (room + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (out - 1) * stride >= size + padding:
        out -= 1
    if out < 1:
        brackets = "⌈⌉" if ceil else "⌊⌋"
        formula = f"({axis} + 2 · {padding} − {dilation} · ({kernel} − 1) − 1) / {stride}"
        raise ShapeError("x", f"O{axis} = {brackets[0]}{formula}{brackets[1]} + 1 ≥ 1", f"{axis} = {size}")
    return out


def _windows(x: Spec, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> tuple:
    """(normal kernel_size, stride, padding, dilation, output size), checked."""
    require_float("x", x)
    require_image(x)
    if 0 in x.shape[1:]:
        raise ShapeError("x", "C, H, W ≥ 1 (N may be 0)", list(x.shape))
    kernel = pair("kernel_size", kernel_size, 1)
    stride = kernel if stride is None else pair("stride", stride, 1)
    padding, dilation = pair("padding", padding, 0), pair("dilation", dilation, 1)
    for p, k in zip(padding, kernel):
        if 2 * p > k:
            raise ShapeError("padding", "padding ≤ kernel_size / 2", f"padding {padding}, kernel_size {kernel}")
    ceil = (ceil_mode, ceil_mode)
    return (
        kernel,
        stride,
        padding,
        dilation,
        tuple(map(_output_size, x.shape[2:], kernel, stride, padding, dilation, ceil, "HW")),
    )


def _full(x: Any, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, size: Pair, fill: float) -> Any:
    """``x`` with as much of ``fill`` around it as the windows reach."""
    ends = [s * (o - 1) + d * (k - 1) + 1 for s, o, d, k in zip(stride, size, dilation, kernel)]
    after = [max(0, e - n - p) for e, n, p in zip(ends, x.shape[2:], padding)]
    sides = [(0, 0), (0, 0), *zip(padding, after)]
    return namespace(x).pad(x, sides, constant_values=fill)


# --- max_pool2d ------------------------------------------------------------------------------------------------------


def max_pool2d_rule(
    x: Spec,
    *,
    needs: tuple = (),
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Rule:
    kernel, stride, padding, dilation, size = _windows(x, kernel_size, stride, padding, dilation, ceil_mode)
    y = Spec((*x.shape[:2], *size), x.dtype, output_order(x))
    options = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "ceil_mode": ceil_mode,
        "return_indices": bool(return_indices),
    }
    outputs = {"y": y} | ({"indices": y._replace(dtype=int64)} if return_indices else {})
    return Rule(outputs, {"tap": y._replace(dtype=tap_dtype(kernel))} if needs else {}, options)


def tap_dtype(kernel: Pair) -> np.dtype:
    """The smallest integer that numbers the taps of a window; −1 says that none of them lay on the image."""
    taps = kernel[0] * kernel[1]
    return np.dtype(np.int8 if taps <= 127 else np.int16 if taps <= 32767 else np.int32)


def max_pool2d_forward(
    x: Any,
    *,
    needs: tuple = (),
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[tuple, dict]:
    """y[n, c, i, j] = max_{r, q} x[n, c, i·stride + r·dilation − padding, j·stride + q·dilation − padding].

    x: (N, C, H, W), float; what lies outside of it never wins. Options: integers or pairs (height, width); stride is
    kernel_size by default; padding ≤ kernel_size / 2; ceil_mode keeps a last window that reaches past the end.

    Returns y: (N, C, OH, OW), OH = ⌊(H + 2 · padding − dilation · (kh − 1) − 1) / stride⌋ + 1 (⌈⌉ with ceil_mode) and
    OW likewise, channels-last in memory where x is. A NaN in a window gives NaN. The gradient goes to the first of
    equal maxima, to the last NaN, as in torch. Saves which tap won, r · kw + q: one byte for each y.
    return_indices: also returns where each maximum lies in its channel, h · W + w, int64 (−1 for a window without a
    pixel); it has no gradient.
    """
    xp = namespace(x)
    kernel, tap_type = kernel_size, tap_dtype(kernel_size)
    size = tuple(map(_output_size, x.shape[2:], kernel, stride, padding, dilation, (ceil_mode, ceil_mode), "HW"))
    v = _full(up(x), kernel, stride, padding, dilation, size, float("-inf"))
    there = _full(xp.ones((1, 1, *x.shape[2:]), bool), kernel, stride, padding, dilation, size, False)
    y = xp.full((*x.shape[:2], *size), float("-inf"), v.dtype)
    won = xp.full(y.shape, -1, tap_type)
    for r in range(kernel[0]):
        for q in range(kernel[1]):
            under, real = (window(a, (r, q), dilation, stride, size) for a in (v, there))
            better = real & ((under > y) | (under != under) | (won < 0))
            y = xp.where(better, under, y)
            won = xp.where(better, xp.asarray(r * kernel[1] + q, tap_type), won)
    outputs = [ordered_as(y.astype(x.dtype, copy=False), x)]
    if return_indices:
        outputs.append(ordered_as(_indices(won, x.shape[3], kernel, stride, padding, dilation), x))
    return tuple(outputs), {"tap": ordered_as(won, x)} if needs else {}


def _indices(won: Any, width: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Any:
    """h · W + w of the taps that won; −1 where none did."""
    xp, tap = namespace(won), won.astype(int64)
    tops, lefts = (xp.arange(o) * s - p for o, s, p in zip(won.shape[2:], stride, padding))
    rows = tops[:, None] + tap // kernel[1] * dilation[0]
    columns = lefts + tap % kernel[1] * dilation[1]
    return xp.where(tap < 0, xp.asarray(-1, int64), rows * width + columns)


def max_pool2d_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    return_indices: bool,
) -> tuple:
    """dx[n, c, h, w] = the sum of dy over the windows in which (h, w) won."""
    dy, (x,), won = dys[0], inputs, saved["tap"]
    xp, size = namespace(dy), dy.shape[2:]
    g = up(dy)
    dx = _full(xp.zeros(x.shape, g.dtype), kernel_size, stride, padding, dilation, size, 0.0)
    for r in range(kernel_size[0]):
        for q in range(kernel_size[1]):
            window(dx, (r, q), dilation, stride, size)[...] += xp.where(won == r * kernel_size[1] + q, g, 0)
    return (_inside(dx, x, padding),)


def _inside(dx: Any, x: Spec, padding: Pair) -> Any:
    """The gradient without its padding, as x lies in memory."""
    (top, left), (h, w) = padding, x.shape[2:]
    return arranged(dx[:, :, top : top + h, left : left + w].astype(x.dtype), x.like().order)


max_pool2d = Op(max_pool2d_rule, max_pool2d_forward, max_pool2d_backward)


# --- avg_pool2d ------------------------------------------------------------------------------------------------------


def avg_pool2d_rule(
    x: Spec,
    *,
    needs: tuple = (),
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Rule:
    kernel, stride, padding, _, size = _windows(x, kernel_size, stride, padding, 1, ceil_mode)
    if divisor_override is not None and not isinstance(divisor_override, int):
        raise KindError("divisor_override", "an integer or None", repr(divisor_override))
    if divisor_override == 0:
        raise ShapeError("divisor_override", "divisor_override ≠ 0", 0)
    options = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "ceil_mode": ceil_mode,
        "count_include_pad": count_include_pad,
        "divisor_override": divisor_override,
    }
    return Rule({"y": Spec((*x.shape[:2], *size), x.dtype, output_order(x))}, {}, options)


def _counts(xp: Any, size: int, out: int, kernel: int, stride: int, padding: int, include_pad: bool) -> Any:
    """How many rows (or columns) of each window count: those on the image, or on the image and its padding."""
    start = xp.arange(out) * stride - padding
    end = xp.minimum(start + kernel, size + padding)
    return end - start if include_pad else xp.minimum(end, size) - xp.maximum(start, 0)


def _weights(xp: Any, shape: tuple, size: tuple, dtype: Any, options: tuple) -> Any:
    """1 / divisor of each window: (OH, OW)."""
    kernel, stride, padding, include_pad, override = options
    if override is not None:
        return xp.full(size, 1 / override, dtype)
    axes = zip(shape[2:], size, kernel, stride, padding)
    rows, columns = (_counts(xp, *axis, include_pad) for axis in axes)
    return (1 / xp.outer(rows, columns)).astype(dtype)


def avg_pool2d_forward(
    x: Any,
    *,
    needs: tuple = (),
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> tuple[tuple, dict]:
    """y[n, c, i, j] = Σ_{r, q} x[n, c, i·stride + r − padding, j·stride + q − padding] / divisor.

    x: (N, C, H, W), float; zeros lie around it. Options as max_pool2d's. The divisor is divisor_override where given,
    else the number of taps on the image and (count_include_pad) its padding. Returns y: (N, C, OH, OW), sizes and
    memory order as max_pool2d's. Saves nothing.
    """
    xp, kernel = namespace(x), kernel_size
    size = tuple(map(_output_size, x.shape[2:], kernel, stride, padding, (1, 1), (ceil_mode, ceil_mode), "HW"))
    v = _full(up(x), kernel, stride, padding, (1, 1), size, 0.0)
    y = xp.zeros((*x.shape[:2], *size), v.dtype)
    for r in range(kernel[0]):
        for q in range(kernel[1]):
            y += window(v, (r, q), (1, 1), stride, size)
    y *= _weights(xp, x.shape, size, y.dtype, (kernel, stride, padding, count_include_pad, divisor_override))
    return (ordered_as(y.astype(x.dtype, copy=False), x),), {}


def avg_pool2d_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> tuple:
    """dx[n, c, h, w] = the sum of dy / divisor over the windows that (h, w) lies under."""
    (dy,), (x,) = dys, inputs
    xp, size = namespace(dy), dy.shape[2:]
    g = up(dy)
    g = g * _weights(xp, x.shape, size, g.dtype, (kernel_size, stride, padding, count_include_pad, divisor_override))
    dx = _full(xp.zeros(x.shape, g.dtype), kernel_size, stride, padding, (1, 1), size, 0.0)
    for r in range(kernel_size[0]):
        for q in range(kernel_size[1]):
            window(dx, (r, q), (1, 1), stride, size)[...] += g
    return (_inside(dx, x, padding),)


avg_pool2d = Op(avg_pool2d_rule, avg_pool2d_forward, avg_pool2d_backward)


# --- adaptive_avg_pool2d ---------------------------------------------------------------------------------------------


def _adaptive_size(x: Spec, output_size: Any) -> tuple:
    """(OH, OW); None keeps the input's size."""
    both = list(output_size) if isinstance(output_size, list | tuple) else [output_size]
    pair("output_size", [0 if s is None else s for s in both] if len(both) > 1 else both[0], 0)
    return tuple(n if s is None else s for n, s in zip(x.shape[2:], both if len(both) > 1 else both * 2))


def adaptive_avg_pool2d_rule(x: Spec, *, needs: tuple = (), output_size: Any) -> Rule:
    require_float("x", x)
    require_image(x)
    size = _adaptive_size(x, output_size)
    if 0 in x.shape[2:] and size != (1, 1):
        raise ShapeError("x", "H, W ≥ 1 where output_size is not 1", list(x.shape))
    return Rule({"y": Spec((*x.shape[:2], *size), x.dtype, output_order(x))}, {}, {"output_size": size})


def _parts(x: Any, output_size: Pair) -> Any:
    """(i, j, index of x's pixels, how many they are) of each window (i, j)."""
    h, w = x.shape[2:]
    rows, columns = ([(i * n // o, -(-(i + 1) * n // o)) for i in range(o)] for n, o in zip((h, w), output_size))
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            yield i, j, (..., slice(top, bottom), slice(left, right)), (bottom - top) * (right - left)


def adaptive_avg_pool2d_forward(x: Any, *, needs: tuple = (), output_size: Any) -> tuple[tuple, dict]:
    """y[n, c, i, j] = the mean of x[n, c, h, w] over ⌊i · H / OH⌋ ≤ h < ⌈(i + 1) · H / OH⌉, and w likewise.

    x: (N, C, H, W), float. output_size: (OH, OW), or an integer for both; None keeps the input's size. Windows overlap
    where OH does not divide H. Returns y: (N, C, OH, OW), x's dtype, channels-last in memory where x is; the mean of no
    pixels is NaN. Saves nothing.
    """
    xp, v = namespace(x), up(x)
    y = xp.zeros((*x.shape[:2], *output_size), v.dtype)
    for i, j, part, count in _parts(x, output_size):
        y[..., i, j] = v[part].sum((2, 3)) / count if count else xp.nan
    return (ordered_as(y.astype(x.dtype, copy=False), x),), {}


def adaptive_avg_pool2d_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, output_size: Pair) -> tuple:
    """dx[n, c, h, w] = the sum of dy / (pixels of its window) over the windows that (h, w) lies in."""
    (dy,), (x,) = dys, inputs
    g = up(dy)
    dx = namespace(dy).zeros(x.shape, g.dtype)
    for i, j, part, count in _parts(x, output_size):
        dx[part] += g[..., i : i + 1, j : j + 1] / max(count, 1)
    return (arranged(dx.astype(x.dtype, copy=False), x.like().order),)


adaptive_avg_pool2d = Op(adaptive_avg_pool2d_rule, adaptive_avg_pool2d_forward, adaptive_avg_pool2d_backward)
