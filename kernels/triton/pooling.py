"""Pooling. Bound by memory: a window's pixels are read once from memory, and from the L1 cache where windows overlap.

A tile is pixels × channels, wide along what is neighbouring in memory; arrays of any strides are read as they are.
Windows and their steps are constants. Backward gathers: each pixel of x looks up the windows it lies under, so nothing is
added to in turn. Which tap won is one byte for each output (a window of more than 127 taps takes two), where an int64
index would be eight. Adaptive pooling is in ``_adaptive_pooling.py``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget, channels_first
from .._pooling import Divisor, adaptive_avg_pool, avg_pool, max_pool
from .._window import Window
from . import _adaptive_pooling, _configs, _pooling_blocks, _pooling_runs, _tile
from ._adaptive_max import adaptive_max_pool_backward as adaptive_max_pool_backward
from ._adaptive_max import adaptive_max_pool_forward as adaptive_max_pool_forward
from ._fractional_max import fractional_max_pool_backward as fractional_max_pool_backward
from ._fractional_max import fractional_max_pool_forward as fractional_max_pool_forward
from ._lp_pool import lp_pool_backward as lp_pool_backward
from ._lp_pool import lp_pool_forward as lp_pool_forward
from ._pixels import pixel_plan, placed, sizes_of, step_to, steps_of, voxels_of
from ._unpooling import max_unpool_backward as max_unpool_backward
from ._unpooling import max_unpool_forward as max_unpool_forward
from ._windows import WIDEST, backward_constants, covered, forward_constants

BUDGETS = {
    "_max_pool_forward_kernel": Budget(registers=224, blocks=2, narrow=channels_first),
    "_max_pool_backward_kernel": Budget(registers=224, blocks=2, narrow=channels_first),
    "_avg_pool_forward_kernel": Budget(registers=168, blocks=3, narrow=channels_first),
    "_avg_pool_backward_kernel": Budget(registers=240, blocks=2, narrow=channels_first),
}


@triton.jit
def _max_pool_forward_kernel(
    x, y, won, indices,
    M, DY, HY, WY, DX, HX, WX, C, x_n, x_d, x_h, x_w, x_c, y_n, y_d, y_h, y_w, y_c,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    FRONT: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, DD: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    UNROLL: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n, k, i, j, c, mask = voxels_of(M, DY, HY, WY, C, DEEP, BP, BC)
    x += n * x_n + step_to(c, x_c, WIDE)  # (BP, BC)
    best = tl.full((BP, BC), float("-inf"), tl.float32)
    tap = tl.full((BP, BC), -1, tl.int32)
    for z in range(KD):
        d = k * SD - FRONT + z * DD
        for r in range(KH):
            h = i * SH - TOP + r * DH
            row = mask & (h >= 0) & (h < HX)
            if DEEP:
                row &= (d >= 0) & (d < DX)
            for first in range(0, KW, UNROLL):
                for u in tl.static_range(UNROLL):
                    q = first + u
                    w = j * SW - LEFT + q * DW
                    there = row & (w >= 0) & (w < WX) & (q < KW)
                    at = placed(d, h, w, x_d, x_h, x_w, DEEP, WIDE)
                    v = tl.load(x + at, there, other=float("-inf")).to(tl.float32)
                    better = there & ((v > best) | (v != v) | (tap < 0))
                    best = tl.where(better, v, best)
                    tap = tl.where(better, (z * KH + r) * KW + q, tap)
    place = n * y_n + step_to(c, y_c, WIDE) + placed(k, i, j, y_d, y_h, y_w, DEEP, WIDE)
    tl.store(y + place, best.to(y.dtype.element_ty), mask)
    if won is not None:
        tl.store(won + place, tap.to(won.dtype.element_ty), mask)
    if indices is not None:
        row = (i * SH - TOP + tap // KW % KH * DH).to(tl.int64)
        if DEEP:
            row += (k * SD - FRONT + tap // (KW * KH) * DD).to(tl.int64) * HX
        index = row * WX + (j * SW - LEFT + tap % KW * DW)
        tl.store(indices + place, tl.where(tap < 0, -1, index), mask)


@triton.jit
def _max_pool_backward_kernel(
    dy, won, dx,
    M, DX, HX, WX, DY, HY, WY, C, dy_n, dy_d, dy_h, dy_w, dy_c, won_n, won_d, won_h, won_w, won_c, x_n, x_d, x_h, x_w, x_c,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    FRONT: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, DD: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    LAPS_D: tl.constexpr, LAPS_H: tl.constexpr, LAPS_W: tl.constexpr, UNROLL: tl.constexpr,
    DEEP: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """LAPS: windows that a pixel may lie under, along each axis; the last of them starts at (h + TOP) // SH."""
    n, d, h, w, c, mask = voxels_of(M, DX, HX, WX, C, DEEP, BP, BC)
    dy += n * dy_n + step_to(c, dy_c, WIDE)
    won += n * won_n + step_to(c, won_c, WIDE)
    acc = tl.zeros((BP, BC), tl.float32)
    for e in range(LAPS_D):
        k = (d + FRONT) // SD - e
        back = d + FRONT - k * SD  # from the window's first slice
        z = back // DD
        for a in range(LAPS_H):
            i = (h + TOP) // SH - a
            down = h + TOP - i * SH
            r = down // DH
            row = (i >= 0) & (i < HY) & (r * DH == down) & (r < KH)
            tap_of_row = r * KW
            if DEEP:
                row &= (k >= 0) & (k < DY) & (z * DD == back) & (z < KD)
                tap_of_row += z * (KH * KW)
            for first in range(0, LAPS_W, UNROLL):
                for b in tl.static_range(UNROLL):
                    j = (w + LEFT) // SW - (first + b)
                    right = w + LEFT - j * SW
                    q = right // DW
                    hit = mask & row & (j >= 0) & (j < WY) & (q * DW == right) & (q < KW)
                    tap = tl.load(won + placed(k, i, j, won_d, won_h, won_w, DEEP, WIDE), hit, other=-1)
                    g = tl.load(dy + placed(k, i, j, dy_d, dy_h, dy_w, DEEP, WIDE), hit, other=0.0).to(tl.float32)
                    acc += tl.where(hit & (tap == tap_of_row + q), g, 0.0)
    place = n * x_n + step_to(c, x_c, WIDE) + placed(d, h, w, x_d, x_h, x_w, DEEP, WIDE)
    tl.store(dx + place, acc.to(dx.dtype.element_ty), mask)


@triton.jit
def _avg_pool_forward_kernel(
    x, y,
    M, DY, HY, WY, DX, HX, WX, C, x_n, x_d, x_h, x_w, x_c, y_n, y_d, y_h, y_w, y_c, DIVISOR,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    FRONT: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, OVERRIDE: tl.constexpr, INCLUDE_PAD: tl.constexpr,
    UNROLL: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n, k, i, j, c, mask = voxels_of(M, DY, HY, WY, C, DEEP, BP, BC)
    x += n * x_n + step_to(c, x_c, WIDE)
    acc = tl.zeros((BP, BC), tl.float32)
    for z in range(KD):
        d = k * SD - FRONT + z
        for r in range(KH):
            h = i * SH - TOP + r
            row = mask & (h >= 0) & (h < HX)
            if DEEP:
                row &= (d >= 0) & (d < DX)
            for first in range(0, KW, UNROLL):
                for u in tl.static_range(UNROLL):
                    w = j * SW - LEFT + (first + u)
                    there = row & (w >= 0) & (w < WX) & (first + u < KW)
                    at = placed(d, h, w, x_d, x_h, x_w, DEEP, WIDE)
                    acc += tl.load(x + at, there, other=0.0).to(tl.float32)
    if OVERRIDE:
        acc = acc / DIVISOR
    else:
        count = covered(i, HX, KH, SH, TOP, INCLUDE_PAD) * covered(j, WX, KW, SW, LEFT, INCLUDE_PAD)
        if DEEP:
            count *= covered(k, DX, KD, SD, FRONT, INCLUDE_PAD)
        acc = acc / count.to(tl.float32)
    place = n * y_n + step_to(c, y_c, WIDE) + placed(k, i, j, y_d, y_h, y_w, DEEP, WIDE)
    tl.store(y + place, acc.to(y.dtype.element_ty), mask)


@triton.jit
def _avg_pool_backward_kernel(
    dy, dx,
    M, DX, HX, WX, DY, HY, WY, C, dy_n, dy_d, dy_h, dy_w, dy_c, x_n, x_d, x_h, x_w, x_c, DIVISOR,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    FRONT: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, OVERRIDE: tl.constexpr, INCLUDE_PAD: tl.constexpr,
    LAPS_D: tl.constexpr, LAPS_H: tl.constexpr, LAPS_W: tl.constexpr, UNROLL: tl.constexpr,
    DEEP: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n, d, h, w, c, mask = voxels_of(M, DX, HX, WX, C, DEEP, BP, BC)
    dy += n * dy_n + step_to(c, dy_c, WIDE)
    acc = tl.zeros((BP, BC), tl.float32)
    for e in range(LAPS_D):
        k = (d + FRONT) // SD - e
        for a in range(LAPS_H):
            i = (h + TOP) // SH - a
            row = (i >= 0) & (i < HY) & (h + TOP - i * SH < KH)
            count = covered(i, HX, KH, SH, TOP, INCLUDE_PAD)
            if DEEP:
                row &= (k >= 0) & (k < DY) & (d + FRONT - k * SD < KD)
                count *= covered(k, DX, KD, SD, FRONT, INCLUDE_PAD)
            for first in range(0, LAPS_W, UNROLL):
                for b in tl.static_range(UNROLL):
                    j = (w + LEFT) // SW - (first + b)
                    hit = mask & row & (j >= 0) & (j < WY) & (w + LEFT - j * SW < KW)
                    at = placed(k, i, j, dy_d, dy_h, dy_w, DEEP, WIDE)
                    g = tl.load(dy + at, hit, other=0.0).to(tl.float32)
                    if OVERRIDE:
                        acc += g / DIVISOR
                    else:
                        by = count * covered(j, WX, KW, SW, LEFT, INCLUDE_PAD)
                        acc += tl.where(hit, g / by.to(tl.float32), 0.0)
    place = n * x_n + step_to(c, x_c, WIDE) + placed(d, h, w, x_d, x_h, x_w, DEEP, WIDE)
    tl.store(dx + place, acc.to(dx.dtype.element_ty), mask)


# --- launches --------------------------------------------------------------------------------------------------------


MAX_FORWARD = _configs.rows("max_pool_forward")
MAX_BACKWARD = _configs.rows("max_pool_backward")
AVG_FORWARD = _configs.rows("avg_pool_forward")
AVG_BACKWARD = _configs.rows("avg_pool_backward")
PLAIN = ("kernel", "stride", "padding")
DILATED = (*PLAIN, "dilation")


def _max_forward(x: Any, y: Any, tap: Any, indices: Any, window: Window, empty: Any) -> None:
    if indices is None and _pooling_runs.max_forward(MAX_FORWARD, x, y, tap, window):
        return
    if _pooling_blocks.max_forward(MAX_FORWARD, x, y, tap, indices, window):
        return
    grid, tile = pixel_plan(MAX_FORWARD, y, x)
    _tile.launch(
        _max_pool_forward_kernel, grid, x, y, tap, indices, *sizes_of(y, x), *steps_of(x), *steps_of(y),
        **forward_constants(window, *DILATED), **tile,
    )  # fmt: skip


def _max_backward(dy: Any, tap: Any, dx: Any, window: Window) -> None:
    if _pooling_runs.max_backward(MAX_BACKWARD, dy, tap, dx, window) or _pooling_blocks.max_backward(
        MAX_BACKWARD, dy, tap, dx, window
    ):
        return
    grid, tile = pixel_plan(MAX_BACKWARD, dx, dy, tap)
    _tile.launch(
        _max_pool_backward_kernel, grid, dy, tap, dx, *sizes_of(dx, dy), *steps_of(dy), *steps_of(tap), *steps_of(dx),
        **backward_constants(window, *DILATED), **tile,
    )  # fmt: skip


def _divided_by(divisor: Divisor) -> dict:
    return {"OVERRIDE": divisor.override is not None, "INCLUDE_PAD": divisor.include_pad}


def _avg_forward(x: Any, y: Any, window: Window, divisor: Divisor) -> None:
    if _pooling_runs.avg_forward(AVG_FORWARD, x, y, window, divisor) or _pooling_blocks.avg_forward(
        AVG_FORWARD, x, y, window, divisor
    ):
        return
    grid, tile = pixel_plan(AVG_FORWARD, y, x)
    _tile.launch(
        _avg_pool_forward_kernel, grid, x, y, *sizes_of(y, x), *steps_of(x), *steps_of(y), float(divisor.override or 1),
        **forward_constants(window, *PLAIN), **_divided_by(divisor), **tile,
    )  # fmt: skip


def _avg_backward(dy: Any, dx: Any, window: Window, divisor: Divisor) -> None:
    if _pooling_runs.avg_backward(AVG_BACKWARD, dy, dx, window, divisor) or _pooling_blocks.avg_backward(
        AVG_BACKWARD, dy, dx, window, divisor
    ):
        return
    grid, tile = pixel_plan(AVG_BACKWARD, dx, dy)
    _tile.launch(
        _avg_pool_backward_kernel, grid, dy, dx, *sizes_of(dx, dy), *steps_of(dy), *steps_of(dx), float(divisor.override or 1),
        **backward_constants(window, *PLAIN), **_divided_by(divisor), **tile,
    )  # fmt: skip


max_pool_forward, max_pool_backward = max_pool(_max_forward, _max_backward)
avg_pool_forward, avg_pool_backward = avg_pool(_avg_forward, _avg_backward)
adaptive_avg_pool_forward, adaptive_avg_pool_backward = adaptive_avg_pool(
    (avg_pool_forward, avg_pool_backward), _adaptive_pooling.avg_forward, _adaptive_pooling.avg_backward, WIDEST
)
