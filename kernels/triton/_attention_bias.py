"""The gradient of attention's bias: the scores' own, summed where the bias was repeated, without atomics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _matmul, _tile
from ._attention import INF, in_parts, kept, rows, span
from ._attention_backward import weights

BUDGETS = {
    # Rows of a bias whose length 16 does not divide.
    "_attention_bias_kernel": Budget(registers=255, blocks=1, narrow="stores"),
}


@triton.jit
def _attention_bias_kernel(
    q, k, v, bias, seed, cu_q, cu_k, dy, tops, delta, db, Hq, Lq, Lk, D, DV, group, sequences, depth,
    q_n, q_h, q_l, k_n, k_h, k_l, v_n, v_h, v_l, b_n, b_h, b_i, b_j, dy_n, dy_h, dy_l,
    scale, softcap, before, after, quarters, threshold, gain, N, heads, high, wide, over_h, over_i, over_j, each, total,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, BOTTOM: tl.constexpr, CAPPED: tl.constexpr, SUM_I: tl.constexpr,
    SUM_J: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PART: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of db (N, heads, high, wide), or the part of its sum that ``each`` of the ``total`` tiles of scores make that
    lie over it: over_h, over_i, over_j of them along heads, queries and keys (1 where the bias is not repeated)."""
    tiles_i, tiles_j = tl.cdiv(high, BM), tl.cdiv(wide, BN)
    pid = tl.program_id(0)
    tile_j = pid % tiles_j
    tile_i = pid // tiles_j % tiles_i
    bias_h = pid // tiles_j // tiles_i % heads
    bias_n = pid // tiles_j // tiles_i // heads % N
    part = pid // tiles_j // tiles_i // heads // N
    acc = tl.zeros((BM, BN), tl.float32)
    for item in range(part * each, tl.minimum((part + 1) * each, total)):
        j0 = (tile_j + item % over_j) * BN
        i0 = (tile_i + item // over_j % over_i) * BM
        head = bias_h + item // over_j // over_i % over_h
        n = (bias_n + item // over_j // over_i // over_h).to(tl.int64)
        h = head.to(tl.int64)
        i, j = i0 + tl.arange(0, BM), j0 + tl.arange(0, BN)
        row = (n * Hq + h) * Lq + i
        low, most = span(i, Lq, Lk, cu_q, cu_k, sequences, depth, before, after, BEFORE, AFTER, BOTTOM)
        left, right = q + n * q_n + h * q_h, k + n * k_n + h // group * k_h
        if PART == BD:
            d = tl.arange(0, BD)[None, :]
            query, key = rows(left, i, q_l, Lq, d, D, False, EVEN_D), rows(right, j, k_l, Lk, d, D, False, EVEN_D)
            dot = tl.dot(query, key.T, input_precision=PRECISION)
        else:
            dot = in_parts(left, i, q_l, Lq, right, j, k_l, Lk, D, BM, BN, BD, PART, PRECISION)
        dw = tl.zeros((BM, BN), tl.float32)
        if dy is not None:
            grad, value = dy + n * dy_n + h * dy_h, v + n * v_n + h // group * v_h
            if PART == BD:
                d = tl.arange(0, BV)[None, :]
                a, b = rows(grad, i, dy_l, Lq, d, DV, False, EVEN_V), rows(value, j, v_l, Lk, d, DV, False, EVEN_V)
                dw = tl.dot(a, b.T, input_precision=PRECISION)
            else:
                dw = in_parts(grad, i, dy_l, Lq, value, j, v_l, Lk, DV, BM, BN, BV, PART, PRECISION)
        top, less = tl.load(tops + row, i < Lq, other=INF), tl.load(delta + row, i < Lq, other=0.0)
        its = bias + n * b_n + h * b_h
        w, _ = weights(
            dot, its, top, i[:, None], j[None, :], j[None, :], low[:, None], most[:, None], Lq, Lk, b_i, b_j, scale, softcap,
            True, True, CAPPED, False,
        )  # fmt: skip
        if seed is not None:
            dw = tl.where(kept(seed, row, quarters, j0, threshold, BN), dw * gain, 0.0)
        acc += w * (dw - less[:, None])
    if SUM_I:
        acc = tl.sum(acc, 0, keep_dims=True)
    if SUM_J:
        acc = tl.sum(acc, 1, keep_dims=True)
    i = tile_i * BM + (tl.arange(0, 1) if SUM_I else tl.arange(0, BM))[:, None]
    j = tile_j * BN + (tl.arange(0, 1) if SUM_J else tl.arange(0, BN))[None, :]
    line = ((part * N + bias_n) * heads + bias_h).to(tl.int64) * high + i
    tl.store(db + line * wide + j, acc.to(db.dtype.element_ty), (i < high) & (j < wide))


def gradient(
    shape: tuple, given: tuple, common: dict[str, Any], tile: dict[str, Any], db: Any, empty: Callable
) -> None:
    """db, row-major, of a bias for scores of this shape (N, Hq, Lq, Lk). given, common, tile: what launches take."""
    sizes = (1,) * (4 - db.ndim) + tuple(db.shape)
    over = [a if b == 1 else 1 for a, b in zip(shape, sizes)]
    over[2:] = [_tile.cdiv(a, tile[block]) for a, block in zip(over[2:], ("BM", "BN"))]
    tiles = sizes[0] * sizes[1] * _tile.cdiv(sizes[2], tile["BM"]) * _tile.cdiv(sizes[3], tile["BN"])
    total = over[0] * over[1] * over[2] * over[3]
    parts, each = _tile.split(total, _tile.device(db).sms // max(tiles, 1))
    parts = max(parts, 1)
    target = db if parts == 1 else empty((parts, sizes[0] * sizes[1] * sizes[2], sizes[3]), "float32")
    _tile.launch(
        _attention_bias_kernel, (tiles * parts,), *given, target, **common,
        N=sizes[0], heads=sizes[1], high=sizes[2], wide=sizes[3], over_h=over[1], over_i=over[2], over_j=over[3],
        each=each, total=total, SUM_I=sizes[2] == 1, SUM_J=sizes[3] == 1, **tile,
    )  # fmt: skip
    if parts > 1:
        _matmul.finish(target, db.view(sizes[0] * sizes[1] * sizes[2], sizes[3]))
