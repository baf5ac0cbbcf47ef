"""Group norm; instance norm is group norm with a group for each channel. Bound by memory.

Row-major samples: a group's numbers lie side by side, and one program has a group (``_group_norm_alone.py``). Where such
groups are too few to fill the GPU, and channels-last, where a group is a strip of every pixel,
programs share out channels and pixels: what each finds of a group is a partial result, and each program of the second pass
merges those of its groups, in a fixed order. Gradients of the weights are summed channel by channel for each sample, then
over samples.

A residual and an activation may follow in the pass that writes y. Backward reads x anyway: f'(z) is from z = x̂ · weight + bias +
residual, made again.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from .._norm import group_norm_saved
from . import _configs, _tile
from ._batch_norm import EXACT, channels_last, constants, in_order
from ._group_norm_alone import _group_norm_backward_kernel, _group_norm_forward_kernel, activated_gradient, parameter
from ._norm_backward import finalise
from ._pixels import step_to
from .activation import value

BUDGETS = {
    "_group_norm_moments_kernel": Budget(registers=80, blocks=6),
    "_group_norm_apply_kernel": Budget(registers=96, blocks=5),
    # Sums are few.
    "_group_norm_sums_kernel": Budget(registers=96, blocks=5, narrow="stores"),
    "_group_norm_gradient_kernel": Budget(registers=96, blocks=5),
}

# --- several programs a group ----------------------------------------------------------------------------------------


@triton.jit
def _place(C, S, columns, shares, each, UNIT: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, COLS: tl.constexpr):
    """(C, S, sample, where it begins, share, this program's channels, its first pixel, and the one after its last).

    Sizes come in units. WIDE: places in a sample take 64 bits.
    """
    if LAST:
        C = C * UNIT
    else:
        S = S * UNIT
    pid = tl.program_id(0)
    column = pid % columns
    share = pid // columns % shares
    lo = step_to(share, each, WIDE)
    sample = (pid // columns // shares).to(tl.int64)
    if LAST:
        channel = column * COLS + tl.arange(0, COLS)[None, :]  # (1, COLS)
    else:
        channel = column + tl.zeros((1, 1), tl.int32)
    return C, S, sample, sample * C * S, share, channel, lo, tl.minimum(lo + each, S)


@triton.jit
def _tile_of(start, hi, C, S, channel, LAST: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(offsets in its sample, mask) of the tile that begins at this pixel: ROWS pixels of COLS channels, or COLS of one."""
    if LAST:
        pixel = start + tl.arange(0, ROWS)[:, None]
        return step_to(pixel, C, WIDE) + channel, (pixel < hi) & (channel < C)
    else:
        pixel = start + tl.arange(0, COLS)[None, :]
        return step_to(channel, S, WIDE) + pixel, (pixel < hi) & (channel < C)


@triton.jit
def _over(t, LAST: tl.constexpr):
    """The sum over a channel's elements in a tile: (1, COLS), or (1, 1) where all are of one channel."""
    if LAST:
        return tl.sum(t, 0, keep_dims=True)
    else:
        return tl.sum(t, 1, keep_dims=True)


@triton.jit
def _slot_of(row, channel, C, D, columns, SLOTS, LAST: tl.constexpr, COLS: tl.constexpr):
    """(where a block of channels puts its part of a channel's group, whether this channel does so, channels of the part)."""
    BLOCK: tl.constexpr = COLS if LAST else 1
    group, block = channel // D, channel // BLOCK
    first = tl.maximum(group * D, block * BLOCK)
    width = tl.minimum(tl.minimum(group * D + D, block * BLOCK + BLOCK), C) - first
    at = (row * columns + block) * SLOTS + (group - block * BLOCK // D)
    return at, (channel == first) & (channel < C), width.to(tl.float32)


@triton.jit
def _over_group(v, channel, C, D, COLS: tl.constexpr):
    """(1, COLS): the sum of v (1, COLS), or of each column's own v (COLS, COLS), over the channels of one group in a block."""
    other = tl.trans(channel)
    v = tl.trans(v) if v.shape[0] == 1 else v
    return tl.sum(tl.where((other // D == channel // D) & (other < C), v, 0.0), 0, keep_dims=True)


@triton.jit
def _partials_of(
    start, sample, channel, C, D, S, columns, shares, each, PARTS, SLOTS,
    LAST: tl.constexpr, COLS: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """(where they are, of how many numbers, whether there are such): MERGE partial results of each channel's group."""
    BLOCK: tl.constexpr = COLS if LAST else 1
    k = start + tl.arange(0, MERGE)[:, None]
    share, group = k // PARTS, channel // D
    block = group * D // BLOCK + k % PARTS
    width = tl.minimum(group * D + D, block * BLOCK + BLOCK) - tl.maximum(group * D, block * BLOCK)
    inside = (share < shares) & (width > 0) & (channel < C)
    pixels = tl.minimum(S - share.to(tl.int64) * each, each).to(tl.float32)
    at = ((sample * shares + share) * columns + block) * SLOTS + (group - block * BLOCK // D)
    return at, tl.where(inside, pixels * width, 0.0), inside


@triton.jit
def _group_norm_moments_kernel(
    x, means, squares, C, S, columns, shares, each, D, PARTS, SLOTS,
    UNIT: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """(mean, Σ (x − mean)²) of each group over a share of a sample's pixels, lane by lane as Welford did, then merged."""
    C, S, sample, begin, share, channel, lo, hi = _place(C, S, columns, shares, each, UNIT, LAST, WIDE, COLS)
    x += begin
    STEP: tl.constexpr = ROWS if LAST else COLS
    mean = tl.zeros((ROWS, COLS), tl.float32)
    square = tl.zeros((ROWS, COLS), tl.float32)
    seen = 0.0
    for start in range(lo, hi, STEP):
        at, mask = _tile_of(start, hi, C, S, channel, LAST, WIDE, ROWS, COLS)
        v = tl.load(x + at, mask, other=0.0).to(tl.float32)
        seen += 1.0
        d = v - mean
        mean += tl.where(mask, d * (1.0 / seen), 0.0)
        square += tl.where(mask, d * (v - mean), 0.0)
    lane = tl.arange(0, STEP).to(tl.int64)
    count = tl.maximum((hi - lo - lane + STEP - 1) // STEP, 0).to(tl.float32)
    count = count[:, None] if LAST else count[None, :]
    m = _over(count * mean, LAST) / tl.maximum(hi - lo, 1).to(tl.float32)
    square = _over(square + count * (mean - m) * (mean - m), LAST)
    slot, begins, width = _slot_of(sample * shares + share, channel, C, D, columns, SLOTS, LAST, COLS)
    if LAST:
        middle = _over_group(m, channel, C, D, COLS) / width
        apart = tl.trans(m) - middle  # (COLS, COLS)
        square = _over_group(tl.trans(square) + (hi - lo).to(tl.float32) * apart * apart, channel, C, D, COLS)
        m = middle
    tl.store(means + slot, m, begins)
    tl.store(squares + slot, square, begins)


@triton.jit
def _group_norm_apply_kernel(
    x, weight, bias, residual, means, squares, mean, var, rstd, y, eps, C, S, columns, shares, each, D, PARTS, SLOTS,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    MERGE: tl.constexpr,
):  # fmt: skip
    """y; mean, var and rstd are written by a group's first channel in the first share."""
    C, S, sample, begin, share, channel, lo, hi = _place(C, S, columns, shares, each, UNIT, LAST, WIDE, COLS)
    x += begin
    y += begin
    if residual is not None:
        residual += begin
    W: tl.constexpr = COLS if LAST else 1
    n = tl.maximum(S.to(tl.int64) * D, 1).to(tl.float32)
    part = tl.zeros((MERGE, W), tl.float32)
    for start in range(0, shares * PARTS, MERGE):
        place, count, inside = _partials_of(
            start, sample, channel, C, D, S, columns, shares, each, PARTS, SLOTS, LAST, COLS, MERGE
        )
        part += count * tl.load(means + place, inside, other=0.0)
    m = tl.sum(part, 0, keep_dims=True) / n
    part = tl.zeros((MERGE, W), tl.float32)
    for start in range(0, shares * PARTS, MERGE):
        place, count, inside = _partials_of(
            start, sample, channel, C, D, S, columns, shares, each, PARTS, SLOTS, LAST, COLS, MERGE
        )
        d = tl.load(means + place, inside, other=0.0) - m
        part += tl.load(squares + place, inside, other=0.0) + count * d * d
    v = tl.sum(part, 0, keep_dims=True) / n
    r = 1.0 / tl.sqrt_rn(v + eps)
    group = sample * (C // D) + channel // D
    writes = (share == 0) & (channel % D == 0) & (channel < C)
    if mean is not None:
        tl.store(mean + group, m, writes)
        tl.store(rstd + group, r, writes)
    if var is not None:
        tl.store(var + group, v, writes)
    w = parameter(weight, channel, channel < C, 1.0)
    b = parameter(bias, channel, channel < C, 0.0)
    for start in range(lo, hi, ROWS if LAST else COLS):
        at, mask = _tile_of(start, hi, C, S, channel, LAST, WIDE, ROWS, COLS)
        z = (tl.load(x + at, mask, other=0.0).to(tl.float32) - m) * r * w + b
        if residual is not None:
            z += tl.load(residual + at, mask, other=0.0).to(tl.float32)
        if ACTIVATION is not None:
            z = value(z, ACTIVATION, NUMBER_A, NUMBER_B)
        tl.store(y + at, z.to(y.dtype.element_ty), mask)


@triton.jit
def _group_norm_sums_kernel(
    dy, x, weight, bias, residual, mean, rstd, dz, sums, dots, totals, slopes, C, S, columns, shares, each, D, PARTS, SLOTS,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dz, and Σ dz and Σ dz x̂ of each channel over a share of a sample's pixels; Σ g and Σ g x̂ of each group, g = dz · weight."""
    C, S, sample, begin, share, channel, lo, hi = _place(C, S, columns, shares, each, UNIT, LAST, WIDE, COLS)
    dy += begin
    x += begin
    if residual is not None:
        residual += begin
    if dz is not None:
        dz += begin
    group = sample * (C // D) + channel // D
    m = tl.load(mean + group, channel < C, other=0.0)
    r = tl.load(rstd + group, channel < C, other=0.0)
    w = parameter(weight, channel, channel < C, 1.0)
    if ACTIVATION is not None:
        b = parameter(bias, channel, channel < C, 0.0)
    total = tl.zeros((ROWS, COLS), tl.float32)
    dot = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(lo, hi, ROWS if LAST else COLS):
        at, mask = _tile_of(start, hi, C, S, channel, LAST, WIDE, ROWS, COLS)
        g = tl.load(dy + at, mask, other=0.0).to(tl.float32)
        xhat = (tl.load(x + at, mask, other=0.0).to(tl.float32) - m) * r
        if ACTIVATION is not None:
            g = activated_gradient(g, xhat * w + b, residual, at, mask, ACTIVATION, NUMBER_A, NUMBER_B)
        if dz is not None:
            tl.store(dz + at, g.to(dz.dtype.element_ty), mask)
        total += g
        dot += g * xhat
    each_total, each_dot = _over(total, LAST), _over(dot, LAST)
    row = sample * shares + share
    if sums is not None:
        tl.store(sums + row * C + channel, each_total, channel < C)
    if dots is not None:
        tl.store(dots + row * C + channel, each_dot, channel < C)
    if totals is not None:
        slot, begins, _width = _slot_of(row, channel, C, D, columns, SLOTS, LAST, COLS)
        each_total, each_dot = tl.fma(each_total, w, 0.0), tl.fma(each_dot, w, 0.0)
        if LAST:
            each_total = _over_group(each_total, channel, C, D, COLS)
            each_dot = _over_group(each_dot, channel, C, D, COLS)
        tl.store(totals + slot, each_total, begins)
        tl.store(slopes + slot, each_dot, begins)


@triton.jit
def _group_norm_gradient_kernel(
    dy, x, weight, bias, residual, mean, rstd, totals, slopes, dx, C, S, columns, shares, each, D, PARTS, SLOTS,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    MERGE: tl.constexpr,
):  # fmt: skip
    C, S, sample, begin, _, channel, lo, hi = _place(C, S, columns, shares, each, UNIT, LAST, WIDE, COLS)
    dy += begin
    x += begin
    dx += begin
    if residual is not None:
        residual += begin
    W: tl.constexpr = COLS if LAST else 1
    n = tl.maximum(S.to(tl.int64) * D, 1).to(tl.float32)
    total = tl.zeros((MERGE, W), tl.float32)
    dot = tl.zeros((MERGE, W), tl.float32)
    for start in range(0, shares * PARTS, MERGE):
        place, _count, inside = _partials_of(
            start, sample, channel, C, D, S, columns, shares, each, PARTS, SLOTS, LAST, COLS, MERGE
        )
        total += tl.load(totals + place, inside, other=0.0)
        dot += tl.load(slopes + place, inside, other=0.0)
    mg = tl.sum(total, 0, keep_dims=True) / n
    slope = tl.sum(dot, 0, keep_dims=True) / n
    group = sample * (C // D) + channel // D
    m = tl.load(mean + group, channel < C, other=0.0)
    r = tl.load(rstd + group, channel < C, other=0.0)
    w = parameter(weight, channel, channel < C, 1.0)
    if ACTIVATION is not None:
        b = parameter(bias, channel, channel < C, 0.0)
    for start in range(lo, hi, ROWS if LAST else COLS):
        at, mask = _tile_of(start, hi, C, S, channel, LAST, WIDE, ROWS, COLS)
        g = tl.load(dy + at, mask, other=0.0).to(tl.float32)
        xhat = (tl.load(x + at, mask, other=0.0).to(tl.float32) - m) * r
        if ACTIVATION is not None:
            g = activated_gradient(g, xhat * w + b, residual, at, mask, ACTIVATION, NUMBER_A, NUMBER_B)
        g = tl.fma(g, w, 0.0)  # as it is in the sum: rounded
        tl.store(dx + at, (r * (g - mg - xhat * slope)).to(dx.dtype.element_ty), mask)


# --- launchers -------------------------------------------------------------------------------------------------------

FORWARD = _configs.rows("group_norm_forward"), _configs.rows("group_norm_forward.channels_last")
BACKWARD = _configs.rows("group_norm_backward"), _configs.rows("group_norm_backward.channels_last")
MERGED = 1024
"""Partial results that a program loads at a time, of all its channels."""


def _warps(entry: _configs.Row, elements: int) -> int:
    """As many as have 128 bits of 16-bit numbers for each lane."""
    return max(1, min(entry.warps, elements // 256))


class _Walk:
    """How programs walk over x, dense in memory order ``last`` or row-major, in groups of channels.

    choices: for a channel's pixels side by side, and for the channels of a pixel.
    """

    def __init__(
        self, choices: tuple[_configs.Choice, _configs.Choice], x: Any, last: tuple[int, ...] | None, groups: int
    ):
        samples, channels = x.shape[:2]
        pixels, device = math.prod(x.shape[2:]), _tile.device(x)
        self.samples, self.channels = samples, channels
        entry = choices[last is not None](device, channels if last else pixels)
        depth = channels // max(groups, 1)
        cols = _tile.next_power_of_2(max(channels if last else pixels, 1), 64 if last else entry.elements)
        rows = max(1, entry.elements // cols)
        unit, length = _tile.in_units(channels if last else pixels)
        wide = channels * pixels >= 2**30  # tiles, and shares of pixels, end behind a sample
        # A merge and a second launch cost more than to read a few tiles with a part of the GPU.
        few = samples * groups < device.sms and depth * pixels > 4 * entry.elements
        self.alone = last is None and not few and samples * channels * pixels > 0
        if self.alone:
            rows = min(rows, _tile.next_power_of_2(depth))
            self.sizes: tuple = (groups, depth, length)
            self.grid: tuple = (samples * groups,)
            self.tile = dict(UNIT=unit, WIDE=wide, ROWS=rows, COLS=cols, num_warps=_warps(entry, rows * cols))
            self.shares = 1
            return
        step = rows if last else cols
        columns = _tile.cdiv(channels, cols) if last else channels
        most = max(1, 4 * device.sms // max(samples * columns, 1))
        self.shares, blocks = _tile.split(_tile.cdiv(pixels, step), min(most, _tile.cdiv(pixels, 2 * step)))
        self.shares = max(self.shares, 1)  # an empty group has statistics to write, too
        each = blocks * step
        block = cols if last else 1
        whole = block % max(depth, 1) == 0 or depth % block == 0
        parts = max(1, depth // block) if whole else (depth - 2) // block + 2  # blocks that a group may lie in
        self.slots = max(1, block // max(depth, 1)) if whole else block // depth + 2  # groups in a block
        self.blocks = columns
        sizes = (length, pixels) if last else (channels, length)
        self.sizes = (*sizes, columns, self.shares, each, depth, parts, self.slots)
        self.grid = (samples * columns * self.shares,)
        rows = rows if last else 1
        tile = dict(ROWS=rows, COLS=cols, num_warps=_warps(entry, rows * cols))
        self.tile = tile | dict(UNIT=unit, LAST=last is not None, WIDE=wide)
        self.merge = _tile.next_power_of_2(self.shares * parts, MERGED // block)

    def finer(self, more: Any) -> dict[str, Any]:
        """Backward's tile; of half the rows where one more array is read or written, which takes registers."""
        return self.tile if more is None else self.tile | {"ROWS": max(1, self.tile["ROWS"] // 2)}

    def partials(self, empty: Any) -> Any:
        """A number for each channel of each share of each sample."""
        return empty((self.samples * self.shares, self.channels), "float32")

    def of_groups(self, empty: Any) -> Any:
        """A number for each group in each block of channels of each share of each sample."""
        return empty((self.samples * self.shares, self.blocks * self.slots), "float32")


def normalise(
    x: Any, weight: Any, bias: Any, residual: Any, groups: int, eps: float, activation: str | None, empty: Any, *,
    keep: bool, spread: bool = False,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """(y, mean, var, rstd). keep: give mean and rstd; spread: give var, the biased one, in float32 too: all (N, G)."""
    last = channels_last(x)
    x, walk = in_order(x, last, empty), _Walk(FORWARD, x, last, groups)
    y = empty(x.shape, x.dtype, last)
    row = (walk.samples, groups)
    mean, rstd = (empty(row, "float32") if keep else None for _ in range(2))
    var = empty(row, "float32") if spread else None
    weight, bias = (None if p is None else _tile.dense(p, empty) for p in (weight, bias))
    residual = None if residual is None else in_order(residual, last, empty)
    if walk.alone:
        arrays = (x, weight, bias, residual, y, mean, var, rstd)
        _tile.launch(
            _group_norm_forward_kernel, walk.grid, *arrays, *walk.sizes, eps, **constants(activation), **walk.tile
        )
    else:
        means, squares = walk.of_groups(empty), walk.of_groups(empty)
        _tile.launch(_group_norm_moments_kernel, walk.grid, x, means, squares, *walk.sizes, **walk.tile)
        arrays = (x, weight, bias, residual, means, squares, mean, var, rstd, y, eps, *walk.sizes)
        tile = constants(activation) | walk.tile
        _tile.launch(_group_norm_apply_kernel, walk.grid, *arrays, MERGE=walk.merge, **tile)
    return y, mean, var, rstd


def gradients(
    dy: Any, saved: dict, inputs: tuple, needs: tuple, groups: int, activation: str | None, empty: Any
) -> tuple:
    """(dx, dweight, dbias, dresidual)"""
    x, statistics, f = saved["x"], (saved["mean"], saved["rstd"]), constants(activation)
    last = channels_last(x)
    walk = _Walk(BACKWARD, x, last, groups)
    x, dy, residual = (None if a is None else in_order(a, last, empty) for a in (x, dy, saved.get("residual")))
    weight, bias = (None if (p := saved.get(k)) is None else _tile.dense(p, empty) for k in ("weight", "bias"))
    dx, dresidual = (empty(x.shape, x.dtype, last) if k in needs else None for k in ("x", "residual"))
    dweight, dbias = (
        empty(p.shape, p.dtype) if name in needs else None for name, p in (("weight", inputs[1]), ("bias", inputs[2]))
    )
    sums, dots = (None if d is None else walk.partials(empty) for d in (dbias, dweight))
    if walk.alone:
        arrays = (dy, x, weight, bias, residual, *statistics, dx, dresidual, sums, dots)
        _tile.launch(_group_norm_backward_kernel, walk.grid, *arrays, *walk.sizes, **f, **walk.tile)
    else:
        totals, slopes = (None if dx is None else walk.of_groups(empty) for _ in range(2))
        arrays = (dy, x, weight, bias, residual, *statistics, dresidual, sums, dots, totals, slopes)
        tile = walk.finer(residual if dresidual is None else dresidual)
        _tile.launch(_group_norm_sums_kernel, walk.grid, *arrays, *walk.sizes, **f, **tile)
        if dx is not None:
            if dresidual is not None and (
                activation in EXACT or x.element_size() == 4
            ):  # it has no fewer digits than dz
                dy, residual, f = dresidual, None, constants(None)
            arrays = (dy, x, weight, bias, residual, *statistics, totals, slopes, dx, *walk.sizes)
            _tile.launch(_group_norm_gradient_kernel, walk.grid, *arrays, MERGE=walk.merge, **f, **walk.finer(residual))
    if dweight is not None or dbias is not None:
        found = (None if d is None else s for d, s in ((dweight, dots), (dbias, sums)))
        finalise(walk.samples * walk.shares, *found, dweight, dbias, walk.channels, x)
    return dx, dweight, dbias, dresidual


def group_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    residual: Any = None,
    *,
    needs: tuple = (),
    num_groups: int,
    eps: float = 1e-5,
    activation: str | None = None,
    empty: Any,
) -> tuple[tuple, dict]:
    given = x, weight, bias, residual
    y, mean, _, rstd = normalise(*given, num_groups, eps, activation, empty, keep=bool(needs))
    return (y,), group_norm_saved(activation, x, mean, rstd, weight, bias, residual) if needs else {}


def group_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    num_groups: int,
    eps: float = 1e-5,
    activation: str | None = None,
    empty: Any,
) -> tuple:
    return gradients(dys[0], saved, inputs, needs, num_groups, activation, empty)
