"""Rotary position embeddings of new tokens, whose keys and values go into a cache at once: a layer's step of decoding."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, compute_dtype, namespace, spec
from gpulayers.definition import LabelError, Rule
from gpulayers.ops._kv_append import check_places, kv_append_forward, kv_append_rule, places
from gpulayers.ops._op import Op
from gpulayers.ops.rotary import rotary_rule, turned


def rotary_append_rule(
    q: Spec,
    k: Spec,
    v: Spec,
    k_cache: Spec,
    v_cache: Spec,
    cos: Spec,
    sin: Spec,
    positions: Spec,
    table: Spec | None = None,
    *,
    needs: tuple = (),
    interleaved: bool = False,
) -> Rule:
    kv_append_rule(k_cache, v_cache, k, v, positions, table)
    of_places = Spec((q.shape[0], q.shape[2]), positions.dtype) if q.ndim == 4 and cos.ndim == 2 else None
    return Rule({"y": rotary_rule(q, cos, sin, k, of_places, interleaved=interleaved).outputs["y"]})


def _rows(table: Any, at: Any, kind: Any, alone: float) -> Any:
    """(N or 1, 1, L, pairs): each token's row of a table; ``alone`` for those left out, NaN past the table."""
    xp = namespace(table)
    if table.ndim == 3:
        return table.astype(kind)[:, None]
    if not table.shape[0]:
        return xp.full((*at.shape, table.shape[1]), xp.nan, kind)[:, None]
    rows = xp.take(table, xp.clip(at, 0, table.shape[0] - 1), 0).astype(kind)
    rows = xp.where((at < table.shape[0])[..., None], rows, xp.full((), xp.nan, kind))
    return xp.where((at < 0)[..., None], xp.full((), alone, kind), rows)[:, None]


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
) -> tuple[tuple, dict]:
    """``rotary`` of new tokens' q and k, each by its place, and ``kv_append`` of k and v: one launch.

    q: (N, H, L, D), k: (N, Hk, L, D), v: (N, Hk, L, Dv). k_cache, v_cache, positions, table: as kv_append takes them. cos, sin:
    (P, pairs), by the token's place in its sequence, or (N or 1, L, pairs), each token's own; interleaved: as ``rotary`` takes
    them. A token whose place is negative is left out of the cache, and not turned where the tables go by places.

    Updates k_cache and v_cache; returns y, q turned. Raises LabelError for a place past the tables on the CPU; on a GPU it
    makes NaN.
    """
    at, kind = places(k_cache, k, positions, table)[0], compute_dtype(q.dtype)
    c, s = _rows(cos, at, kind, 1.0), _rows(sin, at, kind, 0.0)
    y, z = (turned(x, c, s, interleaved, spec(x)) for x in (q, k))
    kv_append_forward(k_cache, v_cache, z, v, positions, table)
    return (y,), {}


def _check(
    q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, cos: Any, sin: Any, positions: Any, table: Any = None, **_: Any
) -> None:
    check_places(k_cache, v_cache, k, v, positions, table)
    at = places(k_cache, k, positions, table)[0]
    if cos.ndim == 2 and at.size and int(at.max()) >= cos.shape[0]:
        raise LabelError("positions", f"place < cos.shape[0] = {cos.shape[0]}", int(at.max()))


rotary_append = Op(
    rotary_append_rule, rotary_append_forward, updates=("k_cache", "v_cache"), check=_check, family="attention"
)
