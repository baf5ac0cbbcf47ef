"""What attention's definition is made of: its rules, which pairs of a query and a key take part, dropout's mask."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from gpulayers.arrays import Spec, arranged, namespace, spec, up
from gpulayers.definition import ArgumentError, KindError, ShapeError
from gpulayers.kernels._attention import order_of_y, scale_of
from gpulayers.kernels._dropout import threshold_and_scale
from gpulayers.ops._random import random_bits

CORNERS = ("top_left", "bottom_right")
INTEGERS = (np.dtype("int32"), np.dtype("int64"))


def require_groups(q: Spec, k: Spec, v: Spec) -> None:
    """Shapes of queries, keys and values that fit together."""
    for name, x, rule in (
        ("q", q, "q.shape = [N, Hq, Lq, D]"),
        ("k", k, "k.shape = [N, Hk, Lk, D]"),
        ("v", v, "v.shape = [N, Hk, Lk, Dv]"),
    ):
        if x.ndim != 4:
            raise ShapeError(name, rule, list(x.shape))
    (n, heads, _, width), (_, groups, keys, _) = q.shape, k.shape
    _require_sizes("k", k, (n, groups, keys, width), "k.shape = [N, Hk, Lk, D]")
    _require_sizes("v", v, (n, groups, keys, v.shape[3]), "v.shape = [N, Hk, Lk, Dv]")
    if None not in (heads, groups) and (heads % groups if groups else heads):
        raise ShapeError("q", "Hq is a multiple of Hk", f"Hq = {heads}, Hk = {groups}")


def _require_sizes(name: str, x: Spec, shape: tuple, rule: str) -> None:
    if any(a is not None and b is not None and a != b for a, b in zip(x.shape, shape)):
        raise ShapeError(name, f"{rule} = {list(shape)}", list(x.shape))


def require_sequences(n: Any, cu_q: Spec | None, cu_k: Spec | None) -> None:
    """Where packed sequences begin: for queries and keys, or for neither."""
    if cu_q is None and cu_k is None:
        return
    if cu_q is None or cu_k is None:
        raise ArgumentError("cu_q", "cu_q and cu_k are given, or neither", "one of them")
    for name, x in (("cu_q", cu_q), ("cu_k", cu_k)):
        if x.dtype not in INTEGERS:
            raise KindError(name, "dtype ∈ {int32, int64}", x.dtype)
        if x.ndim != 1 or (x.shape[0] or 2) < 2 or x.shape != cu_q.shape:
            raise ShapeError(name, "cu_q.shape = cu_k.shape = [sequences + 1], one sequence at least", list(x.shape))
    if n not in (1, None):
        raise ShapeError("q", "packed sequences are one batch item: N = 1", f"N = {n}")


def require_options(causal: Any, window: Any, corner: Any, scale: Any, softcap: Any) -> dict[str, Any]:
    """The options in their normal form: causal is a window without keys to the right."""
    if not isinstance(causal, bool):
        raise KindError("causal", "a bool", repr(causal))
    if corner not in CORNERS:
        raise ArgumentError("corner", f"one of {', '.join(CORNERS)}", repr(corner))
    try:
        left, right = map(operator.index, window)
    except (TypeError, ValueError):
        raise KindError("window", "two integers (left, right)", repr(window)) from None
    if left < -1 or right < -1:
        raise ArgumentError("window", "left, right ≥ 0, or -1 for no limit", (left, right))
    for name, value in (("scale", scale), ("softcap", softcap)):
        if isinstance(value, bool) or not (isinstance(value, int | float) or (value is None and name == "scale")):
            raise KindError(name, "a number", repr(value))
    if softcap < 0:
        raise ArgumentError("softcap", "softcap ≥ 0, 0 for none", softcap)
    window = (left, 0 if causal else right)
    return dict(
        causal=False,
        window=window,
        corner=corner if window != (-1, -1) else CORNERS[0],
        scale=None if scale is None else float(scale),
        softcap=float(softcap),
    )


def require_ordered(cu_q: Any, cu_k: Any, rows: int, keys: int) -> None:
    """The data of cu_q and cu_k: they grow, from 0 on, to the end at most."""
    for name, cu, most in (("cu_q", cu_q, rows), ("cu_k", cu_k, keys)):
        if cu is not None and (cu[0] < 0 or (cu[1:] < cu[:-1]).any() or cu[-1] > most):
            raise ArgumentError(name, f"0 ≤ {name}[0] ≤ {name}[1] ≤ … ≤ {most}", list(map(int, cu)))


def allowed(xp: Any, rows: int, keys: int, window: tuple, corner: str, cu_q: Any, cu_k: Any) -> Any:
    """(rows, keys) bool: where a query sees a key. None: everywhere.

    A query sees the keys of its own sequence from ``left`` before to ``right`` behind the diagonal, which ends at the
    sequence's corner.
    """
    left, right = window
    if cu_q is None and left < 0 and right < 0:
        return None
    i, j = xp.arange(rows)[:, None], xp.arange(keys)[None, :]
    if cu_q is None:
        q0, q1, k0, k1, inside = 0, rows, 0, keys, True
    else:
        at = xp.clip(xp.searchsorted(cu_q, xp.arange(rows), side="right") - 1, 0, len(cu_q) - 2)[:, None]
        q0, q1, k0, k1 = cu_q[at], cu_q[at + 1], cu_k[at], cu_k[at + 1]
        inside = (i >= q0) & (i < q1)
    diagonal = i - q0 + k0
    if corner == "bottom_right":
        diagonal = diagonal + (k1 - k0) - (q1 - q0)
    seen = (j >= k0) & (j < k1) & inside
    if left >= 0:
        seen = seen & (j >= diagonal - left)
    if right >= 0:
        seen = seen & (j <= diagonal + right)
    return seen


def over_groups(a: Any, b: Any) -> Any:
    """a (N, Hq, L, K) · b (N, Hk, K, M): each head's with its group's."""
    n, heads, rows, inner = a.shape
    groups = b.shape[1]
    found = a.reshape(n, groups, heads // max(groups, 1), rows, inner) @ b[:, :, None]
    return found.reshape(n, heads, rows, b.shape[3])


def products(q: Any, k: Any, scale: float | None, softcap: float) -> tuple[Any, Any]:
    """(scores (N, Hq, Lq, Lk) under their cap, the cap's slope there or None)."""
    s = over_groups(up(q), up(k).swapaxes(2, 3)) * scale_of(q, scale)
    if not softcap:
        return s, None
    t = namespace(q).tanh(s / softcap)
    return t * softcap, 1 - t * t


def weighed(s: Any, sinks: Any) -> tuple[Any, Any]:
    """(the softmax of the scores (N, Hq, Lq, Lk), lse (N, Hq, Lq)); zeros and −∞ where all scores are −∞."""
    xp = namespace(s)
    column = None if sinks is None else up(sinks)[None, :, None, None]
    top = s.max(-1, keepdims=True) if s.shape[3] else xp.full((*s.shape[:3], 1), -math.inf, s.dtype)
    if column is not None:
        top = xp.maximum(top, column)
    safe = xp.where(top == -math.inf, xp.zeros_like(top), top)
    e = xp.exp(s - safe)
    total = e.sum(-1, keepdims=True)
    if column is not None:
        total = total + xp.exp(column - safe)
    nothing = total == 0
    total = xp.where(nothing, xp.ones_like(total), total)
    lse = xp.where(nothing, xp_scalar(s, -math.inf), xp.log(total) + safe)
    return e / total, xp.ascontiguousarray(lse[..., 0])


def arranged_as(q: Any, y: Any) -> Any:
    """y in q's dtype, and in the memory order that goes with q's."""
    given = spec(q)
    return arranged(y.astype(q.dtype), order_of_y(given.order, given.contiguous))


def add_bias(s: Any, bias: Any) -> Any:
    """Scores (N, Hq, Lq, Lk) and a float bias, or −∞ where a bool one says no."""
    if bias.dtype.kind == "b":
        return namespace(s).where(bias, s, xp_scalar(s, -math.inf))
    return s + up(bias)


def xp_scalar(like: Any, value: float) -> Any:
    """A number as a 0-dim array of the dtype of ``like``: CuPy gives Python's numbers another."""
    return namespace(like).asarray(value, like.dtype)


def dropped(seed: Any, shape: tuple, p: float, like: Any) -> Any:
    """m / (1 − p) for the pairs (N, Hq, Lq, Lk). Rows are drawn in whole fours of words, so that four neighbours share a
    counter: pair (…, j) of the r-th row is element r · ⌈Lk / 4⌉ · 4 + j of the draw."""
    threshold, scale = threshold_and_scale(p)
    *rows, keys = shape
    wide = -(-keys // 4) * 4
    bits = random_bits(seed, math.prod(rows) * wide).reshape(*rows, wide)[..., :keys]
    return (bits >= threshold).astype(like.dtype) * scale
