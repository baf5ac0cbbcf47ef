"""Attention backward, without atomics: a program for a tile of keys sums dk and dv over the queries of its group's heads,
one for a tile of queries sums dq over their keys; both compute the weights again from lse."""

from __future__ import annotations

import triton
import triton.language as tl

from .._budget import Budget
from ._attention import INF, LOG2E, in_parts, kept, narrow, rows, scored, span, stretch

BUDGETS = {
    "_attention_delta_kernel": Budget(registers=128, blocks=2),
    "_attention_keys_kernel": Budget(registers=255, blocks=1, narrow=narrow),
    "_attention_queries_kernel": Budget(registers=255, blocks=1, narrow=narrow),
}


@triton.jit
def _attention_delta_kernel(
    y, dy, dlse, lse, sinks, tops, delta, parts, Hq, Lq, line, DV, y_n, y_h, y_l, dy_n, dy_h, dy_l, dl_n, dl_h, dl_l,
    BM: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Of a tile of queries, (N, Hq, line) each: delta = Σ dy y − dlse, and tops: lse in units of log 2, ∞ where a query sees
    nothing, so that its weights are 0. parts: their part of −Σ exp(sink − lse) · delta, (N · tiles, Hq)."""
    tiles = tl.cdiv(Lq, BM)
    pid = tl.program_id(0)
    head = pid // tiles % Hq
    n = (pid // tiles // Hq).to(tl.int64)
    h = head.to(tl.int64)
    i = pid % tiles * BM + tl.arange(0, BM)
    row = (n * Hq + h) * Lq + i
    there = i < Lq
    found = tl.zeros((BM,), tl.float32)
    if dy is not None:
        d = tl.arange(0, BV)[None, :]
        a = rows(y + n * y_n + h * y_h, i, y_l, Lq, d, DV, False, False)
        b = rows(dy + n * dy_n + h * dy_h, i, dy_l, Lq, d, DV, False, False)
        found += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    if dlse is not None:
        found -= tl.load(dlse + n * dl_n + h * dl_h + i.to(tl.int64) * dl_l, there, other=0.0)
    to = (n * Hq + h) * line + i
    tl.store(delta + to, found, i < line)
    at = tl.load(lse + row, there, other=-INF)
    tl.store(tops + to, tl.where(at == -INF, INF, at * LOG2E), i < line)
    if parts is not None:
        share = tl.where(at == -INF, 0.0, tl.exp2((tl.load(sinks + head).to(tl.float32) - at) * LOG2E))
        tl.store(parts + (n * tiles + pid % tiles) * Hq + head, -tl.sum(share * found))


@triton.jit
def weights(
    dot, bias, top, i, j, place, low, high, Lq, Lk, b_i, b_j, scale, softcap,
    MASKED: tl.constexpr, LEFT: tl.constexpr, CAPPED: tl.constexpr, ALONG_QUERIES: tl.constexpr,
):  # fmt: skip
    """(the softmax's weights, the cap's slope); top: (BM,) of the queries. MASKED: columns see the places below high (rows, 1),
    LEFT: from low on."""
    if bias is None and not CAPPED:  # one multiplication and addition an element
        s, slope = dot * (scale * LOG2E), 1.0
    else:
        s, slope = scored(dot, bias, i, j, Lq, Lk, b_i, b_j, scale, softcap, CAPPED)
    if ALONG_QUERIES:
        w = tl.exp2(s - top[None, :])
    else:
        w = tl.exp2(s - top[:, None])
    if MASKED:
        seen = place < high
        if LEFT:
            seen &= place >= low
        w = tl.where(seen, w, 0.0)
    return w, slope


@triton.jit
def _along_queries(
    dk, dv, key, value, q, k, v, bias, seed, dy, tops, delta, row, j0, j, low, high, n, h, start, stop, group, Lq, line, Lk, D, DV,
    q_h, q_l, k_l, v_l, b_h, b_i, b_j, dy_h, dy_l, scale, softcap, quarters, threshold, gain,
    MASKED: tl.constexpr, LEFT: tl.constexpr, CAPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PART: tl.constexpr, EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, PRECISION: tl.constexpr, BOXED: tl.constexpr,
):  # fmt: skip
    """(dk, dv) of keys j with the queries of a group's heads from start to stop, one head after the other: one loop, since
    sums that are carried through two would leave their registers. q, bias, dy, row: the first head's."""
    steps = group * tl.cdiv(stop - start, BM)
    its_head = start * 0
    first = start
    for _ in range(0, steps):
        head = its_head.to(tl.int64)
        i = first + tl.arange(0, BM)
        at = row + head * line + i
        its = bias
        if bias is not None:
            its = bias + head * b_h
        if BOXED:
            query = q.load([n, h + its_head, first, 0]).reshape(BM, BD)
        else:
            query = rows(q + head * q_h, i, q_l, Lq, tl.arange(0, BD)[None, :], D, not MASKED, EVEN_D)
        if PART == BD:
            dot = tl.dot(key, query.T, input_precision=PRECISION)
        else:
            dot = in_parts(k, j, k_l, Lk, q + head * q_h, i, q_l, Lq, D, BN, BM, BD, PART, PRECISION)
        if BOXED:
            top, less = tops.load([row + its_head, first]).reshape(BM), delta.load([row + its_head, first]).reshape(BM)
        elif MASKED:
            top, less = tl.load(tops + at, i < Lq, other=INF), tl.load(delta + at, i < Lq, other=0.0)
        else:
            top, less = tl.load(tops + at), tl.load(delta + at)
        w, slope = weights(
            dot, its, top, i[None, :], j[:, None], tl.arange(0, BM)[None, :], (low - first)[:, None], (high - first)[:, None],
            Lq, Lk, b_i, b_j, scale, softcap, MASKED, LEFT, CAPPED, True,
        )  # fmt: skip
        dw = tl.zeros((BN, BM), tl.float32)
        if dy is not None:
            if BOXED:
                grad = dy.load([n, h + its_head, first, 0]).reshape(BM, BV)
            else:
                grad = rows(dy + head * dy_h, i, dy_l, Lq, tl.arange(0, BV)[None, :], DV, not MASKED, EVEN_V)
            if PART == BD:
                dw = tl.dot(value, grad.T, input_precision=PRECISION)
            else:
                dw = in_parts(v, j, v_l, Lk, dy + head * dy_h, i, dy_l, Lq, DV, BN, BM, BV, PART, PRECISION)
            given = w
            if seed is not None:
                here = kept(seed, at, quarters, j0, threshold, BN).T
                given = tl.where(here, w, 0.0)
                dw = tl.where(here, dw * gain, 0.0)
            dv = tl.dot(given.to(grad.dtype), grad, dv, input_precision=PRECISION)
        ds = w * (dw - less[None, :]) * slope
        dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=PRECISION)
        first += BM
        its_head += (first >= stop).to(tl.int32)
        first = tl.where(first >= stop, start, first)
    return dk, dv


@triton.jit
def _attention_keys_kernel(
    q, k, v, bias, seed, cu_q, cu_k, dy, tops, delta, dk, dv, Hq, Lq, line, Lk, D, DV, group, sequences, depth,
    q_n, q_h, q_l, k_n, k_h, k_l, v_n, v_h, v_l, b_n, b_h, b_i, b_j, dy_n, dy_h, dy_l,
    dk_n, dk_h, dk_l, dv_n, dv_h, dv_l, scale, softcap, before, after, quarters, threshold, gain,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, BOTTOM: tl.constexpr, CAPPED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PART: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, PRECISION: tl.constexpr, BOXED: tl.constexpr,
):  # fmt: skip
    """line: from one head's tops and delta to the next one's; Lq where there is dropout, whose draws are counted by it."""
    tiles = tl.cdiv(Lk, BN)
    pid = tl.program_id(0)
    groups = Hq // group
    item = pid // tiles // groups
    g = pid // tiles % groups
    n = item.to(tl.int64)
    h = g.to(tl.int64)
    j0 = pid % tiles * BN
    j = j0 + tl.arange(0, BN)
    low, high = span(j, Lk, Lq, cu_k, cu_q, sequences, depth, after, before, AFTER, BEFORE, BOTTOM)
    first, whole, partial, end = stretch(low, high, BM)
    d, dd = tl.arange(0, BD)[None, :], tl.arange(0, BV)[None, :]
    key, value = 0, 0
    if BOXED:
        key = k.load([item, g, j0, 0]).reshape(BN, BD)
        value = v.load([item, g, j0, 0]).reshape(BN, BV)
    else:
        k += n * k_n + h * k_h
        v += n * v_n + h * v_h
    if not BOXED and PART == BD:
        key = rows(k, j, k_l, Lk, d, D, False, EVEN_D)
        value = rows(v, j, v_l, Lk, dd, DV, False, EVEN_V)
    sum_k = tl.zeros((BN, BD), tl.float32)
    sum_v = tl.zeros((BN, BV), tl.float32)
    head = h * group
    if not BOXED:
        q += n * q_n + head * q_h
    if bias is not None:
        bias += n * b_n + head * b_h
    if dy is not None and not BOXED:
        dy += n * dy_n + head * dy_h
    row = item * Hq + g * group if BOXED else (n * Hq + head) * line
    given = (key, value, q, k, v, bias, seed, dy, tops, delta, row, j0, j, low, high, item, g * group)
    numbers = (
        group, Lq, line, Lk, D, DV, q_h, q_l, k_l, v_l, b_h, b_i, b_j, dy_h, dy_l, scale, softcap, quarters, threshold, gain
    )  # fmt: skip
    LEFT: tl.constexpr = AFTER or cu_q is not None
    if LEFT:
        sum_k, sum_v = _along_queries(
            sum_k, sum_v, *given, first, whole, *numbers,
            True, LEFT, CAPPED, BM, BN, BD, BV, PART, EVEN_D, EVEN_V, PRECISION, BOXED,
        )  # fmt: skip
    sum_k, sum_v = _along_queries(
        sum_k, sum_v, *given, whole, partial, *numbers,
        False, LEFT, CAPPED, BM, BN, BD, BV, PART, EVEN_D, EVEN_V, PRECISION, BOXED,
    )  # fmt: skip
    sum_k, sum_v = _along_queries(
        sum_k, sum_v, *given, partial, end, *numbers,
        True, LEFT, CAPPED, BM, BN, BD, BV, PART, EVEN_D, EVEN_V, PRECISION, BOXED,
    )  # fmt: skip
    there = (j < Lk)[:, None]
    at = j.to(tl.int64)[:, None]
    if dk is not None:
        dk += n * dk_n + h * dk_h
        tl.store(dk + at * dk_l + d, (sum_k * scale).to(dk.dtype.element_ty), there & (d < D))
    if dv is not None:
        dv += n * dv_n + h * dv_h
        tl.store(dv + at * dv_l + dd, (sum_v * gain).to(dv.dtype.element_ty), there & (dd < DV))


@triton.jit
def _along_keys(
    dq, query, grad, q, k, v, bias, seed, dy, top, less, row, i, low, high, n, g, start, stop, Lq, Lk, D, DV,
    q_l, k_l, v_l, b_i, b_j, dy_l, scale, softcap, quarters, threshold, gain,
    MASKED: tl.constexpr, LEFT: tl.constexpr, CAPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PART: tl.constexpr, EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, PRECISION: tl.constexpr, BOXED: tl.constexpr,
):  # fmt: skip
    """dq of queries i with the keys from start to stop."""
    for first in range(start, stop, BN):
        j = first + tl.arange(0, BN)
        if BOXED:
            key = k.load([n, g, first, 0]).reshape(BN, BD)
        else:
            key = rows(k, j, k_l, Lk, tl.arange(0, BD)[None, :], D, not MASKED, EVEN_D)
        if PART == BD:
            dot = tl.dot(query, key.T, input_precision=PRECISION)
        else:
            dot = in_parts(q, i, q_l, Lq, k, j, k_l, Lk, D, BM, BN, BD, PART, PRECISION)
        dw = tl.zeros((BM, BN), tl.float32)
        if dy is not None:
            if BOXED:
                dw = tl.dot(grad, v.load([n, g, first, 0]).reshape(BN, BV).T)
            elif PART == BD:
                value = rows(v, j, v_l, Lk, tl.arange(0, BV)[None, :], DV, not MASKED, EVEN_V)
                dw = tl.dot(grad, value.T, input_precision=PRECISION)
            else:
                dw = in_parts(dy, i, dy_l, Lq, v, j, v_l, Lk, DV, BM, BN, BV, PART, PRECISION)
        w, slope = weights(
            dot, bias, top, i[:, None], j[None, :], tl.arange(0, BN)[None, :], (low - first)[:, None], (high - first)[:, None],
            Lq, Lk, b_i, b_j, scale, softcap, MASKED, LEFT, CAPPED, False,
        )  # fmt: skip
        if seed is not None:
            dw = tl.where(kept(seed, row, quarters, first, threshold, BN), dw * gain, 0.0)
        ds = w * (dw - less[:, None]) * slope
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _attention_queries_kernel(
    q, k, v, bias, seed, cu_q, cu_k, dy, tops, delta, dq, Hq, Lq, Lk, D, DV, group, sequences, depth,
    q_n, q_h, q_l, k_n, k_h, k_l, v_n, v_h, v_l, b_n, b_h, b_i, b_j, dy_n, dy_h, dy_l, dq_n, dq_h, dq_l,
    scale, softcap, before, after, quarters, threshold, gain,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, BOTTOM: tl.constexpr, CAPPED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PART: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, PRECISION: tl.constexpr, BOXED: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(Lq, BM)
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles if AFTER else pid % tiles  # under a diagonal the last tiles have most to do
    item = pid // tiles // Hq
    head = pid // tiles % Hq
    n = item.to(tl.int64)
    h = head.to(tl.int64)
    if not BOXED:
        q += n * q_n + h * q_h
        k += n * k_n + h // group * k_h
        v += n * v_n + h // group * v_h
    if dy is not None and not BOXED:
        dy += n * dy_n + h * dy_h
    if bias is not None:
        bias += n * b_n + h * b_h
    i = tile * BM + tl.arange(0, BM)
    row = (n * Hq + h) * Lq + i
    low, high = span(i, Lq, Lk, cu_q, cu_k, sequences, depth, before, after, BEFORE, AFTER, BOTTOM)
    first, whole, partial, end = stretch(low, high, BN)
    d = tl.arange(0, BD)[None, :]
    query, grad = 0, 0
    if BOXED:
        query = q.load([item, head, tile * BM, 0]).reshape(BM, BD)
    elif PART == BD:
        query = rows(q, i, q_l, Lq, d, D, False, EVEN_D)
    if BOXED and dy is not None:
        grad = dy.load([item, head, tile * BM, 0]).reshape(BM, BV)
    elif PART == BD and dy is not None:
        grad = rows(dy, i, dy_l, Lq, tl.arange(0, BV)[None, :], DV, False, EVEN_V)
    if BOXED:
        top = tops.load([item * Hq + head, tile * BM]).reshape(BM)
        less = delta.load([item * Hq + head, tile * BM]).reshape(BM)
    else:
        top, less = tl.load(tops + row, i < Lq, other=INF), tl.load(delta + row, i < Lq, other=0.0)
    sum_q = tl.zeros((BM, BD), tl.float32)
    given = (query, grad, q, k, v, bias, seed, dy, top, less, row, i, low, high, item, head // group)
    numbers = (Lq, Lk, D, DV, q_l, k_l, v_l, b_i, b_j, dy_l, scale, softcap, quarters, threshold, gain)
    LEFT: tl.constexpr = BEFORE or cu_q is not None
    if LEFT:
        sum_q = _along_keys(
            sum_q, *given, first, whole, *numbers,
            True, LEFT, CAPPED, BM, BN, BD, BV, PART, EVEN_D, EVEN_V, PRECISION, BOXED,
        )  # fmt: skip
    sum_q = _along_keys(
        sum_q, *given, whole, partial, *numbers,
        False, LEFT, CAPPED, BM, BN, BD, BV, PART, EVEN_D, EVEN_V, PRECISION, BOXED,
    )  # fmt: skip
    sum_q = _along_keys(
        sum_q, *given, partial, end, *numbers,
        True, LEFT, CAPPED, BM, BN, BD, BV, PART, EVEN_D, EVEN_V, PRECISION, BOXED,
    )  # fmt: skip
    dq += n * dq_n + h * dq_h
    at = dq + i.to(tl.int64)[:, None] * dq_l + d
    tl.store(at, (sum_q * scale).to(dq.dtype.element_ty), (i < Lq)[:, None] & (d < D))
