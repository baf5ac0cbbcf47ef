"""Pooling over one to three spatial axes: the maximum, the mean or a norm under a window; the maximum or the mean of so many
parts (``_adaptive_pooling.py``).

x's rank says how many axes there are: (N, C, L), (N, C, H, W) or (N, C, D, H, W).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpulayers.arrays import Spec, int64, namespace, up
from gpulayers.definition import KindError, Rule, ShapeError
from gpulayers.ops._adaptive_pooling import adaptive_avg_pool as adaptive_avg_pool
from gpulayers.ops._adaptive_pooling import adaptive_max_pool as adaptive_max_pool
from gpulayers.ops._fractional_pooling import fractional_max_pool as fractional_max_pool
from gpulayers.ops._op import Op
from gpulayers.ops._pooling import along, full, inside, output_size, positions, taps, windows
from gpulayers.ops._unpooling import max_unpool as max_unpool
from gpulayers.ops._window import ordered_as, output_order, window

# --- max_pool --------------------------------------------------------------------------------------------------------


def max_pool_rule(
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
    kernel, stride, padding, dilation, size = windows(x, kernel_size, stride, padding, dilation, ceil_mode)
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


def tap_dtype(kernel: tuple) -> np.dtype:
    """The smallest integer that numbers the taps of a window; −1 says that none of them lay on the image."""
    count = np.prod(kernel)
    return np.dtype(np.int8 if count <= 127 else np.int16 if count <= 32767 else np.int32)


def max_pool_forward(
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

    x: (N, C, L), (N, C, H, W) or (N, C, D, H, W), float; what lies outside of it never wins. Options: an integer, or one
    for each axis; stride is kernel_size by default; padding ≤ kernel_size / 2; ceil_mode keeps a last window that reaches
    past the end.

    Returns y: (N, C, OH, OW), OH = ⌊(H + 2 · padding − dilation · (kh − 1) − 1) / stride⌋ + 1 (⌈⌉ with ceil_mode) and
    the other sizes likewise, channels-last in memory where x is. A NaN in a window gives NaN. The gradient goes to the
    first of equal maxima, to the last NaN, as in torch. Saves which tap won, counted row-major: one byte for each y.
    return_indices: also returns where each maximum lies in its channel, counted row-major (h · W + w), int64 (−1 for a
    window without a pixel); it has no gradient.
    """
    xp, how = namespace(x), (kernel_size, stride, padding, dilation)
    size, tap_type = output_size(x.shape[2:], *how, ceil_mode), tap_dtype(kernel_size)
    v = full(up(x), *how, size, float("-inf"))
    there = full(xp.ones((1, 1, *x.shape[2:]), bool), *how, size, False)
    y = xp.full((*x.shape[:2], *size), float("-inf"), v.dtype)
    won = xp.full(y.shape, -1, tap_type)
    for number, tap in taps(kernel_size):
        under, real = (window(a, tap, dilation, stride, size) for a in (v, there))
        better = real & ((under > y) | (under != under) | (won < 0))
        y = xp.where(better, under, y)
        won = xp.where(better, xp.asarray(number, tap_type), won)
    outputs = [ordered_as(y.astype(x.dtype, copy=False), x)]
    if return_indices:
        outputs.append(ordered_as(positions(won, x.shape[2:], *how), x))
    return tuple(outputs), {"tap": ordered_as(won, x)} if needs else {}


def max_pool_backward(
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
    """dx[n, c, h, w] = the sum of dy over the windows in which (h, w) won."""
    dy, (x,), won = dys[0], inputs, saved["tap"]
    xp, size = namespace(dy), dy.shape[2:]
    g = up(dy)
    dx = full(xp.zeros(x.shape, g.dtype), kernel_size, stride, padding, dilation, size, 0.0)
    for number, tap in taps(kernel_size):
        window(dx, tap, dilation, stride, size)[...] += xp.where(won == number, g, 0)
    return (inside(dx, x, padding),)


max_pool = Op(max_pool_rule, max_pool_forward, max_pool_backward)


# --- avg_pool --------------------------------------------------------------------------------------------------------


def avg_pool_rule(
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
    kernel, stride, padding, _, size = windows(x, kernel_size, stride, padding, 1, ceil_mode)
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
    counts = xp.ones((), int64)
    for axis, each in enumerate(zip(shape[2:], size, kernel, stride, padding)):
        counts = counts * along(_counts(xp, *each, include_pad), axis, len(size))
    return (1 / counts).astype(dtype)


def avg_pool_forward(
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

    x: (N, C, L), (N, C, H, W) or (N, C, D, H, W), float; zeros lie around it. Options as max_pool's. The divisor is
    divisor_override where given, else the number of taps on the image and (count_include_pad) its padding. Returns y:
    (N, C, OH, OW), sizes and memory order as max_pool's. Saves nothing.
    """
    xp, ones = namespace(x), (1,) * len(kernel_size)
    size = output_size(x.shape[2:], kernel_size, stride, padding, ones, ceil_mode)
    v = full(up(x), kernel_size, stride, padding, ones, size, 0.0)
    y = xp.zeros((*x.shape[:2], *size), v.dtype)
    for _, tap in taps(kernel_size):
        y += window(v, tap, ones, stride, size)
    y *= _weights(xp, x.shape, size, y.dtype, (kernel_size, stride, padding, count_include_pad, divisor_override))
    return (ordered_as(y.astype(x.dtype, copy=False), x),), {}


def avg_pool_backward(
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
    """dx[n, c, h, w] = the sum of dy / divisor over the windows that (h, w) lies under."""
    (dy,), (x,), ones = dys, inputs, (1,) * len(kernel_size)
    xp, size = namespace(dy), dy.shape[2:]
    g = up(dy)
    g = g * _weights(xp, x.shape, size, g.dtype, (kernel_size, stride, padding, count_include_pad, divisor_override))
    dx = full(xp.zeros(x.shape, g.dtype), kernel_size, stride, padding, ones, size, 0.0)
    for _, tap in taps(kernel_size):
        window(dx, tap, ones, stride, size)[...] += g
    return (inside(dx, x, padding),)


avg_pool = Op(avg_pool_rule, avg_pool_forward, avg_pool_backward)

# --- lp_pool ---------------------------------------------------------------------------------------------------------


def lp_pool_rule(
    x: Spec, *, needs: tuple = (), norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
) -> Rule:
    kernel, stride, _, _, size = windows(x, kernel_size, stride, 0, 1, ceil_mode)
    if isinstance(norm_type, bool) or not isinstance(norm_type, int | float):
        raise KindError("norm_type", "a number", repr(norm_type))
    if norm_type == 0:
        raise ShapeError("norm_type", "norm_type ≠ 0", 0)
    y = Spec((*x.shape[:2], *size), x.dtype, output_order(x))
    options = {"norm_type": float(norm_type), "kernel_size": kernel, "stride": stride, "ceil_mode": ceil_mode}
    return Rule({"y": y}, {"x": x, "y": y} if needs else {}, options)


def _overhang(xp: Any, shape: tuple, size: tuple, dtype: Any, kernel: tuple, stride: tuple) -> Any:
    """Taps of each window by those of them on the image."""
    zeros = (0,) * len(kernel)
    return _weights(xp, shape, size, dtype, (kernel, stride, zeros, True, None)) * math.prod(kernel)


def lp_pool_forward(
    x: Any, *, needs: tuple = (), norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
) -> tuple[tuple, dict]:
    """y[n, c, i, j] = (Σ_{r, q} x[n, c, i·stride + r, j·stride + q]^p)^(1/p), p = norm_type: powers of x, not of |x|, as torch.

    x: (N, C, L), (N, C, H, W) or (N, C, D, H, W), float. kernel_size, stride, ceil_mode: as max_pool's; the sum of a window
    that hangs over the image's end is scaled up to all its taps. Returns y: (N, C, OH, OW), sizes and memory order as
    max_pool's without padding. Saves x and y.
    """
    xp, count = namespace(x), len(kernel_size)
    ones, zeros = (1,) * count, (0,) * count
    size = output_size(x.shape[2:], kernel_size, stride, zeros, ones, ceil_mode)
    powers = up(x)
    powers = powers * powers if norm_type == 2 else powers**norm_type
    v = full(powers, kernel_size, stride, zeros, ones, size, 0.0)
    total = xp.zeros((*x.shape[:2], *size), v.dtype)
    for _, tap in taps(kernel_size):
        total += window(v, tap, ones, stride, size)
    total *= _overhang(xp, x.shape, size, v.dtype, kernel_size, stride)
    if norm_type == 2:
        y = xp.sqrt(total)
    else:
        y = xp.where(total == 0, xp.asarray(0, v.dtype), total ** (1 / norm_type))
    y = ordered_as(y.astype(x.dtype, copy=False), x)
    return (y,), {"x": x, "y": y} if needs else {}


def lp_pool_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    norm_type: float,
    kernel_size: tuple,
    stride: tuple,
    ceil_mode: bool,
) -> tuple:
    """dx[n, c, h, w] = x^(p − 1) · the sum of dy · y^(1 − p) over the windows that (h, w) lies under; none where y is 0,
    nor where it is NaN and p = 1, as in torch."""
    (dy,), (x,), count = dys, inputs, len(kernel_size)
    xp, size, ones, zeros = namespace(dy), dy.shape[2:], (1,) * count, (0,) * count
    g, y, v = up(dy), up(saved["y"]), up(saved["x"])
    there = (y != 0) & (y == y) if norm_type == 1 else y != 0
    g = g * _overhang(xp, x.shape, size, g.dtype, kernel_size, stride)
    g = xp.where(there, g * xp.where(there, y, xp.asarray(1, y.dtype)) ** (1 - norm_type), 0)
    dx = full(xp.zeros(x.shape, g.dtype), kernel_size, stride, zeros, ones, size, 0.0)
    for _, tap in taps(kernel_size):
        window(dx, tap, ones, stride, size)[...] += g
    powers = v if norm_type == 2 else v ** (norm_type - 1)
    own = (slice(None), slice(None), *[slice(n) for n in x.shape[2:]])
    return (inside(dx[own] * powers, x, zeros),)


lp_pool = Op(lp_pool_rule, lp_pool_forward, lp_pool_backward)
