"""A convolution's weight gradient as an implicit matrix product: taps × channels against output channels, summed over
pixels. The pixels are split over programs, their float32 partial sums added in a second stage, in a fixed order."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _tile
from ._conv import FEW_CHANNELS, Walk, bounded, channels_first, narrow_accesses, precision, unit_of, weight_tile
from ._image import flattened, image_pixel, steps

BUDGETS = {
    # Of volumes with few channels, a tap has three coordinates for each column; others keep to 208 registers.
    "_conv_weight_kernel": Budget(registers=255, blocks=1, narrow=narrow_accesses, spills=6),
}


@triton.jit
def _conv_weight_kernel(
    dy, x, partial,
    M, EACH, DY, HY, WY, DX, HX, WX, C, O, KH, KW, TAPS,
    dy_n, dy_d, dy_h, dy_w, dy_c, x_n, x_d, x_h, x_w, x_c,
    SD, SH, SW, D0, H0, W0, DD, DH, DW,
    DEEP: tl.constexpr, FLAT: tl.constexpr, PLAIN: tl.constexpr, ALIGNED: tl.constexpr, BOUNDED: tl.constexpr,
    UNIT_C: tl.constexpr, UNIT_O: tl.constexpr, UNIT_X: tl.constexpr, UNIT_DY: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial[s, o, tap, c] = Σ over the s-th EACH pixels of dy[pixel, o] · x[pixel under tap, c], in float32.

    The flags, and the units, are ``_conv_kernel``'s.
    """
    C = C // UNIT_C * UNIT_C  # known to be a multiple, as places are, so that as many numbers move at once
    O = O // UNIT_O * UNIT_O
    blocks = tl.cdiv(TAPS * C, BN) if FLAT else TAPS * tl.cdiv(C, BN)
    pid_n = tl.program_id(0) % blocks
    o = (tl.program_id(0) // blocks) * BM + tl.arange(0, BM)  # (BM,) in the group
    split = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2)
    if FLAT:
        flat = pid_n * BN + tl.arange(0, BN)
        c = tl.max_contiguous(tl.multiple_of(flat % C, [UNIT_C]), [UNIT_C])
        tap = tl.max_constancy(flat // C, [UNIT_C])
        inside = flat < TAPS * C
    else:
        tap = pid_n // tl.cdiv(C, BN)
        c = (pid_n % tl.cdiv(C, BN)) * BN + tl.arange(0, BN)
        inside = c < C
    inside = inside[None, :]
    made = (o < O)[:, None]
    if DEEP:
        deep = tap // (KH * KW) * DD
        down = tap // KW % KH * DH
    else:
        down = tap // KW * DH
    right = tap % KW * DW
    if FLAT:
        down, right = down[None, :], right[None, :]
        if DEEP:
            deep = deep[None, :]
    g_rows = dy + tl.multiple_of((group * O + o).to(tl.int64) * dy_c, [UNIT_DY])[:, None]  # (BM, 1)
    x_columns = x + tl.multiple_of((group * C + c).to(tl.int64) * x_c, [UNIT_X])[None, :]  # (1, BN)

    first = split * EACH
    last = tl.minimum(first + EACH, M)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(first, last, BK):
        if DEEP:
            n, pixel = image_pixel(start, DY * HY * WY, ALIGNED, BK)
        else:
            n, pixel = image_pixel(start, HY * WY, ALIGNED, BK)
        real = start + tl.arange(0, BK) < last
        if PLAIN:
            i = tl.zeros((BK,), tl.int32)
            j = pixel
        else:
            i = pixel // WY
            j = pixel % WY
        if DEEP:
            z = i // HY
            i = i % HY
            d = (z * SD + D0)[:, None] + deep
        h = (i * SH + H0)[:, None] + down
        w = (j * SW + W0)[:, None] + right
        mask = real[:, None] & inside
        if PLAIN:  # pixels of a channel may be neighbours
            g_place = n * dy_n + j * dy_w
            x_place = tl.multiple_of(n * x_n + j * x_w, [UNIT_X])[:, None]
        else:
            g_place = n * dy_n + i.to(tl.int64) * dy_h + j.to(tl.int64) * dy_w
            x_place = (n * x_n)[:, None] + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w
            if DEEP:
                g_place += z.to(tl.int64) * dy_d
                x_place += d.to(tl.int64) * x_d
            x_place = tl.multiple_of(x_place, [UNIT_X, UNIT_X])
        g_place = tl.multiple_of(g_place, [UNIT_DY])
        if not BOUNDED:
            mask = mask & (h >= 0) & (h < HX) & (w >= 0) & (w < WX)
            if DEEP:
                mask = mask & (d >= 0) & (d < DX)
        g = tl.load(g_rows + g_place[None, :], made & real[None, :], other=0.0)  # (BM, BK)
        v = tl.load(x_columns + x_place, mask, other=0.0)  # (BK, BN)
        acc = tl.dot(g, v, acc, input_precision=PRECISION)
    row = (split * tl.num_programs(2) + group) * O + o  # (BM,)
    if FLAT:
        place = flat
    else:
        place = tap * C + c
    where = partial + row[:, None] * (TAPS * C) + place[None, :]
    tl.store(where, acc, made & inside)


def shares_of(dy: Any, x: Any, sizes: tuple, walk: Walk, plain: bool, empty: Any) -> Any:
    """The shares (S, O, taps, C / groups) of dweight, of these sizes. dy, x: of three spatial axes, channels last, or plain
    NCHW."""
    (stride, before, dilation, groups), (o, c, *kernel) = walk, sizes
    if plain:
        dy, x = flattened(dy), flattened(x)
    (n, _, *out), size, taps = dy.shape, x.shape[2:], math.prod(kernel)
    flat, pixels, o_group = c < FEW_CHANNELS, n * math.prod(out), o // groups
    start = tuple([-b for b in before])
    tile = weight_tile(dy, o_group, c * taps if flat else c, flat)
    if plain and channels_first(x) and math.prod(size) % 4:  # every number has an address of its own
        tile = tile._replace(BN=min(tile.BN, 64))
    columns = _tile.cdiv(c * taps, tile.BN) if flat else taps * _tile.cdiv(c, tile.BN)
    tiles = _tile.cdiv(o_group, tile.BM) * columns
    # Two waves of programs; each sums enough pixels to be worth its partial result.
    wanted = min(2 * _tile.device(dy).sms // max(1, tiles * groups), pixels // (4 * tile.BK))
    splits, each = _tile.split(_tile.cdiv(pixels, tile.BK), max(1, wanted))
    partial = empty((splits, o, taps, c), "float32")
    _tile.launch(
        _conv_weight_kernel, (tiles, splits, groups), dy, x, partial,
        pixels, each * tile.BK, *out, *size, c, o_group, *kernel[1:], taps,
        *steps(dy), *steps(x), *stride, *start, *dilation,
        DEEP=max(size[0], out[0], kernel[0]) > 1, FLAT=flat, PLAIN=plain, ALIGNED=_tile.unit_of(math.prod(out)),
        BOUNDED=bounded(tuple(out), tuple(size), tuple(kernel), stride, start, dilation), PRECISION=precision(dy),
        UNIT_C=_tile.unit_of(c), UNIT_O=_tile.unit_of(o_group), UNIT_X=unit_of(x, c), UNIT_DY=unit_of(dy, o_group),
        BM=tile.BM, BN=tile.BN, BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partial
