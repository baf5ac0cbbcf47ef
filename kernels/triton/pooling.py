"""Pooling. Bound by memory: a window's pixels are read once from memory, and from the L1 cache where windows overlap.

A tile is pixels × channels, wide along what is neighbouring in memory; arrays of any strides are read as they are.
Backward gathers: each pixel of x looks up the windows it lies under, so nothing is added to in turn. Which tap won is
one byte for each output (a window of more than 127 taps takes two), where an int64 index would be eight.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget, channels_first
from .._pooling import Divisor, adaptive_avg_pool2d, avg_pool2d, max_pool2d
from .._window import Window
from . import _configs, _tile
from ._image import (
    evenly_spaced,
    finish,
    flattened,
    image_pixel,
    pixel_plan,
    pixel_tile,
    pixels_of,
    sizes_of,
    steps,
)

BUDGETS = {
    "_max_pool2d_forward_kernel": Budget(registers=224, blocks=2, narrow=channels_first),
    "_max_pool2d_backward_kernel": Budget(registers=224, blocks=2, narrow=channels_first),
    "_avg_pool2d_forward_kernel": Budget(registers=168, blocks=3, narrow=channels_first),
    "_avg_pool2d_backward_kernel": Budget(registers=240, blocks=2, narrow=channels_first),
    "_adaptive_avg_pool2d_kernel": Budget(registers=208, blocks=2, narrow=channels_first),
    "_global_avg_pool2d_forward_kernel": Budget(registers=176, blocks=3),
    # One dy serves a whole image.
    "_global_avg_pool2d_backward_kernel": Budget(
        registers=64, blocks=9, narrow=lambda c: "loads" if c["BC"] == 1 else ""
    ),
}


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
    first, last = _part(i, tl.maximum(parts, 1), size)  # where there are none, the compiler divides all the same
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
        rows = n * x_n + (pixel // W).to(tl.int64) * x_h + (pixel % W).to(tl.int64) * x_w
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


def _laps(window: Window) -> dict:
    return dict(zip(("LAPS_H", "LAPS_W"), window.laps))


def _max_forward(x: Any, y: Any, tap: Any, indices: Any, window: Window, empty: Any) -> None:
    grid, tile = pixel_plan(MAX_FORWARD, y)
    _tile.launch(
        _max_pool2d_forward_kernel, grid, x, y, tap, indices, *sizes_of(y, x), *steps(x), *steps(y),
        *window.stride, *window.padding, *window.dilation, KH=window.kernel[0], KW=window.kernel[1], **tile,
    )  # fmt: skip


def _max_backward(dy: Any, tap: Any, dx: Any, window: Window) -> None:
    grid, tile = pixel_plan(MAX_BACKWARD, dx)
    _tile.launch(
        _max_pool2d_backward_kernel, grid, dy, tap, dx, *sizes_of(dx, dy), *steps(dy), *steps(tap), *steps(dx),
        *window.stride, *window.padding, *window.dilation, KH=window.kernel[0], KW=window.kernel[1],
        **_laps(window), **tile,
    )  # fmt: skip


def _divided_by(divisor: Divisor) -> dict:
    return {"OVERRIDE": divisor.override is not None, "INCLUDE_PAD": divisor.include_pad}


def _avg_forward(x: Any, y: Any, window: Window, divisor: Divisor) -> None:
    grid, tile = pixel_plan(AVG_FORWARD, y)
    _tile.launch(
        _avg_pool2d_forward_kernel, grid, x, y, *sizes_of(y, x), *steps(x), *steps(y),
        *window.stride, *window.padding, float(divisor.override or 1), KH=window.kernel[0], KW=window.kernel[1],
        **_divided_by(divisor), **tile,
    )  # fmt: skip


def _avg_backward(dy: Any, dx: Any, window: Window, divisor: Divisor) -> None:
    grid, tile = pixel_plan(AVG_BACKWARD, dx)
    _tile.launch(
        _avg_pool2d_backward_kernel, grid, dy, dx, *sizes_of(dx, dy), *steps(dy), *steps(dx),
        *window.stride, *window.padding, float(divisor.override or 1), KH=window.kernel[0], KW=window.kernel[1],
        **_divided_by(divisor), **_laps(window), **tile,
    )  # fmt: skip


WIDEST = 32
"""Columns of a window that ``avg_pool2d``'s kernels unroll."""


def _adaptive(source: Any, out: Any, grad: bool) -> None:
    most = [
        n // o if o and n % o == 0 else _tile.cdiv(n, max(o, 1)) + 1 for n, o in zip(source.shape[2:], out.shape[2:])
    ]
    grid, tile = pixel_plan(ADAPTIVE_BACKWARD if grad else ADAPTIVE_FORWARD, out)
    _tile.launch(
        _adaptive_avg_pool2d_kernel, grid, source, out, *sizes_of(out, source), *steps(source), *steps(out), *most,
        GRAD=grad, **tile,
    )  # fmt: skip


def _adaptive_forward(x: Any, y: Any, empty: Any) -> None:
    if y.shape[2:] == (1, 1):
        _global_mean(x, y, empty)
    else:
        _adaptive(x, y, False)


def _adaptive_backward(dy: Any, dx: Any) -> None:
    if dy.shape[2:] != (1, 1):
        _adaptive(dy, dx, True)
        return
    grid, tile = pixel_plan(GLOBAL_BACKWARD, dx)
    n, c, h, w = dx.shape
    _tile.launch(
        _global_avg_pool2d_backward_kernel, grid, dy, dx, n * h * w, w, h * w, c, dy.stride(0), dy.stride(1),
        *steps(dx), 1 / max(h * w, 1), EVEN=evenly_spaced(dx), ALIGNED=h * w % 16 == 0 and tile["BP"] % 16 == 0, **tile,
    )  # fmt: skip


def _global_mean(x: Any, y: Any, empty: Any) -> None:
    n, c, h, w = x.shape
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


max_pool2d_forward, max_pool2d_backward = max_pool2d(_max_forward, _max_backward)
avg_pool2d_forward, avg_pool2d_backward = avg_pool2d(_avg_forward, _avg_backward)
adaptive_avg_pool2d_forward, adaptive_avg_pool2d_backward = adaptive_avg_pool2d(
    (avg_pool2d_forward, avg_pool2d_backward), _adaptive_forward, _adaptive_backward, WIDEST
)
