"""Convolution as an implicit matrix product: the tiles of x are gathered under the kernel while the product runs.

Rows are pixels, the inner axis runs over taps × channels, with channels neighbouring in memory (NHWC). An NCHW array is
turned first: one pass over it costs less than gathering 2-byte elements kernel-many times. A 1×1 kernel needs no
gathering, so it reads NCHW as it is. The output is written in either order.

- forward, and dx with stride 1 (the same sum, the kernel turned around): ``_conv2d_kernel``.
- dx with a stride: pixels of one remainder (h mod stride, w mod stride) see the same taps; each remainder is a
  convolution of its own, without a multiplication by the zeros in between.
- dweight: taps × channels against output channels, summed over pixels; the pixels are split over programs, their
  float32 partial sums added in a second stage, in a fixed order.
- depthwise convolutions: ``_depthwise.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from .._window import Window
from . import _configs, _depthwise, _tile
from ._configs import Tile
from ._image import channel_sums, evenly_spaced, finish, flattened, image_pixel, nhwc, output_order, steps

FEW_CHANNELS = 16
"""With fewer channels than this in a group, taps and channels make one inner axis (a tile would be mostly empty)."""


def _narrow(c: dict[str, Any]) -> str:
    """Taps and few channels in one run begin anywhere, as pixels do where the output's rows lie along the width; TF32 is
    multiplied with K neighbouring, so what lies along the other axis is read number by number."""
    loads = c["FLAT"] or c["PRECISION"] == "tf32"
    stores = c["FLAT"] or c.get("y_w") == 1
    return ("loads " if loads else "") + ("stores" if stores else "")


BUDGETS = {
    # One or two registers are put aside in some float32 tiles.
    "_conv2d_kernel": Budget(registers=255, blocks=1, narrow=_narrow, spills=6),
    "_conv2d_weight_kernel": Budget(registers=208, blocks=1, narrow=_narrow, spills=6),
}


@triton.jit
def _remainder(size, phase, taps, pad, stride, dilation, common, inverse):
    """The pixels of one remainder, and the taps that reach them, which may be none.

    Returns (pixels, first tap, number of taps, the output pixel under the first tap for the first pixel).
    """
    shifted = phase + pad
    step = stride // common
    first = (shifted // common * inverse) % step
    count = tl.where(shifted % common == 0, tl.maximum((taps - first + step - 1) // step, 0), 0)
    return (size - phase + stride - 1) // stride, first, count, (shifted - first * dilation) // stride


@triton.jit
def _conv2d_kernel(
    x, weight, bias, y,
    M, HY, WY, HX, WX, C, O, KH, KW,
    x_n, x_h, x_w, x_c, w_o, w_t, w_c, w_group, y_n, y_h, y_w, y_c,
    SH, SW, H0, W0, DH, DW, DIL_H, DIL_W, GCD_H, GCD_W, INV_H, INV_W,
    PHASED: tl.constexpr, FLAT: tl.constexpr, PLAIN: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    FIRST: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[m, o] = Σ_{tap, c} x[pixel m · S + (H0, W0) + tap · D, c] · weight[o, tap, c].

    M: pixels of y (of the largest remainder). C, O: channels in a group. PHASED: dx of a strided convolution, where
    SH and SW step y, not x. FLAT: taps and channels are one inner axis. PLAIN: a 1×1 kernel, all pixels of x and y in
    one row. ALIGNED: an image has a multiple of 16 pixels. EVEN: y_w leads from each pixel of y to the next. FIRST: y
    is NCHW. BOUNDED: every pixel under a tap exists.
    """
    tiles_n = tl.cdiv(O, BN)
    pid = tl.program_id(0)
    pid_n = pid % tiles_n
    first_row = (pid // tiles_n).to(tl.int64) * BM
    group = tl.program_id(1)
    first_r = 0
    first_q = 0
    taps_h = KH
    taps_w = KW
    if PHASED:
        ph = tl.program_id(2) // SW
        pw = tl.program_id(2) % SW
        HY, first_r, taps_h, H0 = _remainder(HY, ph, KH, H0, SH, DIL_H, GCD_H, INV_H)
        WY, first_q, taps_w, W0 = _remainder(WY, pw, KW, W0, SW, DIL_W, GCD_W, INV_W)
        M = (HY * WY).to(tl.int64) * M  # it came as the number of images
        HY = tl.maximum(HY, 1)
        WY = tl.maximum(WY, 1)
        y += ph.to(tl.int64) * y_h + pw * y_w

    n, pixel = image_pixel(first_row, HY * WY, ALIGNED, BM)
    i = pixel // WY
    j = pixel % WY
    real = first_row + tl.arange(0, BM) < M  # (BM,)
    if PHASED:
        h = i + H0
        w = j + W0
    elif PLAIN:
        h = tl.zeros((BM,), tl.int32)
        w = pixel
    else:
        h = i * SH + H0
        w = j * SW + W0
    if PLAIN:
        across = w * x_w  # in 32 bits, as its launcher promises
    else:
        across = w.to(tl.int64) * x_w
    rows = x + (n * x_n + h.to(tl.int64) * x_h + across + group.to(tl.int64) * C * x_c)[:, None]  # (BM, 1)
    column = pid_n * BN + tl.arange(0, BN)  # (BN,)
    columns = weight + (group.to(tl.int64) * w_group + column.to(tl.int64) * w_o)[None, :]  # (1, BN)

    acc = tl.zeros((BM, BN), tl.float32)
    blocks = tl.cdiv(C, BK)
    steps = taps_h * taps_w * blocks
    width = tl.maximum(taps_w, 1)  # the compiler divides by it before it asks whether there are any steps
    if FLAT:
        steps = tl.cdiv(taps_h * taps_w * C, BK)
    for k in range(0, steps):
        if FLAT:
            inner = k * BK + tl.arange(0, BK)  # (BK,)
            c = (inner % C).to(tl.int64)
            tap = inner // C
            u = tap // width
            v = tap % width
            inside = inner < taps_h * taps_w * C
            step_x = (u.to(tl.int64) * DH * x_h + v.to(tl.int64) * DW * x_w + c * x_c)[None, :]
            hh = h[:, None] + (u * DH)[None, :]
            ww = w[:, None] + (v * DW)[None, :]
        else:
            c = ((k % blocks) * BK + tl.arange(0, BK)).to(tl.int64)
            tap = k // blocks
            u = tap // width
            v = tap % width
            inside = c < C
            step_x = (u.to(tl.int64) * DH * x_h + v.to(tl.int64) * DW * x_w) + (c * x_c)[None, :]
            hh = (h + u * DH)[:, None]
            ww = (w + v * DW)[:, None]
        mask = real[:, None] & inside[None, :]
        if not BOUNDED:
            mask = mask & (hh >= 0) & (hh < HX) & (ww >= 0) & (ww < WX)
        a = tl.load(rows + step_x, mask, other=0.0)  # (BM, BK)
        if PHASED:
            t = (first_r + u * (SH // GCD_H)) * KW + first_q + v * (SW // GCD_W)
        else:
            t = u * KW + v
        if FLAT:
            offset = (t.to(tl.int64) * w_t + c * w_c)[:, None]
        else:
            offset = t.to(tl.int64) * w_t + (c * w_c)[:, None]
        b = tl.load(columns + offset, inside[:, None] & (column < O)[None, :], other=0.0)  # (BK, BN)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    o = group * O + column
    if bias is not None:
        acc += tl.load(bias + o, column < O, other=0.0).to(tl.float32)[None, :]
    if PHASED:
        place = n * y_n + i.to(tl.int64) * SH * y_h + j.to(tl.int64) * SW * y_w
    elif EVEN:
        place = n * y_n + pixel.to(tl.int64) * y_w
    else:
        place = n * y_n + i.to(tl.int64) * y_h + j.to(tl.int64) * y_w
    out, mask = acc.to(y.dtype.element_ty), real[:, None] & (column < O)[None, :]
    if FIRST:  # written along pixels
        tl.store(y + place[None, :] + (o.to(tl.int64) * y_c)[:, None], tl.trans(out), tl.trans(mask))
    else:
        tl.store(y + place[:, None] + (o.to(tl.int64) * y_c)[None, :], out, mask)


@triton.jit
def _conv2d_weight_kernel(
    dy, x, partial,
    M, EACH, HY, WY, HX, WX, C, O, KW, TAPS,
    dy_n, dy_h, dy_w, dy_c, x_n, x_h, x_w, x_c,
    SH, SW, H0, W0, DH, DW,
    FLAT: tl.constexpr, PLAIN: tl.constexpr, ALIGNED: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial[s, o, tap, c] = Σ over the s-th EACH pixels of dy[pixel, o] · x[pixel under tap, c], in float32."""
    blocks = tl.cdiv(TAPS * C, BN) if FLAT else TAPS * tl.cdiv(C, BN)
    pid_n = tl.program_id(0) % blocks
    o = (tl.program_id(0) // blocks) * BM + tl.arange(0, BM)  # (BM,) in the group
    split = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2)
    if FLAT:
        flat = pid_n * BN + tl.arange(0, BN)
        c = flat % C
        tap = flat // C
        inside = flat < TAPS * C
        down = (tap // KW * DH)[None, :]
        right = (tap % KW * DW)[None, :]
    else:
        tap = pid_n // tl.cdiv(C, BN)
        c = (pid_n % tl.cdiv(C, BN)) * BN + tl.arange(0, BN)
        inside = c < C
        down = tap // KW * DH
        right = tap % KW * DW
    dy_columns = dy + ((group * O + o).to(tl.int64) * dy_c)[None, :]  # (1, BM)
    x_columns = x + ((group * C + c).to(tl.int64) * x_c)[None, :]  # (1, BN)

    first = split * EACH
    last = tl.minimum(first + EACH, M)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(first, last, BK):
        n, pixel = image_pixel(start, HY * WY, ALIGNED, BK)
        n = n[:, None]
        real = (start + tl.arange(0, BK) < last)[:, None]
        if PLAIN:
            i = tl.zeros((BK, 1), tl.int32)
            j = pixel[:, None]
        else:
            i = (pixel // WY)[:, None]
            j = (pixel % WY)[:, None]
        h = i * SH + H0 + down
        w = j * SW + W0 + right
        if PLAIN:
            x_across, dy_across = w * x_w, j * dy_w
        else:
            x_across, dy_across = w.to(tl.int64) * x_w, j.to(tl.int64) * dy_w
        g_rows = dy_columns + n * dy_n + i.to(tl.int64) * dy_h + dy_across
        g = tl.load(g_rows, real & (o < O)[None, :], other=0.0)  # (BK, BM)
        mask = real & inside[None, :]
        if not BOUNDED:
            mask = mask & (h >= 0) & (h < HX) & (w >= 0) & (w < WX)
        v = tl.load(x_columns + n * x_n + h.to(tl.int64) * x_h + x_across, mask, other=0.0)  # (BK, BN)
        acc = tl.dot(tl.trans(g), v, acc, input_precision=PRECISION)
    row = (split * tl.num_programs(2) + group) * O + o  # (BM,)
    if FLAT:
        place = flat
    else:
        place = tap * C + c
    where = partial + row[:, None] * (TAPS * C) + place[None, :]
    tl.store(where, acc, (o < O)[:, None] & inside[None, :])


# --- configurations --------------------------------------------------------------------------------------------------


LEAST_SUMS = 8
"""Sums that a thread holds at least: a narrow tile shared by more warps spilled, with addresses beside so few sums."""


def _choose(
    entries: Sequence[Tile], device: _tile.Device, m: int, n: int, k: int, others: int, flat: bool, itemsize: int
) -> tuple[int, Tile] | None:
    """The first tile that still gives every multiprocessor a program, for ``others`` products of (m, k) · (k, n)."""
    narrow = max(16, _tile.next_power_of_2(n))
    fitting = []
    for i, t in enumerate(entries):
        t = t._replace(BN=min(t.BN, narrow), BK=_inner_block(k, min(t.BK, 32) if flat else t.BK))
        t = t._replace(warps=min(t.warps, t.BM * t.BN // (32 * LEAST_SUMS)))
        if t.shared(itemsize) <= device.shared:
            if _tile.cdiv(m, t.BM) * _tile.cdiv(n, t.BN) * others >= device.sms:
                return i, t
            fitting.append((i, t))
    return fitting[-1] if fitting else None


def _choose_for_weight(
    entries: Sequence[Tile], device: _tile.Device, o: int, columns: int, itemsize: int
) -> tuple[int, Tile] | None:
    """For dweight: splitting the pixels makes programs enough, so only the result (o, columns) limits the tile."""
    rows, width = max(16, _tile.next_power_of_2(o)), max(16, _tile.next_power_of_2(columns))
    fitting = [(i, t._replace(BM=min(t.BM, rows), BN=min(t.BN, width))) for i, t in enumerate(entries)]
    fitting = [(i, t) for i, t in fitting if t.shared(itemsize) <= device.shared]
    filled = (f for f in fitting if o > entries[f[0]].BM // 2 and columns > entries[f[0]].BN // 2)
    return next(filled, fitting[-1] if fitting else None)


# No 128 × 256 in sm_80's table: sums in registers, as before Hopper, spill beside the addresses of such a tile.
HALF = _configs.tiles("conv2d.half", _choose, inner=(32, 64))
TF32 = _configs.tiles("conv2d.tf32", _choose, inner=(16, 32))
SINGLE = _configs.tiles("conv2d.single", _choose, inner=(16, 32))
WEIGHT_HALF = _configs.tiles("conv2d_weight.half", _choose_for_weight, inner=(32, 64))
WEIGHT_FLAT = _configs.tiles("conv2d_weight.half_flat", _choose_for_weight, inner=(32, 64))
WEIGHT_TF32 = _configs.tiles("conv2d_weight.tf32", _choose_for_weight, inner=(16, 32))
WEIGHT_SINGLE = _configs.tiles("conv2d_weight.single", _choose_for_weight, inner=(16, 32))


def _tile_for(x: Any, m: int, n: int, k: int, others: int, flat: bool) -> Tile:
    choice = HALF if x.element_size() == 2 else TF32 if _precision(x) == "tf32" else SINGLE
    return choice(_tile.device(x), m, n, k, others, flat, x.element_size())


def _weight_tile(x: Any, o: int, columns: int, flat: bool) -> Tile:
    if x.element_size() == 2:
        choice = WEIGHT_FLAT if flat else WEIGHT_HALF
    else:
        choice = WEIGHT_TF32 if _precision(x) == "tf32" else WEIGHT_SINGLE
    return choice(_tile.device(x), o, columns, x.element_size())


def _inner_block(k: int, most: int) -> int:
    """The longest block that leaves at most a quarter of the last one empty; 16 if none does."""
    blocks = [b for b in (64, 32, 16) if b <= most]
    return next((b for b in blocks if 4 * k >= 3 * _tile.cdiv(k, b) * b), blocks[-1])


def _precision(x: Any) -> str:
    """TF32 only where torch allows it for convolutions and for matrix products."""
    return "tf32" if x.element_size() == 4 and _tile.tf32("cudnn.conv", "cuda.matmul") else "ieee"


# --- launches --------------------------------------------------------------------------------------------------------


def _turned_weight(weight: Any, empty: Any) -> Any:
    """(O, kh, kw, C) dense: itself for a channels-last weight."""
    return _tile.dense(weight.permute(0, 2, 3, 1), empty)


def _source(x: Any, one_by_one: bool, empty: Any) -> Any:
    """x as the kernels read it, with logical shape (N, C, H, W): NHWC in memory, or NCHW for a 1×1 kernel."""
    pixels = x.shape[2] * x.shape[3]
    if one_by_one and x.is_contiguous() and pixels % 16 == 0:
        return x
    return nhwc(x, empty)


def _is_plain(x: Any, weight: Any, stride: tuple, padding: tuple) -> bool:
    """A 1×1 kernel that takes every pixel as it is, of images with fewer than 2^31 elements. x, weight: or specs."""
    _, c, h, w = x.shape
    plain = tuple(weight.shape[2:]) == stride == (1, 1) and padding == ((0, 0), (0, 0))
    return plain and max(c, weight.shape[0]) * h * w < 2**31


def _convolve(x: Any, weight: Any, bias: Any, y: Any, sizes: tuple, walk: tuple, jumps: tuple, plain: bool) -> None:
    """y = the sum that ``_conv2d_kernel`` states. x: NHWC or plain NCHW. weight: any array with the strides in steps.

    sizes: (channels of x and of y in a group, groups, kh, kw). walk: stride, first pixel and dilation in x.
    jumps: weight's strides over y's channel, tap, x's channel, group.
    """
    c, o, groups, kh, kw = sizes
    stride, start, dilation = walk
    if plain:
        x, y = flattened(x), flattened(y)
    (n, _, hx, wx), (_, _, hy, wy) = x.shape, y.shape
    flat = c < FEW_CHANNELS
    tile = _tile_for(x, n * hy * wy, o, c * kh * kw if flat else c, groups, flat)
    if plain and _channels_first(x) and _tile.device(x).arch not in (90, 100):
        tile = tile._replace(BN=min(tile.BN, 64))  # sums stand in registers there, and every channel has addresses
    grid = (_tile.cdiv(n * hy * wy, tile.BM) * _tile.cdiv(o, tile.BN), groups)
    _tile.launch(
        _conv2d_kernel, grid, x, weight, bias, y,
        n * hy * wy, hy, wy, hx, wx, c, o, kh, kw, *steps(x), *jumps, *steps(y),
        *stride, *start, *dilation, 1, 1, 1, 1, 1, 1,
        PHASED=False, FLAT=flat, PLAIN=plain, ALIGNED=hy * wy % 16 == 0, EVEN=evenly_spaced(y), FIRST=_channels_first(y),
        BOUNDED=_bounded(y.shape[2:], x.shape[2:], (kh, kw), *walk), PRECISION=_precision(x),
        BM=tile.BM, BN=tile.BN, BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _channels_first(y: Any) -> bool:
    """Whether pixels, not channels, are neighbours in memory."""
    return y.shape[1] > 1 and y.stride(1) != 1


def _bounded(out: tuple, size: tuple, kernel: tuple, stride: tuple, start: tuple, dilation: tuple) -> bool:
    """Whether every pixel under a tap exists."""
    return all(
        b + min(0, d * (k - 1)) >= 0 and b + s * (o - 1) + max(0, d * (k - 1)) < n
        for o, n, k, s, b, d in zip(out, size, kernel, stride, start, dilation)
    )


def conv2d_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    needs: tuple = (),
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
    empty: Any,
) -> tuple[tuple, dict]:
    (n, c, h, w), (o, c_group, kh, kw) = x.shape, weight.shape
    before, after = zip(*padding)
    size = Window((kh, kw), stride, before, dilation).output_size((h, w), after)
    y = empty((n, o, *size), x.dtype, output_order(x))
    bias = None if bias is None else _tile.dense(bias, empty)
    saved = {"x": x} if "weight" in needs else {}
    saved |= {"weight": weight} if "x" in needs else {}
    if groups == c > 1:
        _depthwise.forward(x, weight, bias, y, stride, padding, dilation)
        return (y,), saved
    plain = _is_plain(x, weight, stride, padding)
    source, taps = _source(x, plain, empty), _turned_weight(weight, empty)
    jumps = (kh * kw * c_group, c_group, 1, o // groups * kh * kw * c_group)
    start = (-padding[0][0], -padding[1][0])
    walk = (stride, start, dilation)
    _convolve(source, taps, bias, y, (c_group, o // groups, groups, kh, kw), walk, jumps, plain)
    return (y,), saved


def conv2d_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
    empty: Any,
) -> tuple:
    (dy,), (x, weight, bias) = dys, inputs
    dx = dweight = dbias = None
    depthwise = groups == x.shape[1] > 1
    plain = _is_plain(x, weight, stride, padding)
    if not depthwise:
        dy = _source(dy, plain, empty)
    if "x" in needs:
        dx = empty(x.shape, x.dtype, x.like().order)
        how = (dy, saved["weight"], dx, stride, padding, dilation, groups)
        _depthwise.input_gradient(*how) if depthwise else _input_gradient(*how, empty)
    if "weight" in needs:
        dweight = empty(weight.shape, weight.dtype, weight.like().order)
        if depthwise:
            _depthwise.weight_gradient(dy, saved["x"], dweight, stride, padding, dilation, empty)
        else:
            source = _source(saved["x"], plain, empty)
            _weight_gradient(dy, source, dweight, (stride, padding, dilation, groups), plain, empty)
    if "bias" in needs:
        dbias = empty(bias.shape, bias.dtype)
        channel_sums(dy, dbias, empty)
    return dx, dweight, dbias


def _input_gradient(
    dy: Any, weight: Any, dx: Any, stride: tuple, padding: tuple, dilation: tuple, groups: int, empty: Any
) -> None:
    """dx[pixel, c] = Σ_{tap, o} dy[the pixel whose tap this is, o] · weight[o, tap, c]."""
    (n, _, h, w), (o, c_group, kh, kw) = dx.shape, weight.shape
    taps, o_group = _turned_weight(weight, empty), o // groups
    jumps = (1, c_group, kh * kw * c_group, o_group * kh * kw * c_group)
    pads = (padding[0][0], padding[1][0])
    if stride == (1, 1):
        walk = (stride, pads, tuple(-d for d in dilation))
        plain = _is_plain(dx, weight, stride, padding) and evenly_spaced(dx)
        _convolve(dy, taps, None, dx, (o_group, c_group, groups, kh, kw), walk, jumps, plain)
        return
    common = tuple(map(math.gcd, stride, dilation))
    back = tuple(-d // g for d, g in zip(dilation, common))
    inverse = tuple(pow(d // g, -1, s // g) if s > g else 0 for d, s, g in zip(dilation, stride, common))
    largest = n * _tile.cdiv(h, stride[0]) * _tile.cdiv(w, stride[1])
    flat = o_group < FEW_CHANNELS
    tile = _tile_for(dy, largest, c_group, o_group * kh * kw if flat else o_group, groups * stride[0] * stride[1], flat)
    grid = (_tile.cdiv(largest, tile.BM) * _tile.cdiv(c_group, tile.BN), groups, stride[0] * stride[1])
    _tile.launch(
        _conv2d_kernel, grid, dy, taps, None, dx,
        n, h, w, *dy.shape[2:], o_group, c_group, kh, kw, *steps(dy), *jumps, *steps(dx),
        *stride, *pads, *back, *dilation, *common, *inverse,
        PHASED=True, FLAT=flat, PLAIN=False, ALIGNED=False, EVEN=False, FIRST=_channels_first(dx),
        BOUNDED=False, PRECISION=_precision(dy),
        BM=tile.BM, BN=tile.BN, BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _weight_gradient(dy: Any, x: Any, dweight: Any, options: tuple, plain: bool, empty: Any) -> None:
    stride, padding, dilation, groups = options
    o, c, kh, kw = dweight.shape
    if plain:
        dy, x = flattened(dy), flattened(x)
    (n, _, hy, wy), (_, _, hx, wx) = dy.shape, x.shape
    flat, pixels, o_group = c < FEW_CHANNELS, n * hy * wy, o // groups
    start = (-padding[0][0], -padding[1][0])
    bounded = _bounded((hy, wy), (hx, wx), (kh, kw), stride, start, dilation)
    tile = _weight_tile(dy, o_group, c * kh * kw if flat else c, flat)
    columns = _tile.cdiv(c * kh * kw, tile.BN) if flat else kh * kw * _tile.cdiv(c, tile.BN)
    tiles = _tile.cdiv(o_group, tile.BM) * columns
    # Two waves of programs; each sums enough pixels to be worth its partial result.
    wanted = min(2 * _tile.device(dy).sms // max(1, tiles * groups), pixels // (4 * tile.BK))
    splits, each = _tile.split(_tile.cdiv(pixels, tile.BK), max(1, wanted))
    partial = empty((splits, o, kh * kw, c), "float32")
    _tile.launch(
        _conv2d_weight_kernel, (tiles, splits, groups), dy, x, partial,
        pixels, each * tile.BK, hy, wy, hx, wx, c, o_group, kw, kh * kw,
        *steps(dy), *steps(x), *stride, *start, *dilation,
        FLAT=flat, PLAIN=plain, ALIGNED=hy * wy % 16 == 0, BOUNDED=bounded, PRECISION=_precision(dy),
        BM=tile.BM, BN=tile.BN, BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    finish(partial, dweight)
