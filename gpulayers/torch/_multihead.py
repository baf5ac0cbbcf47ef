"""``torch.nn.MultiheadAttention``: its projections by our linear, its heads by our attention, on views without copies."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.torch._arguments import held
from gpulayers.torch.attention import attention
from gpulayers.torch.dropout import dropout
from gpulayers.torch.linear import linear
from gpulayers.torch.softmax import softmax


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` over gpulayers' kernels, in evaluation too: torch's fused path is left alone.

    Without ``need_weights`` the weights of the pairs are never stored, and a query whose keys are all masked gives what
    the projection's bias says; with it, NaN, as torch.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not _fits(self, query, key, value, key_padding_mask, attn_mask, is_causal):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = query.dim() == 3
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _merged(attn_mask, key_padding_mask, query.dtype, self.num_heads)
        turned = batched and not self.batch_first
        q, k, v = (_by_head(x, self.num_heads, turned) for x in _projected(self, query, key, value))
        k, v, mask = _extended(self, k, v, mask)
        p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            y, weights = _weighted(q, k, v, mask, p)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            y = attention(q, k, v, mask, causal=causal, dropout_p=p)
        y = (y.permute(2, 0, 1, 3) if turned else y.transpose(1, 2)).flatten(2)
        y = linear(y, held(self.out_proj, "weight"), held(self.out_proj, "bias"))
        return (y if batched else y.squeeze(0)), weights


def _fits(m: MultiheadAttention, q: Any, k: Any, v: Any, padding: Any, mask: Any, causal: bool) -> bool:
    """Whether it is a right call: torch raises for the others."""
    tensors = (q, k, v, *[t for t in (padding, mask) if t is not None])
    if not all(isinstance(t, Tensor) and not t.is_nested for t in tensors) or q.dim() not in (2, 3):
        return False
    if not k.dim() == v.dim() == q.dim() or q.shape[-1] != m.embed_dim or (causal and mask is None):
        return False
    if (k.shape[-1], v.shape[-1]) != (m.kdim, m.vdim) or k.shape[:-1] != v.shape[:-1]:
        return False
    if any(t.dtype is not torch.bool and t.dtype != q.dtype for t in tensors[3:]):
        return False
    (n, rows, keys) = _sizes(m, q, k)
    if padding is not None and padding.shape != ((n, keys) if q.dim() == 3 else (keys,)):
        return False
    if q.dim() == 3 and k.shape[0 if m.batch_first else 1] != n:
        return False
    return mask is None or mask.shape in ((rows, keys), (n * m.num_heads, rows, keys))


def _sizes(m: MultiheadAttention, q: Tensor, k: Tensor) -> tuple[int, int, int]:
    """(batch, queries, keys)."""
    if q.dim() == 2:
        return 1, q.shape[0], k.shape[0]
    rows = int(m.batch_first)
    return q.shape[1 - rows], q.shape[rows], k.shape[rows]


def _projected(m: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, one product for those that come from one tensor."""
    bias = held(m, "in_proj_bias")
    if not m._qkv_same_embed_dim:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        weights = [held(m, name) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        return tuple(linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases))
    weight, size = held(m, "in_proj_weight"), m.embed_dim
    if q is k is v:
        return linear(q, weight, bias).unflatten(-1, (3, size)).unbind(-2)
    if k is v:
        of_q, of_both = weight.split([size, 2 * size])
        b_q, b_both = (None, None) if bias is None else bias.split([size, 2 * size])
        return linear(q, of_q, b_q), *linear(k, of_both, b_both).unflatten(-1, (2, size)).unbind(-2)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return tuple(linear(x, w, b) for x, w, b in zip((q, k, v), weight.chunk(3), biases))


def _by_head(x: Tensor, heads: int, turned: bool) -> Tensor:
    """(N, heads, L, D) of (L, N, E) where turned, else of (N, L, E) or (L, E)."""
    x = x.unflatten(-1, (heads, x.shape[-1] // heads))
    if turned:
        return x.permute(1, 2, 0, 3)
    return (x if x.dim() == 4 else x.unsqueeze(0)).transpose(1, 2)


def _merged(mask: Any, padding: Any, dtype: torch.dtype, heads: int) -> Any:
    """One bias for the scores (N, heads, L, S): bool, True where a pair takes part, or float, to be added. torch's bool masks
    say the contrary."""
    given = []
    if mask is not None:
        given.append(mask if mask.dim() == 2 else mask.unflatten(0, (-1, heads)))
    if padding is not None:
        given.append((padding if padding.dim() == 2 else padding.unsqueeze(0))[:, None, None])
    if not given:
        return None
    if all(t.dtype is torch.bool for t in given):
        return ~(given[0] if len(given) == 1 else given[0] | given[1])
    floats = [torch.zeros_like(t, dtype=dtype).masked_fill(t, -math.inf) if t.dtype is torch.bool else t for t in given]
    return floats[0] if len(floats) == 1 else floats[0] + floats[1]


def _extended(m: MultiheadAttention, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor, Any]:
    """Keys and values with the module's own behind them, and a key of zeros; all queries see them."""
    more = [(m.bias_k, m.bias_v)] if m.bias_k is not None else []
    more = [tuple(b.view(1, m.num_heads, 1, -1).expand(k.shape[0], -1, -1, -1) for b in pair) for pair in more]
    if m.add_zero_attn:
        more.append(tuple(x.new_zeros(*x.shape[:2], 1, x.shape[3]) for x in (k, v)))
    if not more:
        return k, v, mask
    k, v = (torch.cat([x, *(pair[i].to(x.dtype) for pair in more)], 2) for i, x in enumerate((k, v)))
    if mask is not None:
        mask = F.pad(mask, (0, len(more)), value=mask.dtype is torch.bool)
    return k, v, mask


def _weighted(q: Tensor, k: Tensor, v: Tensor, mask: Any, p: float) -> tuple[Tensor, Tensor]:
    """(y, the weights of all pairs), which are stored; both can be differentiated."""
    scores = q * math.sqrt(1.0 / q.shape[-1]) @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    weights = softmax(scores, -1)
    weights = dropout(weights, p) if p > 0 else weights
    return weights @ v, weights
