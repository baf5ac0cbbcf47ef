"""Attention of a few new queries to a cache of keys and values, whole or in pages."""

from __future__ import annotations

import math
from typing import Any

from gpulayers.arrays import Spec, float32, namespace, up
from gpulayers.definition import ArgumentError, KindError, LabelError, Rule, ShapeError
from gpulayers.kernels._attention import order_of_y
from gpulayers.ops._attention import (
    CORNERS,
    INTEGERS,
    arranged_as,
    over_groups,
    products,
    require_groups,
    require_options,
    weighed,
    xp_scalar,
)
from gpulayers.ops._op import Op, require_float, require_shape


def require_cache(n: Any, k: Spec, v: Spec, table: Spec | None) -> tuple[Spec, Spec]:
    """(k, v) as (N, Hk, capacity, D) and (N, Hk, capacity, Dv), whether they are whole or in pages."""
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4:
            rule = "[N, Hk, capacity, width], or [pages, Hk, page size, width] with a table"
            raise ShapeError(name, f"{name}.shape = {rule}", list(x.shape))
    if table is None:
        return k, v
    if table.dtype not in INTEGERS:
        raise KindError("table", "dtype ∈ {int32, int64}", table.dtype)
    if table.ndim != 2 or (None not in (n, table.shape[0]) and table.shape[0] != n):
        raise ShapeError("table", f"table.shape = [N, blocks] = [{n}, blocks]", list(table.shape))
    if k.shape[2] == 0 or k.shape[0] != v.shape[0]:
        raise ShapeError("v", "pages of k and v are as many, and hold a token at least", [k.shape[0], v.shape[0]])
    blocks, size = table.shape[1], k.shape[2]
    capacity = None if None in (blocks, size) else blocks * size
    return tuple(x._replace(shape=(n, x.shape[1], capacity, x.shape[3])) for x in (k, v))  # type: ignore[return-value]


def require_lengths(name: str, x: Spec, *shapes: tuple) -> None:
    """Integers, one for each sequence (or token)."""
    if x.dtype not in INTEGERS:
        raise KindError(name, "dtype ∈ {int32, int64}", x.dtype)
    if x.ndim not in map(len, shapes):
        raise ShapeError(name, f"{name}.shape = {' or '.join(map(str, map(list, shapes)))}", list(x.shape))
    wanted = next(s for s in shapes if len(s) == x.ndim)
    require_shape(name, x, wanted, f"{name}.shape")


def attention_decode_rule(
    q: Spec,
    k: Spec,
    v: Spec,
    lengths: Spec | None = None,
    table: Spec | None = None,
    sinks: Spec | None = None,
    *,
    needs: tuple = (),
    causal: bool = True,
    window: tuple = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
) -> Rule:
    require_float("q", q)
    if q.ndim != 4:
        raise ShapeError("q", "q.shape = [N, Hq, Lq, D]", list(q.shape))
    n, heads, rows, _ = q.shape
    require_groups(q, *require_cache(n, k, v, table))
    for name, other in (("k", k), ("v", v), ("sinks", sinks)):
        if other is not None and other.dtype != q.dtype:
            raise ShapeError(name, f"{name}.dtype = q.dtype", f"{name} {other.dtype} with q {q.dtype}")
    if lengths is not None:
        require_lengths("lengths", lengths, (n,))
    if sinks is not None:
        require_shape("sinks", sinks, (heads,), "sinks.shape = [Hq]")
    options = require_options(causal, window, CORNERS[1], scale, softcap)
    y = Spec((n, heads, rows, v.shape[3]), q.dtype, order_of_y(q.order, q.contiguous))
    lse = Spec((n, heads, rows), float32 if q.dtype.itemsize < 4 else q.dtype)
    return Rule({"y": y, "lse": lse}, {}, {k: v for k, v in options.items() if k != "corner"})


def attention_decode_forward(
    q: Any,
    k: Any,
    v: Any,
    lengths: Any = None,
    table: Any = None,
    sinks: Any = None,
    *,
    needs: tuple = (),
    causal: bool = True,
    window: tuple = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[tuple, dict]:
    """Attention of the last Lq tokens of each sequence to its cache: y = softmax(cap(scale · q kᵀ)) v, for inference.

    q: (N, Hq, Lq, D), float: the queries of the sequences' last Lq tokens, whose keys are in the cache already.
    k, v: the cache, of q's dtype and in any strides: (N, Hk, capacity, D) and (N, Hk, capacity, Dv); or in pages, (pages,
    Hk, page size, D) and (pages, Hk, page size, Dv), with table: (N, blocks) int32 or int64, the pages of each sequence in
    order. Pages have any size, and sequences may share them. lengths: (N,) int32 or int64, how many tokens each sequence
    has (0 to capacity, all of it by default); what lies behind them is not read.

    Hq is a multiple of Hk: neighbouring heads of q share a head of the cache. causal: a query sees the tokens up to its
    own. window (left, right): from so many before to so many behind its own (-1: no limit). scale: D^(-1/2) by default.
    softcap: scores s become c · tanh(s / c); 0 for none. sinks: (Hq,), a score for each head that joins the softmax's sum
    and has no value.

    Returns y: (N, Hq, Lq, Dv), in q's memory order, and lse: (N, Hq, Lq), float32 (float64 for float64). A query that
    sees no token has y = 0 and lse = −∞. Nothing here has a gradient. On the CPU a length or page out of range raises; on
    a GPU lengths are cut to the capacity, and a page that is not there makes NaN.

    Sources: Pope et al., "Efficiently scaling transformer inference" (2022), for the cache; Dao et al., "Flash-Decoding"
    (2023), for keys shared out; Kwon et al., "PagedAttention" (2023), for pages.
    """
    xp, rows = namespace(q), q.shape[2]
    (k, known), (v, _) = in_order(k, table), in_order(v, table)
    capacity = k.shape[2]
    j = xp.arange(capacity)[None, None, None, :]
    length = capacity if lengths is None else xp.clip(lengths, 0, capacity)[:, None, None, None]
    own = length - rows + xp.arange(rows)[None, None, :, None]
    seen = j < length
    if window[0] >= 0:
        seen = seen & (j >= own - window[0])
    right = 0 if causal else window[1]
    if right >= 0:
        seen = seen & (j <= own + right)
    s, _ = products(q, k, scale, softcap)
    there = j < length
    if known is not None:
        s = xp.where(known[:, None, None, :], s, xp_scalar(s, math.nan))
        there = there & known[:, None, None, :]
    weights, lse = weighed(xp.where(seen, s, xp_scalar(s, -math.inf)), sinks)
    values = up(v)
    values = xp.where(there.swapaxes(2, 3), values, xp_scalar(values, 0))
    return (arranged_as(q, over_groups(weights, values)), lse), {}


def in_order(x: Any, table: Any) -> tuple[Any, Any]:
    """(x: (N, Hk, capacity, width), (N, capacity) bool: whether the page is there; None where there are no pages)."""
    if table is None:
        return x, None
    xp, (n, blocks), (pages, heads, size, width) = namespace(x), table.shape, x.shape
    known = xp.repeat((table >= 0) & (table < pages), size, 1)
    if pages == 0:
        return xp.zeros((n, heads, blocks * size, width), x.dtype), known
    found = xp.take(x, xp.clip(table, 0, pages - 1), 0)
    return found.transpose(0, 2, 1, 3, 4).reshape(n, heads, blocks * size, width), known


def require_within(lengths: Any, table: Any, capacity: int, size: int, pages: int, low: Any) -> None:
    """The data of lengths, and of the pages from the tokens ``low`` (N,) on: what is there."""
    if lengths.size == 0:
        return
    if int(lengths.min()) < 0 or int(lengths.max()) > capacity:
        wrong = int(lengths.min() if int(lengths.min()) < 0 else lengths.max())
        raise ArgumentError("lengths", f"0 ≤ length ≤ {capacity}, the capacity", wrong)
    if table is None:
        return
    first = namespace(table).arange(table.shape[1])[None, :] * size
    used = (first < lengths[:, None]) & (first + size > low[:, None])
    wrong = used & ((table < 0) | (table >= pages))
    if bool(wrong.any()):
        raise LabelError("table", f"0 ≤ page < {pages}, for every block that is used", int(table[wrong][0]))


def _check(
    q: Any, k: Any, v: Any, lengths: Any = None, table: Any = None, sinks: Any = None, *, window: tuple = (-1, -1), **_: Any
) -> None:  # fmt: skip
    xp, size = namespace(q), k.shape[2]
    capacity = size if table is None else table.shape[1] * size
    ends = xp.full((q.shape[0],), capacity) if lengths is None else lengths
    low = ends - q.shape[2] - window[0] if window[0] >= 0 else xp.zeros_like(ends)
    require_within(ends, table, capacity, size, k.shape[0], low)


attention_decode = Op(attention_decode_rule, attention_decode_forward, check=_check, family="attention")
