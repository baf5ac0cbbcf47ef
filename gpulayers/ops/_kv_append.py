"""New keys and values written into a cache, whole or in pages."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, namespace, up
from gpulayers.definition import ArgumentError, LabelError, Rule, ShapeError
from gpulayers.ops._attention_decode import require_cache, require_lengths
from gpulayers.ops._op import Op, require_float, require_shape


def kv_append_rule(
    k_cache: Spec,
    v_cache: Spec,
    k: Spec,
    v: Spec,
    positions: Spec,
    table: Spec | None = None,
    *,
    needs: tuple = (),
) -> Rule:
    require_float("k_cache", k_cache)
    if k.ndim != 4:
        raise ShapeError("k", "k.shape = [N, Hk, L, D]", list(k.shape))
    n, heads, length, _ = k.shape
    whole = require_cache(n, k_cache, v_cache, table)
    for name, cache, x in (("k", whole[0], k), ("v", whole[1], v)):
        if x.dtype != cache.dtype or cache.dtype != k_cache.dtype:
            raise ShapeError(name, f"{name}.dtype = k_cache.dtype = v_cache.dtype", f"{x.dtype} with {cache.dtype}")
        require_shape(f"{name}_cache", cache, (n, heads, whole[0].shape[2], cache.shape[3]), "[N, Hk, capacity, width]")
        require_shape(name, x, (n, heads, length, cache.shape[3]), f"{name}.shape = [N, Hk, L, width]")
    require_lengths("positions", positions, (n,), (n, length))
    return Rule({})


def kv_append_forward(
    k_cache: Any, v_cache: Any, k: Any, v: Any, positions: Any, table: Any = None, *, needs: tuple = ()
) -> tuple[tuple, dict]:
    """Writes new tokens' keys and values into a cache, where it lies.

    k_cache, v_cache: (N, Hk, capacity, D) and (N, Hk, capacity, Dv), in any strides; or in pages, (pages, Hk, page size, D)
    and (pages, Hk, page size, Dv), with table: (N, blocks) int32 or int64, the pages of each sequence in order. k, v:
    (N, Hk, L, D) and (N, Hk, L, Dv), of the caches' dtype. positions: int32 or int64, (N,), the place of each sequence's
    first new token, those after it following; or (N, L), each token's place, all of them different. A token whose place
    is negative is left out.

    Updates k_cache and v_cache; returns nothing. On the CPU a place or page out of range raises; on a GPU such a token is
    left out.
    """
    xp, heads = namespace(k), k.shape[1]
    at, inside = places(k_cache, k, positions, table)
    (rows, _, size, _), tokens = k_cache.shape, at.size
    n = xp.arange(k.shape[0])[:, None]
    if table is not None and table.shape[1]:
        n, at = table[n, xp.clip(at // size, 0, table.shape[1] - 1)], at % size
    came = xp.full((rows * size + 1,), -1)  # the token of each place, and in the last those that are left out
    came[xp.where(inside, n * size + at, rows * size).reshape(-1)] = xp.arange(tokens)
    came = came[:-1]
    for cache, x in ((k_cache, k), (v_cache, v)):
        if tokens:
            new = xp.take(x.swapaxes(1, 2).reshape(tokens, heads, x.shape[3]), xp.clip(came, 0, tokens), 0)
            new = new.reshape(rows, size, heads, x.shape[3]).swapaxes(1, 2)
            found = xp.where((came >= 0).reshape(rows, 1, size, 1), up(new), up(cache))
            cache[...] = found.astype(cache.dtype)
    return (), {}


def places(cache: Any, k: Any, positions: Any, table: Any) -> tuple[Any, Any]:
    """((N, L) the tokens' places, whether each is in the cache)."""
    xp, (n, _, length, _) = namespace(k), k.shape
    at = positions if positions.ndim == 2 else positions[:, None] + xp.arange(length)[None, :]
    if table is None:
        return at, (at >= 0) & (at < cache.shape[2])
    size, blocks = cache.shape[2], table.shape[1]
    inside = (at >= 0) & (at < blocks * size)
    if blocks == 0:
        return at, inside
    page = table[xp.arange(n)[:, None], xp.clip(at // size, 0, blocks - 1)]
    return at, inside & (page >= 0) & (page < cache.shape[0])


def check_places(k_cache: Any, v_cache: Any, k: Any, v: Any, positions: Any, table: Any = None, **_: Any) -> None:
    at, inside = places(k_cache, k, positions, table)
    wrong = (at >= 0) & ~inside
    if bool(wrong.any()):
        capacity = k_cache.shape[2] * (1 if table is None else table.shape[1])
        place = int(at[wrong][0])
        if place >= capacity:
            raise ArgumentError("positions", f"place < {capacity}, the capacity", place)
        raise LabelError("table", f"0 ≤ page < {k_cache.shape[0]}, for every token's block", f"none for place {place}")


kv_append = Op(
    kv_append_rule, kv_append_forward, updates=("k_cache", "v_cache"), check=check_places, family="attention"
)
