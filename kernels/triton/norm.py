"""Layer norm and RMS norm, of x or of the sum h of x and a residual. Bound by memory. Norms of channels stand beside this.

Forward moves 2 elements for each element of x, backward 3; of a sum 4 each. A row that fits in registers is read once.
Longer rows are walked twice, the second time mostly from L2 (h by the program that wrote it, or by a later launch);
where they are too few to fill the GPU, several programs share each. Backward is in _norm_backward.py.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from .._norm import for_both, norms_own, sum_dtype
from . import _configs, _tile
from ._batch_moments import batch_moments_forward as batch_moments_forward
from ._batch_norm import batch_norm_backward as batch_norm_backward
from ._batch_norm import batch_norm_forward as batch_norm_forward
from ._conv_norm import conv_batch_norm_backward as conv_batch_norm_backward
from ._conv_norm import conv_batch_norm_forward as conv_batch_norm_forward
from ._group_norm import group_norm_backward as group_norm_backward
from ._group_norm import group_norm_forward as group_norm_forward
from ._instance_norm import instance_norm_backward as instance_norm_backward
from ._instance_norm import instance_norm_forward as instance_norm_forward
from ._local_response_norm import local_response_norm_backward as local_response_norm_backward
from ._local_response_norm import local_response_norm_forward as local_response_norm_forward
from ._moments import added, moments
from ._norm_backward import backward, walk

# --- forward ---------------------------------------------------------------------------------------------------------

BUDGETS = {
    "_norm_forward_kernel": Budget(registers=104, blocks=2),
    "_norm_forward_looped_kernel": Budget(registers=80, blocks=3),
    "_norm_moments_kernel": Budget(registers=72, blocks=4),
    "_norm_moments_of_sum_kernel": Budget(registers=104, blocks=2),
    "_norm_forward_split_kernel": Budget(registers=72, blocks=3),
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
    x, residual, weight, bias, h, y, mean, rstd, M, N, x_row, residual_row, eps,
    UNIT: tl.constexpr, RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A row lies in pieces, of which each thread has a vector, so that few are idle; they are added up before threads are."""
    N, x_row = N * UNIT, x_row * UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    n = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    there = row < M
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    pieces = ()
    for i in tl.static_range(PIECES):
        at = n + i * BLOCK
        mask = there if WHOLE or i < PIECES - 1 else there & (at < N)
        d = tl.load(x + row * x_row + at, mask, other=0.0).to(tl.float32)
        if residual is not None:
            d = added(d, residual + row * (residual_row * UNIT) + at, h + row * N + at, mask)
        total += d * d if RMS else d
        pieces += (d,)
    size = tl.maximum(N, 1).to(tl.float32)
    m = 0.0
    if not RMS:
        m = tl.div_rn(tl.sum(total, 1, keep_dims=True), size)  # `/` is off by a bit: 3c / 3 ≠ c
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for i in tl.static_range(PIECES):
            d = pieces[i] - m
            if not (WHOLE or i < PIECES - 1):
                d = tl.where(n + i * BLOCK < N, d, 0.0)
            total += d * d
        if mean is not None:
            tl.store(mean + row, m, there)
    r = 1.0 / tl.sqrt_rn(tl.sum(total, 1, keep_dims=True) / size + eps)
    if rstd is not None:
        tl.store(rstd + row, r, there)
    for i in tl.static_range(PIECES):
        at = n + i * BLOCK
        mask = there if WHOLE or i < PIECES - 1 else there & (at < N)
        inside = at < N
        tl.store(y + row * N + at, _scaled((pieces[i] - m) * r, weight, bias, at, inside).to(y.dtype.element_ty), mask)


@triton.jit
def _normalise(x, weight, bias, y, m, r, lo, hi, BLOCK: tl.constexpr):
    """y[lo:hi] of one row from its mean and rstd."""
    for start in range(lo, hi, BLOCK):
        n = start + tl.arange(0, BLOCK).to(tl.int64)
        v = tl.load(x + n, n < hi, other=0.0).to(tl.float32)
        out = _scaled((v - m) * r, weight, bias, n, n < hi)
        tl.store(y + n, out.to(y.dtype.element_ty), n < hi)


@triton.jit
def _norm_forward_looped_kernel(
    x, residual, weight, bias, h, y, mean, rstd, N, x_row, residual_row, eps, RMS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row
    if residual is not None:
        residual += row * residual_row
        h += row * N
    m, spread = moments(x, residual, h, 0, N, RMS, BLOCK)
    if residual is not None:
        tl.debug_barrier()  # what one thread wrote to h, another may read
        x = h
    r = 1.0 / tl.sqrt_rn(spread / N + eps)
    if mean is not None:
        tl.store(mean + row, m)
    if rstd is not None:
        tl.store(rstd + row, r)
    _normalise(x, weight, bias, y + row * N, m, r, 0, N, BLOCK)


@triton.jit
def _norm_moments_kernel(x, means, squares, N, x_row, parts, each, RMS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // parts).to(tl.int64)
    lo = (tl.program_id(0) % parts).to(tl.int64) * each
    m, spread = moments(x + row * x_row, None, None, lo, tl.minimum(lo + each, N), RMS, BLOCK)
    tl.store(means + tl.program_id(0), m)
    tl.store(squares + tl.program_id(0), spread)


@triton.jit
def _norm_moments_of_sum_kernel(
    x, residual, h, means, squares, N, x_row, residual_row, parts, each, RMS: tl.constexpr, BLOCK: tl.constexpr
):
    """The same of the sum h, whose part is written."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    lo = (tl.program_id(0) % parts).to(tl.int64) * each
    hi = tl.minimum(lo + each, N)
    m, spread = moments(x + row * x_row, residual + row * residual_row, h + row * N, lo, hi, RMS, BLOCK)
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


# --- launchers ---------------------------------------------------------------------------------------------------------

FORWARD = _tile.held_rows("norm_forward")
FORWARD_WALKED = _configs.rows("norm_forward.walked")


def _pieces(rows: int, block: int, warps: int, n: int, size: int) -> tuple[int, dict]:
    """(rows a program, tile) for rows of n: pieces of a vector for each thread, and as many rows as fit in what the table says."""
    width = min(block, 32 * warps * (16 // size))
    pieces = _tile.cdiv(n, width)
    count = 1 << max(1, rows * block // max(pieces * width, 1)).bit_length() - 1
    return count, dict(ROWS=count, BLOCK=width, PIECES=pieces, WHOLE=n == pieces * width, num_warps=warps)


def _forward(
    x: Any,
    weight: Any,
    bias: Any,
    needs: tuple,
    normalized_shape: tuple,
    eps: float | None,
    empty: Any,
    rms: bool,
    residual: Any = None,
    dtype: str | None = None,
) -> tuple[Any, Any, Any, Any]:
    """(y, h, mean, rstd); mean and rstd are None where no gradient is needed, mean for RMS, h without a residual."""
    lead, n = x.shape[: x.ndim - len(normalized_shape)], math.prod(normalized_shape)
    m = math.prod(lead)
    own = x.dtype if residual is None else sum_dtype(x, residual)
    y = empty(x.shape, own if dtype is None else dtype)
    h = None if residual is None else empty(x.shape, own)
    rstd = empty(lead, "float32") if needs else None
    mean = empty(lead, "float32") if needs and not rms else None
    weight, bias = (None if p is None else _tile.dense(p, empty) for p in (weight, bias))
    x, row = _tile.rows(x, n, empty)
    residual, residual_row = (None, None) if residual is None else _tile.rows(residual, n, empty)
    if held := FORWARD(_tile.device(x), n):
        count, tile = _pieces(*held, n, x.element_size())
        grid = (_tile.cdiv(m, count),)
        unit, *sizes = _tile.in_units(n, row, residual_row)
        tile |= dict(UNIT=unit, RMS=rms)
        arrays = (x, residual, weight, bias, h, y, mean, rstd)
        _tile.launch(_norm_forward_kernel, grid, *arrays, m, *sizes, eps, **tile)
        return y, h, mean, rstd
    parts, each, walked = walk(FORWARD_WALKED, m, n, x)
    steps = (n, row, residual_row)
    if parts == 1:
        arrays = (x, residual, weight, bias, h, y, mean, rstd)
        _tile.launch(_norm_forward_looped_kernel, (m,), *arrays, *steps, eps, RMS=rms, **walked)
    else:
        means, squares = empty((m, parts), "float32"), empty((m, parts), "float32")
        grid, most = (m * parts,), _tile.next_power_of_2(parts)
        if h is None:
            _tile.launch(_norm_moments_kernel, grid, x, means, squares, n, row, parts, each, RMS=rms, **walked)
        else:
            given, x, row = (x, residual, h, means, squares, *steps), h, n
            _tile.launch(_norm_moments_of_sum_kernel, grid, *given, parts, each, RMS=rms, **walked)
        arrays = (x, weight, bias, y, mean, rstd, means, squares)
        _tile.launch(_norm_forward_split_kernel, grid, *arrays, n, row, eps, parts, each, PARTS=most, **walked)
    return y, h, mean, rstd


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
    y, _, mean, rstd = _forward(x, weight, bias, needs, normalized_shape, eps, empty, rms=False)
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
    return backward(dys[0], saved, inputs, needs, normalized_shape, empty)[:3]


def rms_norm_forward(
    x: Any,
    weight: Any = None,
    *,
    needs: tuple = (),
    normalized_shape: tuple,
    eps: float | None = None,
    empty: Any,
) -> tuple[tuple, dict]:
    y, _, _, rstd = _forward(x, weight, None, needs, normalized_shape, eps, empty, rms=True)
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
    return backward(dys[0], saved, inputs, needs, normalized_shape, empty)[:2]


# --- of a sum --------------------------------------------------------------------------------------------------------


def _backward_of_sum(
    dys: tuple, saved: dict, inputs: tuple, needs: tuple, normalized_shape: tuple, empty: Any
) -> tuple:
    """(dx, dresidual, dweight, dbias)"""
    dx, *others, dresidual = backward(
        dys[0], *norms_own(saved, inputs, needs), normalized_shape, empty, dys[1], inputs[:2]
    )
    return for_both((dx, *others), needs, dresidual)


def add_layer_norm_forward(
    x: Any,
    residual: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    needs: tuple = (),
    normalized_shape: tuple,
    eps: float = 1e-5,
    dtype: str | None = None,
    empty: Any,
) -> tuple[tuple, dict]:
    y, h, mean, rstd = _forward(x, weight, bias, needs, normalized_shape, eps, empty, False, residual, dtype)
    saved = {"sum": h, "mean": mean, "rstd": rstd} | ({} if weight is None else {"weight": weight})
    return (y, h), saved if needs else {}


def add_layer_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    normalized_shape: tuple,
    eps: float = 1e-5,
    dtype: str | None = None,
    empty: Any,
) -> tuple:
    return _backward_of_sum(dys, saved, inputs, needs, normalized_shape, empty)


def add_rms_norm_forward(
    x: Any,
    residual: Any,
    weight: Any = None,
    *,
    needs: tuple = (),
    normalized_shape: tuple,
    eps: float | None = None,
    dtype: str | None = None,
    empty: Any,
) -> tuple[tuple, dict]:
    y, h, _, rstd = _forward(x, weight, None, needs, normalized_shape, eps, empty, True, residual, dtype)
    saved = {"sum": h, "rstd": rstd} | ({} if weight is None else {"weight": weight})
    return (y, h), saved if needs else {}


def add_rms_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    normalized_shape: tuple,
    eps: float | None = None,
    dtype: str | None = None,
    empty: Any,
) -> tuple:
    return _backward_of_sum(dys, saved, inputs, needs, normalized_shape, empty)[:3]
