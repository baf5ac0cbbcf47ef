"""Attention forward: one program for a tile of queries of one head, the softmax carried along the keys (online)."""

from __future__ import annotations

import triton
import triton.language as tl

from .._budget import Budget
from ._attention import INF, LN2, LOG2E, in_parts, kept, narrow, rows, scored, span, stretch

BUDGETS = {
    "_attention_forward_kernel": Budget(registers=255, blocks=1, narrow=narrow),
}


@triton.jit
def _along(
    acc, top, total, query, q, k, v, bias, seed, row, i, low, high, n, g, start, stop, Lq, Lk, D, DV,
    q_l, k_l, v_l, b_i, b_j, scale, softcap, quarters, threshold,
    MASKED: tl.constexpr, LEFT: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PART: tl.constexpr, EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, PRECISION: tl.constexpr, BOXED: tl.constexpr,
):  # fmt: skip
    """(acc, top, total) after the keys from start to stop. LEFT: there are keys before what a query sees."""
    for first in range(start, stop, BN):
        j = first + tl.arange(0, BN)
        if BOXED:
            dot = tl.dot(query, k.load([n, g, first, 0]).reshape(BN, BD).T)
        elif PART == BD:
            d = tl.arange(0, BD)[None, :]
            dot = tl.dot(query, rows(k, j, k_l, Lk, d, D, not MASKED, EVEN_D).T, input_precision=PRECISION)
        else:
            dot = in_parts(q, i, q_l, Lq, k, j, k_l, Lk, D, acc.shape[0], BN, BD, PART, PRECISION)
        if PLAIN:
            s = dot
        else:
            s, _ = scored(dot, bias, i[:, None], j[None, :], Lq, Lk, b_i, b_j, scale, softcap, CAPPED)
        if MASKED:
            place = tl.arange(0, BN)[None, :]
            seen = place < (high - first)[:, None]
            if LEFT:
                seen &= place >= (low - first)[:, None]
            s = tl.where(seen, s, -INF)
        if PLAIN:
            higher = tl.maximum(top, tl.max(s, 1) * (scale * LOG2E))
        else:
            higher = tl.maximum(top, tl.max(s, 1))
        safe = higher
        if MASKED or bias is not None:
            safe = tl.where(higher == -INF, 0.0, higher)
        p = tl.exp2(s * (scale * LOG2E) - safe[:, None]) if PLAIN else tl.exp2(s - safe[:, None])
        less = tl.exp2(top - safe)
        total = total * less + tl.sum(p, 1)
        if seed is not None:
            p = tl.where(kept(seed, row, quarters, first, threshold, BN), p, 0.0)
        acc = acc * less[:, None]
        if BOXED:
            value = v.load([n, g, first, 0]).reshape(BN, BV)
        else:
            value = rows(v, j, v_l, Lk, tl.arange(0, BV)[None, :], DV, not MASKED, EVEN_V)
        acc = tl.dot(p.to(value.dtype), value, acc, input_precision=PRECISION)
        top = higher
    return acc, top, total


@triton.jit
def _attention_forward_kernel(
    q, k, v, bias, sinks, seed, cu_q, cu_k, y, lse, Hq, Lq, Lk, D, DV, group, sequences, depth,
    q_n, q_h, q_l, k_n, k_h, k_l, v_n, v_h, v_l, b_n, b_h, b_i, b_j, y_n, y_h, y_l,
    scale, softcap, before, after, quarters, threshold, gain,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, BOTTOM: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PART: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, PRECISION: tl.constexpr, BOXED: tl.constexpr,
):  # fmt: skip
    """PLAIN: scores are products times a positive scale. PART: so much of D is multiplied at a time. gain: 1 / (1 − p).

    BOXED: q, k, v and y are descriptors, of boxes (1, 1, BM or BN, BD or BV): zeros outside, no addresses, no masks.
    """
    tiles = tl.cdiv(Lq, BM)
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles if AFTER else pid % tiles  # under a diagonal the last tiles have most to do
    head = pid // tiles % Hq
    item = pid // tiles // Hq
    n = item.to(tl.int64)
    h = head.to(tl.int64)
    if not BOXED:
        q += n * q_n + h * q_h
        k += n * k_n + h // group * k_h
        v += n * v_n + h // group * v_h
    if bias is not None:
        bias += n * b_n + h * b_h
    i = tile * BM + tl.arange(0, BM)
    row = (n * Hq + h) * Lq + i
    low, high = span(i, Lq, Lk, cu_q, cu_k, sequences, depth, before, after, BEFORE, AFTER, BOTTOM)
    first, whole, partial, end = stretch(low, high, BN)
    query = 0
    if BOXED:
        query = q.load([item, head, tile * BM, 0]).reshape(BM, BD)
    elif PART == BD:
        query = rows(q, i, q_l, Lq, tl.arange(0, BD)[None, :], D, False, EVEN_D)
    acc = tl.zeros((BM, BV), tl.float32)
    top = tl.zeros((BM,), tl.float32) - INF
    total = tl.zeros((BM,), tl.float32)
    given = (query, q, k, v, bias, seed, row, i, low, high, item, head // group)
    numbers = (Lq, Lk, D, DV, q_l, k_l, v_l, b_i, b_j, scale, softcap, quarters, threshold)
    LEFT: tl.constexpr = BEFORE or cu_q is not None
    if LEFT:
        acc, top, total = _along(
            acc, top, total, *given, first, whole, *numbers,
            True, LEFT, PLAIN, CAPPED, BN, BD, BV, PART, EVEN_D, EVEN_V, PRECISION, BOXED,
        )  # fmt: skip
    acc, top, total = _along(
        acc, top, total, *given, whole, partial, *numbers,
        False, LEFT, PLAIN, CAPPED, BN, BD, BV, PART, EVEN_D, EVEN_V, PRECISION, BOXED,
    )  # fmt: skip
    acc, top, total = _along(
        acc, top, total, *given, partial, end, *numbers,
        True, LEFT, PLAIN, CAPPED, BN, BD, BV, PART, EVEN_D, EVEN_V, PRECISION, BOXED,
    )  # fmt: skip
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        higher = tl.maximum(top, sink)
        less = tl.exp2(top - higher)
        total = total * less + tl.exp2(sink - higher)
        acc = acc * less[:, None]
        top = higher
    safe = tl.where(top == -INF, 0.0, top)
    acc = acc * (gain / tl.where(total == 0, 1.0, total))[:, None]
    tl.store(lse + row, tl.where(total == 0, -INF, (safe + tl.log2(total)) * LN2), i < Lq)
    if BOXED:
        y.store([item, head, tile * BM, 0], acc.to(y.dtype).reshape(1, 1, BM, BV))
    else:
        d = tl.arange(0, BV)[None, :]
        at = y + n * y_n + h * y_h + i.to(tl.int64)[:, None] * y_l + d
        tl.store(at, acc.to(y.dtype.element_ty), (i < Lq)[:, None] & (d < DV))
