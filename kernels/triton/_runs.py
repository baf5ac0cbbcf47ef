"""Runs of neighbours in the rows of row-major images: how a kernel moves 16 bytes of them at a time and looks at a window's
columns without a second load.

A lane owns V neighbouring columns of one row, and every V · S columns below them where windows step by S, 1 or 2. All arrays
are contiguous, their rows whole runs, so that a place counted in runs is a place that 16 bytes begin at. Tensors are
(lanes, V); they are split, joined and shifted within a thread, where that is a choice of registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from . import _configs, _tile
from ._image import first_of, is_wide


@triton.jit
def divided(a, b):
    """a // b of numbers ≥ 0: without signs it is shorter."""
    return (a.to(tl.uint32) // (a * 0 + b).to(tl.uint32)).to(tl.int32)


@triton.jit
def lanes_of(M, R, H, BL: tl.constexpr):
    """(plane, row, run, mask) of each of M lanes, R to a row, H rows to a plane."""
    lane = first_of(M, BL) + tl.arange(0, BL)
    row = divided(lane, R)
    plane = divided(row, H)
    return plane, row - plane * H, lane - row * R, lane < M


@triton.jit
def load_run(x, run, mask, other, V: tl.constexpr):
    """(lanes, V): the run of each."""
    return tl.load(x + run[:, None] * V + tl.arange(0, V)[None, :], mask[:, None], other=other)


@triton.jit
def store_run(x, run, v, mask, V: tl.constexpr):
    tl.store(x + run[:, None] * V + tl.arange(0, V)[None, :], v.to(x.dtype.element_ty), mask[:, None])


@triton.jit
def after_first(v, first, N: tl.constexpr):
    """[first, v[0], …, v[N - 2]] of v (lanes, N) and first (lanes,)."""
    if N == 1:
        return first[:, None]
    else:
        even, odd = tl.split(tl.reshape(v, (v.shape[0], N // 2, 2)))
        return tl.reshape(tl.join(after_first(odd, first, N // 2), even), (v.shape[0], N))


@triton.jit
def before_last(v, last, N: tl.constexpr):
    """[v[1], …, v[N - 1], last]."""
    if N == 1:
        return last[:, None]
    else:
        even, odd = tl.split(tl.reshape(v, (v.shape[0], N // 2, 2)))
        return tl.reshape(tl.join(odd, before_last(even, last, N // 2)), (v.shape[0], N))


@triton.jit
def parted(low, high, N: tl.constexpr):
    """The even and the odd columns of two runs that follow each other."""
    a, b = tl.split(tl.reshape(low, (low.shape[0], N // 2, 2)))
    c, d = tl.split(tl.reshape(high, (low.shape[0], N // 2, 2)))
    even = tl.reshape(tl.permute(tl.join(a, c), (0, 2, 1)), (low.shape[0], N))
    return even, tl.reshape(tl.permute(tl.join(b, d), (0, 2, 1)), (low.shape[0], N))


@triton.jit
def woven(even, odd, N: tl.constexpr):
    """Two runs that follow each other from their even and their odd columns."""
    a, c = tl.split(tl.permute(tl.reshape(even, (even.shape[0], 2, N // 2)), (0, 2, 1)))
    b, d = tl.split(tl.permute(tl.reshape(odd, (even.shape[0], 2, N // 2)), (0, 2, 1)))
    return tl.reshape(tl.join(a, b), (even.shape[0], N)), tl.reshape(tl.join(c, d), (even.shape[0], N))


@triton.jit
def load_columns(
    x, row, run, R, mask, other,
    S: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, V: tl.constexpr, NEAREST: tl.constexpr = False,
):  # fmt: skip
    """(even, odd, before, after): of the S runs from run · S on in a row of R the even and the odd columns (S = 1: all of
    them, twice), the column before them and that after them, each where it is asked for; beyond the row ``other``, or its
    NEAREST (before and after alone)."""
    at = row * R + run * S
    even = load_run(x, at, mask & (run * S < R), other, V)
    odd = even
    if S == 2:
        high = load_run(x, at + 1, mask & (run * S + 1 < R), other, V)
        even, odd = parted(even, high, V)
    before, after = run, run
    if BEFORE:
        if NEAREST:
            before = tl.load(x + tl.maximum(at * V - 1, row * R * V), mask, other=other)
        else:
            before = tl.load(x + at * V - 1, mask & (run > 0) & (run * S <= R), other=other)
    if AFTER:
        if NEAREST:
            after = tl.load(x + tl.minimum((at + S) * V, (row + 1) * R * V - 1), mask, other=other)
        else:
            after = tl.load(x + (at + S) * V, mask & (run * S + S < R), other=other)
    return even, odd, before, after


@triton.jit
def column(even, odd, before, after, OFFSET: tl.constexpr, S: tl.constexpr, V: tl.constexpr):
    """Of V columns, S apart, those OFFSET further, −1 to S."""
    if OFFSET == -1:
        return after_first(odd, before, V)
    elif OFFSET == S:
        return before_last(even, after, V)
    elif OFFSET == 1:
        return odd
    else:
        return even


def run_length(*arrays: Any) -> int:
    """Columns of a run, as many as 16 bytes or half of them hold of the first array; 0 where arrays are not contiguous, their
    rows are no whole runs, or their places take 64 bits."""
    return _length(arrays, [a.shape[-1] for a in arrays])


def line_length(x: Any) -> int:
    """Elements of a run of ``x`` as one line, wherever its rows begin, none of which is shorter; 0 as of ``run_length``."""
    length = _length((x,), (x.numel(),))
    return length if length <= x.shape[-1] else 0


def _length(arrays: Sequence[Any], sizes: Sequence[int]) -> int:
    whole = 16 // arrays[0].element_size()
    length = next((v for v in (whole, whole // 2) if v > 1 and all([size % v == 0 for size in sizes])), 0)
    fits = length and all([a.is_contiguous() and a.numel() > 0 for a in arrays]) and not is_wide(*arrays)
    return length if fits else 0


def run_plan(choice: _configs.Choice, x: Any, runs: int, length: int) -> tuple[tuple, tuple, dict]:
    """(grid, (lanes, runs of a row, rows of a plane), tile) for a kernel with so many lanes to a row of ``x``."""
    lanes = x.numel() // x.shape[-1] * runs
    grid, tile = _plan(choice, x, lanes, length)
    return grid, (lanes, runs, x.shape[-2]), tile


def line_plan(choice: _configs.Choice, x: Any, length: int) -> tuple[tuple, int, dict]:
    """(grid, lanes, tile) for a kernel with a lane to each run of ``x`` as one line."""
    lanes = x.numel() // length
    grid, tile = _plan(choice, x, lanes, length)
    return grid, lanes, tile


def _plan(choice: _configs.Choice, x: Any, lanes: int, length: int) -> tuple[tuple, dict]:
    entry = choice(_tile.device(x), lanes * length)
    block = min(entry.elements // length, 32 * entry.warps)
    return (_tile.cdiv(lanes, block),), {"V": length, "BL": block, "num_warps": entry.warps}
