"""Maxima of so many parts, whose places are kept. Backward gathers: each pixel of x asks the parts (or, of fractional pooling,
the windows) that it lies in which pixel won."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget, channels_first
from .._window import image, output_order
from . import _configs, _tile
from ._adaptive_pooling import GLOBAL_FORWARD, is_long, most, part
from ._image import as_images, evenly_spaced, pixel_tile, steps
from ._pixels import pixel_plan, placed, sizes_of, step_to, steps_of, voxels_of

BUDGETS = {
    "_adaptive_max_pool_kernel": Budget(registers=208, blocks=2, narrow=channels_first),
    # Of a part's maxima, which come with places, there are few.
    "_global_max_pool_kernel": Budget(registers=160, blocks=3, narrow=lambda c: "" if "of" in c else "loads"),
    "_won_pool_backward_kernel": Budget(registers=240, blocks=2, narrow=channels_first),
}


@triton.jit
def kept(
    y, index, indices, best, won, n, k, i, j, c, mask, y_n, y_d, y_h, y_w, y_c, DEEP: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    place = n * y_n + step_to(c, y_c, WIDE) + placed(k, i, j, y_d, y_h, y_w, DEEP, WIDE)
    tl.store(y + place, best.to(y.dtype.element_ty), mask)
    if index is not None:
        tl.store(index + place, won, mask)
    if indices is not None:
        tl.store(indices + place, won.to(tl.int64), mask)


@triton.jit
def _adaptive_max_pool_kernel(
    x, y, index, indices,
    M, DY, HY, WY, DX, HX, WX, C, x_n, x_d, x_h, x_w, x_c, y_n, y_d, y_h, y_w, y_c, MOST_D, MOST_H, MOST_W,
    LONG: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n, k, i, j, c, mask = voxels_of(M, DY, HY, WY, C, DEEP, BP, BC)
    front, back = part(k, DY, DX, LONG)
    top, bottom = part(i, HY, HX, LONG)
    left, right = part(j, WY, WX, LONG)
    x += n * x_n + step_to(c, x_c, WIDE)
    best = tl.full((BP, BC), float("-inf"), tl.float32)
    won = tl.full((BP, BC), -1, tl.int32)
    for z in range(MOST_D if DEEP else 1):
        d = front + z
        for r in range(MOST_H):
            h = top + r
            row = mask & (h < bottom)
            first = h * WX
            if DEEP:
                row &= d < back
                first += d * HX * WX
            for q in range(MOST_W):
                w = left + q
                there = row & (w < right)
                at = placed(d, h, w, x_d, x_h, x_w, DEEP, WIDE)
                v = tl.load(x + at, there, other=float("-inf")).to(tl.float32)
                better = there & ((v > best) | (v != v) | (won < 0))
                best = tl.where(better, v, best)
                won = tl.where(better, first + w, won)
    kept(y, index, indices, best, won, n, k, i, j, c, mask, y_n, y_d, y_h, y_w, y_c, DEEP, WIDE)


@triton.jit
def _global_max_pool_kernel(
    x, of, y, index, indices, P, EACH, C, W, x_n, x_h, x_w, x_c, y_s, y_n, y_c,
    EVEN: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y[s, n, c] = the maximum of the s-th EACH pixels of x[n, c, pixel]; its place is the pixel, or what ``of`` has there.

    Lanes walk forward, so that each has the first of its equal maxima, or its last NaN.
    """
    blocks = tl.cdiv(C, BC)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)[None, :]  # (1, BC)
    split = tl.program_id(1).to(tl.int64)
    begin = split * EACH
    end = tl.minimum(begin + EACH, P)
    channel = n * x_n + c.to(tl.int64) * x_c
    best = tl.full((BP, BC), float("-inf"), tl.float32)
    won = tl.full((BP, BC), -1, tl.int32)
    for start in range(begin, end, BP):
        p = start + tl.arange(0, BP)[:, None]  # (BP, 1)
        at = channel + (p * x_w if EVEN else p // W * x_h + p % W * x_w)
        there = (p < end) & (c < C)
        v = tl.load(x + at, there, other=float("-inf")).to(tl.float32)
        place = p.to(tl.int32) if of is None else tl.load(of + at, there, other=-1)
        better = there & ((v > best) | (v != v) | (won < 0))
        best = tl.where(better, v, best)
        won = tl.where(better, place, won)
    none = tl.max(tl.where(best != best, won, -1), 0, keep_dims=True)  # the last NaN
    top = tl.max(tl.where(best != best, float("-inf"), best), 0, keep_dims=True)
    place = tl.min(tl.where((best == top) & (won >= 0), won, 2147483647), 0, keep_dims=True)
    best = tl.max(tl.where(won == place, best, float("-inf")), 0, keep_dims=True)  # its zero has its sign
    to, inside = split * y_s + n * y_n + c.to(tl.int64) * y_c, c < C
    tl.store(y + to, tl.where(none >= 0, float("nan"), best).to(y.dtype.element_ty), inside)
    place = tl.where(none >= 0, none, place)
    if index is not None:
        tl.store(index + to, place, inside)
    if indices is not None:
        tl.store(indices + to, place.to(tl.int64), inside)


@triton.jit
def _first(h, SIZE, OUT, K: tl.constexpr, LONG: tl.constexpr):
    """The first part of an axis that row (or column) h lies in; K > 0: the first window of so many that may lie over it, as
    they begin within a pixel of equal steps."""
    if K > 0:
        behind = tl.maximum(h - K, 0)
        return ((behind.to(tl.int64) if LONG else behind) * (OUT - 1) // tl.maximum(SIZE - K, 1)).to(tl.int32)
    else:
        first, _last = part(h, SIZE, OUT, LONG)
        return first


@triton.jit
def _won_pool_backward_kernel(
    dy, index, dx,
    M, DX, HX, WX, DY, HY, WY, C, dy_n, dy_d, dy_h, dy_w, dy_c, i_n, i_d, i_h, i_w, i_c, x_n, x_d, x_h, x_w, x_c,
    MOST_D, MOST_H, MOST_W, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    LONG: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """MOST: parts along each axis that a pixel may lie in; of others than its own, none has it as its maximum."""
    n, d, h, w, c, mask = voxels_of(M, DX, HX, WX, C, DEEP, BP, BC)
    dy += n * dy_n + step_to(c, dy_c, WIDE)
    index += n * i_n + step_to(c, i_c, WIDE)
    own = h * WX + w
    if DEEP:
        own += d * HX * WX
    acc = tl.zeros((BP, BC), tl.float32)
    front, top, left = _first(d, DX, DY, KD, LONG), _first(h, HX, HY, KH, LONG), _first(w, WX, WY, KW, LONG)
    for e in range(MOST_D if DEEP else 1):
        k = front + e
        for a in range(MOST_H):
            i = top + a
            row = mask & (i < HY)
            if DEEP:
                row &= k < DY
            for b in range(MOST_W):
                j = left + b
                hit = row & (j < WY)
                won = tl.load(index + placed(k, i, j, i_d, i_h, i_w, DEEP, WIDE), hit, other=-1)
                hit &= won == own
                acc += tl.load(dy + placed(k, i, j, dy_d, dy_h, dy_w, DEEP, WIDE), hit, other=0.0).to(tl.float32)
    place = n * x_n + step_to(c, x_c, WIDE) + placed(d, h, w, x_d, x_h, x_w, DEEP, WIDE)
    tl.store(dx + place, acc.to(dx.dtype.element_ty), mask)


# --- launches --------------------------------------------------------------------------------------------------------


ADAPTIVE = _configs.rows("adaptive_max_pool_forward")
BACKWARD = _configs.rows("won_pool_backward")


def outputs(x: Any, size: tuple, needs: tuple, return_indices: bool, empty: Any) -> list:
    """[y, index or None, indices or None]."""
    shape, order = (*x.shape[:2], *size), output_order(x)
    index = empty(shape, "int32", order) if needs else None
    return [empty(shape, x.dtype, order), index, empty(shape, "int64", order) if return_indices else None]


def views(arrays: list) -> list:
    return [a if a is None else image(a) for a in arrays]


def returned(y: Any, index: Any, indices: Any) -> tuple[tuple, dict]:
    return (y,) if indices is None else (y, indices), {} if index is None else {"index": index}


def gathered(dy: Any, index: Any, x: Any, empty: Any, kernel: tuple = (0, 0, 0), laps: tuple = ()) -> Any:
    """dx of index, the places that won: of parts, or of windows of random steps, of which so many lie over a pixel."""
    dx = empty(x.shape, x.dtype, x.like().order)
    dy, index, out = image(dy), image(index), image(dx)
    grid, tile = pixel_plan(BACKWARD, out, dy, index)
    _tile.launch(
        _won_pool_backward_kernel, grid, dy, index, out, *sizes_of(out, dy), *steps_of(dy), *steps_of(index),
        *steps_of(out), *(laps or most(dy, out)), **dict(zip(("KD", "KH", "KW"), kernel)), LONG=is_long(dy, out), **tile,
    )  # fmt: skip
    return dx


def _global_max(x: Any, of: Any, found: list, empty: Any) -> None:
    """[y, index or None, indices or None] of one part, an image (N, C, H, W); of: places of its pixels, strides as x's."""
    n, c, h, w = x.shape
    device = _tile.device(x)
    entry = GLOBAL_FORWARD(device, h * w)
    pixels, channels = pixel_tile(x, h * w, entry.elements)
    blocks, rounds = _tile.cdiv(c, channels), _tile.cdiv(h * w, pixels)
    # Few large images are split, so that every multiprocessor has work; a second stage finds the greatest of the parts'.
    splits, each = _tile.split(rounds, max(1, min(device.sms // max(1, n * blocks), rounds // 4)))
    parts = None
    if splits != 1:
        parts = [empty((splits, n, 1, c), kind).permute(1, 3, 2, 0) for kind in ("float32", "int32")]
    y, *places = found if parts is None else (*parts, None)
    _tile.launch(
        _global_max_pool_kernel, (n * blocks, splits), x, of, y, *places, h * w, each * pixels, c, w, *steps(x),
        n * c, y.stride(0), y.stride(1), EVEN=evenly_spaced(x), BP=pixels, BC=channels, num_warps=entry.warps,
    )  # fmt: skip
    if parts is not None:
        _global_max(*parts, found, empty)


def adaptive_max_pool_forward(
    x: Any, *, needs: tuple = (), output_size: tuple, return_indices: bool, empty: Any
) -> tuple[tuple, dict]:
    found = outputs(x, output_size, needs, return_indices, empty)
    if math.prod(output_size) == 1:
        _global_max(as_images(image(x), empty), None, found, empty)
        return returned(*found)
    source, (y, index, indices) = image(x), views(found)
    grid, tile = pixel_plan(ADAPTIVE, y, source)
    _tile.launch(
        _adaptive_max_pool_kernel, grid, source, y, index, indices, *sizes_of(y, source), *steps_of(source), *steps_of(y),
        *most(source, y), LONG=is_long(source, y), **tile,
    )  # fmt: skip
    return returned(*found)


def adaptive_max_pool_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, output_size: tuple, return_indices: bool, empty: Any
) -> tuple:
    return (gathered(dys[0], saved["index"], inputs[0], empty),)
