"""Activations that are more than a function of x: prelu (a weight), rrelu (chance), glu (a gate). Bound by memory.

prelu moves 2 elements for each of x, and 3 in backward, where the same pass sums dweight in float32: as many programs
as keep the GPU busy each sum their part, then a second stage adds the parts in order. rrelu moves 2 and 3 and draws its
slopes anew in backward. glu moves 1.5 and 2.5.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._budget import Budget
from .._gates import rrelu
from .._layout import around, halved
from . import _configs, _random, _tile
from ._random import words
from ._special import opened, sigmoid
from ._tile import rows_tile

# --- prelu -----------------------------------------------------------------------------------------------------------

BUDGETS = {
    "_prelu_forward_kernel": Budget(registers=48, blocks=12),
    "_prelu_backward_kernel": Budget(registers=96, blocks=5),
    # One weight's sums lie one by one.
    "_prelu_sum_kernel": Budget(registers=48, blocks=10, narrow=lambda c: "loads" if c.get("C") == 1 else ""),
    "_rrelu_kernel": Budget(registers=96, blocks=5),
    "_glu_forward_kernel": Budget(registers=48, blocks=10),
    "_glu_backward_kernel": Budget(registers=80, blocks=7),
}


@triton.jit
def _place(t, block, C, B, blocks, a_step, c_step, b_step, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """(c, where in memory, mask) of tile t of a block of channels; shapes (COLS, 1), (COLS, BLOCK), (COLS, BLOCK)."""
    c = block * COLS + tl.arange(0, COLS)[:, None]
    b = (t % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    at = (t // blocks).to(tl.int64) * a_step + c.to(tl.int64) * c_step + b * b_step
    return c, at, (c < C) & (b < B)


@triton.jit
def _prelu_forward_kernel(
    x, weight, y, C, B, groups, blocks, a_step, c_step, b_step, COLS: tl.constexpr, BLOCK: tl.constexpr
):
    block, t = tl.program_id(0) % groups, tl.program_id(0) // groups
    c, at, mask = _place(t, block, C, B, blocks, a_step, c_step, b_step, COLS, BLOCK)
    v = tl.load(x + at, mask, other=0.0).to(tl.float32)
    w = tl.load(weight + c, c < C, other=0.0).to(tl.float32)
    tl.store(y + at, tl.where(v > 0, v, v * w).to(y.dtype.element_ty), mask)


@triton.jit
def _prelu_backward_kernel(
    dy, x, weight, dx, parts, C, B, groups, blocks, a_step, c_step, b_step, tiles, each,
    COLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx, and this program's part of dweight, over ``each`` tiles of one block of channels."""
    block, part = tl.program_id(0) % groups, tl.program_id(0) // groups
    total = tl.zeros((COLS, BLOCK), tl.float32)
    for t in range(part * each, tl.minimum((part + 1) * each, tiles)):
        c, at, mask = _place(t, block, C, B, blocks, a_step, c_step, b_step, COLS, BLOCK)
        g = tl.load(dy + at, mask, other=0.0).to(tl.float32)
        v = tl.load(x + at, mask, other=0.0).to(tl.float32)
        if dx is not None:
            w = tl.load(weight + c, c < C, other=0.0).to(tl.float32)
            tl.store(dx + at, tl.where(v > 0, g, g * w).to(dx.dtype.element_ty), mask)
        if parts is not None:
            total += tl.where(v > 0, 0.0, v * g)
    if parts is not None:
        c = block * COLS + tl.arange(0, COLS)[:, None]
        tl.store(parts + part.to(tl.int64) * C + c, tl.sum(total, 1, keep_dims=True), c < C)


@triton.jit
def _prelu_sum_kernel(parts, dweight, P, C, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The sums of the P rows of parts."""
    c = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]  # (1, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, P, ROWS):
        p = start + tl.arange(0, ROWS)[:, None].to(tl.int64)  # (ROWS, 1)
        total += tl.load(parts + p * C + c, (p < P) & (c < C), other=0.0)
    tl.store(dweight + c, tl.sum(total, 0, keep_dims=True).to(dweight.dtype.element_ty), c < C)


class _Channels(NamedTuple):
    """A dense array as (A, C, B) in memory, walked in tiles of COLS channels and BLOCK places along B."""

    sizes: tuple[int, ...]
    """C, B, blocks of channels, blocks along B, and the steps of A, C and B."""
    tiles: int
    """Along A and B."""
    tile: dict
    """COLS, BLOCK and num_warps of a launch."""

    @property
    def groups(self) -> int:
        return self.sizes[2]


PRELU_FORWARD = _configs.rows("prelu_forward")
PRELU_BACKWARD = _configs.rows("prelu_backward")


def _channels(choice: _configs.Choice, x: Any, order: tuple | None, count: int) -> _Channels:
    """How to walk over x; count: of the weights: 1, or one for each place along axis 1."""
    shape, entry = tuple(x.shape), choice(_tile.device(x), x.numel())
    a, c, b = around(shape, order, 1) if count > 1 else (1, 1, math.prod(shape))
    steps = c * b, b, 1
    if b == 1:  # channels are neighbours in memory, so A is what a tile walks along
        a, b, steps = 1, a, (0, 1, c)
        cols = min(128, _tile.next_power_of_2(c))
        block = max(1, entry.elements // cols)
    else:
        block = _tile.next_power_of_2(b, entry.elements)
        cols = min(entry.elements // block, _tile.next_power_of_2(c))
    groups, blocks = _tile.cdiv(c, cols), _tile.cdiv(b, block)
    tile = dict(COLS=cols, BLOCK=block, num_warps=entry.warps)
    return _Channels((c, b, groups, blocks, *steps), a * blocks, tile)


def prelu_forward(x: Any, weight: Any, *, needs: tuple = (), empty: Any) -> tuple[tuple, dict]:
    order = _tile.order(x)
    y = empty(x.shape, x.dtype, order)
    walk = _channels(PRELU_FORWARD, x, order, weight.numel())
    arrays = _tile.arranged(x, order, empty), _tile.dense(weight, empty), y
    _tile.launch(_prelu_forward_kernel, (walk.groups * walk.tiles,), *arrays, *walk.sizes, **walk.tile)
    return (y,), {"x": x, "weight": weight} if needs else {}


def prelu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, empty: Any) -> tuple:
    x, weight = saved["x"], saved["weight"]
    order = _tile.order(x)
    walk = _channels(PRELU_BACKWARD, x, order, weight.numel())
    dx = empty(x.shape, x.dtype, order) if "x" in needs else None
    dweight = empty(weight.shape, weight.dtype) if "weight" in needs else None
    most = walk.tiles if dweight is None else _tile.cdiv(8 * _tile.device(x).sms, max(walk.groups, 1))
    programs, each = _tile.split(walk.tiles, most)
    parts = None if dweight is None else empty((programs, weight.numel()), "float32")
    dy, x = (_tile.arranged(a, order, empty) for a in (dys[0], x))
    arrays = dy, x, _tile.dense(weight, empty), dx, parts
    grid, sizes = (walk.groups * programs,), (*walk.sizes, walk.tiles, each)
    _tile.launch(_prelu_backward_kernel, grid, *arrays, *sizes, **walk.tile)
    if dweight is not None:
        grid, tile = (_tile.cdiv(weight.numel(), 16),), dict(ROWS=128, COLS=16)
        _tile.launch(_prelu_sum_kernel, grid, parts, dweight, programs, weight.numel(), **tile)
    return dx, dweight


# --- rrelu -----------------------------------------------------------------------------------------------------------


@triton.jit
def _rrelu_kernel(
    dy, x, seed, out, size, n1, n2, step0, step1, step2, lower, upper, PERMUTED: tl.constexpr, BLOCK: tl.constexpr
):
    """out = dy times the slope at x; dy None: x times its slope. seed None: the slope is the mean one."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    v = tl.load(x + i, i < size, other=0.0).to(tl.float32)
    g = v if dy is None else tl.load(dy + i, i < size, other=0.0).to(tl.float32)
    if seed is None:
        g = tl.where(v > 0, g, g * ((lower + upper) / 2))
    else:
        bits = words(seed, start, n1, n2, step0, step1, step2, PERMUTED, BLOCK)
        slope = lower + (upper - lower) * ((bits >> 8).to(tl.float32) * 5.9604644775390625e-08)  # 2⁻²⁴
        g = tl.where(v <= 0, g * slope, g)
    tl.store(out + i, g.to(out.dtype.element_ty), i < size)


RRELU = _random.choices("rrelu")


def _rrelu(dy: Any, x: Any, seed: Any, order: tuple | None, lower: float, upper: float, empty: Any) -> Any:
    out = empty(x.shape, x.dtype, order)
    size, walk = x.numel(), _random.walk(RRELU, x, order)
    if walk is None:
        _tile.copy(_rrelu(dy, x, seed, None, lower, upper, empty), out)
        return out
    dy, x = (None if a is None else _tile.arranged(a, order, empty) for a in (dy, x))
    arrays = dy, x, None if seed is None else _tile.dense(seed, empty), out
    _tile.launch(_rrelu_kernel, walk.grid(size), *arrays, size, *walk.sizes, lower, upper, **walk.tile)
    return out


def _sloped(dy: Any, x: Any, seed: Any, lower: float, upper: float, empty: Any) -> Any:
    return _rrelu(dy, x, seed, _tile.order(x), lower, upper, empty)


rrelu_forward, rrelu_backward = rrelu(_sloped)


# --- glu -------------------------------------------------------------------------------------------------------------


@triton.jit
def _glu_forward_kernel(x, y, M, N, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """M rows: of 2N in x, the halves a and b, and of N in y."""
    N = N * UNIT
    row, n, mask = rows_tile(M, N, ROWS, BLOCK)
    a = tl.load(x + row * 2 * N + n, mask, other=0.0).to(tl.float32)
    b = tl.load(x + row * 2 * N + N + n, mask, other=0.0).to(tl.float32)
    tl.store(y + row * N + n, opened(a, b).to(y.dtype.element_ty), mask)


@triton.jit
def _glu_backward_kernel(dy, x, dx, M, N, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    N = N * UNIT
    row, n, mask = rows_tile(M, N, ROWS, BLOCK)
    g = tl.load(dy + row * N + n, mask, other=0.0).to(tl.float32)
    a = tl.load(x + row * 2 * N + n, mask, other=0.0).to(tl.float32)
    s = sigmoid(tl.load(x + row * 2 * N + N + n, mask, other=0.0).to(tl.float32))
    tl.store(dx + row * 2 * N + n, (g * s).to(dx.dtype.element_ty), mask)
    tl.store(dx + row * 2 * N + N + n, (g * a * s * (1 - s)).to(dx.dtype.element_ty), mask)


GLU_FORWARD = _configs.rows("glu_forward")
GLU_BACKWARD = _configs.rows("glu_backward")


def _launch_over_halves(
    choice: _configs.Choice, kernel: Any, x: Any, order: tuple | None, axis: int, *arrays: Any
) -> None:
    m, c, b = around(tuple(x.shape), order, axis)
    n = c // 2 * b
    unit, units = _tile.in_units(n)
    tile = _tile.flat_tile(choice(_tile.device(x), n), n)
    grid = (_tile.cdiv(m, tile["ROWS"]) * _tile.cdiv(n, tile["BLOCK"]),)
    _tile.launch(kernel, grid, *arrays, m, units, UNIT=unit, **tile)


def glu_forward(x: Any, *, needs: tuple = (), axis: int = -1, empty: Any) -> tuple[tuple, dict]:
    order, axis = _tile.order(x), axis % x.ndim
    y = empty(halved(x.shape, axis), x.dtype, order)
    _launch_over_halves(GLU_FORWARD, _glu_forward_kernel, x, order, axis, _tile.arranged(x, order, empty), y)
    return (y,), {"x": x} if needs else {}


def glu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, axis: int = -1, empty: Any) -> tuple:
    (dy,), x = dys, saved["x"]
    order = _tile.order(x)
    dx = empty(x.shape, x.dtype, order)
    arrays = _tile.arranged(dy, order, empty), _tile.arranged(x, order, empty), dx
    _launch_over_halves(GLU_BACKWARD, _glu_backward_kernel, x, order, axis % x.ndim, *arrays)
    return (dx,)
