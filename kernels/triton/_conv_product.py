"""Convolution as an implicit matrix product, forward and for dx: the tiles of x are gathered under the kernel while the
product runs.

Rows are pixels, the inner axis runs over taps × channels, with channels neighbouring in memory (NHWC). dx with stride 1 is
the same sum with the kernel turned around. With a stride, pixels of one remainder (h mod stride, w mod stride) see the same
taps; each remainder is a convolution of its own, without a multiplication by the zeros in between.

Groups of few channels stay here on every GPU: their pixels are runs of 8 to 64 bytes, which L1 hands over tap by tap, and a
box of such a run would cost the copy engine as much. A block-diagonal weight over many groups would take fewer loads, but
multiply what is not finite in one group by the zeros of the others.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _tile
from ._conv import FEW_CHANNELS, Walk, bounded, channels_first, narrow_accesses, precision, tile_for, unit_of
from ._epilogue import Epilogue, finished
from ._image import evenly_spaced, flattened, image_pixel, steps

BUDGETS = {
    # One or two registers are put aside in some float32 tiles.
    "_conv_kernel": Budget(registers=255, blocks=1, narrow=narrow_accesses, spills=6),
}


@triton.jit
def remainder(size, phase, taps, pad, stride, dilation, common, inverse):
    """The pixels of one remainder, and the taps that reach them, which may be none.

    Returns (pixels, first tap, number of taps, the output pixel under the first tap for the first pixel).
    """
    shifted = phase + pad
    step = stride // common
    first = (shifted // common * inverse) % step
    count = tl.where(shifted % common == 0, tl.maximum((taps - first + step - 1) // step, 0), 0)
    return (size - phase + stride - 1) // stride, first, count, (shifted - first * dilation) // stride


@triton.jit
def _pixels_of(
    first_row, M, DY, HY, WY, SD, SH, SW, D0, H0, W0,
    DEEP: tl.constexpr, PHASED: tl.constexpr, PLAIN: tl.constexpr, ALIGNED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """(image, pixel, its frame, row and column in y; the frame, row and column of x under the first tap; whether there is
    such a pixel) of each row of a tile: (BM,). Frames are 0 where there is one."""
    if DEEP:
        n, pixel = image_pixel(first_row, DY * HY * WY, ALIGNED, BM)
    else:
        n, pixel = image_pixel(first_row, HY * WY, ALIGNED, BM)
    i = pixel // WY
    j = pixel % WY
    real = first_row + tl.arange(0, BM) < M
    z = 0
    d = 0
    if DEEP:
        z = i // HY
        i = i % HY
        d = z + D0 if PHASED else z * SD + D0
    if PHASED:
        h = i + H0
        w = j + W0
    elif PLAIN:
        h = tl.zeros((BM,), tl.int32)
        w = pixel
    else:
        h = i * SH + H0
        w = j * SW + W0
    return n, pixel, z, i, j, d, h, w, real


@triton.jit
def _places_of(
    n, pixel, z, i, j, y_n, y_d, y_h, y_w, SD, SH, SW,
    DEEP: tl.constexpr, PHASED: tl.constexpr, EVEN: tl.constexpr, FIRST: tl.constexpr, UNIT_Y: tl.constexpr,
):  # fmt: skip
    """Where the pixels of a tile's rows lie in y."""
    if PHASED:
        place = n * y_n + i.to(tl.int64) * SH * y_h + j.to(tl.int64) * SW * y_w
        if DEEP:
            place += z.to(tl.int64) * SD * y_d
    elif EVEN:
        place = tl.multiple_of(n * y_n, [UNIT_Y]) + pixel.to(tl.int64) * y_w
    else:
        place = n * y_n + i.to(tl.int64) * y_h + j.to(tl.int64) * y_w
        if DEEP:
            place += z.to(tl.int64) * y_d
    if not FIRST:
        place = tl.multiple_of(place, [UNIT_Y])
    return place


@triton.jit
def _put(
    acc, residual, kept, y, place, across, mask, FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr,
):  # fmt: skip
    """A tile of sums (pixels, channels), with what follows them, at place + across in y; FIRST: written along pixels."""
    if FIRST:
        at, right = place[None, :], across[:, None]
        acc = finished(acc, residual, kept, at, right, tl.trans(mask), True, ACTIVATION, NUMBER_A, NUMBER_B)
        out = acc.to(y.dtype.element_ty)
        tl.store(y + at + right, tl.trans(out), tl.trans(mask))
    else:
        at, right = place[:, None], across[None, :]
        acc = finished(acc, residual, kept, at, right, mask, False, ACTIVATION, NUMBER_A, NUMBER_B)
        tl.store(y + at + right, acc.to(y.dtype.element_ty), mask)


@triton.jit
def _conv_kernel(
    x, weight, bias, scale, residual, kept, y,
    M, DY, HY, WY, DX, HX, WX, C, O, KD, KH, KW,
    x_n, x_d, x_h, x_w, x_c, w_o, w_t, w_c, w_group, y_n, y_d, y_h, y_w, y_c,
    SD, SH, SW, D0, H0, W0, DD, DH, DW, DIL_D, DIL_H, DIL_W, GCD_D, GCD_H, GCD_W, INV_D, INV_H, INV_W,
    DEEP: tl.constexpr, PHASED: tl.constexpr, FLAT: tl.constexpr, PLAIN: tl.constexpr, ALIGNED: tl.constexpr,
    EVEN: tl.constexpr, FIRST: tl.constexpr, BOUNDED: tl.constexpr,
    UNIT_C: tl.constexpr, UNIT_O: tl.constexpr, UNIT_X: tl.constexpr, UNIT_W: tl.constexpr, UNIT_Y: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[m, o] = Σ_{tap, c} x[pixel m · S + (D0, H0, W0) + tap · D, c] · weight[o, tap, c], and its epilogue.

    kept: where y before f goes. M: pixels of y (of the largest remainder). C, O: channels in a group. DEEP: there is a third
    spatial axis. PHASED: dx of a strided convolution, where SD, SH and SW step y, not x. FLAT: taps and channels are one
    inner axis. PLAIN: a kernel of one tap, all pixels of x and y in one row. ALIGNED: divides an image's pixels. EVEN: y_w
    leads from each pixel of y to the next. FIRST: y is NCHW. BOUNDED: every pixel under a tap exists. UNIT_…: what divides
    channels, and the places where runs of neighbours in x, w and y begin.
    """
    C = C // UNIT_C * UNIT_C  # known to be a multiple, as places are, so that as many numbers move at once
    O = O // UNIT_O * UNIT_O
    tiles_n = tl.cdiv(O, BN)
    pid = tl.program_id(0)
    pid_n = pid % tiles_n
    first_row = (pid // tiles_n).to(tl.int64) * BM
    group = tl.program_id(1)
    first_s = 0
    first_r = 0
    first_q = 0
    taps_d = KD
    taps_h = KH
    taps_w = KW
    if PHASED:
        ph = tl.program_id(2) // SW
        pw = tl.program_id(2) % SW
        if DEEP:
            pd = ph // SH
            ph = ph % SH
            DY, first_s, taps_d, D0 = remainder(DY, pd, KD, D0, SD, DIL_D, GCD_D, INV_D)
            y += pd.to(tl.int64) * y_d
        HY, first_r, taps_h, H0 = remainder(HY, ph, KH, H0, SH, DIL_H, GCD_H, INV_H)
        WY, first_q, taps_w, W0 = remainder(WY, pw, KW, W0, SW, DIL_W, GCD_W, INV_W)
        M = (DY * HY * WY).to(tl.int64) * M  # it came as the number of images
        HY = tl.maximum(HY, 1)
        WY = tl.maximum(WY, 1)
        if DEEP:
            DY = tl.maximum(DY, 1)
        y += ph.to(tl.int64) * y_h + pw * y_w
        phase = ph.to(tl.int64) * y_h + pw * y_w
        if DEEP:
            phase += pd.to(tl.int64) * y_d
        if residual is not None:
            residual += phase
        if kept is not None:
            kept += phase

    n, pixel, z, i, j, d, h, w, real = _pixels_of(
        first_row, M, DY, HY, WY, SD, SH, SW, D0, H0, W0, DEEP, PHASED, PLAIN, ALIGNED, BM
    )
    if PLAIN:
        across = w * x_w  # in 32 bits, as its launcher promises
    else:
        across = w.to(tl.int64) * x_w
    start = n * x_n + h.to(tl.int64) * x_h + across + group.to(tl.int64) * C * x_c
    if DEEP:
        start += d.to(tl.int64) * x_d
    rows = x + tl.multiple_of(start, [UNIT_X])[:, None]  # (BM, 1)
    column = pid_n * BN + tl.arange(0, BN)  # (BN,)
    columns = (
        weight + tl.multiple_of(group.to(tl.int64) * w_group + column.to(tl.int64) * w_o, [UNIT_W])[None, :]
    )  # (1, BN)

    acc = tl.zeros((BM, BN), tl.float32)
    blocks = tl.cdiv(C, BK)
    taps = taps_h * taps_w
    if DEEP:
        taps = taps * taps_d
    steps = taps * blocks
    width = tl.maximum(taps_w, 1)  # the compiler divides by it before it asks whether there are any steps
    height = tl.maximum(taps_h, 1)
    if FLAT:
        steps = tl.cdiv(taps * C, BK)
    for k in range(0, steps):
        if FLAT:
            inner = k * BK + tl.arange(0, BK)  # (BK,)
            c = tl.max_contiguous(tl.multiple_of(inner % C, [UNIT_C]), [UNIT_C]).to(tl.int64)
            tap = tl.max_constancy(inner // C, [UNIT_C])
            inside = inner < taps * C
        else:
            c = ((k % blocks) * BK + tl.arange(0, BK)).to(tl.int64)
            tap = k // blocks
            inside = c < C
        u = tap // width
        v = tap % width
        s = 0
        if DEEP:
            s = u // height
            u = u % height
        step_x = u.to(tl.int64) * DH * x_h + v.to(tl.int64) * DW * x_w
        if DEEP:
            step_x += s.to(tl.int64) * DD * x_d
        if FLAT:
            step_x = (tl.multiple_of(step_x, [UNIT_X]) + c * x_c)[None, :]
            hh = h[:, None] + (u * DH)[None, :]
            ww = w[:, None] + (v * DW)[None, :]
        else:
            step_x = step_x // UNIT_X * UNIT_X + tl.multiple_of(c * x_c, [UNIT_X])[None, :]
            hh = (h + u * DH)[:, None]
            ww = (w + v * DW)[:, None]
        mask = real[:, None] & inside[None, :]
        if not BOUNDED:
            mask = mask & (hh >= 0) & (hh < HX) & (ww >= 0) & (ww < WX)
            if DEEP:
                dd = d[:, None] + (s * DD)[None, :] if FLAT else (d + s * DD)[:, None]
                mask = mask & (dd >= 0) & (dd < DX)
        a = tl.load(rows + step_x, mask, other=0.0)  # (BM, BK)
        if PHASED:
            t = (first_r + u * (SH // GCD_H)) * KW + first_q + v * (SW // GCD_W)
            if DEEP:
                t += (first_s + s * (SD // GCD_D)) * KH * KW
        else:
            t = tap
        if FLAT:
            offset = tl.multiple_of(tl.multiple_of(t.to(tl.int64) * w_t, [UNIT_W]) + c * w_c, [UNIT_W])[:, None]
        else:
            offset = t.to(tl.int64) * w_t // UNIT_W * UNIT_W + tl.multiple_of(c * w_c, [UNIT_W])[:, None]
        b = tl.load(columns + offset, inside[:, None] & (column < O)[None, :], other=0.0)  # (BK, BN)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    o = group * O + column
    if scale is not None:
        acc *= tl.load(scale + o, column < O, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        acc += tl.load(bias + o, column < O, other=0.0).to(tl.float32)[None, :]
    place = _places_of(n, pixel, z, i, j, y_n, y_d, y_h, y_w, SD, SH, SW, DEEP, PHASED, EVEN, FIRST, UNIT_Y)
    across = tl.multiple_of(o.to(tl.int64) * y_c, [UNIT_Y])
    mask = real[:, None] & (column < O)[None, :]
    _put(acc, residual, kept, y, place, across, mask, FIRST, ACTIVATION, NUMBER_A, NUMBER_B)


def _summed(
    x: Any, weight: Any, end: Epilogue, y: Any, sizes: tuple, walk: tuple, jumps: tuple, plain: bool
) -> None:  # fmt: skip
    """y = what ``_conv_kernel`` states. x: channels last, or plain NCHW. weight: any array with the strides in
    ``jumps``, over y's channel, tap, x's channel, group.

    sizes: (channels of x and of y in a group, groups, kernel). walk: stride, first pixel and dilation in x.
    """
    c, o, groups, kernel = sizes
    if plain:
        x, y = flattened(x), flattened(y)
    (n, _, *size), out, taps = x.shape, y.shape[2:], math.prod(kernel)
    pixels, flat, even = math.prod(out), c < FEW_CHANNELS, evenly_spaced(y)
    tile = tile_for(x, n * pixels, o, c * taps if flat else c, groups, flat)
    if plain and channels_first(x) and pixels % 4 and _tile.device(x).arch not in (90, 100):
        tile = tile._replace(BN=min(tile.BN, 64))  # sums stand in registers there, and every channel has addresses
    if not end.is_affine:
        tile = tile._replace(BN=min(tile.BN, 128))  # what follows them takes registers
    grid = (_tile.cdiv(n * pixels, tile.BM) * _tile.cdiv(o, tile.BN), groups)
    _tile.launch(
        _conv_kernel, grid, x, weight, *end.arrays, y,
        n * pixels, *out, *size, c, o, *kernel, *_read_steps(x), *jumps, *steps(flattened(y) if even else y),
        *(n for axes in walk for n in axes), *(1,) * 9,
        DEEP=max(size[0], out[0], kernel[0]) > 1, PHASED=False, FLAT=flat, PLAIN=plain, ALIGNED=_tile.unit_of(pixels),
        EVEN=even, FIRST=channels_first(y), BOUNDED=bounded(out, tuple(size), kernel, *walk), PRECISION=precision(x),
        **_units(x, y, c, o, jumps), **end.constants, BM=tile.BM, BN=tile.BN, BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _read_steps(x: Any) -> tuple[int, ...]:
    """Strides in the order of the kernel's arguments; 0 along axes of one pixel, whose strides could be odd."""
    n, *pixels, c = steps(x)
    return (n, *[0 if size == 1 else step for size, step in zip(x.shape[2:], pixels)], c)


def _units(x: Any, y: Any, c: int, o: int, jumps: tuple) -> dict[str, int]:
    of_weight = _tile.unit_of(*[j for j in jumps if j > 1])
    return dict(
        UNIT_C=_tile.unit_of(c), UNIT_O=_tile.unit_of(o), UNIT_X=unit_of(x, c), UNIT_W=of_weight, UNIT_Y=unit_of(y, o)
    )


def forward(x: Any, taps: Any, end: Epilogue, y: Any, walk: Walk, plain: bool) -> None:
    """y of a convolution. All of three spatial axes. taps: the weight, (O, C / groups, *kernel), channels last."""
    (o, c, *kernel), groups = taps.shape, walk.groups
    each = c * math.prod(kernel)
    start = tuple([-b for b in walk.before])
    sizes, jumps = (c, o // groups, groups, tuple(kernel)), (each, c, 1, o // groups * each)
    plain = plain and evenly_spaced(y)
    _summed(x, taps, end, y, sizes, (walk.stride, start, walk.dilation), jumps, plain)


def input_gradient(dy: Any, taps: Any, end: Epilogue, dx: Any, walk: Walk, plain: bool) -> None:
    """dx[pixel, c] = Σ_{tap, o} dy[the pixel whose tap this is, o] · weight[o, tap, c], and its epilogue."""
    (o, c, *kernel), (stride, before, dilation, groups) = taps.shape, walk
    each, o_group = c * math.prod(kernel), o // groups
    jumps = (1, c, each, o_group * each)
    if stride == (1, 1, 1):
        back = (stride, before, tuple([-d for d in dilation]))
        sizes = (o_group, c, groups, tuple(kernel))
        _summed(dy, taps, end, dx, sizes, back, jumps, plain and evenly_spaced(dx))
        return
    common = tuple(map(math.gcd, stride, dilation))
    back = tuple([-d // g for d, g in zip(dilation, common)])
    inverse = tuple([pow(d // g, -1, s // g) if s > g else 0 for d, s, g in zip(dilation, stride, common)])
    n, _, *size = dx.shape
    largest = n * math.prod(map(_tile.cdiv, size, stride))
    flat, phases = o_group < FEW_CHANNELS, math.prod(stride)
    tile = tile_for(dy, largest, c, o_group * math.prod(kernel) if flat else o_group, groups * phases, flat)
    grid = (_tile.cdiv(largest, tile.BM) * _tile.cdiv(c, tile.BN), groups, phases)
    _tile.launch(
        _conv_kernel, grid, dy, taps, *end.arrays, dx,
        n, *size, *dy.shape[2:], o_group, c, *kernel, *_read_steps(dy), *jumps, *steps(dx),
        *stride, *before, *back, *dilation, *common, *inverse,
        DEEP=max(size[0], dy.shape[2], kernel[0]) > 1, PHASED=True, FLAT=flat, PLAIN=False, ALIGNED=1, EVEN=False,
        FIRST=channels_first(dx), BOUNDED=False, PRECISION=precision(dy),
        **_units(dy, dx, o_group, c, jumps), **end.constants, BM=tile.BM, BN=tile.BN, BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
