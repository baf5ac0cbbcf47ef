"""Depthwise convolution: every output channel sees one input channel. Bound by memory, so a direct sum over the taps.

A tile is pixels × channels, wide along what is neighbouring in memory; arrays of any strides are read as they are. The
taps of neighbouring pixels overlap, and the L1 cache serves all but the first read.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from . import _configs, _tile
from ._image import finish, pixel_tile, pixels_of, steps


@triton.jit
def _depthwise_forward_kernel(
    x, weight, bias, y,
    M, HY, WY, HX, WX, O, MANY,
    x_n, x_h, x_w, x_c, w_o, w_h, w_w, y_n, y_h, y_w, y_c,
    SH, SW, H0, W0, DH, DW,
    KH: tl.constexpr, KW: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n, i, j, o, mask = pixels_of(M, HY * WY, WY, O, BP, BC)
    rows = x + n * x_n + (o // MANY).to(tl.int64) * x_c  # (BP, BC)
    acc = tl.zeros((BP, BC), tl.float32)
    for r in range(KH):
        h = i * SH + H0 + r * DH
        for q in tl.static_range(KW):
            w = j * SW + W0 + q * DW
            there = mask & (h >= 0) & (h < HX) & (w >= 0) & (w < WX)
            v = tl.load(rows + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w, there, other=0.0).to(tl.float32)
            tap = tl.load(weight + o.to(tl.int64) * w_o + r * w_h + q * w_w, o < O, other=0.0).to(tl.float32)
            acc += v * tap
    if bias is not None:
        acc += tl.load(bias + o, o < O, other=0.0).to(tl.float32)
    place = y + n * y_n + i.to(tl.int64) * y_h + j.to(tl.int64) * y_w + o.to(tl.int64) * y_c
    tl.store(place, acc.to(y.dtype.element_ty), mask)


@triton.jit
def _depthwise_input_kernel(
    dy, weight, dx,
    M, HX, WX, HY, WY, C, MANY,
    dy_n, dy_h, dy_w, dy_c, w_o, w_h, w_w, x_n, x_h, x_w, x_c,
    SH, SW, TOP, LEFT, DH, DW,
    KH: tl.constexpr, KW: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx[pixel, c] = Σ_{o of c, tap} dy[the pixel whose tap this is, o] · weight[o, tap]."""
    n, h, w, c, mask = pixels_of(M, HX * WX, WX, C, BP, BC)
    acc = tl.zeros((BP, BC), tl.float32)
    for r in range(KH):
        down = h + TOP - r * DH
        i = down // SH
        for q in tl.static_range(KW):
            right = w + LEFT - q * DW
            j = right // SW
            hit = (down >= 0) & (i * SH == down) & (i < HY) & (right >= 0) & (j * SW == right) & (j < WY)
            for each in range(0, MANY):
                o = c * MANY + each
                place = dy + n * dy_n + i.to(tl.int64) * dy_h + j.to(tl.int64) * dy_w + o.to(tl.int64) * dy_c
                g = tl.load(place, mask & hit, other=0.0).to(tl.float32)
                tap = tl.load(weight + o.to(tl.int64) * w_o + r * w_h + q * w_w, c < C, other=0.0).to(tl.float32)
                acc += g * tap
    place = dx + n * x_n + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w + c.to(tl.int64) * x_c
    tl.store(place, acc.to(dx.dtype.element_ty), mask)


@triton.jit
def _depthwise_weight_kernel(
    dy, x, partial,
    M, EACH, HY, WY, HX, WX, O, MANY, KW, TAPS,
    dy_n, dy_h, dy_w, dy_c, x_n, x_h, x_w, x_c,
    SH, SW, H0, W0, DH, DW,
    BT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """partial[s, o, tap] = Σ over the s-th EACH pixels of dy[pixel, o] · x[pixel under tap, channel of o]."""
    split = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BC + tl.arange(0, BC)[None, None, :]  # (1, 1, BC)
    tap = tl.program_id(2) * BT + tl.arange(0, BT)[:, None, None]  # (BT, 1, 1)
    down, right = tap // KW * DH + H0, tap % KW * DW + W0
    dy += o.to(tl.int64) * dy_c
    x += (o // MANY).to(tl.int64) * x_c
    first = split * EACH
    last = tl.minimum(first + EACH, M)
    acc = tl.zeros((BT, BP, BC), tl.float32)
    for start in range(first, last, BP):
        local = (start % (HY * WY)).to(tl.int32) + tl.arange(0, BP)[None, :, None]  # (1, BP, 1)
        n, pixel = start // (HY * WY) + local // (HY * WY), local % (HY * WY)
        i, j = pixel // WY, pixel % WY
        mask = (start + tl.arange(0, BP)[None, :, None] < last) & (o < O)
        g = tl.load(dy + n * dy_n + i.to(tl.int64) * dy_h + j.to(tl.int64) * dy_w, mask, other=0.0).to(tl.float32)
        h, w = i * SH + down, j * SW + right  # (BT, BP, 1)
        there = mask & (tap < TAPS) & (h >= 0) & (h < HX) & (w >= 0) & (w < WX)
        v = tl.load(x + n * x_n + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w, there, other=0.0).to(tl.float32)
        acc += g * v
    total = tl.sum(acc, 1, keep_dims=True)  # (BT, 1, BC)
    place = partial + (split * O + o) * TAPS + tap
    tl.store(place, total, (tap < TAPS) & (o < O))


FORWARD = _configs.rows("depthwise_forward")
INPUT_GRADIENT = _configs.rows("depthwise_input_gradient")
WEIGHT_GRADIENT = _configs.rows("depthwise_weight_gradient")


def forward(x: Any, weight: Any, bias: Any, y: Any, stride: tuple, padding: tuple, dilation: tuple) -> None:
    (n, o, hy, wy), (_, c, hx, wx) = y.shape, x.shape
    w_o, _, w_h, w_w = weight.stride()
    entry = FORWARD(_tile.device(x), n * hy * wy)
    pixels, channels = pixel_tile(x, n * hy * wy, entry.elements)
    grid = (_tile.cdiv(n * hy * wy, pixels), _tile.cdiv(o, channels))
    _tile.launch(
        _depthwise_forward_kernel, grid, x, weight, bias, y,
        n * hy * wy, hy, wy, hx, wx, o, o // c, *steps(x), w_o, w_h, w_w, *steps(y),
        *stride, -padding[0][0], -padding[1][0], *dilation,
        KH=weight.shape[2], KW=weight.shape[3], BP=pixels, BC=channels, num_warps=entry.warps,
    )  # fmt: skip


def input_gradient(dy: Any, weight: Any, dx: Any, stride: tuple, padding: tuple, dilation: tuple, groups: int) -> None:
    (_, o, hy, wy), (n, c, hx, wx) = dy.shape, dx.shape
    w_o, _, w_h, w_w = weight.stride()
    entry = INPUT_GRADIENT(_tile.device(dx), n * hx * wx)
    pixels, channels = pixel_tile(dx, n * hx * wx, entry.elements)
    grid = (_tile.cdiv(n * hx * wx, pixels), _tile.cdiv(c, channels))
    _tile.launch(
        _depthwise_input_kernel, grid, dy, weight, dx,
        n * hx * wx, hx, wx, hy, wy, c, o // c, *steps(dy), w_o, w_h, w_w, *steps(dx),
        *stride, padding[0][0], padding[1][0], *dilation,
        KH=weight.shape[2], KW=weight.shape[3], BP=pixels, BC=channels, num_warps=entry.warps,
    )  # fmt: skip


def weight_gradient(dy: Any, x: Any, dweight: Any, stride: tuple, padding: tuple, dilation: tuple, empty: Any) -> None:
    (n, o, hy, wy), (_, c, hx, wx), (kh, kw) = dy.shape, x.shape, dweight.shape[2:]
    taps = min(16, _tile.next_power_of_2(kh * kw))
    device = _tile.device(x)
    entry = WEIGHT_GRADIENT(device, n * hy * wy)
    pixels, channels = pixel_tile(x, n * hy * wy, entry.elements // taps)
    blocks, rounds, total = _tile.cdiv(o, channels), _tile.cdiv(kh * kw, taps), n * hy * wy
    # Several waves of programs, each with enough pixels to be worth its partial sums.
    wanted = min(8 * device.sms // (blocks * rounds), total // (8 * pixels))
    splits, each = _tile.split(total, max(1, wanted))
    partial = empty((splits, o, kh * kw, 1), "float32")
    _tile.launch(
        _depthwise_weight_kernel, (splits, blocks, rounds), dy, x, partial,
        total, each, hy, wy, hx, wx, o, o // c, kw, kh * kw, *steps(dy), *steps(x),
        *stride, -padding[0][0], -padding[1][0], *dilation,
        BT=taps, BP=pixels, BC=channels, num_warps=entry.warps,
    )  # fmt: skip
    finish(partial, dweight)
