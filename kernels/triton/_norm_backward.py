"""The backward of layer norm and RMS norm, and of those of a sum, whose own gradient dsum is added to dx.

The gradients of the weights are summed over rows in float32 by as many programs as keep the GPU busy, then over programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile

BUDGETS = {
    # On sm_80 one register is put aside, once.
    "_norm_backward_kernel": Budget(registers=136, blocks=1, spills=2),
    "_norm_sums_kernel": Budget(registers=104, blocks=2),
    "_norm_backward_columns_kernel": Budget(registers=136, blocks=2),
    "_norm_finalise_kernel": Budget(registers=72, blocks=8),
}


@triton.jit
def _norm_backward_kernel(
    dy,
    dsum,
    x,
    weight,
    mean,
    rstd,
    dx,
    dweights,
    dbiases,
    M,
    N,
    dy_row,
    x_row,
    dsum_row,
    each,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    N, dy_row, x_row = N * UNIT, dy_row * UNIT, x_row * UNIT
    n = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    inside = n < N
    if weight is not None:
        w = tl.load(weight + n, inside, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(each):
        row = (i * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
        mask = (row < M) & inside
        g = tl.load(dy + row * dy_row + n, mask, other=0.0).to(tl.float32)
        xhat = tl.load(x + row * x_row + n, mask, other=0.0).to(tl.float32)
        if dsum is not None:  # early, so that it is there in time; of long rows it has the registers of the weights
            s = tl.load(dsum + row * (dsum_row * UNIT) + n, mask, other=0.0)
            if weight is not None and ROWS == 1:
                w = tl.load(weight + n, inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, row < M, other=0.0)
        if mean is not None:
            xhat -= tl.load(mean + row, row < M, other=0.0)
        xhat = tl.where(mask, xhat * r, 0.0)
        if dweights is not None:
            dw += g * xhat
        if dbiases is not None:
            db += g
        if dx is not None:
            if weight is not None:
                g = tl.fma(g, w, 0.0)  # rounded here: in a row of one element g and Σ g must be one number
            d = g - xhat * (tl.sum(g * xhat, 1, keep_dims=True) / N)
            if mean is not None:
                d -= tl.sum(g, 1, keep_dims=True) / N
            at = dx + row * N + n
            d *= r
            if dsum is not None:
                d += s.to(tl.float32)
            tl.store(at, d.to(dx.dtype.element_ty), mask)
    share = tl.program_id(0).to(tl.int64) * N + n
    if dweights is not None:
        tl.store(dweights + share, tl.sum(dw, 0, keep_dims=True), inside)
    if dbiases is not None:
        tl.store(dbiases + share, tl.sum(db, 0, keep_dims=True), inside)


@triton.jit
def _norm_sums_kernel(dy, x, weight, mean, rstd, sums, dots, N, dy_row, x_row, parts, each, BLOCK: tl.constexpr):
    """Σ g and Σ g x̂ over a part of a row, with g = dy · weight."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    lo = (tl.program_id(0) % parts).to(tl.int64) * each
    hi = tl.minimum(lo + each, N)
    r = tl.load(rstd + row)
    total = tl.zeros((BLOCK,), tl.float32)
    dot = tl.zeros((BLOCK,), tl.float32)
    for start in range(lo, hi, BLOCK):
        n = start + tl.arange(0, BLOCK).to(tl.int64)
        g = tl.load(dy + row * dy_row + n, n < hi, other=0.0).to(tl.float32)
        xhat = tl.load(x + row * x_row + n, n < hi, other=0.0).to(tl.float32)
        if weight is not None:
            g *= tl.load(weight + n, n < hi, other=0.0).to(tl.float32)
        if mean is not None:
            xhat -= tl.load(mean + row)
        total += g
        dot += g * (xhat * r)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))
    tl.store(dots + tl.program_id(0), tl.sum(dot, 0))


@triton.jit
def _norm_backward_columns_kernel(
    dy,
    dsum,
    x,
    weight,
    mean,
    rstd,
    sums,
    dots,
    dx,
    dweights,
    dbiases,
    M,
    N,
    dy_row,
    x_row,
    dsum_row,
    parts,
    blocks,
    each,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx for a block of columns and ``each`` rows, whose sums are known, and their share of the weights' gradients."""
    n = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    share = (tl.program_id(0) // blocks).to(tl.int64)
    inside = n < N
    p = tl.arange(0, PARTS)
    if weight is not None:
        w = tl.load(weight + n, inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    db = tl.zeros((BLOCK,), tl.float32)
    for row in range(share * each, tl.minimum(share * each + each, M)):
        g = tl.load(dy + row * dy_row + n, inside, other=0.0).to(tl.float32)
        xhat = tl.load(x + row * x_row + n, inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row)
        if mean is not None:
            xhat -= tl.load(mean + row)
        xhat *= r
        if dweights is not None:
            dw += g * xhat
        if dbiases is not None:
            db += g
        if dx is not None:
            if weight is not None:
                g *= w
            d = g - xhat * (tl.sum(tl.load(dots + row * parts + p, p < parts, other=0.0), 0) / N)
            if mean is not None:
                d -= tl.sum(tl.load(sums + row * parts + p, p < parts, other=0.0), 0) / N
            at = dx + row * N + n
            d *= r
            if dsum is not None:
                d += tl.load(dsum + row * dsum_row + n, inside, other=0.0).to(tl.float32)
            tl.store(at, d.to(dx.dtype.element_ty), inside)
    if dweights is not None:
        tl.store(dweights + share * N + n, dw, inside)
    if dbiases is not None:
        tl.store(dbiases + share * N + n, db, inside)


@triton.jit
def _norm_finalise_kernel(
    dweights, dbiases, dweight, dbias, P, N, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """The sums of the P rows of dweights and of dbiases."""
    N = N * UNIT
    n = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]  # (1, COLS)
    dw = tl.zeros((ROWS, COLS), tl.float32)
    db = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, P, ROWS):
        p = start + tl.arange(0, ROWS)[:, None].to(tl.int64)  # (ROWS, 1)
        mask = (p < P) & (n < N)
        if dweights is not None:
            dw += tl.load(dweights + p * N + n, mask, other=0.0)
        if dbiases is not None:
            db += tl.load(dbiases + p * N + n, mask, other=0.0)
    if dweights is not None:
        tl.store(dweight + n, tl.sum(dw, 0, keep_dims=True).to(dweight.dtype.element_ty), n < N)
    if dbiases is not None:
        tl.store(dbias + n, tl.sum(db, 0, keep_dims=True).to(dbias.dtype.element_ty), n < N)


# --- launchers ---------------------------------------------------------------------------------------------------------

BACKWARD = _tile.held_rows("norm_backward")
"""Backward holds x, dy, their product with the weights, and two sums in registers."""
BACKWARD_WALKED = _configs.rows("norm_backward.walked")
FINALISE = _configs.rows("norm_backward.finalise")


def walk(choice: _configs.Choice, m: int, n: int, x: Any) -> tuple[int, int, dict]:
    """(programs that share a row, elements for each, tile): one program, unless the rows alone leave the GPU idle."""
    device = _tile.device(x)
    entry = choice(device, n)
    block = entry.elements
    most = max(1, min(2 * device.sms // max(m, 1), n // (2 * block), 1024))
    parts, blocks = _tile.split(_tile.cdiv(n, block), most)
    return parts, blocks * block, dict(BLOCK=block, num_warps=entry.warps)


def _programs(n: int, x: Any) -> int:
    """Programs that sum the weights' gradients: more for short rows, whose partial sums are small."""
    return _tile.device(x).sms * max(1, min(16, 8192 // _tile.next_power_of_2(max(n, 1))))


def backward(
    dy: Any, saved: dict, inputs: tuple, needs: tuple, normalized_shape: tuple, empty: Any, dsum: Any = None
) -> tuple:
    """(dx, dweight, dbias) of a norm of x. dsum: what is added to dx; dy may then be None."""
    x, rstd, mean, weight = (saved.get(k) for k in ("x", "rstd", "mean", "weight"))
    n = math.prod(normalized_shape)
    m = math.prod(x.shape[: x.ndim - len(normalized_shape)])
    dx = empty(x.shape, x.dtype) if "x" in needs else None
    dweight = empty(normalized_shape, inputs[1].dtype) if "weight" in needs else None
    dbias = empty(normalized_shape, inputs[2].dtype) if "bias" in needs else None

    summed = dweight is not None or dbias is not None

    def shares(programs: int) -> tuple:
        """(programs, their shares of dweight and dbias)"""
        return programs, *(None if d is None else empty((programs, n), "float32") for d in (dweight, dbias))

    if dy is None:
        if dx is not None:
            _tile.copy(dsum, dx)
        found = shares(0)
    else:
        dsum = None if dx is None else dsum
        weight = None if weight is None else _tile.dense(weight, empty)
        (dy, dy_row), (x, x_row) = _tile.rows(dy, n, empty), _tile.rows(x, n, empty)
        dsum, dsum_row = (None, None) if dsum is None else _tile.rows(dsum, n, empty)
        how = (dy, dsum, x, weight, mean, rstd), dx, (dy_row, x_row, dsum_row), m, n, shares
        held = BACKWARD(_tile.device(x), n)
        found = _walked(*how, empty) if held is None else _held(*how, *held, summed)
    if summed:
        finalise(*found, dweight, dbias, n, x)
    return dx, dweight, dbias


def _held(
    arrays: tuple,
    dx: Any,
    steps: tuple,
    m: int,
    n: int,
    shares: Callable,
    rows: int,
    block: int,
    warps: int,
    summed: bool,
) -> tuple:
    tiles = _tile.cdiv(m, rows)
    programs, each = _tile.split(tiles, _programs(n, arrays[0]) if summed else tiles)
    found = shares(programs)
    unit, *sizes = _tile.in_units(n, *steps)
    tile = dict(UNIT=unit, ROWS=rows, BLOCK=block, num_warps=warps)
    _tile.launch(_norm_backward_kernel, (programs if n else 0,), *arrays, dx, *found[1:], m, *sizes, each, **tile)
    return found


def _walked(arrays: tuple, dx: Any, steps: tuple, m: int, n: int, shares: Callable, empty: Any) -> tuple:
    dy, dsum, *others = arrays
    parts, each, tile = walk(BACKWARD_WALKED, m, n, dy)
    sums, dots = empty((m, parts), "float32"), empty((m, parts), "float32")
    if dx is not None:
        sizes = (n, *steps[:2], parts, each)
        _tile.launch(_norm_sums_kernel, (m * parts,), dy, *others, sums, dots, *sizes, **tile)
    block = tile["BLOCK"] if dsum is None else tile["BLOCK"] // 2  # one array more to hold
    blocks = _tile.cdiv(n, block)
    programs, each = _tile.split(m, _tile.cdiv(4 * _tile.device(dy).sms, blocks))
    found = shares(programs)
    sizes = (m, n, *steps, parts, blocks, each)
    tile |= dict(PARTS=_tile.next_power_of_2(parts), BLOCK=block)
    grid = (programs * blocks,)
    _tile.launch(_norm_backward_columns_kernel, grid, *arrays, sums, dots, dx, *found[1:], *sizes, **tile)
    return found


def finalise(programs: int, dweights: Any, dbiases: Any, dweight: Any, dbias: Any, n: int, x: Any) -> None:
    """dweight and dbias from the shares that so many programs have summed, in float32: (programs, n)."""
    cols, entry = 16 if n <= 1024 else 32, FINALISE(_tile.device(x), n)
    unit, units = _tile.in_units(n)
    arrays, tile = (dweights, dbiases, dweight, dbias), dict(UNIT=unit, ROWS=entry.elements // cols, COLS=cols)
    _tile.launch(_norm_finalise_kernel, (_tile.cdiv(n, cols),), *arrays, programs, units, num_warps=entry.warps, **tile)
