"""Batch norm. Bound by memory: forward reads x twice and writes y, backward reads x and dy twice and writes dx.

A residual is read once by forward, and its gradient dz = dy f'(z) written by backward: by the first pass where that loses
no digit, and the second one then reads it in the place of dy. Otherwise both passes compute dz, from y where the
activation allows it, else from z, which x and the residual make again.

x is a stack of rows. Channels-first (ROW = one image, all of a program's elements belong to one channel): rows of S
elements, C · S apart. Channels-last, and (N, C) (a row = one position): rows of C elements, each of its own channel.
A program sums over a tile of rows; the sums of several programs are merged, always in the same order, by those that
need them, so nothing is atomic and nothing waits.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._activation import numbers_of
from .._budget import Budget
from .._norm import batch_norm_saved
from . import _configs, _tile
from .activation import gradient, value

BUDGETS = {
    "_batch_norm_moments_kernel": Budget(registers=224, blocks=2),
    # On sm_80 one register is put aside, once.
    "_batch_norm_forward_kernel": Budget(registers=80, blocks=7, spills=2),
    "_batch_norm_sums_kernel": Budget(registers=104, blocks=5),
    "_batch_norm_backward_kernel": Budget(registers=96, blocks=5),
}


@triton.jit
def _place(R, C, S, row_step, groups, each, UNIT: tl.constexpr, LAST: tl.constexpr, COLS: tl.constexpr):
    """(channels in all, share, this program's channels, and what ``_tile_of`` needs) of this program.

    Sizes come in units (see _tile.in_units), and leave in elements.
    """
    if LAST:
        C = C * UNIT
    else:
        S = S * UNIT
    group = tl.program_id(0) % groups
    share = (tl.program_id(0) // groups).to(tl.int64)
    rows = share * each, tl.minimum(share * each + each, R), row_step * UNIT
    if LAST:
        channel = group * COLS + tl.arange(0, COLS)[None, :]  # (1, COLS)
        return C, share, channel, rows, (group * COLS, tl.minimum(group * COLS + COLS, C), tl.zeros((), tl.int64))
    else:
        channel = group + tl.zeros((1, 1), tl.int32)  # (1, 1)
        return C, share, channel, rows, (group * 0, S, group.to(tl.int64) * S)


@triton.jit
def _tile_of(start, column, rows, columns, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(offsets, mask) of the tile whose first row and column these are: (ROWS, COLS)."""
    row = start + tl.arange(0, ROWS)[:, None]
    col = column + tl.arange(0, COLS)[None, :]
    return (row * rows[2] + columns[2]) + col, (row < rows[1]) & (col < columns[1])


@triton.jit
def _over(t, LAST: tl.constexpr):
    """The sum over a channel's elements in a tile: (1, COLS), or (1, 1) where all are of one channel."""
    if LAST:
        return tl.sum(t, 0, keep_dims=True)
    else:  # by way of a scalar: Triton 3.6 fails to compile sums of one axis after the other
        return tl.sum(tl.sum(t, 1), 0) + tl.zeros((1, 1), tl.float32)


@triton.jit
def _parameter(p, channel, C, default):
    if p is None:
        return default + tl.zeros(channel.shape, tl.float32)
    else:
        return tl.load(p + channel, channel < C, other=0.0).to(tl.float32)


@triton.jit
def _batch_norm_moments_kernel(
    x, counts, means, squares, R, C, S, row_step, groups, each,
    UNIT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """(count, mean, Σ (x − mean)²) of each channel over ``each`` rows, lane by lane as Welford did, then merged."""
    C, share, channel, rows, columns = _place(R, C, S, row_step, groups, each, UNIT, LAST, COLS)
    mean = tl.zeros((ROWS, COLS), tl.float32)
    square = tl.zeros((ROWS, COLS), tl.float32)
    count = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(rows[0], rows[1], ROWS):
        for column in range(columns[0], columns[1], COLS):
            at, mask = _tile_of(start, column, rows, columns, ROWS, COLS)
            v = tl.load(x + at, mask, other=0.0).to(tl.float32)
            count += mask.to(tl.float32)
            d = v - mean
            mean += tl.where(mask, d / tl.maximum(count, 1.0), 0.0)
            square += tl.where(mask, d * (v - mean), 0.0)
    n = _over(count, LAST)
    m = _over(count * mean, LAST) / tl.maximum(n, 1.0)
    square = _over(square + count * (mean - m) * (mean - m), LAST)
    at = share * C + channel
    tl.store(counts + at, n, channel < C)
    tl.store(means + at, m, channel < C)
    tl.store(squares + at, square, channel < C)


@triton.jit
def _partials(p, start, channel, C, shares, MERGE: tl.constexpr):
    """The (MERGE, channels) partial results of shares from ``start`` on."""
    s = start + tl.arange(0, MERGE)[:, None]  # (MERGE, 1)
    return tl.load(p + s.to(tl.int64) * C + channel, (s < shares) & (channel < C), other=0.0)


@triton.jit
def _merged_moments(counts, means, squares, channel, C, shares, MERGE: tl.constexpr):
    """(count, mean, Σ (x − mean)²) of each channel over all shares."""
    n = tl.zeros(channel.shape, tl.float32)
    mean = tl.zeros(channel.shape, tl.float32)
    spread = tl.zeros(channel.shape, tl.float32)
    for start in range(0, shares, MERGE):
        count = _partials(counts, start, channel, C, shares, MERGE)
        n += tl.sum(count, 0, keep_dims=True)
        mean += tl.sum(count * _partials(means, start, channel, C, shares, MERGE), 0, keep_dims=True)
    mean /= tl.maximum(n, 1.0)
    for start in range(0, shares, MERGE):
        d = _partials(means, start, channel, C, shares, MERGE) - mean
        d = _partials(counts, start, channel, C, shares, MERGE) * d * d
        spread += tl.sum(_partials(squares, start, channel, C, shares, MERGE) + d, 0, keep_dims=True)
    return n, mean, spread


@triton.jit
def _merged_sum(p, channel, C, shares, MERGE: tl.constexpr):
    total = tl.zeros(channel.shape, tl.float32)
    for start in range(0, shares, MERGE):
        total += tl.sum(_partials(p, start, channel, C, shares, MERGE), 0, keep_dims=True)
    return total


@triton.jit
def _batch_norm_forward_kernel(
    x, weight, bias, residual, running_mean, running_var, y, mean, rstd, counts, means, squares,
    R, C, S, row_step, groups, each, shares, momentum, eps, BATCH: tl.constexpr, UPDATE: tl.constexpr,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, MERGE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    C, share, channel, rows, columns = _place(R, C, S, row_step, groups, each, UNIT, LAST, COLS)
    leader = (channel < C) & (share == 0)
    if BATCH:
        n, m, spread = _merged_moments(counts, means, squares, channel, C, shares, MERGE)
        var = spread / tl.maximum(n, 1.0)
        if UPDATE:
            old = tl.load(running_mean + channel, leader, other=0.0).to(tl.float32)
            new = (1 - momentum) * old + momentum * m
            tl.store(running_mean + channel, new.to(running_mean.dtype.element_ty), leader)
            old = tl.load(running_var + channel, leader, other=0.0).to(tl.float32)
            new = (1 - momentum) * old + momentum * (spread / tl.maximum(n - 1.0, 1.0))
            tl.store(running_var + channel, new.to(running_var.dtype.element_ty), leader)
    else:
        m = _parameter(running_mean, channel, C, 0.0)
        var = _parameter(running_var, channel, C, 1.0)
    r = 1.0 / tl.sqrt_rn(var + eps)
    if mean is not None:
        tl.store(mean + channel, m, leader)
        tl.store(rstd + channel, r, leader)
    w = _parameter(weight, channel, C, 1.0)
    b = _parameter(bias, channel, C, 0.0)
    for start in range(rows[0], rows[1], ROWS):
        for column in range(columns[0], columns[1], COLS):
            at, mask = _tile_of(start, column, rows, columns, ROWS, COLS)
            v = tl.load(x + at, mask, other=0.0).to(tl.float32)
            z = (v - m) * r * w + b
            if residual is not None:
                z += tl.load(residual + at, mask, other=0.0).to(tl.float32)
            if ACTIVATION is not None:
                z = value(z, ACTIVATION, NUMBER_A, NUMBER_B)
            tl.store(y + at, z.to(y.dtype.element_ty), mask)


@triton.jit
def _gradient(
    g, d, scale, b, residual, y, at, mask, ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr
):
    """dz = dy f'(z) of a tile, from y where there is one, else from z = (x − mean) scale + bias + residual."""
    if y is not None:
        s = tl.load(y + at, mask, other=0.0).to(tl.float32)
    else:
        s = d * scale + b
        if residual is not None:
            s += tl.load(residual + at, mask, other=0.0).to(tl.float32)
    return tl.where(mask, gradient(g, s, ACTIVATION, NUMBER_A, NUMBER_B), 0.0)


@triton.jit
def _batch_norm_sums_kernel(
    dy, x, weight, bias, residual, y, mean, rstd, dz, sums, dots, R, C, S, row_step, groups, each,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Σ dz and Σ dz x̂ of each channel over ``each`` rows; and dz, where asked."""
    C, share, channel, rows, columns = _place(R, C, S, row_step, groups, each, UNIT, LAST, COLS)
    m = _parameter(mean, channel, C, 0.0)
    r = _parameter(rstd, channel, C, 0.0)
    scale = r * _parameter(weight, channel, C, 1.0)
    b = _parameter(bias, channel, C, 0.0)
    AGAIN: tl.constexpr = ACTIVATION is not None and y is None  # then r does not stay beside scale
    total = tl.zeros((ROWS, COLS), tl.float32)
    dot = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(rows[0], rows[1], ROWS):
        for column in range(columns[0], columns[1], COLS):
            at, mask = _tile_of(start, column, rows, columns, ROWS, COLS)
            g = tl.load(dy + at, mask, other=0.0).to(tl.float32)
            d = tl.load(x + at, mask, other=0.0).to(tl.float32) - m
            if ACTIVATION is not None:
                g = _gradient(g, d, scale, b, residual, y, at, mask, ACTIVATION, NUMBER_A, NUMBER_B)
            if dz is not None:
                tl.store(dz + at, g.to(dz.dtype.element_ty), mask)
            total += g
            dot += g * (d if AGAIN else d * r)
    tl.store(sums + share * C + channel, _over(total, LAST), channel < C)
    tl.store(dots + share * C + channel, _over(dot, LAST) * (r if AGAIN else 1.0), channel < C)


@triton.jit
def _batch_norm_backward_kernel(
    dy, x, weight, bias, residual, y, mean, rstd, sums, dots, dx, dweight, dbias, dresidual,
    R, C, S, row_step, groups, each, shares, count, BATCH: tl.constexpr,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, MERGE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    C, share, channel, rows, columns = _place(R, C, S, row_step, groups, each, UNIT, LAST, COLS)
    leader = (channel < C) & (share == 0)
    m = _parameter(mean, channel, C, 0.0)
    r = _parameter(rstd, channel, C, 0.0)
    scale = r * _parameter(weight, channel, C, 1.0)
    b = _parameter(bias, channel, C, 0.0)
    AGAIN: tl.constexpr = ACTIVATION is not None and y is None
    total = tl.zeros(channel.shape, tl.float32)
    dot = tl.zeros(channel.shape, tl.float32)
    if sums is not None:
        total = _merged_sum(sums, channel, C, shares, MERGE)
        dot = _merged_sum(dots, channel, C, shares, MERGE)
    if dweight is not None:
        tl.store(dweight + channel, dot.to(dweight.dtype.element_ty), leader)
    if dbias is not None:
        tl.store(dbias + channel, total.to(dbias.dtype.element_ty), leader)
    if dx is not None or dresidual is not None:
        for start in range(rows[0], rows[1], ROWS):
            for column in range(columns[0], columns[1], COLS):
                at, mask = _tile_of(start, column, rows, columns, ROWS, COLS)
                g = tl.load(dy + at, mask, other=0.0).to(tl.float32)
                d = tl.load(x + at, mask, other=0.0).to(tl.float32) - m  # not read where nobody asks for it
                if ACTIVATION is not None:
                    g = _gradient(g, d, scale, b, residual, y, at, mask, ACTIVATION, NUMBER_A, NUMBER_B)
                if dresidual is not None:
                    tl.store(dresidual + at, g.to(dresidual.dtype.element_ty), mask)
                if dx is not None:
                    if BATCH:
                        g = g - total / count - (d * (r * (dot / count)) if AGAIN else d * r * (dot / count))
                    tl.store(dx + at, (g * scale).to(dx.dtype.element_ty), mask)


# --- launchers -------------------------------------------------------------------------------------------------------


def channels_last(x: Any) -> tuple[int, ...] | None:
    """The order of channels-last memory, if x has it (or is a matrix); None for row-major, which all else becomes."""
    order = (0, *range(2, x.ndim), 1)
    turned = x.permute(order)
    return order if x.ndim > 2 and turned.is_contiguous() and not x.is_contiguous() else None


def in_order(x: Any, order: tuple[int, ...] | None, empty: Any) -> Any:
    """x dense in this memory order."""
    if order is None:
        return _tile.dense(x, empty)
    return x if x.permute(order).is_contiguous() else _tile.copied(x, order, empty)


FORWARD = _configs.rows("batch_norm_forward"), _configs.rows("batch_norm_forward.channels_last")
BACKWARD = _configs.rows("batch_norm_backward"), _configs.rows("batch_norm_backward.channels_last")


class _Walk:
    """How programs walk over x: groups of channels, and shares of the rows for each.

    choices: for a channel's elements in rows, and for channels that are neighbours in memory.
    """

    def __init__(self, choices: tuple[_configs.Choice, _configs.Choice], x: Any, order: tuple[int, ...] | None):
        images, channels = x.shape[:2]
        inner = math.prod(x.shape[2:])
        self.count, self.channels = images * inner, channels
        last = bool(order is not None or inner == 1)
        rows, step = (images * inner, channels) if last else (images, channels * inner)
        device = _tile.device(x)
        entry = choices[last](device, channels if last else inner)
        cols = _tile.next_power_of_2(channels if last else inner, 64 if last else entry.elements)
        tile = max(1, entry.elements // cols)
        self.groups = _tile.cdiv(channels, cols) if last else channels
        # Merging is cheap for tens of shares: four programs a multiprocessor, each with a few tiles of rows at least.
        most = max(1, min(4 * device.sms // max(self.groups, 1), 256))
        self.shares, self.each = _tile.split(rows, min(most, _tile.cdiv(rows, 2 * tile)))
        self.shares = max(self.shares, 1)  # an empty batch has a channel vector to write, too
        unit, length, step = _tile.in_units(channels if last else inner, step)
        sizes = (length, inner) if last else (channels, length)
        self.sizes = (rows, *sizes, step, self.groups, self.each)
        self.grid = (self.groups * self.shares,)
        self.tile = dict(UNIT=unit, LAST=last, ROWS=tile, COLS=cols, num_warps=entry.warps)

    def merge(self, shares: int) -> dict:
        """How a kernel merges the partial results of so many shares."""
        return dict(MERGE=_tile.next_power_of_2(shares, 16 if self.tile["LAST"] else 256))

    def finer(self, more: bool) -> dict:
        """The tile of a kernel that has more arrays in registers than x and dy, or an activation's temporaries."""
        rows = self.tile["ROWS"]
        return self.tile | {"ROWS": max(1, rows // 2)} if more and self.tile["LAST"] else self.tile

    def partials(self, how_many: int, empty: Any) -> list[Any]:
        return [empty((self.shares, self.channels), "float32") for _ in range(how_many)]


EXACT = ("relu", "relu6", "hardtanh", "hardshrink", "softshrink", "threshold")
"""Activations whose dz is dy or 0, and so a 16-bit number where dy is one."""


def constants(activation: str | None) -> dict[str, Any]:
    """What kernels are told of an activation that follows."""
    a, b = numbers_of(activation, 2)
    return dict(ACTIVATION=activation, NUMBER_A=a, NUMBER_B=b)


def batch_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    residual: Any = None,
    *,
    needs: tuple = (),
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    empty: Any,
) -> tuple[tuple, dict]:
    given = x, weight, bias, running_mean, running_var, residual
    return normalised(*given, [], needs, training, momentum, eps, activation, empty)


def normalised(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, residual: Any, moments: list[Any],
    needs: tuple, training: bool, momentum: float, eps: float, activation: str | None, empty: Any,
) -> tuple[tuple, dict]:  # fmt: skip
    """What batch_norm_forward gives. moments: [counts, means, Σ (x − mean)²], (shares, C) in float32 each, of x's parts,
    where someone has taken them already; else []."""
    given, order = (x, weight, bias, residual), channels_last(x)
    x, walk = in_order(x, order, empty), _Walk(FORWARD, x, order)
    y = empty(x.shape, x.dtype, order)
    mean, rstd = (empty((x.shape[1],), "float32") if needs else None for _ in range(2))
    weight, bias = (None if p is None else _tile.dense(p, empty) for p in (weight, bias))
    residual = None if residual is None else in_order(residual, order, empty)
    running = [None if r is None else _tile.dense(r, empty) for r in (running_mean, running_var)]
    batch = training or running_mean is None
    partials: list[Any] = moments or [None, None, None]
    if batch and not moments:
        partials = walk.partials(3, empty)
        _tile.launch(_batch_norm_moments_kernel, walk.grid, x, *partials, *walk.sizes, **walk.tile)
    shares = partials[0].shape[0] if batch else walk.shares
    _tile.launch(
        _batch_norm_forward_kernel,
        walk.grid,
        *(x, weight, bias, residual, *running, y, mean, rstd, *partials),
        *(*walk.sizes, shares, momentum, eps),
        BATCH=batch,
        UPDATE=batch and running_mean is not None and walk.count > 0,
        **constants(activation),
        **walk.merge(shares),
        **walk.finer(activation is not None or residual is not None),
    )
    for target, copy in zip((running_mean, running_var), running):
        if batch and copy is not target:
            _tile.copy(copy, target)
    return (y,), batch_norm_saved(activation, y, mean, rstd, *given) if needs else {}


def batch_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    empty: Any,
) -> tuple:
    order, batch = channels_last(saved["x"]), training or inputs[3] is None
    x, dy, residual, y = (
        None if a is None else in_order(a, order, empty)
        for a in (saved["x"], *dys, saved.get("residual"), saved.get("y"))
    )
    weight, bias = (None if (p := saved.get(k)) is None else _tile.dense(p, empty) for k in ("weight", "bias"))
    walk, statistics, epilogue = _Walk(BACKWARD, x, order), (saved["mean"], saved["rstd"]), constants(activation)
    dx, dresidual = (empty(x.shape, x.dtype, order) if k in needs else None for k in ("x", "residual"))
    dweight, dbias = (
        empty(p.shape, p.dtype) if name in needs else None for name, p in (("weight", inputs[1]), ("bias", inputs[2]))
    )
    sums: list[Any] = [None, None]
    rest = dresidual
    if (batch and dx is not None) or dweight is not None or dbias is not None:
        sums, dz = walk.partials(2, empty), None
        if dresidual is not None and (activation in EXACT or (activation is not None and x.element_size() == 4)):
            dz, rest = dresidual, None
        again = None if activation is None or y is not None else weight
        arrays = (dy, x, again, bias, residual, y, *statistics, dz, *sums)
        _tile.launch(
            _batch_norm_sums_kernel, walk.grid, *arrays, *walk.sizes, **epilogue, **walk.finer(activation is not None)
        )
        if dz is not None:  # the second pass reads it in the place of dy and of what f' is computed from
            dy, bias, residual, y, epilogue = dz, None, None, None, constants(None)
    _tile.launch(
        _batch_norm_backward_kernel,
        (walk.groups,) if dx is None and rest is None else walk.grid,
        *(dy, x, weight, bias, residual, y, *statistics, *sums, dx, dweight, dbias, rest),
        *(*walk.sizes, walk.shares, max(walk.count, 1)),
        BATCH=batch,
        **epilogue,
        **walk.merge(walk.shares),
        **walk.finer(rest is not None or epilogue["ACTIVATION"] is not None),
    )
    return dx, dweight, dbias, None, None, dresidual
