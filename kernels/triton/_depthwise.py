"""Depthwise convolution: every output channel sees one input channel. Bound by memory, so a direct sum over the taps.

A tile is pixels × channels, wide along what is neighbouring in memory; arrays of any strides are read as they are. The
taps of neighbouring pixels overlap, and the L1 cache serves all but the first read.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget, channels_first
from . import _configs, _tile
from ._conv import Walk
from ._epilogue import Epilogue, finished
from ._image import finish, pixel_tile, pixels_of, steps


def _narrow(c: dict[str, Any]) -> str:
    """Channels first, or channels whose number 16 does not divide: no row of theirs is known to begin at 16 bytes."""
    return "loads, stores" if {"C", "O"} & c["odd"] else channels_first(c)


BUDGETS = {
    "_depthwise_forward_kernel": Budget(registers=255, blocks=2, narrow=_narrow),
    "_depthwise_input_kernel": Budget(registers=255, blocks=2, narrow=_narrow),
    # Sums over taps are few, and stored channel by channel.
    "_depthwise_weight_kernel": Budget(registers=136, blocks=2, narrow=lambda c: f"stores, {_narrow(c)}"),
}


@triton.jit
def _depthwise_forward_kernel(
    x, weight, bias, scale, residual, kept, y,
    M, DY, HY, WY, DX, HX, WX, O, MANY,
    x_n, x_d, x_h, x_w, x_c, w_o, w_d, w_h, w_w, y_n, y_d, y_h, y_w, y_c,
    SD, SH, SW, D0, H0, W0, DD, DH, DW,
    DEEP: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """DEEP: there is a third spatial axis; without it KD is 1. kept: where y before f goes."""
    n, i, j, o, mask = pixels_of(M, DY * HY * WY, WY, O, BP, BC)
    if DEEP:
        z = i // HY
        i = i % HY
    rows = x + n * x_n + (o // MANY).to(tl.int64) * x_c  # (BP, BC)
    acc = tl.zeros((BP, BC), tl.float32)
    taps = weight + o.to(tl.int64) * w_o
    for each in range(KD * KH):
        r = each
        line = rows
        hit = mask
        of_line = taps
        if DEEP:
            r = each % KH
            d = z * SD + D0 + each // KH * DD
            hit = hit & (d >= 0) & (d < DX)
            line = line + d.to(tl.int64) * x_d
            of_line = of_line + each // KH * w_d
        h = i * SH + H0 + r * DH
        for q in tl.static_range(KW):
            w = j * SW + W0 + q * DW
            there = hit & (h >= 0) & (h < HX) & (w >= 0) & (w < WX)
            v = tl.load(line + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w, there, other=0.0).to(tl.float32)
            tap = tl.load(of_line + r * w_h + q * w_w, o < O, other=0.0).to(tl.float32)
            acc += v * tap
    if scale is not None:
        acc *= tl.load(scale + o, o < O, other=0.0).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + o, o < O, other=0.0).to(tl.float32)
    at = n * y_n + i.to(tl.int64) * y_h + j.to(tl.int64) * y_w
    place = y + n * y_n + i.to(tl.int64) * y_h + j.to(tl.int64) * y_w + o.to(tl.int64) * y_c
    if DEEP:
        at += z.to(tl.int64) * y_d
        place += z.to(tl.int64) * y_d
    acc = finished(acc, residual, kept, at, o.to(tl.int64) * y_c, mask, False, ACTIVATION, NUMBER_A, NUMBER_B)
    tl.store(place, acc.to(y.dtype.element_ty), mask)


@triton.jit
def _depthwise_input_kernel(
    dy, weight, bias, scale, residual, kept, dx,
    M, DX, HX, WX, DY, HY, WY, C, MANY,
    dy_n, dy_d, dy_h, dy_w, dy_c, w_o, w_d, w_h, w_w, x_n, x_d, x_h, x_w, x_c,
    SD, SH, SW, FRONT, TOP, LEFT, DD, DH, DW,
    DEEP: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx[pixel, c] = Σ_{o of c, tap} dy[the pixel whose tap this is, o] · weight[o, tap], and its epilogue."""
    n, h, w, c, mask = pixels_of(M, DX * HX * WX, WX, C, BP, BC)
    if DEEP:
        d = h // HX
        h = h % HX
    acc = tl.zeros((BP, BC), tl.float32)
    for line in range(KD * KH):
        r = line
        images = dy + n * dy_n
        taps = weight
        reached = mask
        if DEEP:
            r = line % KH
            behind = d + FRONT - line // KH * DD
            z = behind // SD
            reached = reached & (behind >= 0) & (z * SD == behind) & (z < DY)
            images = images + z.to(tl.int64) * dy_d
            taps = taps + line // KH * w_d
        down = h + TOP - r * DH
        i = down // SH
        for q in tl.static_range(KW):
            right = w + LEFT - q * DW
            j = right // SW
            hit = (down >= 0) & (i * SH == down) & (i < HY) & (right >= 0) & (j * SW == right) & (j < WY)
            for each in range(0, MANY):
                o = c * MANY + each
                place = images + i.to(tl.int64) * dy_h + j.to(tl.int64) * dy_w + o.to(tl.int64) * dy_c
                g = tl.load(place, reached & hit, other=0.0).to(tl.float32)
                tap = tl.load(taps + o.to(tl.int64) * w_o + r * w_h + q * w_w, c < C, other=0.0).to(tl.float32)
                acc += g * tap
    if scale is not None:
        acc *= tl.load(scale + c, c < C, other=0.0).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + c, c < C, other=0.0).to(tl.float32)
    at = n * x_n + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w
    place = dx + n * x_n + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w + c.to(tl.int64) * x_c
    if DEEP:
        at += d.to(tl.int64) * x_d
        place += d.to(tl.int64) * x_d
    acc = finished(acc, residual, kept, at, c.to(tl.int64) * x_c, mask, False, ACTIVATION, NUMBER_A, NUMBER_B)
    tl.store(place, acc.to(dx.dtype.element_ty), mask)


@triton.jit
def _depthwise_weight_kernel(
    dy, x, partial,
    M, EACH, DY, HY, WY, DX, HX, WX, O, MANY, KH, KW, TAPS,
    dy_n, dy_d, dy_h, dy_w, dy_c, x_n, x_d, x_h, x_w, x_c,
    SD, SH, SW, D0, H0, W0, DD, DH, DW,
    DEEP: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """partial[s, o, tap] = Σ over the s-th EACH pixels of dy[pixel, o] · x[pixel under tap, channel of o]."""
    split = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BC + tl.arange(0, BC)[None, None, :]  # (1, 1, BC)
    tap = tl.program_id(2) * BT + tl.arange(0, BT)[:, None, None]  # (BT, 1, 1)
    down, right = tap // KW, tap % KW * DW + W0
    P = HY * WY
    if DEEP:
        deep = down // KH * DD + D0
        down = down % KH
        P = P * DY
    down = down * DH + H0
    dy += o.to(tl.int64) * dy_c
    x += (o // MANY).to(tl.int64) * x_c
    first = split * EACH
    last = tl.minimum(first + EACH, M)
    acc = tl.zeros((BT, BP, BC), tl.float32)
    for start in range(first, last, BP):
        local = (start % P).to(tl.int32) + tl.arange(0, BP)[None, :, None]  # (1, BP, 1)
        n, pixel = start // P + local // P, local % P
        i, j = pixel // WY, pixel % WY
        mask = (start + tl.arange(0, BP)[None, :, None] < last) & (o < O)
        g_images, x_images = dy + n * dy_n, x + n * x_n
        there = mask & (tap < TAPS)
        if DEEP:
            z = i // HY
            i = i % HY
            d = z * SD + deep
            there = there & (d >= 0) & (d < DX)
            g_images += z.to(tl.int64) * dy_d
            x_images = x_images + d.to(tl.int64) * x_d
        g = tl.load(g_images + i.to(tl.int64) * dy_h + j.to(tl.int64) * dy_w, mask, other=0.0).to(tl.float32)
        h, w = i * SH + down, j * SW + right  # (BT, BP, 1)
        there = there & (h >= 0) & (h < HX) & (w >= 0) & (w < WX)
        v = tl.load(x_images + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w, there, other=0.0).to(tl.float32)
        acc += g * v
    total = tl.sum(acc, 1, keep_dims=True)  # (BT, 1, BC)
    place = partial + (split * O + o) * TAPS + tap
    tl.store(place, total, (tap < TAPS) & (o < O))


FORWARD = _configs.rows("depthwise_forward")
INPUT_GRADIENT = _configs.rows("depthwise_input_gradient")
WEIGHT_GRADIENT = _configs.rows("depthwise_weight_gradient")


def _deep(*shapes: Any) -> bool:
    """Whether any of these has a third spatial axis."""
    return max(shape[2] for shape in shapes) > 1


def forward(x: Any, weight: Any, end: Epilogue, y: Any, walk: Walk) -> None:
    """All of three spatial axes, x and y of any strides."""
    (n, o, *out), (c, *size), kernel = y.shape, x.shape[1:], weight.shape[2:]
    w_o, _, *w = weight.stride()
    total = n * math.prod(out)
    entry = FORWARD(_tile.device(x), total)
    pixels, channels = pixel_tile(x, total, entry.elements)
    grid = (_tile.cdiv(total, pixels), _tile.cdiv(o, channels))
    _tile.launch(
        _depthwise_forward_kernel, grid, x, weight, *end.arrays, y,
        total, *out, *size, o, o // c, *steps(x), w_o, *w, *steps(y),
        *walk.stride, *[-b for b in walk.before], *walk.dilation,
        DEEP=_deep(x.shape, y.shape, weight.shape), KD=kernel[0], KH=kernel[1], KW=kernel[2],
        **end.constants, BP=pixels, BC=channels, num_warps=entry.warps,
    )  # fmt: skip


def input_gradient(dy: Any, weight: Any, end: Epilogue, dx: Any, walk: Walk) -> None:
    (_, o, *out), (n, c, *size), kernel = dy.shape, dx.shape, weight.shape[2:]
    w_o, _, *w = weight.stride()
    total = n * math.prod(size)
    entry = INPUT_GRADIENT(_tile.device(dx), total)
    pixels, channels = pixel_tile(dx, total, entry.elements)
    grid = (_tile.cdiv(total, pixels), _tile.cdiv(c, channels))
    _tile.launch(
        _depthwise_input_kernel, grid, dy, weight, *end.arrays, dx,
        total, *size, *out, c, o // c, *steps(dy), w_o, *w, *steps(dx),
        *walk.stride, *walk.before, *walk.dilation,
        DEEP=_deep(dx.shape, dy.shape, weight.shape), KD=kernel[0], KH=kernel[1], KW=kernel[2],
        **end.constants, BP=pixels, BC=channels, num_warps=entry.warps,
    )  # fmt: skip


def weight_gradient(dy: Any, x: Any, dweight: Any, walk: Walk, empty: Any) -> None:
    (n, o, *out), (c, *size), kernel = dy.shape, x.shape[1:], dweight.shape[2:]
    count, total = math.prod(kernel), n * math.prod(out)
    taps = min(16, _tile.next_power_of_2(count))
    device = _tile.device(x)
    entry = WEIGHT_GRADIENT(device, total)
    deep = _deep(x.shape, dy.shape, dweight.shape)
    pixels, channels = pixel_tile(x, total, entry.elements // (taps * (1 + deep)))  # a third axis takes registers
    blocks, rounds = _tile.cdiv(o, channels), _tile.cdiv(count, taps)
    # Several waves of programs, each with enough pixels to be worth its partial sums.
    wanted = min(8 * device.sms // (blocks * rounds), total // (8 * pixels))
    splits, each = _tile.split(total, max(1, wanted))
    partial = empty((splits, o, count, 1), "float32")
    _tile.launch(
        _depthwise_weight_kernel, (splits, blocks, rounds), dy, x, partial,
        total, each, *out, *size, o, o // c, *kernel[1:], count, *steps(dy), *steps(x),
        *walk.stride, *[-b for b in walk.before], *walk.dilation,
        DEEP=deep, BT=taps, BP=pixels, BC=channels, num_warps=entry.warps,
    )  # fmt: skip
    finish(partial, dweight)
