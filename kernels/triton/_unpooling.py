"""Max unpooling, without atomics. A part of an image is one program's, which clears it and then puts maxima there in their
order, so that of several with one place the last stays. It passes over blocks of maxima none of which lies in its part."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from .._window import image, output_order
from . import _configs, _tile
from ._pixels import is_far, pixel_plan, placed, sizes_of, step_to, steps_of, three, voxels_of

BUDGETS = {
    "_bounds_kernel": Budget(registers=128, blocks=4, narrow="loads, stores"),
    # Maxima go wherever they were.
    "_max_unpool_forward_kernel": Budget(registers=104, blocks=4, narrow="loads, stores"),
    "_max_unpool_backward_kernel": Budget(registers=208, blocks=2, narrow="loads, stores"),
}
BLOCK, GROUP = 16, 16
"""Maxima of a channel that are put in place at once; blocks of them that are looked at at once."""


@triton.jit
def _steps_to(place, H, W, s_d, s_h, s_w, DEEP: tl.constexpr, WIDE: tl.constexpr):
    """How far a pixel, counted row-major in its image, lies from the first."""
    h, d = place // W, place
    if DEEP:
        d, h = h // H, h % H
    return placed(d, h, place % W, s_d, s_h, s_w, DEEP, WIDE)


@triton.jit
def _places(indices, start, P, H, W, C, c, i_d, i_h, i_w, i_c, DEEP: tl.constexpr, WIDE: tl.constexpr, B: tl.constexpr):
    """Where B maxima from ``start`` on go, (B, BC); −1 for a place outside of 31 bits, and for what is no maximum."""
    p = start + tl.arange(0, B)[:, None]
    steps = step_to(c, i_c, WIDE) + _steps_to(p, H, W, i_d, i_h, i_w, DEEP, WIDE)
    at = tl.load(indices + steps, (p < P) & (c < C), other=-1)
    return tl.where((at >= 0) & (at < 2147483647), at, -1).to(tl.int32)


@triton.jit
def _bounds_kernel(
    indices, bounds, P, H, W, C, BLOCKS, i_n, i_d, i_h, i_w, i_c,
    DEEP: tl.constexpr, WIDE: tl.constexpr, B: tl.constexpr, G: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """bounds[n, channels, block] = (least, greatest place) of the maxima in a block."""
    parts = tl.cdiv(C, BC)
    pid = tl.program_id(0).to(tl.int64)
    c = (pid % parts).to(tl.int32) * BC + tl.arange(0, BC)[None, :]
    indices += pid // parts * i_n
    first = tl.program_id(1) * G
    for block in range(first, tl.minimum(first + G, BLOCKS)):
        at = _places(indices, block * B, P, H, W, C, c, i_d, i_h, i_w, i_c, DEEP, WIDE, B)
        low = tl.min(tl.where(at < 0, 2147483647, at))
        high = tl.max(at)
        tl.store(bounds + (pid * BLOCKS + block) * 2, low)
        tl.store(bounds + (pid * BLOCKS + block) * 2 + 1, high)


@triton.jit
def _max_unpool_forward_kernel(
    x, indices, bounds, y, P, PLACES, EACH, BLOCKS, DX, HX, WX, DY, HY, WY, C,
    x_n, x_d, x_h, x_w, x_c, i_n, i_d, i_h, i_w, i_c, y_n, y_d, y_h, y_w, y_c,
    DEEP: tl.constexpr, WIDE: tl.constexpr, B: tl.constexpr, G: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(C, BC)
    pid = tl.program_id(0).to(tl.int64)
    n = pid // parts
    c = (pid % parts).to(tl.int32) * BC + tl.arange(0, BC)[None, :]
    first = tl.program_id(1) * EACH
    last = tl.minimum(first + EACH, PLACES)
    x += n * x_n + step_to(c, x_c, WIDE)
    y += n * y_n + step_to(c, y_c, WIDE)
    indices += n * i_n
    for start in range(first, last, BP):
        place = start + tl.arange(0, BP)[:, None]
        steps = _steps_to(place, HY, WY, y_d, y_h, y_w, DEEP, WIDE)
        tl.store(y + steps, tl.zeros((BP, BC), y.dtype.element_ty), (place < last) & (c < C))
    tl.debug_barrier()  # what one thread cleared, another fills
    for group in range(0, BLOCKS, G):
        block = group + tl.arange(0, G)
        of_block = bounds + (pid * BLOCKS + block) * 2
        near = tl.load(of_block, block < BLOCKS, other=2147483647) < last
        near &= tl.load(of_block + 1, block < BLOCKS, other=-1) >= first
        if tl.sum(near.to(tl.int32)) > 0:
            for b in range(group, tl.minimum(group + G, BLOCKS)):
                at = _places(indices, b * B, P, HX, WX, C, c, i_d, i_h, i_w, i_c, DEEP, WIDE, B)
                hit = (at >= first) & (at < last)
                # Of several in the block, the last alone is stored. Three are looked up at a time (of B − 1, a multiple): all
                # at once take three times the registers.
                for some in range(1, B, 3):
                    for one in tl.static_range(3):
                        later = some + one
                        other = _places(indices, b * B + later, P, HX, WX, C, c, i_d, i_h, i_w, i_c, DEEP, WIDE, 1)
                        hit &= (other != at) | (tl.arange(0, B)[:, None] >= later)
                p = b * B + tl.arange(0, B)[:, None]
                v = tl.load(x + _steps_to(p, HX, WX, x_d, x_h, x_w, DEEP, WIDE), hit, other=0.0)
                tl.store(y + _steps_to(tl.where(hit, at, 0), HY, WY, y_d, y_h, y_w, DEEP, WIDE), v, hit)
                tl.debug_barrier()  # and before the next block's


@triton.jit
def _max_unpool_backward_kernel(
    dy, indices, dx, M, DX, HX, WX, DY, HY, WY, C, PLACES, dy_n, dy_d, dy_h, dy_w, dy_c, i_n, i_d, i_h, i_w, i_c,
    x_n, x_d, x_h, x_w, x_c, DEEP: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n, d, h, w, c, mask = voxels_of(M, DX, HX, WX, C, DEEP, BP, BC)
    own = tl.load(
        indices + n * i_n + step_to(c, i_c, WIDE) + placed(d, h, w, i_d, i_h, i_w, DEEP, WIDE), mask, other=-1
    )
    there = mask & (own >= 0) & (own < PLACES)
    own = tl.where(there, own, 0).to(tl.int32)
    at = step_to(c, dy_c, WIDE) + _steps_to(own, HY, WY, dy_d, dy_h, dy_w, DEEP, WIDE)
    g = tl.load(dy + n * dy_n + at, there, other=0.0)
    tl.store(dx + n * x_n + step_to(c, x_c, WIDE) + placed(d, h, w, x_d, x_h, x_w, DEEP, WIDE), g, mask)


# --- launches --------------------------------------------------------------------------------------------------------


FORWARD = _configs.rows("max_unpool_forward")
BACKWARD = _configs.rows("max_unpool_backward")


def max_unpool_forward(
    x: Any, indices: Any, *, needs: tuple = (), output_size: tuple, empty: Any
) -> tuple[tuple, dict]:
    y = empty((*x.shape[:2], *output_size), x.dtype, output_order(x))
    source, at, out = image(x), image(indices), image(y)
    n, c, *sizes = source.shape
    pixels, places = math.prod(sizes), math.prod(output_size)
    device, entry = _tile.device(x), FORWARD(_tile.device(x), n * places)
    channels = min(_tile.next_power_of_2(c), 64 if out.stride(1) == 1 else 4)
    rows, blocks, parts = max(16, entry.elements // channels), _tile.cdiv(pixels, BLOCK), n * _tile.cdiv(c, channels)
    # An image is split until every multiprocessor has work for four.
    splits, each = _tile.split(_tile.cdiv(places, rows), max(1, 4 * device.sms // max(1, parts)))
    bounds = empty((parts, blocks, 2), "int32")
    tile = {"DEEP": out.ndim == 5, "WIDE": is_far(source, at, out), "BC": channels, "num_warps": entry.warps}
    _tile.launch(
        _bounds_kernel, (parts, _tile.cdiv(blocks, GROUP)), at, bounds, pixels, *source.shape[-2:], c, blocks,
        *steps_of(at), B=BLOCK, G=GROUP, **tile,
    )  # fmt: skip
    _tile.launch(
        _max_unpool_forward_kernel, (parts, splits), source, at, bounds, out, pixels, places, each * rows, blocks,
        *three(sizes, 1), *three(out.shape[2:], 1), c, *steps_of(source), *steps_of(at), *steps_of(out),
        B=BLOCK, G=GROUP, BP=rows, **tile,
    )  # fmt: skip
    return (y,), {"indices": indices} if needs else {}


def max_unpool_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, output_size: tuple, empty: Any
) -> tuple:
    x = inputs[0]
    dx = empty(x.shape, x.dtype, x.like().order)
    dy, at, out = image(dys[0]), image(saved["indices"]), image(dx)
    grid, tile = pixel_plan(BACKWARD, out, dy, at)
    _tile.launch(
        _max_unpool_backward_kernel, grid, dy, at, out, *sizes_of(out, dy), math.prod(output_size), *steps_of(dy),
        *steps_of(at), *steps_of(out), **tile,
    )  # fmt: skip
    return dx, None
