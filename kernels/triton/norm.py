"""Layer norm and RMS norm; batch norm is in _batch_norm.py. Bound by memory.

Forward moves 2 elements for each element of x, backward 3. A row that fits in registers is read once. Longer rows are
walked twice, the second time mostly from L2; where they are too few to fill the GPU, several programs share each. The
gradients of the weights are summed over rows in float32 by as many programs as keep the GPU busy, then over programs.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._batch_norm import batch_norm_backward as batch_norm_backward
from ._batch_norm import batch_norm_forward as batch_norm_forward

# --- forward ---------------------------------------------------------------------------------------------------------

BUDGETS = {
    "_norm_forward_kernel": Budget(registers=104, blocks=1),
    "_norm_forward_looped_kernel": Budget(registers=80, blocks=3),
    "_norm_moments_kernel": Budget(registers=72, blocks=4),
    "_norm_forward_split_kernel": Budget(registers=72, blocks=3),
    # On sm_80 one register is put aside, once.
    "_norm_backward_kernel": Budget(registers=136, blocks=1, spills=2),
    "_norm_sums_kernel": Budget(registers=104, blocks=2),
    "_norm_backward_columns_kernel": Budget(registers=136, blocks=2),
    "_norm_finalise_kernel": Budget(registers=72, blocks=8),
}


@triton.jit
def _scaled(xhat, weight, bias, n, inside):
    """xhat · weight + bias, where there are such."""
    if weight is not None:
        xhat = xhat * tl.load(weight + n, inside, other=0.0).to(tl.float32)
    if bias is not None:
        xhat = xhat + tl.load(bias + n, inside, other=0.0).to(tl.float32)
    return xhat


@triton.jit
def _norm_forward_kernel(
    x,
    weight,
    bias,
    y,
    mean,
    rstd,
    M,
    N,
    x_row,
    eps,
    UNIT: tl.constexpr,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    N, x_row = N * UNIT, x_row * UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    n = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    inside = n < N
    mask = (row < M) & inside
    d = tl.load(x + row * x_row + n, mask, other=0.0).to(tl.float32)
    if not RMS:
        m = tl.div_rn(tl.sum(d, 1, keep_dims=True), tl.maximum(N, 1).to(tl.float32))  # `/` is off by a bit: 3c / 3 ≠ c
        d = tl.where(inside, d - m, 0.0)
        if mean is not None:
            tl.store(mean + row, m, row < M)
    r = 1.0 / tl.sqrt_rn(tl.sum(d * d, 1, keep_dims=True) / tl.maximum(N, 1) + eps)
    if rstd is not None:
        tl.store(rstd + row, r, row < M)
    tl.store(y + row * N + n, _scaled(d * r, weight, bias, n, inside).to(y.dtype.element_ty), mask)


@triton.jit
def _moments(x, lo, hi, RMS: tl.constexpr, BLOCK: tl.constexpr):
    """(mean, Σ (x − mean)²) of x[lo:hi], lane by lane as Welford did, then merged; for RMS the mean is 0."""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    mean = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    seen = 0.0
    for start in range(lo, hi, BLOCK):
        mask = start + lane < hi
        v = tl.load(x + start + lane, mask, other=0.0).to(tl.float32)
        if RMS:
            squares += v * v
        else:
            seen += 1.0
            d = v - mean
            mean += tl.where(mask, d * (1.0 / seen), 0.0)
            squares += tl.where(mask, d * (v - mean), 0.0)
    if RMS:
        total = 0.0
        spread = tl.sum(squares, 0)
    else:
        count = tl.maximum((hi - lo - lane + BLOCK - 1) // BLOCK, 0).to(tl.float32)
        total = tl.sum(count * mean, 0) / (hi - lo)
        spread = tl.sum(squares + count * (mean - total) * (mean - total), 0)
    return total, spread


@triton.jit
def _normalise(x, weight, bias, y, m, r, lo, hi, BLOCK: tl.constexpr):
    """y[lo:hi] of one row from its mean and rstd."""
    for start in range(lo, hi, BLOCK):
        n = start + tl.arange(0, BLOCK).to(tl.int64)
        v = tl.load(x + n, n < hi, other=0.0).to(tl.float32)
        out = _scaled((v - m) * r, weight, bias, n, n < hi)
        tl.store(y + n, out.to(y.dtype.element_ty), n < hi)


@triton.jit
def _norm_forward_looped_kernel(x, weight, bias, y, mean, rstd, N, x_row, eps, RMS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m, spread = _moments(x + row * x_row, 0, N, RMS, BLOCK)
    r = 1.0 / tl.sqrt_rn(spread / N + eps)
    if mean is not None:
        tl.store(mean + row, m)
    if rstd is not None:
        tl.store(rstd + row, r)
    _normalise(x + row * x_row, weight, bias, y + row * N, m, r, 0, N, BLOCK)


@triton.jit
def _norm_moments_kernel(x, means, squares, N, x_row, parts, each, RMS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // parts).to(tl.int64)
    lo = (tl.program_id(0) % parts).to(tl.int64) * each
    m, spread = _moments(x + row * x_row, lo, tl.minimum(lo + each, N), RMS, BLOCK)
    tl.store(means + tl.program_id(0), m)
    tl.store(squares + tl.program_id(0), spread)


@triton.jit
def _norm_forward_split_kernel(
    x, weight, bias, y, mean, rstd, means, squares, N, x_row, eps, parts, each, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    lo = part.to(tl.int64) * each
    p = tl.arange(0, PARTS)
    ms = tl.load(means + row * parts + p, p < parts, other=0.0)  # (PARTS,)
    count = tl.where(p < parts, tl.minimum(N - p.to(tl.int64) * each, each), 0).to(tl.float32)
    m = tl.sum(count * ms, 0) / N
    spread = tl.load(squares + row * parts + p, p < parts, other=0.0) + count * (ms - m) * (ms - m)
    r = 1.0 / tl.sqrt_rn(tl.sum(spread, 0) / N + eps)
    if mean is not None:
        tl.store(mean + row, m, part == 0)
    if rstd is not None:
        tl.store(rstd + row, r, part == 0)
    _normalise(x + row * x_row, weight, bias, y + row * N, m, r, lo, tl.minimum(lo + each, N), BLOCK)


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _norm_backward_kernel(
    dy,
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
            tl.store(dx + row * N + n, (d * r).to(dx.dtype.element_ty), mask)
    at = tl.program_id(0).to(tl.int64) * N + n
    if dweights is not None:
        tl.store(dweights + at, tl.sum(dw, 0, keep_dims=True), inside)
    if dbiases is not None:
        tl.store(dbiases + at, tl.sum(db, 0, keep_dims=True), inside)


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
            tl.store(dx + row * N + n, (d * r).to(dx.dtype.element_ty), inside)
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


# --- launchers -------------------------------------------------------------------------------------------------------

FORWARD = _tile.held_rows("norm_forward")
FORWARD_WALKED = _configs.rows("norm_forward.walked")
BACKWARD = _tile.held_rows("norm_backward")
"""Backward holds x, dy, their product with the weights, and two sums in registers."""
BACKWARD_WALKED = _configs.rows("norm_backward.walked")
FINALISE = _configs.rows("norm_backward.finalise")


def _walked(choice: _configs.Choice, m: int, n: int, x: Any) -> tuple[int, int, dict]:
    """(programs that share a row, elements for each, tile): one program, unless the rows alone leave the GPU idle."""
    device = _tile.device(x)
    entry = choice(device, n)
    block = entry.elements
    most = max(1, min(2 * device.sms // max(m, 1), n // (2 * block), 1024))
    parts, blocks = _tile.split(_tile.cdiv(n, block), most)
    return parts, blocks * block, dict(BLOCK=block, num_warps=entry.warps)


def _forward(
    x: Any, weight: Any, bias: Any, needs: tuple, normalized_shape: tuple, eps: float, empty: Any, rms: bool
) -> tuple[Any, Any, Any]:
    """(y, mean, rstd); mean and rstd are None where no gradient is needed, and mean for RMS."""
    lead, n = x.shape[: x.ndim - len(normalized_shape)], math.prod(normalized_shape)
    m = math.prod(lead)
    y = empty(x.shape, x.dtype)
    rstd = empty(lead, "float32") if needs else None
    mean = empty(lead, "float32") if needs and not rms else None
    weight, bias = (None if p is None else _tile.dense(p, empty) for p in (weight, bias))
    x, row = _tile.rows(x, n, empty)
    arrays = (x, weight, bias, y, mean, rstd)
    if held := FORWARD(_tile.device(x), n):
        count, block, warps = held
        grid, (unit, *sizes) = (_tile.cdiv(m, count),), _tile.in_units(n, row)
        tile = dict(UNIT=unit, RMS=rms, ROWS=count, BLOCK=block, num_warps=warps)
        _tile.launch(_norm_forward_kernel, grid, *arrays, m, *sizes, eps, **tile)
        return y, mean, rstd
    parts, each, walked = _walked(FORWARD_WALKED, m, n, x)
    if parts == 1:
        _tile.launch(_norm_forward_looped_kernel, (m,), *arrays, n, row, eps, RMS=rms, **walked)
    else:
        means, squares = empty((m, parts), "float32"), empty((m, parts), "float32")
        grid, most = (m * parts,), _tile.next_power_of_2(parts)
        _tile.launch(_norm_moments_kernel, grid, x, means, squares, n, row, parts, each, RMS=rms, **walked)
        _tile.launch(
            _norm_forward_split_kernel, grid, *arrays, means, squares, n, row, eps, parts, each, PARTS=most, **walked
        )
    return y, mean, rstd


def _programs(n: int, x: Any) -> int:
    """Programs that sum the weights' gradients: more for short rows, whose partial sums are small."""
    return _tile.device(x).sms * max(1, min(16, 8192 // _tile.next_power_of_2(max(n, 1))))


def _backward(dy: Any, saved: dict, inputs: tuple, needs: tuple, normalized_shape: tuple, empty: Any) -> tuple:
    """(dx, dweight, dbias)"""
    x, rstd, mean, weight = (saved.get(k) for k in ("x", "rstd", "mean", "weight"))
    n = math.prod(normalized_shape)
    m = math.prod(x.shape[: x.ndim - len(normalized_shape)])
    dx = empty(x.shape, x.dtype) if "x" in needs else None
    dweight = empty(normalized_shape, inputs[1].dtype) if "weight" in needs else None
    dbias = empty(normalized_shape, inputs[2].dtype) if "bias" in needs else None
    x, x_row = _tile.rows(x, n, empty)
    dy, dy_row = _tile.rows(dy, n, empty)
    weight = None if weight is None else _tile.dense(weight, empty)

    if held := BACKWARD(_tile.device(x), n):
        count, block, warps = held
        tiles = _tile.cdiv(m, count)
        programs, each = _tile.split(tiles, tiles if dweight is None and dbias is None else _programs(n, x))
        dweights, dbiases = (None if d is None else empty((programs, n), "float32") for d in (dweight, dbias))
        arrays = (dy, x, weight, mean, rstd, dx, dweights, dbiases)
        grid, (unit, *sizes) = (programs if n else 0,), _tile.in_units(n, dy_row, x_row)
        tile = dict(UNIT=unit, ROWS=count, BLOCK=block, num_warps=warps)
        _tile.launch(_norm_backward_kernel, grid, *arrays, m, *sizes, each, **tile)
    else:
        parts, each, walked = _walked(BACKWARD_WALKED, m, n, x)
        sums, dots = empty((m, parts), "float32"), empty((m, parts), "float32")
        steps = (dy_row, x_row)
        if dx is not None:
            grid = (m * parts,)
            _tile.launch(
                _norm_sums_kernel, grid, dy, x, weight, mean, rstd, sums, dots, n, *steps, parts, each, **walked
            )
        blocks = _tile.cdiv(n, walked["BLOCK"])
        programs, each = _tile.split(m, _tile.cdiv(4 * _tile.device(x).sms, blocks))
        dweights, dbiases = (None if d is None else empty((programs, n), "float32") for d in (dweight, dbias))
        arrays = (dy, x, weight, mean, rstd, sums, dots, dx, dweights, dbiases)
        sizes = (m, n, *steps, parts, blocks, each)
        grid, most = (programs * blocks,), _tile.next_power_of_2(parts)
        _tile.launch(_norm_backward_columns_kernel, grid, *arrays, *sizes, PARTS=most, **walked)
    if dweight is not None or dbias is not None:
        cols, entry = 16 if n <= 1024 else 32, FINALISE(_tile.device(x), n)
        unit, units = _tile.in_units(n)
        grid, tile = (_tile.cdiv(n, cols),), dict(UNIT=unit, ROWS=entry.elements // cols, COLS=cols)
        _tile.launch(
            _norm_finalise_kernel,
            grid,
            dweights,
            dbiases,
            dweight,
            dbias,
            programs,
            units,
            num_warps=entry.warps,
            **tile,
        )
    return dx, dweight, dbias


def layer_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    needs: tuple = (),
    normalized_shape: tuple,
    eps: float = 1e-5,
    empty: Any,
) -> tuple[tuple, dict]:
    y, mean, rstd = _forward(x, weight, bias, needs, normalized_shape, eps, empty, rms=False)
    saved = {"x": x, "mean": mean, "rstd": rstd} | ({} if weight is None else {"weight": weight})
    return (y,), saved if needs else {}


def layer_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    normalized_shape: tuple,
    eps: float = 1e-5,
    empty: Any,
) -> tuple:
    return _backward(dys[0], saved, inputs, needs, normalized_shape, empty)


def rms_norm_forward(
    x: Any,
    weight: Any = None,
    *,
    needs: tuple = (),
    normalized_shape: tuple,
    eps: float | None = None,
    empty: Any,
) -> tuple[tuple, dict]:
    y, _, rstd = _forward(x, weight, None, needs, normalized_shape, eps, empty, rms=True)  # type: ignore[arg-type]
    saved = {"x": x, "rstd": rstd} | ({} if weight is None else {"weight": weight})
    return (y,), saved if needs else {}


def rms_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    normalized_shape: tuple,
    eps: float | None = None,
    empty: Any,
) -> tuple:
    dx, dweight, _ = _backward(dys[0], saved, inputs, needs, normalized_shape, empty)
    return dx, dweight
