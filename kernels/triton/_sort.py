"""A stable sort of indices, digit by digit, so that equal ones lie side by side in the order that they came in.

Each pass over a digit counts it block by block, adds the counts up, and puts every index where those before it end. What
ties would break by chance is decided by place: no atomics, the same order on every run.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from gpulayers.arrays import Spec

from .._budget import Budget
from . import _tile

BUDGETS = {
    # Four bytes an index, and what is scattered lies anywhere.
    "_keys_kernel": Budget(registers=48, blocks=10, narrow="loads, stores"),
    "_digits_kernel": Budget(registers=96, blocks=5, narrow="loads, stores"),
    "_totals_kernel": Budget(registers=64, blocks=8, narrow="loads, stores"),
    "_placed_kernel": Budget(registers=255, blocks=2, narrow="loads, stores"),
    "_bounds_kernel": Budget(registers=48, blocks=10, narrow="loads, stores"),
}
BITS = 6
"""Of a digit: three passes order a vocabulary of 2^18."""
STEP = 64
"""Indices that a program ranks at once."""


@triton.jit
def _keys_kernel(indices, keys, places, N, V, padding, BLOCK: tl.constexpr):
    """Each index, V where it has no gradient, and its place."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + i, i < N, other=0).to(tl.int64)
    key = tl.where((index >= 0) & (index < V) & (index != padding), index, V)
    tl.store(keys + i, key.to(tl.int32), i < N)
    tl.store(places + i, i.to(tl.int32), i < N)


@triton.jit
def _digits_kernel(keys, counts, N, P, each, SHIFT: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr):
    """counts[digit, p]: how many of the p-th ``each`` keys have it."""
    p = tl.program_id(0)
    digits = tl.arange(0, R)
    total = tl.zeros((R,), tl.int32)
    for start in range(0, each, STEP):
        i = p.to(tl.int64) * each + start + tl.arange(0, STEP)
        digit = tl.where(i < N, (tl.load(keys + i, i < N, other=0) >> SHIFT) & (R - 1), R)
        total += tl.sum((digit[:, None] == digits[None, :]).to(tl.int32), 0)
    tl.store(counts + digits.to(tl.int64) * P + p, total)


@triton.jit
def _totals_kernel(counts, T, BLOCK: tl.constexpr):
    """counts[i] = Σ counts before i, by one program."""
    before = tl.zeros((), tl.int32)
    for start in range(0, T, BLOCK):
        i = start + tl.arange(0, BLOCK)
        found = tl.load(counts + i, i < T, other=0)
        tl.store(counts + i, before + tl.cumsum(found, 0) - found, i < T)
        before += tl.sum(found, 0)


@triton.jit
def _placed_kernel(
    keys, places, counts, keys_out, places_out, N, P, each, SHIFT: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr
):
    """Each key, and the place it came from, to where those before it end: of smaller digits, and of its own."""
    p = tl.program_id(0)
    digits = tl.arange(0, R)
    free = tl.load(counts + digits.to(tl.int64) * P + p)
    for start in range(0, each, STEP):
        i = p.to(tl.int64) * each + start + tl.arange(0, STEP)
        key, place = tl.load(keys + i, i < N, other=0), tl.load(places + i, i < N, other=0)
        digit = tl.where(i < N, (key >> SHIFT) & (R - 1), R)
        hot = (digit[:, None] == digits[None, :]).to(tl.int32)  # (STEP, R)
        to = tl.sum(hot * (tl.cumsum(hot, 0) - hot + free[None, :]), 1)
        tl.store(keys_out + to, key, i < N)
        tl.store(places_out + to, place, i < N)
        free += tl.sum(hot, 0)


@triton.jit
def _bounds_kernel(keys, starts, N, V, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """starts[v], v from 0 to V: how many keys are less than v."""
    v = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low, high = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32) + N
    for _ in range(ROUNDS):
        middle = low + (high - low) // 2
        less = tl.load(keys + middle, (v <= V) & (middle < high), other=0) < v
        some = low < high
        low, high = tl.where(some & less, middle + 1, low), tl.where(some & (less == 0), middle, high)
    tl.store(starts + v, low, v <= V)


class Sorted(NamedTuple):
    """Indices in order, (N,) int32: V where one has no gradient."""

    keys: Any
    places: Any
    """Where each one came from."""
    starts: Any
    """(V + 1,): where the keys v begin, and those of the row after."""


REFUSALS = {"sorted": "2^31 indices, rows, or more: what sorts indices for a gradient counts in 32 bits"}


def refuses(weight: Spec, indices: Spec, *rest: Any, needs: tuple, **options: Any) -> str | None:
    """Why an op that looks up rows of a table is left to the definition, for its gradients."""
    return REFUSALS["sorted"] if needs and max(weight.shape[0], math.prod(indices.shape)) >= 2**31 else None


def sorted_indices(indices: Any, rows: int, padding: int | None, empty: Any) -> Sorted:
    """Dense ``indices`` (N,) of the rows of a table, in order. N and ``rows`` are under 2^31."""
    n = indices.shape[0]
    each = max(STEP, min(8192, _tile.next_power_of_2(n // 256)))
    programs = _tile.cdiv(n, each)
    keys, places = empty((n,), "int32"), empty((n,), "int32")
    none = -1 if padding is None else padding
    _tile.launch(_keys_kernel, (_tile.cdiv(n, 512),), indices, keys, places, n, rows, none, BLOCK=512, num_warps=4)
    counts = empty(((1 << BITS) * max(programs, 1),), "int32")
    for shift in range(0, max(rows, 1).bit_length(), BITS):
        options = {"SHIFT": shift, "R": 1 << BITS, "STEP": STEP, "num_warps": 4}
        _tile.launch(_digits_kernel, (programs,), keys, counts, n, programs, each, **options)
        _tile.launch(_totals_kernel, (min(programs, 1),), counts, (1 << BITS) * programs, BLOCK=1024, num_warps=4)
        to = empty((n,), "int32"), empty((n,), "int32")
        _tile.launch(_placed_kernel, (programs,), keys, places, counts, *to, n, programs, each, **options)
        keys, places = to
    starts = empty((rows + 1,), "int32")
    rounds = max(n, 1).bit_length()
    _tile.launch(
        _bounds_kernel, (_tile.cdiv(rows + 1, 512),), keys, starts, n, rows, ROUNDS=rounds, BLOCK=512, num_warps=4
    )
    return Sorted(keys, places, starts)
