"""Attention: y = softmax(scale · q kᵀ) v, with all that is done to the scores in between."""

from __future__ import annotations

import math
from typing import Any

from gpulayers.arrays import FLOATS, Spec, arranged, float32, int64, namespace, up
from gpulayers.definition import ArgumentError, KindError, Rule, ShapeError, UnsupportedTypeError
from gpulayers.kernels._attention import order_of_gradient, order_of_y, scale_of
from gpulayers.ops._attention import (
    add_bias,
    allowed,
    arranged_as,
    dropped,
    over_groups,
    products,
    require_groups,
    require_options,
    require_ordered,
    require_sequences,
    weighed,
    xp_scalar,
)
from gpulayers.ops._attention_decode import attention_decode as attention_decode
from gpulayers.ops._kv_append import kv_append as kv_append
from gpulayers.ops._op import Op, require_float, require_shape
from gpulayers.ops._rotary_append import rotary_append as rotary_append
from gpulayers.ops.dropout import _guard


def attention_rule(
    q: Spec,
    k: Spec,
    v: Spec,
    bias: Spec | None = None,
    sinks: Spec | None = None,
    seed: Spec | None = None,
    cu_q: Spec | None = None,
    cu_k: Spec | None = None,
    *,
    needs: tuple = (),
    causal: bool = False,
    window: tuple = (-1, -1),
    corner: str = "top_left",
    scale: float | None = None,
    softcap: float = 0.0,
) -> Rule:
    require_float("q", q)
    require_groups(q, k, v)
    (n, heads, rows, _), keys = q.shape, k.shape[2]
    if bias is not None and bias.dtype not in FLOATS and bias.dtype.kind != "b":
        raise UnsupportedTypeError("bias", "dtype = q.dtype, or bool", bias.dtype)
    given = bias if bias is not None and bias.dtype.kind != "b" else None
    for name, other in (("k", k), ("v", v), ("bias", given), ("sinks", sinks)):
        if other is not None and other.dtype != q.dtype:
            raise ShapeError(name, f"{name}.dtype = q.dtype", f"{name} {other.dtype} with q {q.dtype}")
    if "bias" in needs and given is None:
        raise ArgumentError("bias", "a gradient of a bias that is float", "bool")
    if bias is not None:
        full = (n, heads, rows, keys)[4 - bias.ndim :] if bias.ndim <= 4 else None
        if full is None or any(b not in (1, None, a) and a is not None for a, b in zip(full, bias.shape)):
            raise ShapeError("bias", f"it broadcasts to [N, Hq, Lq, Lk] = {[n, heads, rows, keys]}", list(bias.shape))
    if sinks is not None:
        require_shape("sinks", sinks, (heads,), "sinks.shape = [Hq]")
    if seed is not None and (seed.dtype != int64 or seed.shape != (2,)):
        raise KindError("seed", "seed = [seed, offset], int64 of shape [2]", seed)
    require_sequences(n, cu_q, cu_k)
    options = require_options(causal, window, corner, scale, softcap)
    y = Spec((n, heads, rows, v.shape[3]), q.dtype, order_of_y(q.order, q.contiguous))
    lse = Spec((n, heads, rows), float32 if q.dtype.itemsize < 4 else q.dtype)
    inputs = dict(q=q, k=k, v=v, bias=bias, sinks=sinks, seed=seed, cu_q=cu_q, cu_k=cu_k)
    saved = {name: x for name, x in inputs.items() if x is not None} | {"y": y, "lse": lse}
    grads = {name: Spec(x.shape, x.dtype, order_of_gradient(x)) for name, x in (("q", q), ("k", k), ("v", v))}
    grads |= {} if given is None else {"bias": Spec(given.shape, given.dtype)}
    return Rule({"y": y, "lse": lse}, saved if needs else {}, options, grads)


def attention_forward(
    q: Any,
    k: Any,
    v: Any,
    bias: Any = None,
    sinks: Any = None,
    seed: Any = None,
    cu_q: Any = None,
    cu_k: Any = None,
    *,
    needs: tuple = (),
    causal: bool = False,
    window: tuple = (-1, -1),
    corner: str = "top_left",
    scale: float | None = None,
    softcap: float = 0.0,
    p: float = 0.0,
) -> tuple[tuple, dict]:
    """y = dropout(softmax(cap(scale · q kᵀ) + bias)) v, and lse, the logarithm of each softmax's sum.

    q: (N, Hq, Lq, D); k: (N, Hk, Lk, D); v: (N, Hk, Lk, Dv), of one float dtype. Hq is a multiple of Hk: neighbouring
    heads of q share a head of k and v (grouped queries). bias: broadcasts to (N, Hq, Lq, Lk); float numbers of q's dtype
    are added, a bool array says which pairs take part. sinks: (Hq,), a score for each head that joins the softmax's sum
    and has no value. seed: int64 [seed, offset] (see ``_random.py``) and p: pairs are dropped with probability p.
    cu_q, cu_k: (sequences + 1,) int32 or int64, where packed sequences begin and the last one ends; N is then 1, and a
    query sees the keys of its own sequence alone.

    causal: query i sees keys up to the diagonal's, window (left, right): from so many before to so many behind it (-1: no
    limit). corner: where the diagonal lies, from the first query and key on ("top_left"), or so that it ends at the last
    ones ("bottom_right"). scale: D^(-1/2) by default. softcap: scores s become c · tanh(s / c); 0 for none.

    Returns y: (N, Hq, Lq, Dv), in q's memory order (heads last where that has gaps, or D is not the fastest axis), and
    lse: (N, Hq, Lq), float32 (float64 for float64). A query that sees no key has y = 0 and lse = −∞, and passes no
    gradient.

    Sources: Vaswani et al., "Attention is all you need" (2017); Dao, "FlashAttention-2" (2023), for what is saved; Shazeer,
    "Fast transformer decoding" (2019), and Ainslie et al., "GQA" (2023), for groups; Xiao et al., "Efficient streaming
    language models with attention sinks" (2023).
    """
    s, _ = _scores(q, k, bias, cu_q, cu_k, causal, window, corner, scale, softcap)
    weights, lse = weighed(s, sinks)
    if seed is not None:
        weights = weights * dropped(seed, s.shape, p, s)
    y = arranged_as(q, over_groups(weights, up(v)))
    inputs = dict(q=q, k=k, v=v, bias=bias, sinks=sinks, seed=seed, cu_q=cu_q, cu_k=cu_k)
    saved = {name: x for name, x in inputs.items() if x is not None} | {"y": y, "lse": lse}
    return (y, lse), saved if needs else {}


def attention_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    causal: bool = False,
    window: tuple = (-1, -1),
    corner: str = "top_left",
    scale: float | None = None,
    softcap: float = 0.0,
    p: float = 0.0,
) -> tuple:
    """With the softmax's weights w = exp(s − lse), m dropout's mask and dw = m · dy vᵀ:
    ds = w (dw − Σ dy y + dlse); dq = scale · ds k, dk = scale · dsᵀ q, dv = (m w)ᵀ dy, dbias = ds, summed where the bias
    was repeated; dsinks = Σ exp(sink − lse) (dlse − Σ dy y). Under a cap, ds is times 1 − (s / c)² for q and k.
    """
    q, k, v, y, lse = (up(saved[name]) for name in ("q", "k", "v", "y", "lse"))
    bias, sinks, seed, cu_q, cu_k = (saved.get(name) for name in ("bias", "sinks", "seed", "cu_q", "cu_k"))
    xp = namespace(q)
    dy = xp.zeros_like(y) if dys[0] is None else up(dys[0])
    delta = (dy * y).sum(-1) - (0 if dys[1] is None else dys[1])
    s, slope = _scores(q, k, bias, cu_q, cu_k, causal, window, corner, scale, softcap)
    nothing = lse == -math.inf
    weights = xp.exp(s - xp.where(nothing, xp.full_like(lse, math.inf), lse)[..., None])
    dw = over_groups(dy, v.swapaxes(2, 3))
    kept = weights
    if seed is not None:
        mask = dropped(seed, s.shape, p, s)
        dw, kept = dw * mask, weights * mask
    ds = weights * (dw - delta[..., None])
    found: dict[str, Any] = {}
    if "bias" in needs:
        found["bias"] = _summed(ds, inputs[3].shape)
    if "sinks" in needs:
        share = xp.where(nothing, xp.zeros_like(lse), xp.exp(up(sinks)[None, :, None] - lse))
        found["sinks"] = -(share * delta).sum((0, 2))
    dots = ds * scale_of(q, scale) if slope is None else ds * slope * scale_of(q, scale)
    found["q"] = over_groups(dots, k)
    found["k"] = _by_group(dots, q, k.shape[1])
    found["v"] = _by_group(kept, dy, v.shape[1])
    orders = {name: order_of_gradient(like) for name, like in zip("qkv", inputs)}
    return tuple(
        arranged(found[name].astype(like.dtype), orders.get(name)) if name in needs else None
        for name, like in zip(attention.inputs, inputs)
    )


def _scores(
    q: Any,
    k: Any,
    bias: Any,
    cu_q: Any,
    cu_k: Any,
    causal: bool,
    window: tuple,
    corner: str,
    scale: Any,
    softcap: float,
) -> tuple[Any, Any]:
    """(s (N, Hq, Lq, Lk), −∞ where a query does not see a key; the slope of the cap at s, or None)."""
    xp = namespace(q)
    s, slope = products(q, k, scale, softcap)
    if bias is not None:
        s = add_bias(s, bias)
    seen = allowed(xp, s.shape[2], s.shape[3], (window[0], 0 if causal else window[1]), corner, cu_q, cu_k)
    return (s if seen is None else xp.where(seen, s, xp_scalar(s, -math.inf))), slope


def _by_group(a: Any, b: Any, groups: int) -> Any:
    """Σ aᵀ b over the queries of all heads of a group: a (N, Hq, Lq, Lk), b (N, Hq, Lq, M) → (N, Hk, Lk, M)."""
    n, heads, rows, keys = a.shape
    left = a.reshape(n, groups, heads // max(groups, 1) * rows, keys)
    return left.swapaxes(2, 3) @ b.reshape(n, groups, heads // max(groups, 1) * rows, b.shape[3])


def _summed(ds: Any, shape: tuple) -> Any:
    """ds (N, Hq, Lq, Lk) summed to the shape of what was broadcast."""
    wide = (1,) * (4 - len(shape)) + tuple(shape)
    axes = tuple(a for a in range(4) if wide[a] == 1)
    return ds.sum(axes, keepdims=True).reshape(shape)


def _check(
    q: Any, k: Any, v: Any, bias: Any = None, sinks: Any = None, seed: Any = None, cu_q: Any = None, cu_k: Any = None, **_: Any
) -> None:  # fmt: skip
    require_ordered(cu_q, cu_k, q.shape[2], k.shape[2])


attention = Op(
    attention_rule,
    attention_forward,
    attention_backward,
    differentiable=("q", "k", "v", "bias", "sinks"),
    dynamic=("p",),
    guard=_guard,
    check=_check,
)
