"""A layer's step of decoding before its attention, in one launch: q and k turned by their places, k and v put into a cache.
A row is a head of a token. Bound by memory."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._kv_append import home_of, place_of, put_rows
from .rotary import turn_rows

BUDGETS = {
    # A row has an address of its own, and lanes may have one element each.
    "_rotary_append_kernel": Budget(registers=255, blocks=2, narrow="loads, stores"),
}


@triton.jit
def _angles(cos, sin, n, l, place, inside, c_n, c_l, c_f, T, F: tl.constexpr, BF: tl.constexpr, OWN: tl.constexpr):
    """Cosines and sines of rows, (ROWS, BF): 1 and 0 of a token that is left out, NaN past the tables. OWN: each token's."""
    f = tl.arange(0, BF)[None, :].to(tl.int64)
    at = (n * c_n + l * c_l if OWN else place * c_l) + f * c_f
    known = inside & (f < F)
    if not OWN:
        known = known & (place >= 0) & (place < T)
    c = tl.load(cos + at, known, other=float("nan")).to(tl.float32)
    s = tl.load(sin + at, known, other=float("nan")).to(tl.float32)
    if not OWN:
        c = tl.where(place < 0, 1.0, c)
        s = tl.where(place < 0, 0.0, s)
    return c, s


@triton.jit
def _rotary_append_kernel(
    q, k, v, u, y, z, cos, sin, positions, table, blocks, MQ, M, HQ, H, L, D, DV, capacity, pages, T,
    q_n, q_h, q_l, q_d, k_n, k_h, k_l, k_d, v_n, v_h, v_l, v_d, u_n, u_h, u_l, u_d, y_n, y_h, y_l, y_d, z_n, z_h, z_l, z_d,
    c_n, c_l, c_f, p_n, p_l, t_n, t_b,
    F: tl.constexpr, BF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, OWN: tl.constexpr,
    FIRST: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """u: q turned, by the first ``blocks`` programs; k turned into y, and v into z."""
    pid = tl.program_id(0)
    if pid < blocks:
        row = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = row < MQ
        h, l, n = row % HQ, row // HQ % L, row // HQ // L
        place = place_of(positions, n, l, inside, p_n, p_l, FIRST)
        c, s = _angles(cos, sin, n, l, place, inside, c_n, c_l, c_f, T, F, BF, OWN)
        turn_rows(
            q + (n * q_n + h * q_h + l * q_l), u + (n * u_n + h * u_h + l * u_l), c, s, inside, q_d, u_d, D, F, BF, REST,
            INTERLEAVED, ROWS,
        )  # fmt: skip
    else:
        row = (pid - blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = row < M
        h, l, n = row % H, row // H % L, row // H // L
        place = place_of(positions, n, l, inside, p_n, p_l, FIRST)
        c, s = _angles(cos, sin, n, l, place, inside, c_n, c_l, c_f, T, F, BF, OWN)
        to, place, known = home_of(place, table, n, inside, capacity, pages, t_n, t_b, PAGE)
        turn_rows(
            k + (n * k_n + h * k_h + l * k_l), y + (to * y_n + h * y_h + place * y_l), c, s, known, k_d, y_d, D, F, BF, REST,
            INTERLEAVED, ROWS,
        )  # fmt: skip
        put_rows(v + (n * v_n + h * v_h + l * v_l), z + (to * z_n + h * z_h + place * z_l), known, v_d, z_d, DV, BV)


APPEND = _configs.rows("rotary_append")


def rotary_append_forward(
    q: Any,
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    cos: Any,
    sin: Any,
    positions: Any,
    table: Any = None,
    *,
    needs: tuple = (),
    interleaved: bool = False,
    empty: Any,
) -> tuple[tuple, dict]:
    (n, heads, length, width), values = k.shape, v.shape[3]
    (pages, _, page, _), blocks = k_cache.shape, 1 if table is None else table.shape[1]
    cos, sin = (cos, sin) if cos.stride() == sin.stride() else (_tile.dense(t, empty) for t in (cos, sin))
    y = empty(q.shape, q.dtype, _tile.order(q))
    pairs, own, first = cos.shape[-1], cos.ndim == 3, positions.ndim == 1
    wide, rest = [_tile.next_power_of_2(max(x, 16)) for x in (pairs, values)], width - 2 * pairs
    entry = APPEND(_tile.device(q), max(2 * wide[0], wide[1]))
    tall = max(1, entry.elements // max(2 * wide[0], wide[1]))
    rows = [n * h * length for h in (q.shape[1], heads)]
    its = [_tile.cdiv(m, tall) for m in rows]
    walks = [step for x in (q, k, v, y, k_cache, v_cache) for step in x.stride()]
    walks += _tile.steps(cos, *((0, 1, 2) if own else (None, 0, 1)))
    walks += [positions.stride(0), 0 if first else positions.stride(1), *((0, 0) if table is None else table.stride())]
    _tile.launch(
        _rotary_append_kernel, (sum(its),), q, k, v, y, k_cache, v_cache, cos, sin, positions, table,
        its[0], *rows, q.shape[1], heads, length, width, values, page * blocks, pages, length if own else cos.shape[0],
        *walks, F=pairs, BF=wide[0], REST=_tile.next_power_of_2(rest) if rest else 0, INTERLEAVED=interleaved, OWN=own,
        FIRST=first, PAGE=1 if table is None else page, ROWS=tall, BV=wide[1], num_warps=entry.warps,
    )  # fmt: skip
    return (y,), {}
