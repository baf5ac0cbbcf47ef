"""What attention's kernels share: which keys a query sees, a tile of scores, loads of rows, dropout's mask.

A query's keys are one interval, whatever limits them (lengths, the diagonal, a window, packed sequences), and so are a
key's queries. So a kernel walks the blocks that any of its rows sees: first those that not all rows see whole, then those
that they do, without masks, then the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl

from . import _tile
from ._configs import Tile
from ._random import _words_of
from .activation import _tanh

LEAST = 16
"""Of what a product of matrices has in each direction."""
PART = 16
"""Of a head's elements, what is multiplied at a time without tensor cores."""


def choose(entries: Sequence[Tile], device: _tile.Device, width: int, rows: int) -> tuple[int, Tile] | None:
    """The tiles for heads so wide (BK: the widest that a tile is for), of them the lowest that holds all rows."""
    wide = [(i, c) for i, c in enumerate(entries) if width <= c.BK]
    fitting = [(i, c) for i, c in wide if c.BK == wide[0][1].BK]
    return next(((i, c) for i, c in reversed(fitting) if rows <= c.BM), fitting[0] if fitting else None)


def registers(x: Any) -> dict[str, int]:
    """All of them for float32."""
    return {} if x.element_size() == 2 else {"maxnreg": _tile.MOST_REGISTERS}


def operands(q: Any, v: Any) -> tuple[str, dict[str, Any]]:
    """("half", "tf32" or "single", what kernels take of the heads' widths and of how they are multiplied)."""
    half = q.element_size() == 2
    tf32 = not half and _tile.tf32("cuda.matmul")
    wide, wide_v = (_tile.next_power_of_2(max(x.shape[3], LEAST)) for x in (q, v))
    widths = dict(BD=wide, BV=wide_v, PART=wide if half or tf32 else PART, PRECISION="tf32" if tf32 else "ieee")
    kind = "half" if half else "tf32" if tf32 else "single"
    return kind, widths | dict(EVEN_D=q.shape[3] == wide, EVEN_V=v.shape[3] == wide_v)


def along(x: Any, empty: Callable) -> Any:
    """``x`` with the last axis contiguous; a copy where it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else _tile.copied(x, None, empty)


def narrow(c: dict[str, Any]) -> str:
    """Rows of heads whose width or step 16 does not divide."""
    return "loads, stores" if c["odd"] & {"D", "DV", "q_l", "k_l", "v_l", "y_l", "dy_l"} else ""


LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class _Infinity(float):
    """Its text is Python, too: Inductor writes what a kernel names into its code."""

    def __repr__(self) -> str:
        return 'float("inf")'


INF = tl.constexpr(_Infinity("inf"))


@triton.jit
def _sequence(cu, sequences, depth, x):
    """The sequence that each position is in, by halving: depth ≥ log2(sequences)."""
    low = x * 0
    high = low + sequences
    for _ in range(depth):
        middle = (low + high) // 2
        before = tl.load(cu + middle).to(tl.int32) <= x
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def span(
    x, X, Y, cu_x, cu_y, sequences, depth, before, after,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, BOTTOM: tl.constexpr,
):  # fmt: skip
    """[low, high): the places of Y that each place x of X sees (none: high ≤ low); places past the end see what the last does.

    From the diagonal, so many before and after; BOTTOM: it ends at both last places, else it begins at both first.
    """
    x = tl.minimum(x, X - 1)
    if cu_x is None:
        diagonal = x
        if BOTTOM:
            diagonal += Y - X
        low = x * 0
        high = low + Y
    else:
        at = _sequence(cu_x, sequences, depth, x)
        x0, x1 = tl.load(cu_x + at).to(tl.int32), tl.load(cu_x + at + 1).to(tl.int32)
        low, high = tl.load(cu_y + at).to(tl.int32), tl.load(cu_y + at + 1).to(tl.int32)
        diagonal = x - x0 + low
        if BOTTOM:
            diagonal += (high - low) - (x1 - x0)
        inside = (x >= x0) & (x < x1)
        low = tl.where(inside, tl.maximum(low, 0), Y)
        high = tl.where(inside, tl.minimum(high, Y), 0)
    if BEFORE:
        low = tl.maximum(low, diagonal - before)
    if AFTER:
        high = tl.minimum(high, diagonal + after + 1)
    return low, high


@triton.jit
def stretch(low, high, BLOCK: tl.constexpr):
    """(first, whole, partial, end): blocks from first to whole are seen in part, to partial whole, to end in part."""
    first = tl.maximum(tl.min(low), 0) // BLOCK * BLOCK
    end = tl.maximum(tl.max(high), 0)
    whole = tl.minimum(tl.cdiv(tl.maximum(tl.max(low), 0), BLOCK) * BLOCK, end)
    partial = tl.maximum(tl.maximum(tl.min(high), 0) // BLOCK * BLOCK, whole)
    return first, whole, partial, end


@triton.jit
def rows(x, i, step, L, d, D, INSIDE: tl.constexpr, EVEN: tl.constexpr):
    """Rows i (R,) of x and their elements d (1, BD) of D; zeros outside. INSIDE: no row is. EVEN: no element is."""
    at = x + i.to(tl.int64)[:, None] * step + d
    if INSIDE and EVEN:
        return tl.load(at)
    elif EVEN:
        return tl.load(at, (i < L)[:, None], other=0.0)
    elif INSIDE:
        return tl.load(at, d < D, other=0.0)
    else:
        return tl.load(at, (i < L)[:, None] & (d < D), other=0.0)


@triton.jit
def in_parts(
    a, i, a_l, I, b, j, b_l, J, D, BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows i of a times rows j of b, (BI, BJ), over PART elements at a time: without tensor cores both stand in registers."""
    dot = tl.zeros((BI, BJ), tl.float32)
    for part in range(0, BD, PART):
        d = part + tl.arange(0, PART)[None, :]
        left, right = rows(a, i, a_l, I, d, D, False, False), rows(b, j, b_l, J, d, D, False, False)
        dot = tl.dot(left, right.T, dot, input_precision=PRECISION)
    return dot


@triton.jit
def scored(dot, bias, i, j, Lq, Lk, b_i, b_j, scale, softcap, CAPPED: tl.constexpr):
    """(scores in units of log 2, the cap's slope) of a tile of products; bias: its head's."""
    slope = 1.0
    x = dot * scale
    if CAPPED:
        t = _tanh(x / softcap)
        slope = 1 - t * t
        x = t * softcap
    if bias is not None:
        at = bias + i.to(tl.int64) * b_i + j.to(tl.int64) * b_j
        there = (i < Lq) & (j < Lk)
        if bias.dtype.element_ty.is_int():
            x = tl.where(tl.load(at, there, other=0) != 0, x, -INF)
        else:
            x += tl.load(at, there, other=0.0).to(tl.float32)
    return x * LOG2E, slope


@triton.jit
def kept(seed, row, quarters, j, threshold, BN: tl.constexpr):
    """(BM, BN) bool: which pairs of the draw's rows (BM,) int64 with the keys j … are not dropped; 4 divides j."""
    counter = row[:, None] * quarters + j // 4 + tl.arange(0, BN // 4)[None, :]
    return _words_of(seed, counter).to(tl.int64) >= threshold
