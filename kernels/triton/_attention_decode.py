"""Attention of a few queries to a cache: the heads that share a head of keys are rows of one tile, and a sequence's keys are
shared out to several programs, whose results a second launch merges in their order. Bound by the cache's bytes."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .. import _invariance
from .._attention import order_of_y, scale_of
from .._budget import Budget
from . import _configs, _tile
from ._attention import INF, LN2, LOG2E, along, choose, narrow, operands, registers, scored

BUDGETS = {
    "_attention_decode_kernel": Budget(registers=255, blocks=1, narrow=narrow),
    "_attention_merge_kernel": Budget(registers=128, blocks=2, narrow=narrow),
}


@triton.jit
def _places(table, t_b, pages, j, x_n, x_l, PAGE: tl.constexpr, stop):
    """((BN,) int64: where the keys j are from the cache's start, whether their pages are there)."""
    if table is None:
        at, known = j.to(tl.int64) * x_l, j < stop
    else:
        page = tl.load(table + j // PAGE * t_b, j < stop, other=-1).to(tl.int64)
        known = (page >= 0) & (page < pages)
        at = page * x_n + (j % PAGE).to(tl.int64) * x_l
    return at, known


@triton.jit
def _product(q, rows, query, k, at, known, D, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PART: tl.constexpr,
             EVEN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(BM, BN) queries times keys: whole ones, or PART elements at a time where both would stand in registers."""
    if PART == BD:
        d = tl.arange(0, BD)[None, :]
        mask = known[:, None] if EVEN else known[:, None] & (d < D)
        return tl.dot(query, tl.load(k + at[:, None] + d, mask, other=0.0).T, input_precision=PRECISION)
    dot = tl.zeros((BM, BN), tl.float32)
    for part in range(0, BD, PART):
        d = part + tl.arange(0, PART)[None, :]
        left = tl.load(q + rows[:, None] + d, d < D, other=0.0)
        right = tl.load(k + at[:, None] + d, known[:, None] & (d < D), other=0.0)
        dot = tl.dot(left, right.T, dot, input_precision=PRECISION)
    return dot


@triton.jit
def _attention_decode_kernel(
    q, k, v, lengths, table, sinks, y, lse, shares, tops,
    Hq, Hk, Lq, capacity, pages, D, DV, group, splits,
    q_n, q_h, q_l, k_n, k_h, k_l, v_n, v_h, v_l, t_n, t_b, y_n, y_h, y_l, scale, softcap, before, after,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, CAPPED: tl.constexpr, PAGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PART: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A share of the keys for a tile of the (head, query) rows of one head of the cache. shares, tops: None, or each
    share's result and lse in units of log 2, (N · Hq · Lq, splits, …)."""
    M = group * Lq
    tiles = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    tile, split = pid % tiles, pid // tiles % splits
    g, n = pid // tiles // splits % Hk, (pid // tiles // splits // Hk).to(tl.int64)
    m = tile * BM + tl.arange(0, BM)
    inside = m < M
    m = tl.minimum(m, M - 1)
    h, i = g * group + m // Lq, m % Lq
    length = capacity
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + n), 0), capacity).to(tl.int32)
    own = length - Lq + i
    low, high = tl.zeros_like(own), tl.zeros_like(own) + length
    if BEFORE:
        low = tl.maximum(low, own - before)
    if AFTER:
        high = tl.minimum(high, own + after + 1)
    first, end = tl.min(low), tl.max(high)
    each = tl.cdiv(tl.cdiv(tl.maximum(end - first, 0), splits), BN) * BN
    start = first + split * each
    stop = tl.minimum(start + each, end)

    rows = n * q_n + h.to(tl.int64) * q_h + i.to(tl.int64) * q_l
    d, e = tl.arange(0, BD)[None, :], tl.arange(0, BV)[None, :]
    query = 0
    if PART == BD:
        query = tl.load(q + rows[:, None] + d) if EVEN_D else tl.load(q + rows[:, None] + d, d < D, other=0.0)
    g = g.to(tl.int64)
    k += g * k_h
    v += g * v_h
    if table is None:
        k += n * k_n
        v += n * v_n
    else:
        table += n * t_n
    acc = tl.zeros((BM, BV), tl.float32)
    top = tl.zeros((BM,), tl.float32) - INF
    total = tl.zeros((BM,), tl.float32)
    for at in range(start, stop, BN):
        j = at + tl.arange(0, BN)
        place, known = _places(table, t_b, pages, j, k_n, k_l, PAGE, stop)
        dot = _product(q, rows, query, k, place, known, D, BM, BN, BD, PART, EVEN_D, PRECISION)
        s, _ = scored(dot, None, m[:, None], j[None, :], Lq, capacity, 0, 0, scale, softcap, CAPPED)
        if table is not None:
            s = tl.where(known[None, :], s, float("nan"))
        s = tl.where((j[None, :] >= low[:, None]) & (j[None, :] < high[:, None]), s, -INF)
        higher = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(higher == -INF, 0.0, higher)
        p = tl.exp2(s - safe[:, None])
        less = tl.exp2(top - safe)
        total = total * less + tl.sum(p, 1)
        place, known = _places(table, t_b, pages, j, v_n, v_l, PAGE, stop)
        mask = known[:, None] if EVEN_V else known[:, None] & (e < DV)
        value = tl.load(v + place[:, None] + e, mask, other=0.0)
        acc = tl.dot(p.to(value.dtype), value, acc * less[:, None], input_precision=PRECISION)
        top = higher

    row = (n * Hq + h) * Lq + i
    if tops is None:
        if sinks is not None:
            sink = tl.load(sinks + h).to(tl.float32) * LOG2E
            higher = tl.maximum(top, sink)
            safe = tl.where(higher == -INF, 0.0, higher)
            less = tl.exp2(top - safe)
            total = total * less + tl.exp2(sink - safe)
            acc, top = acc * less[:, None], safe
        at = n * y_n + h.to(tl.int64) * y_h + i.to(tl.int64) * y_l
        tl.store(lse + row, tl.where(total == 0, -INF, (top + tl.log2(total)) * LN2), inside)
    else:
        y, row = shares, row * splits + split
        at = row * DV
        tl.store(tops + row, tl.where(total == 0, -INF, top + tl.log2(total)), inside)
        inside = inside & (total != 0)
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(y + at[:, None] + e, acc.to(y.dtype.element_ty), inside[:, None] & (e < DV))


@triton.jit
def _attention_merge_kernel(
    shares, tops, sinks, y, lse, Hq, Lq, DV, splits, y_n, y_h, y_l, S: tl.constexpr, PART: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """A row's shares, each by its part of the whole softmax's sum, PART at a time. One without keys has −∞, and no more."""
    row = tl.program_id(0).to(tl.int64)
    i, h, n = row % Lq, row // Lq % Hq, row // Lq // Hq
    s = tl.arange(0, S)
    each = tl.load(tops + row * splits + s, s < splits, other=-INF)
    top = tl.max(each, 0)
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    top = tl.where(top == -INF, 0.0, top)
    total = tl.sum(tl.exp2(each - top), 0)
    if sinks is not None:
        total += tl.exp2(sink - top)
    e = tl.arange(0, BV)[None, :]
    acc = tl.zeros((PART, BV), tl.float32)
    for first in range(0, splits, PART):
        t = first + tl.arange(0, PART)[:, None]
        its = tl.load(tops + row * splits + t, t < splits, other=-INF)
        its_y = tl.load(shares + (row * splits + t) * DV + e, (its > -INF) & (e < DV), other=0.0)
        acc += tl.exp2(its - top) * its_y
    tl.store(lse + row, tl.where(total == 0, -INF, (top + tl.log2(total)) * LN2))
    e = tl.arange(0, BV)
    found = tl.sum(acc, 0) / tl.where(total == 0, 1.0, total)
    tl.store(y + n * y_n + h * y_h + i * y_l + e, found.to(y.dtype.element_ty), e < DV)


KINDS = {kind: _configs.tiles(f"attention_decode.{kind}", choose, inner=()) for kind in ("half", "tf32", "single")}
MERGE = _configs.rows("attention_merge")
MOST = 128
"""Shares of a sequence's keys."""


def _splits(q: Any, groups: int, tiles: int, keys: int, before: int, block: int) -> int:
    """Shares that fill the multiprocessors twice, of four blocks of keys at least. keys: the most that a sequence has.
    Batch-invariant ones are as many as for a sequence alone."""
    if before >= 0:
        keys = min(keys, before + q.shape[2])
    programs = max(1, (1 if _invariance.on() else q.shape[0]) * groups * tiles)
    return max(1, min(2 * _tile.device(q).sms // programs, _tile.cdiv(keys, 4 * block), MOST))


def _stages(c: _configs.Tile, q: Any, wide: tuple[int, int], paged: bool) -> int:
    """For as many blocks of keys and values on their way as the tile has stages, and shared memory room. What is loaded by
    a page's number, itself on its way, takes two stages each."""
    size = q.element_size()
    room = _tile.device(q).shared - c.BM * wide[0] * size
    stages = max(1, min(c.stages, room // (c.BN * sum(wide) * size)))
    return 2 * stages - 1 if paged else stages


def attention_decode_forward(
    q: Any, k: Any, v: Any, lengths: Any = None, table: Any = None, sinks: Any = None,
    *, needs: tuple = (), causal: bool = True, window: tuple = (-1, -1), scale: float | None = None,
    softcap: float = 0.0, empty: Any,
) -> tuple[tuple, dict]:  # fmt: skip
    (n, heads, rows, width), (pages, groups, page, values) = q.shape, v.shape
    y = empty((n, heads, rows, values), q.dtype, order_of_y(*_tile.layout(tuple(q.shape), tuple(q.stride()))))
    lse = empty((n, heads, rows), "float32")
    q, k, v = (along(x, empty) for x in (q, k, v))
    lengths, sinks = (None if x is None else _tile.dense(x, empty) for x in (lengths, sinks))
    capacity = page if table is None else page * table.shape[1]
    group = heads // max(groups, 1)
    kind, widths = operands(q, v)
    wide = widths["BD"], widths["BV"]
    c = KINDS[kind](_tile.device(q), max(wide), group * rows)
    tiles = _tile.cdiv(group * rows, c.BM)
    before, after = window
    splits = _splits(q, groups, tiles, capacity, before, c.BN)
    shares = empty((n * heads * rows * splits, values), "float32") if splits > 1 else None
    tops = empty((n * heads * rows * splits,), "float32") if splits > 1 else None
    _tile.launch(
        _attention_decode_kernel, (tiles * splits * groups * n,),
        q, k, v, lengths, table, sinks, y, lse, shares, tops,
        heads, groups, rows, capacity, pages, width, values, group, splits,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *((0, 0) if table is None else table.stride()), *y.stride()[:3],
        scale_of(q, scale), softcap, before, after,
        BEFORE=before >= 0, AFTER=after >= 0, CAPPED=softcap > 0, PAGE=1 if table is None else page,
        BM=c.BM, BN=c.BN, num_warps=c.warps, num_stages=_stages(c, q, wide, table is not None), **widths, **registers(q),
    )  # fmt: skip
    if splits > 1:
        entry, most = MERGE(_tile.device(q), wide[1]), _tile.next_power_of_2(splits)
        _tile.launch(
            _attention_merge_kernel, (n * heads * rows,), shares, tops, sinks, y, lse, heads, rows, values, splits,
            *y.stride()[:3], S=most, PART=min(most, max(1, entry.elements // wide[1])), BV=wide[1],
            num_warps=entry.warps,
        )  # fmt: skip
    return (y, lse), {}
