"""Pooling. Bound by memory: a window's pixels are read once from memory, and from the L1 cache where windows overlap.

A tile is pixels × channels, wide along what is neighbouring in memory; arrays of any strides are read as they are.
Backward gathers: each pixel of x looks up the windows it lies under, so nothing is added to in turn. Which tap won is
one byte for each output (a window of more than 127 taps takes two), where an int64 index would be eight.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from . import _configs, _tile
from ._image import (
    evenly_spaced,
    finish,
    flattened,
    image_pixel,
    output_order,
    pixel_plan,
    pixel_tile,
    pixels_of,
    sizes_of,
    steps,
)


@triton.jit
def _max_pool2d_forward_kernel(
    x, y, won, indices,
    M, HY, WY, HX, WX, C, x_n, x_h, x_w, x_c, y_n, y_h, y_w, y_c,
    SH, SW, TOP, LEFT, DH, DW,
    KH: tl.constexpr, KW: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n, i, j, c, mask = pixels_of(M, HY * WY, WY, C, BP, BC)
    x += n * x_n + c.to(tl.int64) * x_c  # (BP, BC)
    best = tl.full((BP, BC), float("-inf"), tl.float32)
    tap = tl.full((BP, BC), -1, tl.int32)
    for r in range(KH):
        h = i * SH - TOP + r * DH
        for q in tl.static_range(KW):
            w = j * SW - LEFT + q * DW
            there = mask & (h >= 0) & (h < HX) & (w >= 0) & (w < WX)
            v = tl.load(x + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w, there, other=float("-inf")).to(tl.float32)
            better = there & ((v > best) | (v != v) | (tap < 0))
            best = tl.where(better, v, best)
            tap = tl.where(better, r * KW + q, tap)
    place = n * y_n + i.to(tl.int64) * y_h + j.to(tl.int64) * y_w + c.to(tl.int64) * y_c
    tl.store(y + place, best.to(y.dtype.element_ty), mask)
    if won is not None:
        tl.store(won + place, tap.to(won.dtype.element_ty), mask)
    if indices is not None:
        row = (i * SH - TOP + tap // KW * DH).to(tl.int64)
        index = row * WX + (j * SW - LEFT + tap % KW * DW)
        tl.store(indices + place, tl.where(tap < 0, -1, index), mask)


@triton.jit
def _max_pool2d_backward_kernel(
    dy, won, dx,
    M, HX, WX, HY, WY, C, dy_n, dy_h, dy_w, dy_c, won_n, won_h, won_w, won_c, x_n, x_h, x_w, x_c,
    SH, SW, TOP, LEFT, DH, DW,
    KH: tl.constexpr, KW: tl.constexpr, LAPS_H: tl.constexpr, LAPS_W: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """LAPS: windows that a pixel may lie under, along each axis; the last of them starts at (h + TOP) // SH."""
    n, h, w, c, mask = pixels_of(M, HX * WX, WX, C, BP, BC)
    dy += n * dy_n + c.to(tl.int64) * dy_c
    won += n * won_n + c.to(tl.int64) * won_c
    acc = tl.zeros((BP, BC), tl.float32)
    for a in range(LAPS_H):
        i = (h + TOP) // SH - a
        down = h + TOP - i * SH  # from the window's first row
        r = down // DH
        hit_h = (i >= 0) & (i < HY) & (r * DH == down) & (r < KH)
        for b in tl.static_range(LAPS_W):
            j = (w + LEFT) // SW - b
            right = w + LEFT - j * SW
            q = right // DW
            hit = mask & hit_h & (j >= 0) & (j < WY) & (q * DW == right) & (q < KW)
            tap = tl.load(won + i.to(tl.int64) * won_h + j.to(tl.int64) * won_w, hit, other=-1)
            g = tl.load(dy + i.to(tl.int64) * dy_h + j.to(tl.int64) * dy_w, hit, other=0.0).to(tl.float32)
            acc += tl.where(hit & (tap == r * KW + q), g, 0.0)
    place = dx + n * x_n + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w + c.to(tl.int64) * x_c
    tl.store(place, acc.to(dx.dtype.element_ty), mask)


@triton.jit
def _covered(i, size, taps, stride, pad, INCLUDE_PAD: tl.constexpr):
    """Rows (or columns) of window i that count."""
    start = i * stride - pad
    end = tl.minimum(start + taps, size + pad)
    if INCLUDE_PAD:
        return end - start
    else:
        return tl.minimum(end, size) - tl.maximum(start, 0)


@triton.jit
def _avg_pool2d_forward_kernel(
    x, y,
    M, HY, WY, HX, WX, C, x_n, x_h, x_w, x_c, y_n, y_h, y_w, y_c,
    SH, SW, TOP, LEFT, DIVISOR,
    KH: tl.constexpr, KW: tl.constexpr, OVERRIDE: tl.constexpr, INCLUDE_PAD: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n, i, j, c, mask = pixels_of(M, HY * WY, WY, C, BP, BC)
    x += n * x_n + c.to(tl.int64) * x_c
    acc = tl.zeros((BP, BC), tl.float32)
    for r in range(KH):
        h = i * SH - TOP + r
        for q in tl.static_range(KW):
            w = j * SW - LEFT + q
            there = mask & (h >= 0) & (h < HX) & (w >= 0) & (w < WX)
            acc += tl.load(x + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w, there, other=0.0).to(tl.float32)
    if OVERRIDE:
        acc = acc / DIVISOR
    else:
        count = _covered(i, HX, KH, SH, TOP, INCLUDE_PAD) * _covered(j, WX, KW, SW, LEFT, INCLUDE_PAD)
        acc = acc / count.to(tl.float32)
    place = y + n * y_n + i.to(tl.int64) * y_h + j.to(tl.int64) * y_w + c.to(tl.int64) * y_c
    tl.store(place, acc.to(y.dtype.element_ty), mask)


@triton.jit
def _avg_pool2d_backward_kernel(
    dy, dx,
    M, HX, WX, HY, WY, C, dy_n, dy_h, dy_w, dy_c, x_n, x_h, x_w, x_c,
    SH, SW, TOP, LEFT, DIVISOR,
    KH: tl.constexpr, KW: tl.constexpr, OVERRIDE: tl.constexpr, INCLUDE_PAD: tl.constexpr,
    LAPS_H: tl.constexpr, LAPS_W: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n, h, w, c, mask = pixels_of(M, HX * WX, WX, C, BP, BC)
    dy += n * dy_n + c.to(tl.int64) * dy_c
    acc = tl.zeros((BP, BC), tl.float32)
    for a in range(LAPS_H):
        i = (h + TOP) // SH - a
        hit_h = (i >= 0) & (i < HY) & (h + TOP - i * SH < KH)
        for b in tl.static_range(LAPS_W):
            j = (w + LEFT) // SW - b
            hit = mask & hit_h & (j >= 0) & (j < WY) & (w + LEFT - j * SW < KW)
            g = tl.load(dy + i.to(tl.int64) * dy_h + j.to(tl.int64) * dy_w, hit, other=0.0).to(tl.float32)
            if OVERRIDE:
                acc += g / DIVISOR
            else:
                count = _covered(i, HX, KH, SH, TOP, INCLUDE_PAD) * _covered(j, WX, KW, SW, LEFT, INCLUDE_PAD)
                acc += tl.where(hit, g / count.to(tl.float32), 0.0)
    place = dx + n * x_n + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w + c.to(tl.int64) * x_c
    tl.store(place, acc.to(dx.dtype.element_ty), mask)


@triton.jit
def _part(i, parts, size):
    """[first, last) of the i-th of so many parts of ``size``; they overlap where they do not divide it.

    With pixels and windows exchanged: the windows that pixel i lies in.
    """
    start = i.to(tl.int64) * size
    return (start // parts).to(tl.int32), ((start + size + parts - 1) // parts).to(tl.int32)


@triton.jit
def _length(i, parts, size):
    first, last = _part(i, parts, size)
    return last - first


@triton.jit
def _adaptive_avg_pool2d_kernel(
    x, y, M, HY, WY, HX, WX, C, x_n, x_h, x_w, x_c, y_n, y_h, y_w, y_c, MOST_H, MOST_W,
    GRAD: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y: the means of parts of x. GRAD: y is dx, x is dy, and each term is divided by the pixels of its own window."""
    n, i, j, c, mask = pixels_of(M, HY * WY, WY, C, BP, BC)
    top, bottom = _part(i, HY, HX)
    left, right = _part(j, WY, WX)
    x += n * x_n + c.to(tl.int64) * x_c
    acc = tl.zeros((BP, BC), tl.float32)
    for r in range(MOST_H):
        h = top + r
        rows = h.to(tl.int64) * x_h
        tall = _length(h, HX, HY)
        for q in range(MOST_W):
            w = left + q
            v = tl.load(x + rows + w.to(tl.int64) * x_w, mask & (h < bottom) & (w < right), other=0.0).to(tl.float32)
            if GRAD:
                v = v / (tall * _length(w, WX, WY)).to(tl.float32)
            acc += v
    if not GRAD:
        acc = acc / ((bottom - top) * (right - left)).to(tl.float32)
    place = y + n * y_n + i.to(tl.int64) * y_h + j.to(tl.int64) * y_w + c.to(tl.int64) * y_c
    tl.store(place, acc.to(y.dtype.element_ty), mask)


@triton.jit
def _global_avg_pool2d_forward_kernel(
    x, out, P, EACH, C, W, x_n, x_h, x_w, x_c, out_s, out_n, SCALE,
    EVEN: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out[s, n, c] = SCALE · Σ over the s-th EACH pixels of x[n, c, pixel]."""
    blocks = tl.cdiv(C, BC)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)[None, :]  # (1, BC)
    split = tl.program_id(1).to(tl.int64)
    first = split * EACH
    last = tl.minimum(first + EACH, P)
    x += n * x_n + c.to(tl.int64) * x_c
    acc = tl.zeros((BP, BC), tl.float32)
    for start in range(first, last, BP):
        p = start + tl.arange(0, BP)[:, None]  # (BP, 1)
        if EVEN:
            rows = p * x_w
        else:
            rows = p // W * x_h + p % W * x_w
        acc += tl.load(x + rows, (p < last) & (c < C), other=0.0).to(tl.float32)
    total = tl.sum(acc, 0, keep_dims=True) * SCALE
    tl.store(out + split * out_s + n * out_n + c, total.to(out.dtype.element_ty), c < C)


@triton.jit
def _global_avg_pool2d_backward_kernel(
    dy, dx, M, W, P, C, dy_n, dy_c, x_n, x_h, x_w, x_c, SCALE,
    EVEN: tl.constexpr, ALIGNED: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BP
    n, pixel = image_pixel(start, P, ALIGNED, BP)
    c = (tl.program_id(1) * BC + tl.arange(0, BC)).to(tl.int64)[None, :]  # (1, BC)
    mask = (start + tl.arange(0, BP) < M)[:, None] & (c < C)
    g = tl.load(dy + (n * dy_n)[:, None] + c * dy_c, mask, other=0.0).to(tl.float32) * SCALE
    if EVEN:
        rows = n * x_n + pixel.to(tl.int64) * x_w
    else:
        rows = n * x_n + (pixel // W).to(tl.int64) * x_h + pixel % W * x_w
    tl.store(dx + rows[:, None] + c * x_c, g.to(dx.dtype.element_ty), mask)


# --- launches --------------------------------------------------------------------------------------------------------


MAX_FORWARD = _configs.rows("max_pool2d_forward")
MAX_BACKWARD = _configs.rows("max_pool2d_backward")
AVG_FORWARD = _configs.rows("avg_pool2d_forward")
AVG_BACKWARD = _configs.rows("avg_pool2d_backward")
ADAPTIVE_FORWARD = _configs.rows("adaptive_avg_pool2d_forward")
ADAPTIVE_BACKWARD = _configs.rows("adaptive_avg_pool2d_backward")
GLOBAL_FORWARD = _configs.rows("global_avg_pool2d_forward")
GLOBAL_BACKWARD = _configs.rows("global_avg_pool2d_backward")


def _out_size(x: Any, kernel: tuple, stride: tuple, padding: tuple, dilation: tuple, ceil: bool) -> list[int]:
    sizes = []
    for n, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation):
        out = (n + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil else 0)) // s + 1
        sizes.append(out - 1 if ceil and (out - 1) * s >= n + p else out)
    return sizes


def _laps(kernel: tuple, stride: tuple, dilation: tuple = (1, 1)) -> dict:
    """How many windows a pixel may lie under, along each axis."""
    laps = [_tile.cdiv(d * (k - 1) + 1, s) for k, s, d in zip(kernel, stride, dilation)]
    return {"LAPS_H": laps[0], "LAPS_W": laps[1]}


def max_pool2d_forward(
    x: Any,
    *,
    needs: tuple = (),
    kernel_size: tuple,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    ceil_mode: bool,
    return_indices: bool,
    empty: Any,
) -> tuple[tuple, dict]:
    size = _out_size(x, kernel_size, stride, padding, dilation, ceil_mode)
    order, won = output_order(x), None
    y = empty((*x.shape[:2], *size), x.dtype, order)
    if needs:
        taps = kernel_size[0] * kernel_size[1]
        won = empty(y.shape, "int8" if taps <= 127 else "int16" if taps <= 32767 else "int32", order)
    indices = empty(y.shape, "int64", order) if return_indices else None
    grid, tile = pixel_plan(MAX_FORWARD, y)
    _tile.launch(
        _max_pool2d_forward_kernel, grid, x, y, won, indices, *sizes_of(y, x), *steps(x), *steps(y),
        *stride, *padding, *dilation, KH=kernel_size[0], KW=kernel_size[1], **tile,
    )  # fmt: skip
    return (y, indices) if return_indices else (y,), {"tap": won} if needs else {}


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
    empty: Any,
) -> tuple:
    dy, (x,), won = dys[0], inputs, saved["tap"]
    dx = empty(x.shape, x.dtype, x.like().order)
    grid, tile = pixel_plan(MAX_BACKWARD, dx)
    _tile.launch(
        _max_pool2d_backward_kernel, grid, dy, won, dx, *sizes_of(dx, dy), *steps(dy), *steps(won), *steps(dx),
        *stride, *padding, *dilation, KH=kernel_size[0], KW=kernel_size[1],
        **_laps(kernel_size, stride, dilation), **tile,
    )  # fmt: skip
    return (dx,)


def avg_pool2d_forward(
    x: Any,
    *,
    needs: tuple = (),
    kernel_size: tuple,
    stride: tuple,
    padding: tuple,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    empty: Any,
) -> tuple[tuple, dict]:
    size = _out_size(x, kernel_size, stride, padding, (1, 1), ceil_mode)
    y = empty((*x.shape[:2], *size), x.dtype, output_order(x))
    grid, tile = pixel_plan(AVG_FORWARD, y)
    _tile.launch(
        _avg_pool2d_forward_kernel, grid, x, y, *sizes_of(y, x), *steps(x), *steps(y),
        *stride, *padding, float(divisor_override or 1), KH=kernel_size[0], KW=kernel_size[1],
        OVERRIDE=divisor_override is not None, INCLUDE_PAD=bool(count_include_pad), **tile,
    )  # fmt: skip
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
    empty: Any,
) -> tuple:
    (dy,), (x,) = dys, inputs
    dx = empty(x.shape, x.dtype, x.like().order)
    grid, tile = pixel_plan(AVG_BACKWARD, dx)
    _tile.launch(
        _avg_pool2d_backward_kernel, grid, dy, dx, *sizes_of(dx, dy), *steps(dy), *steps(dx),
        *stride, *padding, float(divisor_override or 1), KH=kernel_size[0], KW=kernel_size[1],
        OVERRIDE=divisor_override is not None, INCLUDE_PAD=bool(count_include_pad),
        **_laps(kernel_size, stride), **tile,
    )  # fmt: skip
    return (dx,)


WIDEST = 32
"""Columns of a window that ``avg_pool2d``'s kernels unroll."""


def _divided(x: Any, output_size: tuple) -> dict | None:
    """The options of the ``avg_pool2d`` that does the same, where the parts divide the image and are not too wide."""
    if output_size == (1, 1) or 0 in output_size or any(n % o for n, o in zip(x.shape[2:], output_size)):
        return None
    window = tuple(n // o for n, o in zip(x.shape[2:], output_size))
    plain = {"padding": (0, 0), "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
    return {"kernel_size": window, "stride": window, **plain} if window[1] <= WIDEST else None


def _adaptive(source: Any, out: Any, grad: bool) -> None:
    most = [
        n // o if o and n % o == 0 else _tile.cdiv(n, max(o, 1)) + 1 for n, o in zip(source.shape[2:], out.shape[2:])
    ]
    grid, tile = pixel_plan(ADAPTIVE_BACKWARD if grad else ADAPTIVE_FORWARD, out)
    _tile.launch(
        _adaptive_avg_pool2d_kernel, grid, source, out, *sizes_of(out, source), *steps(source), *steps(out), *most,
        GRAD=grad, **tile,
    )  # fmt: skip


def adaptive_avg_pool2d_forward(x: Any, *, needs: tuple = (), output_size: tuple, empty: Any) -> tuple[tuple, dict]:
    if output_size == (1, 1):
        return (_global_mean(x, empty),), {}
    if divided := _divided(x, output_size):
        return avg_pool2d_forward(x, needs=needs, **divided, empty=empty)
    y = empty((*x.shape[:2], *output_size), x.dtype, output_order(x))
    _adaptive(x, y, False)
    return (y,), {}


def adaptive_avg_pool2d_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, output_size: tuple, empty: Any
) -> tuple:
    (dy,), (x,) = dys, inputs
    if divided := _divided(x, output_size):
        return avg_pool2d_backward(dys, saved, inputs=inputs, needs=needs, **divided, empty=empty)
    dx = empty(x.shape, x.dtype, x.like().order)
    if output_size != (1, 1):
        _adaptive(dy, dx, True)
        return (dx,)
    grid, tile = pixel_plan(GLOBAL_BACKWARD, dx)
    n, c, h, w = x.shape
    _tile.launch(
        _global_avg_pool2d_backward_kernel, grid, dy, dx, n * h * w, w, h * w, c, dy.stride(0), dy.stride(1),
        *steps(dx), 1 / max(h * w, 1), EVEN=evenly_spaced(dx), ALIGNED=h * w % 16 == 0 and tile["BP"] % 16 == 0, **tile,
    )  # fmt: skip
    return (dx,)


def _global_mean(x: Any, empty: Any) -> Any:
    n, c, h, w = x.shape
    y = empty((n, c, 1, 1), x.dtype)
    even = evenly_spaced(x)
    source = flattened(x) if even else x
    device = _tile.device(x)
    entry = GLOBAL_FORWARD(device, h * w)
    pixels, channels = pixel_tile(source, h * w, entry.elements)
    blocks, rounds = _tile.cdiv(c, channels), _tile.cdiv(h * w, pixels)
    # Few large images are split, so that every multiprocessor has work; the parts are added in a second stage.
    splits, each = _tile.split(rounds, max(1, min(device.sms // max(1, n * blocks), rounds // 4)))
    scale = 1 / (h * w) if h * w else float("nan")
    out, own_scale = (y, scale) if splits == 1 else (empty((splits, n, 1, c), "float32"), 1.0)
    _tile.launch(
        _global_avg_pool2d_forward_kernel, (n * blocks, splits), source, out, h * w, each * pixels, c, source.shape[3],
        *steps(source), n * c, c, own_scale, EVEN=even, BP=pixels, BC=channels, num_warps=entry.warps,
    )  # fmt: skip
    if splits != 1:
        finish(out, y, scale)
    return y
