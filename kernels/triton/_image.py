"""What kernels over images share: NHWC copies, sums over pixels, and the second stage of two-stage sums."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from .._window import channels_last
from .._window import output_order as output_order
from . import _configs, _tile


def steps(x: Any) -> tuple[int, ...]:
    """Strides in the order n, (d,) h, w, c."""
    n, c, *pixels = x.stride()
    return (n, *pixels, c)


def evenly_spaced(x: Any) -> bool:
    """Whether one step leads from each pixel of an image to the next."""
    return in_line(x.shape[2:], x.stride()[2:])


def in_line(sizes: Sequence[int], steps: Sequence[int]) -> bool:
    """Whether one step leads from each element to the next, along all these axes."""
    axes = [(size, step) for size, step in zip(sizes, steps) if size != 1]
    return all([step == size * inner for (_, step), (size, inner) in itertools.pairwise(axes)])


def is_wide(*arrays: Any) -> bool:
    """Whether an offset in one of these arrays may not fit 32 bits."""
    return any(sum((n - 1) * s for n, s in zip(a.shape, a.stride())) >= 2**31 - 2**16 for a in arrays)


def flattened(x: Any) -> Any:
    """All pixels of an image in one row: (N, C, 1, H · W), a view of an evenly spaced array."""
    n, c, *sizes = x.shape
    return x.view(n, c, *(1,) * (len(sizes) - 1), math.prod(sizes))


def as_images(x: Any, empty: Any) -> Any:
    """``x`` (N, C, H, W) or (N, C, D, H, W) of any strides as (N, C, H, W), pixels in the same order: a view where it can
    be."""
    if evenly_spaced(x):
        x = flattened(x)
        return x.squeeze(2) if x.ndim == 5 else x
    if x.ndim == 4:
        return x
    n, c, d, h, w = x.shape
    if 1 not in (d, h) and x.stride(2) != h * x.stride(3):
        x = _tile.copied(x, channels_last(5), empty)
    return x.view(n, c, d * h, w)


BUDGETS = {
    # Of few channels no 16 bytes lie together, nor does an image of odd size begin at a multiple of them.
    "_nhwc_kernel": Budget(
        registers=160,
        blocks=3,
        narrow=lambda c: ("stores " if c["BC"] < 8 else "") + ("loads" if "P" in c["odd"] else ""),
    ),
    # Where 16 does not divide an image's pixels, each finds its image for itself (channels first, 128); others keep to 60.
    "_channel_sums_kernel": Budget(registers=128, blocks=2, narrow=lambda c: "loads" if "C" in c["odd"] else ""),
    # A row-major weight takes its gradient in steps of kh · kw, and one of three channels in threes.
    "_finish_kernel": Budget(
        registers=72, blocks=8, narrow=lambda c: "stores, loads" if "SIZE" in c["odd"] else "stores"
    ),
}


def run_of(*pixels: int) -> int:
    """ALIGNED of ``image_pixel`` for pixels of an image, and of a tile: 16, or 1."""
    return 16 if all(p % 16 == 0 for p in pixels) else 1


@triton.jit
def first_of(M, BP: tl.constexpr):
    """This program's first of M pixels: in 32 bits where M is, for a division of 64 calls a function."""
    return (tl.program_id(0) + M * 0) * BP


@triton.jit
def image_pixel(start, P, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """(image as int64, pixel) for BLOCK pixels from ``start`` on, of images of P pixels each.

    ALIGNED: P and start are multiples of it; the compiler then knows that so many neighbours lie in one image.
    """
    local = (start % P).to(tl.int32) + tl.arange(0, BLOCK)
    n = (start // P).to(tl.int64) + local // P
    pixel = local % P
    if ALIGNED > 1:
        n = tl.max_constancy(n, [ALIGNED])
        pixel = tl.max_contiguous(tl.multiple_of(pixel, [ALIGNED]), [ALIGNED])
    return n, pixel


@triton.jit
def _nhwc_kernel(x, y, C, W, P, x_n, x_h, x_w, x_c, BC: tl.constexpr, BP: tl.constexpr):
    """y[n, p, c] = x[n, c, p // W, p % W]: read along pixels, written along channels."""
    p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)  # (BP,)
    c = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)  # (BC,)
    n = tl.program_id(2).to(tl.int64)
    mask = (c < C)[:, None] & (p < P)[None, :]
    v = tl.load(x + n * x_n + (c * x_c)[:, None] + (p // W * x_h + p % W * x_w)[None, :], mask, other=0.0)  # (BC, BP)
    tl.store(y + (n * P + p)[:, None] * C + c[None, :], tl.trans(v), tl.trans(mask))


NHWC = _configs.rows("nhwc")
MOST_IMAGES = 65535
"""The longest third axis of a grid."""


def _in_parts(x: Any) -> list[Any]:
    """``x`` in as many parts as it takes launches."""
    n = x.shape[0]
    return [x] if n <= MOST_IMAGES else [x[first : first + MOST_IMAGES] for first in range(0, n, MOST_IMAGES)]


def nhwc(x: Any, empty: Any) -> Any:
    """x of any strides with channels neighbouring in memory: itself, or a copy."""
    last = channels_last(x.ndim)
    if x.permute(last).is_contiguous():
        return x
    y, source = empty(x.shape, x.dtype, last), as_images(x, empty)
    c, count = x.shape[1], math.prod(x.shape[2:])
    block = min(64, _tile.next_power_of_2(c))
    entry = NHWC(_tile.device(x), count)
    pixels = _tile.next_power_of_2(count, max(1, entry.elements // block))
    for part, there in zip(_in_parts(source), _in_parts(y)):
        grid = (_tile.cdiv(count, pixels), _tile.cdiv(c, block), part.shape[0])
        _tile.launch(
            _nhwc_kernel, grid, part, there, c, source.shape[3], count, *steps(source),
            BC=block, BP=pixels, num_warps=entry.warps,
        )  # fmt: skip
    return y


@triton.jit
def _channel_sums_kernel(
    x, partial, M, EACH, C, W, P, x_n, x_h, x_w, x_c,
    EVEN: tl.constexpr, ALIGNED: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """partial[s, c] = Σ over the s-th EACH of the M = N · P pixels of x[pixel, c], in float32."""
    split = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]  # (1, BC)
    first = split * EACH
    last = tl.minimum(first + EACH, M)
    acc = tl.zeros((BP, BC), tl.float32)
    for start in range(first, last, BP):
        n, pixel = image_pixel(start, P, ALIGNED, BP)
        if EVEN:
            rows = n * x_n + pixel.to(tl.int64) * x_w
        else:
            rows = n * x_n + (pixel // W).to(tl.int64) * x_h + (pixel % W).to(tl.int64) * x_w
        mask = (start + tl.arange(0, BP) < last)[:, None] & (c < C)
        acc += tl.load(x + rows[:, None] + c.to(tl.int64) * x_c, mask, other=0.0).to(tl.float32)
    tl.store(partial + split * C + c, tl.sum(acc, 0, keep_dims=True), c < C)


def pixel_tile(x: Any, pixels: int, elements: int) -> tuple[int, int]:
    """(pixels, channels) of a tile with this many elements: wide along what is neighbouring in memory."""
    c = _tile.next_power_of_2(x.shape[1])
    if x.stride(1) == 1 and x.shape[1] > 1:
        channels = min(c, 64)
        return _tile.next_power_of_2(pixels, max(1, elements // channels)), channels
    rows = _tile.next_power_of_2(pixels, elements)
    return rows, min(c, elements // rows)


@triton.jit
def pixels_of(M, HW, W, C, BP: tl.constexpr, BC: tl.constexpr):
    """(n, h, w, c, mask) of this program's pixels × channels: (BP, 1) three times, (1, BC), (BP, BC)."""
    start = first_of(M, BP)
    local = (start % HW).to(tl.int32) + tl.arange(0, BP)[:, None]
    n, pixel = (start // HW).to(tl.int64) + local // HW, local % HW
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    return n, pixel // W, pixel % W, c, (tl.arange(0, BP)[:, None] < M - start) & (c < C)


CHANNEL_SUMS = _configs.rows("channel_sums")
FINISH = _configs.rows("image_finish")


def channel_sums(x: Any, total: Any, empty: Any, scale: float = 1.0) -> None:
    """total[c] = scale · Σ_{n, h, w} x[n, c, h, w]; x of any strides, with a depth or without."""
    source = as_images(x, empty)
    n, c, h, w = source.shape
    even = evenly_spaced(source)
    device = _tile.device(x)
    entry = CHANNEL_SUMS(device, n * h * w)
    pixels, channels = pixel_tile(source, n * h * w, entry.elements)
    blocks = _tile.cdiv(c, channels)
    rounds = _tile.cdiv(n * h * w, pixels)
    splits, each = _tile.split(rounds, max(1, min(4 * device.sms // blocks, rounds // 4)))
    partial = empty((splits, c, 1, 1), "float32")
    _tile.launch(
        _channel_sums_kernel, (splits, blocks), source, partial, n * h * w, each * pixels, c, source.shape[3], h * w,
        *steps(source), EVEN=even, ALIGNED=run_of(h * w, pixels),
        BP=pixels, BC=channels, num_warps=entry.warps,
    )  # fmt: skip
    finish(partial, total.view(c, 1, 1, 1), scale)


@triton.jit
def _finish_kernel(
    partial, y, S, SIZE, C, T, KH, KW, y_o, y_c, y_d, y_h, y_w, scale,
    DEEP: tl.constexpr, SHARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[o, c, tap] = scale · Σ_s partial[s, o, tap, c], SHARES of them at a time, always in one order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, S, SHARES):
        s = first + tl.arange(0, SHARES)[:, None]
        place = partial + s.to(tl.int64) * SIZE + at[None, :]
        total += tl.sum(tl.load(place, (s < S) & mask[None, :], other=0.0), 0)
    c, tap, o = at % C, at // C % T, at // C // T
    where = y + o * y_o + c * y_c + tap % KW * y_w
    if DEEP:
        where += tap // (KH * KW) * y_d + tap // KW % KH * y_h
    else:
        where += tap // KW * y_h
    tl.store(where, (total * scale).to(y.dtype.element_ty), mask)


def finish(partial: Any, y: Any, scale: float = 1.0) -> None:
    """The sum over the first axis of (S, O, taps, C) into y, (O, C, kh, kw) or (O, C, kd, kh, kw), of any strides."""
    s, o, taps, c = partial.shape
    size = o * taps * c
    entry = FINISH(_tile.device(y), size)
    y = y if y.ndim == 5 else y.unsqueeze(2)
    _tile.launch(
        _finish_kernel, (_tile.cdiv(size, entry.elements),), partial, y, s, size, c, taps, *y.shape[3:], *y.stride(), scale,
        DEEP=y.shape[2] > 1, SHARES=8 if s > 8 else 1, BLOCK=entry.elements, num_warps=entry.warps,
    )  # fmt: skip
