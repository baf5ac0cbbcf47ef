"""Gradients that come back to the rows of a table, without atomics.

The indices are sorted, so that what belongs to a row lies together, and each row is one program's: it adds up its own terms,
or writes zeros. The sorted terms are cut into chunks at fixed places; where all of a chunk is one row's, its sum is made by a
program of its own before. So a row that occurs very often is many programs' work, and the order of the additions is the same
on every run.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._sort import sorted_indices

BUDGETS = {
    # The places of terms are four bytes each.
    "_embedding_chunks_kernel": Budget(registers=128, blocks=4, narrow="loads, stores"),
    "_embedding_rows_kernel": Budget(registers=160, blocks=3, narrow="loads"),
}


@triton.jit
def _terms(dy, places, bags, factors, winners, at, d, D, y_b, mask):
    """What the tokens at these sorted places give to a row: (tokens, 1) × (1, BC)."""
    token = tl.load(places + at, mask, other=0)
    bag = token if bags is None else tl.load(bags + token, mask, other=0)
    mask &= d < D
    found = tl.load(dy + bag.to(tl.int64) * y_b + d, mask, other=0.0).to(tl.float32)
    if factors is not None:
        found *= tl.load(factors + token, mask, other=0.0).to(tl.float32)
    if winners is not None:
        found = tl.where(tl.load(winners + bag.to(tl.int64) * D + d, mask, other=-1) == token, found, 0.0)
    return found


@triton.jit
def _embedding_chunks_kernel(
    dy, keys, places, bags, factors, winners, sums, V, D, y_b, chunk,
    UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """sums[p] = Σ of the p-th chunk of the sorted terms, where all are one row's."""
    D, y_b = D * UNIT, y_b * UNIT
    p = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    key = tl.load(keys + p * chunk)
    if (key < V) & (key == tl.load(keys + p * chunk + chunk - 1)):
        acc = tl.zeros((BR, BC), tl.float32)
        for start in range(0, chunk, BR):
            i = start + tl.arange(0, BR)[:, None]
            acc += _terms(dy, places, bags, factors, winners, p * chunk + i, d, D, y_b, i < chunk)
        tl.store(sums + p * D + d, tl.sum(acc, 0, keep_dims=True), d < D)


@triton.jit
def _embedding_rows_kernel(
    dy, places, bags, factors, winners, starts, sums, dweight, V, D, y_b, chunk,
    FREQ: tl.constexpr, UNIT: tl.constexpr, FEW: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """dweight[v] = Σ terms, over their number where FREQ. ROWS rows at once, a term of each after the other, where none has
    more than FEW; else row by row: up to the first whole chunk, whole chunks, and what is left."""
    D, y_b = D * UNIT, y_b * UNIT
    first = tl.program_id(0) * ROWS
    d = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    v = first + tl.arange(0, ROWS)[:, None]
    begins = tl.load(starts + v, v < V, other=0)
    count = tl.load(starts + v + 1, v < V, other=0) - begins
    most = tl.max(count)
    if most <= FEW:
        each = tl.zeros((ROWS, BC), tl.float32)
        for k in range(most):
            each += _terms(dy, places, bags, factors, winners, begins + k, d, D, y_b, k < count)
        if FREQ:
            each /= tl.maximum(count, 1)
        tl.store(dweight + v.to(tl.int64) * D + d, each.to(dweight.dtype.element_ty), (v < V) & (d < D))
    else:
        for row in range(first, min(first + ROWS, V)):
            begin, end = tl.load(starts + row), tl.load(starts + row + 1)
            head = min(end, (begin + chunk - 1) // chunk * chunk)
            tail = max(head, end // chunk * chunk)
            left = head - begin + end - tail
            acc = tl.zeros((BR, BC), tl.float32)
            for start in range(0, left, BR):
                i = start + tl.arange(0, BR)[:, None]
                at = begin + i
                at = tl.where(at < head, at, at - head + tail)
                acc += _terms(dy, places, bags, factors, winners, at, d, D, y_b, i < left)
            for start in range(head // chunk, tail // chunk, BR):
                i = start + tl.arange(0, BR)[:, None]
                acc += tl.load(sums + i.to(tl.int64) * D + d, (i < tail // chunk) & (d < D), other=0.0)
            total = tl.sum(acc, 0, keep_dims=True)
            if FREQ:
                total /= max(end - begin, 1)
            tl.store(dweight + row.to(tl.int64) * D + d, total.to(dweight.dtype.element_ty), d < D)


BACKWARD = _configs.rows("embedding_backward")
TERMS, ROWS, FEW = 8, 8, 32
"""Terms of a row that a program adds at once, and rows that it writes, at least; and the most terms that one of those rows
has where they are added side by side."""
TILE, MOST = 1024, 32
"""Elements of those rows, and how many of them narrow ones are."""


def rows_of(dy: Any, width: int, empty: Any) -> tuple[Any, int]:
    """(dy, elements from row to row), rows contiguous; a copy where they are not."""
    step = _tile.row_step(dy)
    return (_tile.dense(dy, empty), width) if step is None else (dy, step)


def scattered(dy: Any, indices: Any, weight: Any, padding: int | None, frequent: bool, empty: Any, **of: Any) -> Any:
    """dweight as ``scatter`` makes it."""
    dweight = empty(weight.shape, weight.dtype)
    scatter(dy, indices, dweight, padding, frequent, empty, **of)
    return dweight


def scatter(
    dy: Any, indices: Any, dweight: Any, padding: int | None, frequent: bool, empty: Any,
    *, bags: Any = None, factors: Any = None, winners: Any = None,
) -> None:  # fmt: skip
    """dweight, dense, from dy's rows: the bag's of each index, by its factor, where it won; None: each index has its own."""
    (rows, width), n = dweight.shape, indices.numel()
    dy, step = rows_of(dy, width, empty)
    order = sorted_indices(_tile.dense(indices, empty).reshape((n,)), rows, padding, empty)
    chunk = _tile.next_power_of_2(max(64, n // 512), 1024)
    sums = empty((n // chunk, width), "float32")
    entry = BACKWARD(_tile.device(dy), width)
    unit, columns, step = _tile.in_units(width, step)
    block = _tile.next_power_of_2(width, entry.elements // TERMS)
    several = max(ROWS, min(MOST, TILE // block))
    tile = {"UNIT": unit, "BR": entry.elements // block, "BC": block, "num_warps": entry.warps}
    of = bags, factors, winners
    _tile.launch(
        _embedding_chunks_kernel, (n // chunk, _tile.cdiv(width, block)), dy, order.keys, order.places, *of, sums, rows,
        columns, step, chunk, **tile,
    )  # fmt: skip
    _tile.launch(
        _embedding_rows_kernel, (_tile.cdiv(rows, several), _tile.cdiv(width, block)), dy, order.places, *of, order.starts,
        sums, dweight, rows, columns, step, chunk, FREQ=frequent, FEW=FEW, ROWS=several, **tile,
    )  # fmt: skip
