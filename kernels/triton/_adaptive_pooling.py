"""Adaptive pooling: so many parts of an image, of one pixel or of all, and in backward the parts that each pixel lies in."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget, channels_first
from . import _configs, _global_means, _tile
from ._image import as_images, evenly_spaced, finish, pixel_tile, steps
from ._pixels import pixel_plan, placed, sizes_of, step_to, steps_of, three, voxels_of

BUDGETS = {
    "_adaptive_avg_pool_kernel": Budget(registers=208, blocks=2, narrow=channels_first),
    "_global_avg_pool_forward_kernel": Budget(registers=176, blocks=3),
}


@triton.jit
def part(i, parts, size, LONG: tl.constexpr):
    """[first, last) of the i-th of so many parts of ``size``; they overlap where they do not divide it. LONG: ``is_long``.

    With pixels and windows exchanged: the windows that pixel i lies in.
    """
    start = i.to(tl.int64) * size if LONG else i * size
    return (start // parts).to(tl.int32), ((start + size + parts - 1) // parts).to(tl.int32)


@triton.jit
def _length(i, parts, size, LONG: tl.constexpr):
    first, last = part(i, tl.maximum(parts, 1), size, LONG)  # where there are none, the compiler divides all the same
    return last - first


@triton.jit
def _adaptive_avg_pool_kernel(
    x, y, M, DY, HY, WY, DX, HX, WX, C, x_n, x_d, x_h, x_w, x_c, y_n, y_d, y_h, y_w, y_c, MOST_D, MOST_H, MOST_W,
    GRAD: tl.constexpr, LONG: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y: the means of parts of x. GRAD: y is dx, x is dy, and each term is divided by the pixels of its own window."""
    n, k, i, j, c, mask = voxels_of(M, DY, HY, WY, C, DEEP, BP, BC)
    front = 0
    if DEEP:
        front, back = part(k, DY, DX, LONG)
    top, bottom = part(i, HY, HX, LONG)
    left, right = part(j, WY, WX, LONG)
    high, wide = bottom - top, right - left
    x += n * x_n + step_to(c, x_c, WIDE) + placed(front, top, left, x_d, x_h, x_w, DEEP, WIDE)
    acc = tl.zeros((BP, BC), tl.float32)
    for z in range(MOST_D if DEEP else 1):
        for r in range(MOST_H):
            row = x + step_to(r, x_h, WIDE)
            inside = mask & (r < high)
            if DEEP:
                row += step_to(z, x_d, WIDE)
                inside &= z < back - front
            if GRAD:
                tall = _length(top + r, HX, HY, LONG)
                if DEEP:
                    tall *= _length(front + z, DX, DY, LONG)
            for q in range(MOST_W):
                v = tl.load(row + step_to(q, x_w, WIDE), inside & (q < wide), other=0.0).to(tl.float32)
                if GRAD:
                    v = v / (tall * _length(left + q, WX, WY, LONG)).to(tl.float32)
                acc += v
    if not GRAD:
        count = high * wide
        if DEEP:
            count *= back - front
        acc = acc / count.to(tl.float32)
    place = n * y_n + step_to(c, y_c, WIDE) + placed(k, i, j, y_d, y_h, y_w, DEEP, WIDE)
    tl.store(y + place, acc.to(y.dtype.element_ty), mask)


@triton.jit
def _global_avg_pool_forward_kernel(
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


# --- launches --------------------------------------------------------------------------------------------------------


AVG_FORWARD = _configs.rows("adaptive_avg_pool_forward")
AVG_BACKWARD = _configs.rows("adaptive_avg_pool_backward")
GLOBAL_FORWARD = _configs.rows("global_avg_pool_forward")
GLOBAL_BACKWARD = _configs.rows("global_avg_pool_backward")


def most(source: Any, out: Any) -> tuple[int, ...]:
    """The most places of ``source`` that one of ``out`` looks up, along each of three axes."""
    each = [
        n // o if o and n % o == 0 else _tile.cdiv(n, max(o, 1)) + 1 for n, o in zip(source.shape[2:], out.shape[2:])
    ]
    return three(each, 1)


def is_long(source: Any, out: Any) -> bool:
    """Whether the product of an axis's places, which tells the parts' ends, takes 64 bits."""
    return any([(n + 1) * (o + 1) >= 2**31 for n, o in zip(source.shape[2:], out.shape[2:])])


def _avg(source: Any, out: Any, grad: bool) -> None:
    grid, tile = pixel_plan(AVG_BACKWARD if grad else AVG_FORWARD, out, source)
    _tile.launch(
        _adaptive_avg_pool_kernel, grid, source, out, *sizes_of(out, source), *steps_of(source), *steps_of(out),
        *most(source, out), GRAD=grad, LONG=is_long(source, out), **tile,
    )  # fmt: skip


def avg_forward(x: Any, y: Any, empty: Any) -> None:
    if math.prod(y.shape[2:]) != 1:
        _avg(x, y, False)
    elif not _global_means.forward(x, y):
        _global_mean(x, y, empty)


def avg_backward(dy: Any, dx: Any) -> None:
    if math.prod(dy.shape[2:]) != 1 or not _global_means.backward(GLOBAL_BACKWARD, dy, dx):
        _avg(dy, dx, True)


def _global_mean(x: Any, y: Any, empty: Any) -> None:
    source = as_images(x, empty)
    even = evenly_spaced(source)
    n, c, h, w = source.shape
    device = _tile.device(x)
    entry = GLOBAL_FORWARD(device, h * w)
    pixels, channels = pixel_tile(source, h * w, entry.elements)
    blocks, rounds = _tile.cdiv(c, channels), _tile.cdiv(h * w, pixels)
    # Few large images are split, so that every multiprocessor has work; the parts are added in a second stage.
    splits, each = _tile.split(rounds, max(1, min(device.sms // max(1, n * blocks), rounds // 4)))
    scale = 1 / (h * w) if h * w else float("nan")
    out, own_scale = (y, scale) if splits == 1 else (empty((splits, n, 1, c), "float32"), 1.0)
    _tile.launch(
        _global_avg_pool_forward_kernel, (n * blocks, splits), source, out, h * w, each * pixels, c, source.shape[3],
        *steps(source), n * c, c, own_scale, EVEN=even, BP=pixels, BC=channels, num_warps=entry.warps,
    )  # fmt: skip
    if splits != 1:
        finish(out, y, scale)
