"""Attention: ``torch.nn.functional.scaled_dot_product_attention``, ``attention``, which does more, and attention to caches of
keys and values."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpulayers.kernels._attention import scale_of
from gpulayers.ops import _attention as rules
from gpulayers.ops import attention as ops
from gpulayers.torch import _autocast
from gpulayers.torch._op import TorchOp
from gpulayers.torch.dropout import _dropout, draw_seed
from gpulayers.torch.rotary import rotary, turned_by


def _flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], y: Sequence[int]) -> dict[str, int]:
    pairs = 2 * math.prod(q[:3]) * k[2]
    return {"y": pairs * (k[3] + v[3]), "q": 2 * pairs * k[3], "k": pairs * (k[3] + v[3]), "v": pairs * v[3]}


def _seen(q: Tensor, k: Tensor, window: Sequence[int], corner: str, cu_q: Any, cu_k: Any) -> Any:
    """(Lq, Lk) bool, as in the op's definition."""
    xp = types.SimpleNamespace(
        arange=functools.partial(torch.arange, device=q.device), searchsorted=torch.searchsorted, clip=torch.clip
    )
    cu_q, cu_k = (None if cu is None else cu.long() for cu in (cu_q, cu_k))
    return rules.allowed(xp, q.shape[2], k.shape[2], tuple(window), corner, cu_q, cu_k)


def _composed(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, sinks: Any, seed: Any, cu_q: Any, cu_k: Any,
    causal: bool, window: Sequence[int], corner: str, scale: float | None, softcap: float, p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, lse) in torch's operations, which can be differentiated again."""
    dtype, work = q.dtype, torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // max(k.shape[1], 1)
    q, k, v = q.to(work), *(x.to(work).repeat_interleave(group, 1) for x in (k, v))
    s = q @ k.transpose(2, 3) * scale_of(q, scale)
    if softcap:
        s = torch.tanh(s / softcap) * softcap
    if bias is not None:
        s = s.masked_fill(~bias, -math.inf) if bias.dtype is torch.bool else s + bias.to(work)
    seen = _seen(q, k, (window[0], 0 if causal else window[1]), corner, cu_q, cu_k)
    if seen is not None:
        s = s.masked_fill(~seen, -math.inf)
    wide = s if sinks is None else torch.cat([s, sinks.to(work)[None, :, None, None].expand(*s.shape[:3], 1)], 3)
    nothing = (wide == -math.inf).all(3, keepdim=True)  # their gradient would be NaN
    wide = wide.masked_fill(nothing, 0.0)
    lse = torch.logsumexp(wide, 3, keepdim=True).masked_fill(nothing, -math.inf)
    weights = torch.exp(wide - lse.masked_fill(nothing, 0.0))[..., : s.shape[3]].masked_fill(nothing, 0.0)
    if seed is not None:
        weights = weights * _mask(weights, seed, p)
    y = (weights @ v).to(dtype)
    return y, lse[..., 0]


def _mask(weights: Tensor, seed: Tensor, p: float) -> Tensor:
    """m / (1 − p), as the op draws it."""
    *rows, keys = weights.shape
    ones = torch.ones(*rows, -(-keys // 4) * 4, dtype=weights.dtype, device=weights.device)
    return _dropout.library((ones, seed, p, False, 0), False)[..., :keys]


def _torchs(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, sinks: Any, seed: Any, cu_q: Any, cu_k: Any,
    causal: bool, window: Sequence[int], corner: str, scale: float | None, softcap: float, p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, lse): y is torch's own function's where it has all that is asked for, so that errors are torch's."""
    args: Any = (q, k, v, bias, sinks, seed, cu_q, cu_k, causal, window, corner, scale, softcap, p)
    if sinks is not None or cu_q is not None or softcap or tuple(window) != (-1, -1) or corner != rules.CORNERS[0]:
        return _composed(*args)
    gqa = {} if q.dim() != 4 or k.dim() != 4 or q.shape[1] == k.shape[1] else {"enable_gqa": True}
    y = F.scaled_dot_product_attention(q, k, v, bias, p if seed is not None else 0.0, causal, scale=scale, **gqa)
    with torch.no_grad():
        lse = _composed(*args)[1]
    return y, lse


_attention = TorchOp(
    ops.attention,
    _composed,
    "bool causal, SymInt[] window, str corner, float? scale, float softcap, float p",
    outputs=("y", "lse"),
    cast=_autocast.LOWER,
    flops=_flops,
)
_attention._caller = _torchs


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As ``torch.nn.functional.scaled_dot_product_attention``: query (…, Hq, L, E), key (…, H, S, E), value (…, H, S, Ev).

    A query that sees no key gives zeros. Dropout's mask is Philox's, the same on every device for the same seed.
    """
    plain = isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
    if not plain or not _fits(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    seed = draw_seed(query) if dropout_p > 0 else None
    rest = (None, seed, None, None, is_causal, (-1, -1), rules.CORNERS[0], scale, 0.0, dropout_p)
    missing = 4 - query.dim()
    if not missing:
        return _attention(query, key, value, attn_mask, *rest)[0]
    ahead = (None,) * missing
    y = _attention(query[ahead], key[ahead], value[ahead], attn_mask, *rest)[0]
    return y[(0,) * missing]


def _fits(q: Tensor, k: Tensor, v: Tensor, mask: Any, p: float, causal: bool, gqa: bool) -> bool:
    """Whether it is a call that the op serves, as far as torch allows it: torch serves the others, or raises."""
    dims = q.dim()
    if not (2 <= dims <= 4 and k.dim() == v.dim() == dims and 0 <= p <= 1) or (mask is not None and causal):
        return False
    if mask is not None and (mask.dim() < 2 or mask.dim() > dims):
        return False
    return dims == 2 or (q.shape[-3] == k.shape[-3] == v.shape[-3]) or (gqa and k.shape[-3] == v.shape[-3])


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    causal: bool = False,
    window: Sequence[int] = (-1, -1),
    corner: str = "top_left",
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """``gpulayers.ops.attention``'s op for tensors: query (N, Hq, Lq, D), key (N, Hk, Lk, D), value (N, Hk, Lk, Dv).

    Beyond torch's function it takes windows, a diagonal from either corner, a cap, sinks, and packed sequences; all are
    described there. return_lse: (y, lse), both differentiable, in the place of y.
    """
    seed = draw_seed(query) if dropout_p > 0 else None
    found = _attention(
        query, key, value, bias, sinks, seed, cu_q, cu_k, causal, tuple(window), corner, scale, softcap, dropout_p
    )
    return found if return_lse else found[0]


def _without_gradients(name: str, names: Sequence[str], given: Sequence[Any]) -> None:
    """Raises where a gradient would be lost."""
    wanted = [n for n, x in zip(names, given) if isinstance(x, Tensor) and x.requires_grad]
    if wanted and torch.is_grad_enabled():
        why = f"it is for inference and has no gradient, and {', '.join(wanted)} requires one"
        raise RuntimeError(f"gpulayers.torch: {name}: {why}: detach it, or call under torch.no_grad()")


def _decoded(
    q: Tensor, k: Tensor, v: Tensor, lengths: Any, table: Any, sinks: Any,
    causal: bool, window: Sequence[int], scale: float | None, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, lse) in torch's operations."""
    _without_gradients("attention_decode", ops.attention_decode.inputs, (q, k, v, lengths, table, sinks))
    if table is not None:
        k, v = (x[table.clamp(0, x.shape[0] - 1).long()].transpose(1, 2).flatten(2, 3) for x in (k, v))
    rows, keys = q.shape[2], k.shape[2]
    j = torch.arange(keys, device=q.device)
    ends = torch.full((q.shape[0],), keys, device=q.device) if lengths is None else lengths.clamp(0, keys)
    ends = ends[:, None, None, None]
    own = ends - rows + torch.arange(rows, device=q.device)[:, None]
    there = j < ends
    seen = there & (j >= own - window[0]) if window[0] >= 0 else there.expand(-1, 1, rows, keys)
    if causal or window[1] >= 0:
        seen = seen & (j <= own + (0 if causal else window[1]))
    v = v.masked_fill(~there.transpose(2, 3), 0.0)
    return _composed(q, k, v, seen, sinks, None, None, None, False, (-1, -1), rules.CORNERS[0], scale, softcap, 0.0)


def _appended(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor | None) -> tuple:
    """Torch's operations, which wait for the GPU."""
    _without_gradients("kv_append", ops.kv_append.inputs, (k_cache, v_cache, k, v, positions, table))
    size, blocks = k_cache.shape[2], 1 if table is None else table.shape[1]
    at = positions if positions.dim() == 2 else positions[:, None] + torch.arange(k.shape[2], device=k.device)
    row, token = ((at >= 0) & (at < size * blocks)).nonzero(as_tuple=True)
    place = at[row, token]
    to = row if table is None else table[row, place // size]
    for cache, x in ((k_cache, k), (v_cache, v)):
        cache[to, :, place % size] = x[row, :, token]
    return ()


def _turned_and_appended(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    table: Tensor | None, interleaved: bool,
) -> Tensor:  # fmt: skip
    given = (q, k, v, k_cache, v_cache, cos, sin, positions, table)
    _without_gradients("rotary_append", ops.rotary_append.inputs, given)
    if cos.dim() == 2:
        at = positions if positions.dim() == 2 else positions[:, None] + torch.arange(k.shape[2], device=k.device)
        out = (at < 0)[..., None]
        cos, sin = cos[at.clamp(0)].masked_fill(out, 1.0), sin[at.clamp(0)].masked_fill(out, 0.0)
    y, z = (turned_by(x, cos[:, None], sin[:, None], interleaved) for x in (q, k))
    _appended(k_cache, v_cache, z, v, positions, table)
    return y


_attention_decode = TorchOp(
    ops.attention_decode, _decoded, "bool causal, SymInt[] window, float? scale, float softcap", outputs=("y", "lse"),
    flops=_flops,
)  # fmt: skip
_kv_append = TorchOp(ops.kv_append, _appended, outputs=())
_rotary_append = TorchOp(ops.rotary_append, _turned_and_appended, "bool interleaved")


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    causal: bool = True,
    window: Sequence[int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """``gpulayers.ops.attention``'s attention_decode for tensors: the last Lq tokens' queries (N, Hq, Lq, D) to a cache.

    key_cache and value_cache: (N, Hk, capacity, width), or with block_table (N, blocks), pages (pages, Hk, page size, width);
    in any strides. lengths: (N,) int32 or int64, on the cache's device. All is described there. return_lse: (y, lse).
    Raises RuntimeError where a gradient would be wanted: there is none.
    """
    found = _attention_decode(
        query, key_cache, value_cache, lengths, block_table, sinks, causal, tuple(window), scale, softcap
    )
    return found if return_lse else found[0]


def kv_append(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """Writes new tokens' key and value, (N, Hk, L, width), into caches as ``attention_decode`` takes them, in one launch.

    positions: (N,) int32 or int64, where each sequence's first new token goes, or (N, L), where each token does (negative:
    it is left out).
    """
    _kv_append(key_cache, value_cache, key, value, positions, block_table)


def rotary_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    block_table: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> Tensor:
    """query, (N, H, L, D), turned as ``rotary`` does it by each token's place; and ``kv_append`` of key, turned too, and value.

    One launch. cos, sin: (P, pairs), by the place, or (N or 1, L, pairs), each token's own. All else as ``kv_append`` takes it.
    """
    return _rotary_append(query, key, value, key_cache, value_cache, cos, sin, positions, block_table, interleaved)


def attention_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    block_table: Tensor | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    return_softmax_lse: bool = False,
) -> Any:
    """A step of decoding in the layouts of flash-attention's function of this kind: query (N, Lq, Hq, D).

    key_cache, value_cache: (N, capacity, Hk, width), or (pages, page size, Hk, width) with block_table (N, blocks).
    cache_seqlens: how many tokens each sequence has in the cache, (N,) int32 or int64, or one number for all; nothing by
    default where key and value are given, else the whole cache. key, value: (N, L, Hk, width), written behind those
    first. rotary_cos, rotary_sin: (positions, pairs), which query and key are turned by before, from cache_seqlens on
    (the queries all by the first new token's angle where nothing is causal or a window). causal and window_size: from
    the last tokens on backwards.

    Returns y, (N, Lq, Hq, width); with return_softmax_lse also lse, (N, Hq, Lq).
    """
    q, k_cache, v_cache = (x.transpose(1, 2) for x in (query, key_cache, value_cache))
    batch, lengths = query.shape[0], cache_seqlens
    if lengths is None and key is not None:
        lengths = 0
    if isinstance(lengths, int):
        lengths = torch.full((batch,), lengths, dtype=torch.int32, device=query.device)
    if key is not None:
        assert value is not None and isinstance(lengths, Tensor)
        k, v = key.transpose(1, 2), value.transpose(1, 2)
        turning = causal or tuple(window_size) != (-1, -1)
        if rotary_cos is not None and turning and query.shape[1] == key.shape[1]:
            assert rotary_sin is not None
            tables = rotary_cos, rotary_sin
            how = dict(interleaved=rotary_interleaved)
            q = rotary_append(q, k, v, k_cache, v_cache, *tables, lengths, block_table, **how)
        elif rotary_cos is not None:
            steps = torch.arange(max(query.shape[1], key.shape[1]), device=query.device)
            places = lengths[:, None] + steps
            at = places[:, : query.shape[1]] if turning else lengths[:, None].expand(-1, query.shape[1])
            tables = rotary_cos, rotary_sin
            q = rotary(q, None, *tables, at, rotary_interleaved)  # type: ignore[arg-type]
            k = rotary(k, None, *tables, places[:, : key.shape[1]], rotary_interleaved)  # type: ignore[arg-type]
            kv_append(k_cache, v_cache, k, v, lengths, block_table)
        else:
            kv_append(k_cache, v_cache, k, v, lengths, block_table)
        lengths = lengths + key.shape[1]
    y, lse = attention_decode(
        q, k_cache, v_cache, lengths, block_table, sinks=sinks, causal=causal, window=window_size, scale=softmax_scale,
        softcap=softcap, return_lse=True,
    )  # fmt: skip
    y = y.transpose(1, 2)
    return (y, lse) if return_softmax_lse else y
