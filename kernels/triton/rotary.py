"""Rotary position embeddings of q and k in one launch: a row is a head of a token. Bound by memory; backward is the same
kernel, which turns the other way."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile

BUDGETS = {
    # Positions are four or eight bytes each, and heads may lie in any strides: then a lane has addresses of its own.
    "_rotary_kernel": Budget(registers=255, blocks=2, narrow="loads, stores"),
}


@triton.jit
def turn_rows(
    x, y, c, s, inside, x_d, y_d, D,
    F: tl.constexpr, BF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y: each row of x by its cosines and sines, (ROWS, BF). x, y, inside: (ROWS, 1)."""
    f = tl.arange(0, BF)[None, :].to(tl.int64)
    mask = inside & (f < F)
    if INTERLEAVED:
        d = tl.arange(0, 2 * BF)[None, :].to(tl.int64)
        both = tl.load(x + d * x_d, inside & (d < 2 * F), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (ROWS, BF, 2)))
        turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (ROWS, 2 * BF))
        tl.store(y + d * y_d, turned.to(y.dtype.element_ty), inside & (d < 2 * F))
    else:
        a = tl.load(x + f * x_d, mask, other=0.0).to(tl.float32)
        b = tl.load(x + (f + F) * x_d, mask, other=0.0).to(tl.float32)
        tl.store(y + f * y_d, (a * c - b * s).to(y.dtype.element_ty), mask)
        tl.store(y + (f + F) * y_d, (b * c + a * s).to(y.dtype.element_ty), mask)
    if REST > 0:
        d = 2 * F + tl.arange(0, REST)[None, :].to(tl.int64)
        tl.store(y + d * y_d, tl.load(x + d * x_d, inside & (d < D)), inside & (d < D))


@triton.jit
def _turn(
    x, y, cos, sin, positions, block, M, H, L, D, x_n, x_h, x_l, x_d, y_n, y_h, y_l, y_d, c_n, c_l, c_f, p_n, p_l, T, sign,
    F: tl.constexpr, BF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block of rows (token, head); of zeros where there is no x."""
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < M
    h, l, n = row % H, row // H % L, row // H // L
    y += n * y_n + h * y_h + l * y_l
    if x is None:
        for start in range(0, D, BF):
            d = start + tl.arange(0, BF)[None, :].to(tl.int64)
            tl.store(y + d * y_d, tl.zeros((ROWS, BF), y.dtype.element_ty), inside & (d < D))
    else:
        x += n * x_n + h * x_h + l * x_l
        place = l
        if positions is not None:
            place = tl.load(positions + n * p_n + l * p_l, inside, other=0).to(tl.int64)
        f = tl.arange(0, BF)[None, :].to(tl.int64)
        mask = inside & (f < F)
        at = n * c_n + place * c_l + f * c_f
        known = mask & (place >= 0) & (place < T)
        c = tl.load(cos + at, known, other=float("nan")).to(tl.float32)
        s = tl.load(sin + at, known, other=float("nan")).to(tl.float32) * sign
        turn_rows(x, y, c, s, inside, x_d, y_d, D, F, BF, REST, INTERLEAVED, ROWS)


@triton.jit
def _rotary_kernel(
    q, y, k, z, cos, sin, positions, blocks, MQ, MK, HQ, HK, L, D,
    q_n, q_h, q_l, q_d, y_n, y_h, y_l, y_d, k_n, k_h, k_l, k_d, z_n, z_h, z_l, z_d, c_n, c_l, c_f, p_n, p_l, T, sign,
    F: tl.constexpr, BF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y and z: q and k turned; the first ``blocks`` programs are q's."""
    pid = tl.program_id(0)
    if y is not None:  # noqa: SIM102
        if pid < blocks:
            _turn(
                q, y, cos, sin, positions, pid, MQ, HQ, L, D, q_n, q_h, q_l, q_d, y_n, y_h, y_l, y_d, c_n, c_l, c_f, p_n,
                p_l, T, sign, F, BF, REST, INTERLEAVED, ROWS,
            )  # fmt: skip
    if z is not None:  # noqa: SIM102
        if pid >= blocks:
            _turn(
                k, z, cos, sin, positions, pid - blocks, MK, HK, L, D, k_n, k_h, k_l, k_d, z_n, z_h, z_l, z_d, c_n, c_l, c_f,
                p_n, p_l, T, sign, F, BF, REST, INTERLEAVED, ROWS,
            )  # fmt: skip


ROTARY = _configs.rows("rotary")


def _launch(xs: list, ys: list, tables: tuple, positions: Any, sign: float, interleaved: bool, empty: Any) -> None:
    """Each y of its x, of zeros where there is none; nothing for no y."""
    cos, sin = tables if tables[0].stride() == tables[1].stride() else (_tile.dense(t, empty) for t in tables)
    like = next(y for y in ys if y is not None)
    n, _, length, dim = like.shape
    pairs, own = cos.shape[-1], cos.ndim == 3
    entry, wide = ROTARY(_tile.device(like), pairs), max(16, _tile.next_power_of_2(pairs))
    tall = max(1, entry.elements // wide)
    heads = [0 if y is None else y.shape[1] for y in ys]
    rows = [n * h * length for h in heads]
    blocks = [_tile.cdiv(m, tall) for m in rows]
    walks = [s for x, y in zip(xs, ys) for s in (*_tile.steps(x, 0, 1, 2, 3), *_tile.steps(y, 0, 1, 2, 3))]
    at = [*_tile.steps(cos, *((0, 1, 2) if own else (None, 0, 1))), *_tile.steps(positions, 0, 1)]
    rest = dim - 2 * pairs
    _tile.launch(
        _rotary_kernel, (sum(blocks),), xs[0], ys[0], xs[1], ys[1], cos, sin, positions, blocks[0], *rows, *heads, length,
        dim, *walks, *at, length if own else cos.shape[0], sign, F=pairs, BF=wide,
        REST=_tile.next_power_of_2(rest) if rest else 0, INTERLEAVED=interleaved, ROWS=tall, num_warps=entry.warps,
    )  # fmt: skip


def rotary_forward(
    q: Any,
    cos: Any,
    sin: Any,
    k: Any = None,
    positions: Any = None,
    *,
    needs: tuple = (),
    interleaved: bool,
    empty: Any,
) -> tuple[tuple, dict]:
    ys = [None if x is None else empty(x.shape, x.dtype, _tile.order(x)) for x in (q, k)]
    _launch([q, k], ys, (cos, sin), positions, 1.0, interleaved, empty)
    saved = {"cos": cos, "sin": sin} | ({} if positions is None else {"positions": positions})
    return tuple(y for y in ys if y is not None), saved if needs else {}


def rotary_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, interleaved: bool, empty: Any) -> tuple:
    of = {"q": inputs[0], "k": inputs[3]}
    grads = [empty(x.shape, x.dtype, x.like().order) if name in needs else None for name, x in of.items()]
    dys = [dy if g is not None else None for dy, g in zip((*dys, None), grads)]
    _launch(dys, grads, (saved["cos"], saved["sin"]), saved.get("positions"), -1.0, interleaved, empty)
    return grads[0], None, None, grads[1], None
