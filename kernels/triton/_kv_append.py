"""New keys and values into their cache in one launch: a row is a head of a token. Bound by memory."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile

BUDGETS = {
    # A row has an address of its own, and lanes may have one element each.
    "_kv_append_kernel": Budget(registers=128, blocks=2, narrow="loads, stores"),
}


@triton.jit
def place_of(positions, n, l, inside, p_n, p_l, FIRST: tl.constexpr):
    """Where a sequence's token goes, -1 for nowhere. FIRST: positions are those of each sequence's first token."""
    if FIRST:
        return tl.load(positions + n * p_n, inside, other=-1).to(tl.int64) + l
    else:
        return tl.load(positions + n * p_n + l * p_l, inside, other=-1).to(tl.int64)


@triton.jit
def home_of(place, table, n, inside, capacity, pages, t_n, t_b, PAGE: tl.constexpr):
    """(the cache's row, the place in it, whether it has one)"""
    to = n
    known = inside & (place >= 0) & (place < capacity)
    if table is not None:
        to = tl.load(table + n * t_n + place // PAGE * t_b, known, other=-1).to(tl.int64)
        known = known & (to >= 0) & (to < pages)
        place = place % PAGE
    return to, place, known


@triton.jit
def put_rows(x, y, known, x_d, y_d, D, BD: tl.constexpr):
    """y: each row of x. x, y, known: (ROWS, 1)."""
    d = tl.arange(0, BD)[None, :].to(tl.int64)
    mask = known & (d < D)
    tl.store(y + d * y_d, tl.load(x + d * x_d, mask), mask)


@triton.jit
def _kv_append_kernel(
    k, v, y, z, positions, table, M, H, L, D, DV, capacity, pages,
    k_n, k_h, k_l, k_d, v_n, v_h, v_l, v_d, y_n, y_h, y_l, y_d, z_n, z_h, z_l, z_d, p_n, p_l, t_n, t_b,
    FIRST: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """k into y and v into z."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < M
    h, l, n = row % H, row // H % L, row // H // L
    place = place_of(positions, n, l, inside, p_n, p_l, FIRST)
    to, place, known = home_of(place, table, n, inside, capacity, pages, t_n, t_b, PAGE)
    put_rows(k + (n * k_n + h * k_h + l * k_l), y + (to * y_n + h * y_h + place * y_l), known, k_d, y_d, D, BD)
    put_rows(v + (n * v_n + h * v_h + l * v_l), z + (to * z_n + h * z_h + place * z_l), known, v_d, z_d, DV, BV)


APPEND = _configs.rows("kv_append")


def kv_append_forward(
    k_cache: Any, v_cache: Any, k: Any, v: Any, positions: Any, table: Any = None, *, needs: tuple = (), empty: Any
) -> tuple[tuple, dict]:
    (n, heads, length, width), values = k.shape, v.shape[3]
    (pages, _, page, _), blocks = k_cache.shape, 1 if table is None else table.shape[1]
    wide = [_tile.next_power_of_2(max(x, 16)) for x in (width, values)]
    entry = APPEND(_tile.device(k), max(wide))
    tall, rows = max(1, 2 * entry.elements // max(wide) // k.element_size()), n * heads * length
    first = positions.ndim == 1
    _tile.launch(
        _kv_append_kernel, (_tile.cdiv(rows, tall),), k, v, k_cache, v_cache, positions, table,
        rows, heads, length, width, values, page * blocks, pages,
        *k.stride(), *v.stride(), *k_cache.stride(), *v_cache.stride(),
        positions.stride(0), 0 if first else positions.stride(1), *((0, 0) if table is None else table.stride()),
        FIRST=first, PAGE=1 if table is None else page, ROWS=tall, BD=wide[0], BV=wide[1], num_warps=entry.warps,
    )  # fmt: skip
    return (), {}
