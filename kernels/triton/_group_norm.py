"""Group norm; instance norm is group norm with a group for each channel. Bound by memory.

Row-major samples: a group's numbers lie side by side, and one program has a group (``_group_norm_alone.py``). Where such
groups are too few to fill the GPU, and channels-last, where a group is a strip of every pixel,
programs share out channels and pixels: what each finds of its channels is merged in a fixed order, group by group, before
a second pass over all. Gradients of the weights are summed channel by channel for each sample, then over samples.

An activation may follow in the pass that writes y. Backward reads x anyway: f'(z) is from z = x̂ · weight + bias, made again.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from .._norm import group_norm_saved
from . import _configs, _tile
from ._batch_norm import channels_last, constants, in_order
from ._group_norm_alone import _group_norm_backward_kernel, _group_norm_forward_kernel, activated_gradient, parameter
from ._norm_backward import finalise
from ._pixels import step_to
from .activation import value

BUDGETS = {
    "_group_norm_moments_kernel": Budget(registers=80, blocks=6),
    # A group's partial results are few, and lie in runs as long as its channels.
    "_group_norm_statistics_kernel": Budget(registers=72, blocks=16, narrow="loads"),
    "_group_norm_apply_kernel": Budget(registers=72, blocks=7),
    # On sm_100 one register is put aside, once.
    "_group_norm_sums_kernel": Budget(registers=80, blocks=6, spills=2),
    "_group_norm_means_kernel": Budget(registers=72, blocks=16, narrow="loads"),
    "_group_norm_gradient_kernel": Budget(registers=80, blocks=6),
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
def _group_norm_moments_kernel(
    x, means, squares, C, S, columns, shares, each,
    UNIT: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """(mean, Σ (x − mean)²) of each channel over a share of a sample's pixels, lane by lane as Welford did, then merged."""
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
    at = (sample * shares + share) * C + channel
    tl.store(means + at, m, channel < C)
    tl.store(squares + at, square, channel < C)


@triton.jit
def _partials_of(start, group, D, G, S, shares, each, MERGE: tl.constexpr):
    """(where they are, of which channels, of how many numbers, whether there are such): partial results of a group."""
    p = start + tl.arange(0, MERGE)
    share = p // D
    channel = group % G * D + p % D
    inside = p < shares * D
    count = tl.where(inside, tl.minimum(S - share.to(tl.int64) * each, each), 0).to(tl.float32)
    return (group // G * shares + share).to(tl.int64) * (G * D) + channel, channel, count, inside


@triton.jit
def _group_norm_statistics_kernel(
    means, squares, mean, var, rstd, G, D, S, shares, each, eps, MERGE: tl.constexpr
):  # fmt: skip
    group = tl.program_id(0)
    n = tl.maximum(S.to(tl.int64) * D, 1).to(tl.float32)
    part = tl.zeros((MERGE,), tl.float32)
    for start in range(0, shares * D, MERGE):
        at, _, count, inside = _partials_of(start, group, D, G, S, shares, each, MERGE)
        part += count * tl.load(means + at, inside, other=0.0)
    m = tl.sum(part, 0) / n
    part = tl.zeros((MERGE,), tl.float32)
    for start in range(0, shares * D, MERGE):
        at, _, count, inside = _partials_of(start, group, D, G, S, shares, each, MERGE)
        d = tl.load(means + at, inside, other=0.0) - m
        part += tl.load(squares + at, inside, other=0.0) + count * d * d
    v = tl.sum(part, 0) / n
    tl.store(mean + group, m)
    tl.store(rstd + group, 1.0 / tl.sqrt_rn(v + eps))
    if var is not None:
        tl.store(var + group, v)


@triton.jit
def _group_norm_apply_kernel(
    x, weight, bias, mean, rstd, y, G, C, S, columns, shares, each,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    C, S, sample, begin, _, channel, lo, hi = _place(C, S, columns, shares, each, UNIT, LAST, WIDE, COLS)
    x += begin
    y += begin
    group = sample * G + channel // (C // G)
    m = tl.load(mean + group, channel < C, other=0.0)
    r = tl.load(rstd + group, channel < C, other=0.0)
    w = parameter(weight, channel, channel < C, 1.0)
    b = parameter(bias, channel, channel < C, 0.0)
    for start in range(lo, hi, ROWS if LAST else COLS):
        at, mask = _tile_of(start, hi, C, S, channel, LAST, WIDE, ROWS, COLS)
        z = (tl.load(x + at, mask, other=0.0).to(tl.float32) - m) * r * w + b
        if ACTIVATION is not None:
            z = value(z, ACTIVATION, NUMBER_A, NUMBER_B)
        tl.store(y + at, z.to(y.dtype.element_ty), mask)


@triton.jit
def _group_norm_sums_kernel(
    dy, x, weight, bias, mean, rstd, sums, dots, G, C, S, columns, shares, each,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Σ dz and Σ dz x̂ of each channel over a share of a sample's pixels."""
    C, S, sample, begin, share, channel, lo, hi = _place(C, S, columns, shares, each, UNIT, LAST, WIDE, COLS)
    dy += begin
    x += begin
    group = sample * G + channel // (C // G)
    m = tl.load(mean + group, channel < C, other=0.0)
    r = tl.load(rstd + group, channel < C, other=0.0)
    w = parameter(weight, channel, channel < C, 1.0)
    b = parameter(bias, channel, channel < C, 0.0)
    total = tl.zeros((ROWS, COLS), tl.float32)
    dot = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(lo, hi, ROWS if LAST else COLS):
        at, mask = _tile_of(start, hi, C, S, channel, LAST, WIDE, ROWS, COLS)
        g = tl.load(dy + at, mask, other=0.0).to(tl.float32)
        xhat = (tl.load(x + at, mask, other=0.0).to(tl.float32) - m) * r
        if ACTIVATION is not None:
            g = activated_gradient(g, xhat * w + b, mask, ACTIVATION, NUMBER_A, NUMBER_B)
        total += g
        dot += g * xhat
    at = (sample * shares + share) * C + channel
    tl.store(sums + at, _over(total, LAST), channel < C)
    tl.store(dots + at, _over(dot, LAST), channel < C)


@triton.jit
def _group_norm_means_kernel(
    sums, dots, weight, means, slopes, G, D, S, shares, each, MERGE: tl.constexpr
):  # fmt: skip
    """ḡ and mean(g x̂) of each group, g = dz · weight."""
    group = tl.program_id(0)
    n = tl.maximum(S.to(tl.int64) * D, 1).to(tl.float32)
    total = tl.zeros((MERGE,), tl.float32)
    dot = tl.zeros((MERGE,), tl.float32)
    for start in range(0, shares * D, MERGE):
        at, channel, _, inside = _partials_of(start, group, D, G, S, shares, each, MERGE)
        w = parameter(weight, channel, inside, 1.0)
        total += tl.load(sums + at, inside, other=0.0) * w
        dot += tl.load(dots + at, inside, other=0.0) * w
    tl.store(means + group, tl.sum(total, 0) / n)
    tl.store(slopes + group, tl.sum(dot, 0) / n)


@triton.jit
def _group_norm_gradient_kernel(
    dy, x, weight, bias, mean, rstd, means, slopes, dx, G, C, S, columns, shares, each,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    C, S, sample, begin, _, channel, lo, hi = _place(C, S, columns, shares, each, UNIT, LAST, WIDE, COLS)
    dy += begin
    x += begin
    dx += begin
    group = sample * G + channel // (C // G)
    m = tl.load(mean + group, channel < C, other=0.0)
    r = tl.load(rstd + group, channel < C, other=0.0)
    mg = tl.load(means + group, channel < C, other=0.0)
    slope = tl.load(slopes + group, channel < C, other=0.0)
    w = parameter(weight, channel, channel < C, 1.0)
    b = parameter(bias, channel, channel < C, 0.0)
    for start in range(lo, hi, ROWS if LAST else COLS):
        at, mask = _tile_of(start, hi, C, S, channel, LAST, WIDE, ROWS, COLS)
        g = tl.load(dy + at, mask, other=0.0).to(tl.float32)
        xhat = (tl.load(x + at, mask, other=0.0).to(tl.float32) - m) * r
        if ACTIVATION is not None:
            g = activated_gradient(g, xhat * w + b, mask, ACTIVATION, NUMBER_A, NUMBER_B)
        tl.store(dx + at, (r * (g * w - mg - xhat * slope)).to(dx.dtype.element_ty), mask)


# --- launchers -------------------------------------------------------------------------------------------------------

FORWARD = _configs.rows("group_norm_forward"), _configs.rows("group_norm_forward.channels_last")
BACKWARD = _configs.rows("group_norm_backward"), _configs.rows("group_norm_backward.channels_last")
MERGE = 256
"""Partial results of a group that are loaded at a time."""


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
        pixels, device, self.last = math.prod(x.shape[2:]), _tile.device(x), last
        self.samples, self.channels, self.groups, self.pixels = samples, channels, groups, pixels
        entry = choices[last is not None](device, channels if last else pixels)
        depth = channels // max(groups, 1)
        cols = _tile.next_power_of_2(max(channels if last else pixels, 1), 64 if last else entry.elements)
        rows = max(1, entry.elements // cols)
        self.depth = depth
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
        self.each = blocks * step
        sizes = (length, pixels) if last else (channels, length)
        self.sizes = (*sizes, columns, self.shares, self.each)
        self.grid = (samples * columns * self.shares,)
        rows = rows if last else 1
        tile = dict(ROWS=rows, COLS=cols, num_warps=_warps(entry, rows * cols))
        self.tile = tile | dict(UNIT=unit, LAST=last is not None, WIDE=wide)

    def partials(self, empty: Any) -> Any:
        """A number for each channel of each share of each sample."""
        return empty((self.samples * self.shares, self.channels), "float32")

    def merge(self, kernel: Any, arrays: tuple, *rest: float) -> None:
        sizes = (self.groups, self.depth, self.pixels, self.shares, self.each)
        merge = _tile.next_power_of_2(self.shares * self.depth, MERGE)
        _tile.launch(kernel, (self.samples * self.groups,), *arrays, *sizes, *rest, MERGE=merge, num_warps=1)


def normalise(
    x: Any, weight: Any, bias: Any, groups: int, eps: float, activation: str | None, empty: Any, *, keep: bool,
    spread: bool = False,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """(y, mean, var, rstd). keep: give mean and rstd; spread: give var, the biased one, in float32 too: all (N, G)."""
    last = channels_last(x)
    x, walk = in_order(x, last, empty), _Walk(FORWARD, x, last, groups)
    y = empty(x.shape, x.dtype, last)
    row = (walk.samples, groups)
    mean, rstd = (empty(row, "float32") if keep or not walk.alone else None for _ in range(2))
    var = empty(row, "float32") if spread else None
    weight, bias = (None if p is None else _tile.dense(p, empty) for p in (weight, bias))
    if walk.alone:
        arrays = (x, weight, bias, y, mean, var, rstd)
        _tile.launch(
            _group_norm_forward_kernel, walk.grid, *arrays, *walk.sizes, eps, **constants(activation), **walk.tile
        )
    else:
        means, squares = walk.partials(empty), walk.partials(empty)
        _tile.launch(_group_norm_moments_kernel, walk.grid, x, means, squares, *walk.sizes, **walk.tile)
        walk.merge(_group_norm_statistics_kernel, (means, squares, mean, var, rstd), eps)
        arrays = (x, weight, bias, mean, rstd, y, groups, *walk.sizes)
        _tile.launch(_group_norm_apply_kernel, walk.grid, *arrays, **constants(activation), **walk.tile)
    return y, mean, var, rstd


def gradients(
    dy: Any, saved: dict, inputs: tuple, needs: tuple, groups: int, activation: str | None, empty: Any
) -> tuple:
    """(dx, dweight, dbias)"""
    x, statistics, f = saved["x"], (saved["mean"], saved["rstd"]), constants(activation)
    last = channels_last(x)
    walk = _Walk(BACKWARD, x, last, groups)
    x, dy = in_order(x, last, empty), in_order(dy, last, empty)
    weight, bias = (None if (p := saved.get(k)) is None else _tile.dense(p, empty) for k in ("weight", "bias"))
    dx = empty(x.shape, x.dtype, last) if "x" in needs else None
    dweight, dbias = (
        empty(p.shape, p.dtype) if name in needs else None for name, p in (("weight", inputs[1]), ("bias", inputs[2]))
    )
    if walk.alone:
        sums, dots = (None if d is None else walk.partials(empty) for d in (dbias, dweight))
        arrays = (dy, x, weight, bias, *statistics, dx, sums, dots)
        _tile.launch(_group_norm_backward_kernel, walk.grid, *arrays, *walk.sizes, **f, **walk.tile)
    else:
        sums, dots = walk.partials(empty), walk.partials(empty)
        scale = None if activation is None else weight
        arrays = (dy, x, scale, bias, *statistics, sums, dots, groups)
        _tile.launch(_group_norm_sums_kernel, walk.grid, *arrays, *walk.sizes, **f, **walk.tile)
        if dx is not None:
            means, slopes = (empty((walk.samples, groups), "float32") for _ in range(2))
            walk.merge(_group_norm_means_kernel, (sums, dots, weight, means, slopes))
            arrays = (dy, x, weight, bias, *statistics, means, slopes, dx, groups)
            _tile.launch(_group_norm_gradient_kernel, walk.grid, *arrays, *walk.sizes, **f, **walk.tile)
    if dweight is not None or dbias is not None:
        found = (None if d is None else s for d, s in ((dweight, dots), (dbias, sums)))
        finalise(walk.samples * walk.shares, *found, dweight, dbias, walk.channels, x)
    return dx, dweight, dbias


def group_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    needs: tuple = (),
    num_groups: int,
    eps: float = 1e-5,
    activation: str | None = None,
    empty: Any,
) -> tuple[tuple, dict]:
    y, mean, _, rstd = normalise(x, weight, bias, num_groups, eps, activation, empty, keep=bool(needs))
    return (y,), group_norm_saved(activation, x, mean, rstd, weight, bias) if needs else {}


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
