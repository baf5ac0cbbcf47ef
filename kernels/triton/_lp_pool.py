"""Pooling by a norm: as means of powers. Backward gathers."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .._budget import Budget, channels_first
from .._pooling import pooling_window
from .._window import Window, image, output_order
from . import _configs, _tile
from ._pixels import pixel_plan, placed, sizes_of, step_to, steps_of, voxels_of
from ._windows import backward_constants, forward_constants

BUDGETS = {
    "_lp_pool_forward_kernel": Budget(registers=208, blocks=2, narrow=channels_first),
    "_lp_pool_backward_kernel": Budget(registers=255, narrow=channels_first),
}


@triton.jit
def _power(x, p, SQUARE: tl.constexpr):
    if SQUARE:
        return x * x
    else:
        return libdevice.pow(x, tl.zeros_like(x) + p)


@triton.jit
def _weight(i, size, STRIDE: tl.constexpr, K: tl.constexpr):
    """Taps of window i by those on the image: a window that hangs over its end is scaled up."""
    return K / (tl.minimum(i * STRIDE + K, size) - i * STRIDE).to(tl.float32)


@triton.jit
def _lp_pool_forward_kernel(
    x, y,
    M, DY, HY, WY, DX, HX, WX, C, x_n, x_d, x_h, x_w, x_c, y_n, y_d, y_h, y_w, y_c, P,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    SQUARE: tl.constexpr, UNROLL: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n, k, i, j, c, mask = voxels_of(M, DY, HY, WY, C, DEEP, BP, BC)
    x += n * x_n + step_to(c, x_c, WIDE)
    acc = tl.zeros((BP, BC), tl.float32)
    for z in range(KD):
        d = k * SD + z
        for r in range(KH):
            h = i * SH + r
            row = mask & (h < HX)
            if DEEP:
                row &= d < DX
            for first in range(0, KW, UNROLL):
                for u in tl.static_range(UNROLL):
                    w = j * SW + (first + u)
                    there = row & (w < WX) & (first + u < KW)
                    v = tl.load(x + placed(d, h, w, x_d, x_h, x_w, DEEP, WIDE), there, other=0.0).to(tl.float32)
                    acc += tl.where(there, _power(v, P, SQUARE), 0.0)
    by = _weight(i, HX, SH, KH) * _weight(j, WX, SW, KW)
    if DEEP:
        by *= _weight(k, DX, SD, KD)
    acc = acc * by
    if SQUARE:
        acc = tl.sqrt_rn(acc)
    else:
        acc = tl.where(acc == 0, 0.0, libdevice.pow(acc, tl.zeros_like(acc) + 1 / P))
    place = n * y_n + step_to(c, y_c, WIDE) + placed(k, i, j, y_d, y_h, y_w, DEEP, WIDE)
    tl.store(y + place, acc.to(y.dtype.element_ty), mask)


@triton.jit
def _lp_pool_backward_kernel(
    dy, x, y, dx,
    M, DX, HX, WX, DY, HY, WY, C, dy_n, dy_d, dy_h, dy_w, dy_c, x_n, x_d, x_h, x_w, x_c, y_n, y_d, y_h, y_w, y_c,
    dx_n, dx_d, dx_h, dx_w, dx_c, P,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    LAPS_D: tl.constexpr, LAPS_H: tl.constexpr, LAPS_W: tl.constexpr, UNROLL: tl.constexpr,
    SQUARE: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Of a window whose norm is 0 nothing goes back, as in torch; nor of one that is NaN where P is 1."""
    n, d, h, w, c, mask = voxels_of(M, DX, HX, WX, C, DEEP, BP, BC)
    dy += n * dy_n + step_to(c, dy_c, WIDE)
    y += n * y_n + step_to(c, y_c, WIDE)
    acc = tl.zeros((BP, BC), tl.float32)
    for e in range(LAPS_D):
        k = d // SD - e
        for a in range(LAPS_H):
            i = h // SH - a
            row = mask & (i >= 0) & (i < HY) & (h - i * SH < KH)
            by = _weight(i, HX, SH, KH)
            if DEEP:
                row &= (k >= 0) & (k < DY) & (d - k * SD < KD)
                by *= _weight(k, DX, SD, KD)
            for first in range(0, LAPS_W, UNROLL):
                for b in tl.static_range(UNROLL):
                    j = w // SW - (first + b)
                    hit = row & (j >= 0) & (j < WY) & (w - j * SW < KW)
                    g = tl.load(dy + placed(k, i, j, dy_d, dy_h, dy_w, DEEP, WIDE), hit, other=0.0).to(tl.float32)
                    norm = tl.load(y + placed(k, i, j, y_d, y_h, y_w, DEEP, WIDE), hit, other=0.0).to(tl.float32)
                    if SQUARE:
                        scale = 1 / norm
                    else:
                        scale = libdevice.pow(norm, tl.zeros_like(norm) + (1 - P))
                    acc += tl.where(
                        hit & (norm != 0) & ((norm == norm) | (P != 1)), g * (by * _weight(j, WX, SW, KW)) * scale, 0.0
                    )
    v = tl.load(x + n * x_n + step_to(c, x_c, WIDE) + placed(d, h, w, x_d, x_h, x_w, DEEP, WIDE), mask, other=0.0)
    v = v.to(tl.float32)
    if not SQUARE:
        v = libdevice.pow(v, tl.zeros_like(v) + (P - 1))
    place = n * dx_n + step_to(c, dx_c, WIDE) + placed(d, h, w, dx_d, dx_h, dx_w, DEEP, WIDE)
    tl.store(dx + place, (acc * v).to(dx.dtype.element_ty), mask)


FORWARD = _configs.rows("lp_pool_forward")
BACKWARD = _configs.rows("lp_pool_backward")


def lp_pool_forward(
    x: Any, *, needs: tuple = (), norm_type: float, kernel_size: tuple, stride: tuple, ceil_mode: bool, empty: Any
) -> tuple[tuple, dict]:
    zeros, ones = (0,) * len(stride), (1,) * len(stride)
    size = Window(kernel_size, stride, zeros, ones).output_size(x.shape[2:], zeros, ceil_mode)
    y = empty((*x.shape[:2], *size), x.dtype, output_order(x))
    source, out = image(x), image(y)
    grid, tile = pixel_plan(FORWARD, out, source)
    _tile.launch(
        _lp_pool_forward_kernel, grid, source, out, *sizes_of(out, source), *steps_of(source), *steps_of(out), norm_type,
        SQUARE=norm_type == 2, **forward_constants(pooling_window(kernel_size, stride, zeros), "kernel", "stride"), **tile,
    )  # fmt: skip
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
    empty: Any,
) -> tuple:
    dx = empty(inputs[0].shape, inputs[0].dtype, inputs[0].like().order)
    dy, x, y, out = image(dys[0]), image(saved["x"]), image(saved["y"]), image(dx)
    window = pooling_window(kernel_size, stride, (0,) * len(stride))
    grid, tile = pixel_plan(BACKWARD, out, dy, x, y)
    _tile.launch(
        _lp_pool_backward_kernel, grid, dy, x, y, out, *sizes_of(out, dy), *steps_of(dy), *steps_of(x), *steps_of(y),
        *steps_of(out), norm_type, SQUARE=norm_type == 2, **backward_constants(window, "kernel", "stride"), **tile,
    )  # fmt: skip
    return (dx,)
