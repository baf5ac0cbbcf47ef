"""The backward of layer norm and RMS norm, and of those of a sum, whose own gradient dsum is added to dx.

The gradients of the weights are summed over rows in float32 by as many programs as keep the GPU busy, then over programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from .. import _invariance
from .._budget import Budget
from . import _configs, _tile

BUDGETS = {
    "_norm_backward_kernel": Budget(registers=128, blocks=1),
    "_norm_sums_kernel": Budget(registers=104, blocks=2),
    "_norm_backward_columns_kernel": Budget(registers=136, blocks=2),
    "_norm_finalise_kernel": Budget(registers=72, blocks=4),
}


@triton.jit
def _weights(weight, start, N, BLOCK: tl.constexpr):
    """(1, BLOCK), loaded as a vector: loaded as a row, they would decide how threads share the blocks of x and dy."""
    n = start + tl.arange(0, BLOCK)
    return tl.load(weight + n, n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _taken(dy, x, m, r, mask, dw, db, WHOLE: tl.constexpr):
    """(dy, x̂) of a block of rows, and the weights' gradients with what it adds to them."""
    g = tl.load(dy, mask, other=0.0).to(tl.float32)
    xhat = (tl.load(x, mask, other=0.0).to(tl.float32) - m) * r
    if not WHOLE:
        xhat = tl.where(mask, xhat, 0.0)
    return g, xhat, dw + g * xhat, db + g


@triton.jit
def _sums(
    g, xhat, g_tail, xhat_tail, ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, CENTRED: tl.constexpr
):
    """(Σ g, Σ g x̂) of each row, (ROWS, 1), in one reduction for all threads; 0 for Σ g where x is not centred."""
    dot = g * xhat
    if TAIL:  # neighbours first, which are one thread's
        dot = tl.sum(tl.reshape(dot, (ROWS, TAIL, HEAD // TAIL)), 2) + g_tail * xhat_tail
        if CENTRED:
            g = tl.sum(tl.reshape(g, (ROWS, TAIL, HEAD // TAIL)), 2) + g_tail
    if CENTRED:
        total, dot = tl.split(tl.sum(tl.join(g, dot), 1))
        return total[:, None], dot[:, None]
    else:
        return 0.0, tl.sum(dot, 1, keep_dims=True)


@triton.jit
def _put(dx, dresidual, at, g, xhat, total, dot, r, dsum, mask):
    g = ((g - total) - xhat * dot) * r
    if dsum is not None:
        g += dsum.to(tl.float32)
    tl.store(dx + at, g.to(dx.dtype.element_ty), mask)
    if dresidual is not None:
        tl.store(dresidual + at, g.to(dresidual.dtype.element_ty), mask)


@triton.jit
def _norm_backward_kernel(
    dy, dsum, x, weight, mean, rstd, dx, dresidual, dweights, dbiases, M, N, dy_row, x_row, dsum_row, each,
    UNIT: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With g = dy weight: dx = (g − mean(g) − x̂ mean(g x̂)) rstd. A row lies in two pieces, the second shorter or none, so that
    few threads are idle; the next rows are on their way to shared memory meanwhile."""
    N, dy_row, x_row, dsum_row = N * UNIT, dy_row * UNIT, x_row * UNIT, 0 if dsum is None else dsum_row * UNIT
    k = tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    n = tl.arange(0, HEAD)[None, :]  # (1, HEAD)
    dw = tl.zeros((ROWS, HEAD), tl.float32)
    db = tl.zeros((ROWS, HEAD), tl.float32)
    if weight is not None:
        w = _weights(weight, 0, N, HEAD)
    if TAIL:
        t = HEAD + tl.arange(0, TAIL)[None, :]  # (1, TAIL)
        dw_t = tl.zeros((ROWS, TAIL), tl.float32)
        db_t = tl.zeros((ROWS, TAIL), tl.float32)
        if weight is not None:
            w_t = _weights(weight, HEAD, N, TAIL)
    far = k.to(tl.int64)
    dy_at, x_at, dx_at, dsum_at = far * dy_row, far * x_row, far * N, far * dsum_row
    share = 1.0 / N
    row = tl.program_id(0).to(tl.int64) * ROWS
    step = tl.num_programs(0).to(tl.int64) * ROWS
    dy += row * dy_row
    x += row * x_row
    rstd += row
    left = M - row
    if mean is not None:
        mean += row
    if dx is not None:
        dx += row * N
    if dresidual is not None:
        dresidual += row * N
    if dsum is not None:
        dsum += row * dsum_row
    for _ in tl.range(each, num_stages=STAGES):
        there = k < left
        mask = there if WHOLE or TAIL else there & (n < N)
        r = tl.load(rstd + k, there, other=0.0)
        m = 0.0 if mean is None else tl.load(mean + k, there, other=0.0)
        s = None if dsum is None else tl.load(dsum + (dsum_at + n), mask, other=0.0)
        g, xhat, dw, db = _taken(dy + (dy_at + n), x + (x_at + n), m, r, mask, dw, db, WHOLE or TAIL)
        if weight is not None:
            g = tl.fma(g, w, 0.0)  # rounded here: in a row of one element g and Σ g must be one number
        if TAIL:
            mask_t = there if WHOLE else there & (t < N)
            s_t = None if dsum is None else tl.load(dsum + (dsum_at + t), mask_t, other=0.0)
            dy_t, x_t = dy + (dy_at + t), x + (x_at + t)
            g_t, xhat_t, dw_t, db_t = _taken(dy_t, x_t, m, r, mask_t, dw_t, db_t, WHOLE)
            if weight is not None:
                g_t = tl.fma(g_t, w_t, 0.0)
        if dx is not None:
            if TAIL:
                total, dot = _sums(g, xhat, g_t, xhat_t, ROWS, HEAD, TAIL, mean is not None)
            else:
                total, dot = _sums(g, xhat, None, None, ROWS, HEAD, TAIL, mean is not None)
            total, dot = total * share, dot * share
            _put(dx, dresidual, dx_at + n, g, xhat, total, dot, r, s, mask)
            if TAIL:
                _put(dx, dresidual, dx_at + t, g_t, xhat_t, total, dot, r, s_t, mask_t)
            dx += step * N
            if dresidual is not None:
                dresidual += step * N
        dy += step * dy_row
        x += step * x_row
        rstd += step
        left -= step
        if mean is not None:
            mean += step
        if dsum is not None:
            dsum += step * dsum_row
    part = tl.program_id(0).to(tl.int64) * N
    if dweights is not None:
        tl.store(dweights + part + n, tl.sum(dw, 0, keep_dims=True), n < N)
        if TAIL:
            tl.store(dweights + part + t, tl.sum(dw_t, 0, keep_dims=True), t < N)
    if dbiases is not None:
        tl.store(dbiases + part + n, tl.sum(db, 0, keep_dims=True), n < N)
        if TAIL:
            tl.store(dbiases + part + t, tl.sum(db_t, 0, keep_dims=True), t < N)


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
    dresidual,
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
            at = row * N + n
            d *= r
            if dsum is not None:
                d += tl.load(dsum + row * dsum_row + n, inside, other=0.0).to(tl.float32)
            tl.store(dx + at, d.to(dx.dtype.element_ty), inside)
            if dresidual is not None:
                tl.store(dresidual + at, d.to(dresidual.dtype.element_ty), inside)
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
    """(programs that share a row, elements for each, tile): one program, unless the rows alone leave the GPU idle, and the
    sum of a row may hang on that."""
    device = _tile.device(x)
    entry = choice(device, n)
    block = entry.elements
    most = 1 if _invariance.on() else max(1, min(2 * device.sms // max(m, 1), n // (2 * block), 1024))
    parts, blocks = _tile.split(_tile.cdiv(n, block), most)
    return parts, blocks * block, dict(BLOCK=block, num_warps=entry.warps)


WARPS, AHEAD = 16, 65536
"""What a multiprocessor should have at once: warps, and bytes of rows on their way."""


def _stages(nbytes: int, warps: int, narrow: bool) -> int:
    """Of the loop over rows, for so many bytes of a round; what comes element by element cannot be on its way meanwhile."""
    return 1 if narrow else 1 + max(1, min(2, AHEAD * warps // WARPS // nbytes))


def _pieces(n: int, block: int) -> tuple[int, int]:
    """(HEAD, TAIL) for rows of n, of which ``block`` is the next power of two: 5120 is 4096 + 1024, 7000 is 8192 + 0."""
    half = block // 2
    if half < 256 or n > half + half // 2:
        return block, 0
    return half, max(_tile.next_power_of_2(n - half), half // 8)


def backward(
    dy: Any,
    saved: dict,
    inputs: tuple,
    needs: tuple,
    normalized_shape: tuple,
    empty: Any,
    dsum: Any = None,
    summands: tuple = (),
) -> tuple:
    """(dx, dweight, dbias, dresidual) of a norm of x. dsum: what is added to dx; dy may then be None. summands: what x is the
    sum of; dresidual is another array where the second has another dtype, else None."""
    x, rstd, mean, weight = (saved.get(k) for k in ("x", "rstd", "mean", "weight"))
    n = math.prod(normalized_shape)
    m = math.prod(x.shape[: x.ndim - len(normalized_shape)])
    wanted = "x" in needs
    dx = empty(x.shape, summands[0].dtype if summands else x.dtype) if wanted else None
    apart = wanted and summands and summands[0].dtype != summands[1].dtype
    dresidual = empty(x.shape, summands[1].dtype) if apart else None
    dweight = empty(normalized_shape, inputs[1].dtype) if "weight" in needs else None
    dbias = empty(normalized_shape, inputs[2].dtype) if "bias" in needs else None

    summed = dweight is not None or dbias is not None

    def shares(programs: int) -> tuple:
        """(programs, their shares of dweight and dbias)"""
        return programs, *(None if d is None else empty((programs, n), "float32") for d in (dweight, dbias))

    if dy is None:
        for d in (dx, dresidual):
            if d is not None:
                _tile.copy(dsum, d)
        found = shares(0)
    else:
        dsum = None if dx is None else dsum
        weight = None if weight is None else _tile.dense(weight, empty)
        (dy, dy_row), (x, x_row) = _tile.rows(dy, n, empty), _tile.rows(x, n, empty)
        dsum, dsum_row = (None, None) if dsum is None else _tile.rows(dsum, n, empty)
        how = (dy, dsum, x, weight, mean, rstd), (dx, dresidual), (dy_row, x_row, dsum_row), m, n, shares
        held = BACKWARD(_tile.device(x), n)
        found = _walked(*how, empty) if held is None else _held(*how, *held, summed)
    if summed:
        finalise(*found, dweight, dbias, n, x)
    return dx, dweight, dbias, dresidual


def _held(
    arrays: tuple,
    grads: tuple,
    steps: tuple,
    m: int,
    n: int,
    shares: Callable,
    rows: int,
    block: int,
    warps: int,
    summed: bool,
) -> tuple:
    x = arrays[2]
    tiles = _tile.cdiv(m, rows)
    programs, each = _tile.split(tiles, _tile.device(x).sms * (WARPS // warps) if summed else tiles)
    found = shares(programs)
    head, tail = _pieces(n, block)
    unit, *sizes = _tile.in_units(n, *steps)
    sizes_of = [a.element_size() for a in arrays[:3] if a is not None]
    narrow = _tile.unit_of(n, *(step for step in steps if step is not None)) * min(sizes_of) < 4
    stages = _stages(rows * block * sum(sizes_of), warps, narrow)
    tile = dict(UNIT=unit, WHOLE=n == head + tail, ROWS=rows, HEAD=head, TAIL=tail, STAGES=stages, num_warps=warps)
    _tile.launch(_norm_backward_kernel, (programs if n else 0,), *arrays, *grads, *found[1:], m, *sizes, each, **tile)
    return found


def _walked(arrays: tuple, grads: tuple, steps: tuple, m: int, n: int, shares: Callable, empty: Any) -> tuple:
    dy, dsum, *others = arrays
    parts, each, tile = walk(BACKWARD_WALKED, m, n, dy)
    sums, dots = empty((m, parts), "float32"), empty((m, parts), "float32")
    if grads[0] is not None:
        sizes = (n, *steps[:2], parts, each)
        _tile.launch(_norm_sums_kernel, (m * parts,), dy, *others, sums, dots, *sizes, **tile)
    block = tile["BLOCK"] if dsum is None else tile["BLOCK"] // 2  # one array more to hold
    blocks = _tile.cdiv(n, block)
    programs, each = _tile.split(m, _tile.cdiv(4 * _tile.device(dy).sms, blocks))
    found = shares(programs)
    sizes = (m, n, *steps, parts, blocks, each)
    tile |= dict(PARTS=_tile.next_power_of_2(parts), BLOCK=block)
    grid = (programs * blocks,)
    _tile.launch(_norm_backward_columns_kernel, grid, *arrays, sums, dots, *grads, *found[1:], *sizes, **tile)
    return found


def finalise(programs: int, dweights: Any, dbiases: Any, dweight: Any, dbias: Any, n: int, x: Any) -> None:
    """dweight and dbias from the shares that so many programs have summed, in float32: (programs, n)."""
    cols, entry = 16 if n <= 1024 else 32, FINALISE(_tile.device(x), n)
    unit, units = _tile.in_units(n)
    arrays, tile = (dweights, dbiases, dweight, dbias), dict(UNIT=unit, ROWS=entry.elements // cols, COLS=cols)
    _tile.launch(_norm_finalise_kernel, (_tile.cdiv(n, cols),), *arrays, programs, units, num_warps=entry.warps, **tile)
