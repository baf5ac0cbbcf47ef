"""Attention of Hugging Face's models by transformers' own interface: ``attn_implementation="gpulayers"``.

A mask that only says which keys are there, under a causal diagonal or a window, is not written out: ``mask`` returns it as
(N or 1, 1, 1 + causal, 1 + window, Lk or 1) of booleans, whose middle axes are broadcast. All others are transformers' own.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from gpulayers.torch.attention import _composed, attention

NAME = "gpulayers"


_UTILITIES = (
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_causal_mask_function",
    "sliding_window_bidirectional_mask_function",
    "prepare_padding_mask",
)
_ARGUMENTS = [
    "batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask", "local_size",
    "allow_is_causal_skip", "allow_is_bidirectional_skip",
]  # fmt: skip
"""What transformers' sdpa_mask takes, in the versions that we know: older ones call a mask's function otherwise."""


def register_attention() -> None:
    """Let transformers' models take ``attn_implementation="gpulayers"``. Raises ImportError where there is no transformers, or
    one without this interface."""
    from transformers import AttentionInterface, masking_utils
    from transformers.masking_utils import AttentionMaskInterface

    lacks = [name for name in _UTILITIES if not hasattr(masking_utils, name)]
    takes = list(inspect.signature(getattr(masking_utils, "sdpa_mask", len)).parameters)[: len(_ARGUMENTS)]
    if lacks or takes != _ARGUMENTS:
        what = f"no {lacks[0]}" if lacks else f"a sdpa_mask of {', '.join(takes)}"
        raise ImportError(f"its masking_utils have {what}")
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, mask)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What ``forward`` takes as attention_mask; the arguments are those of ``transformers.masking_utils.sdpa_mask``."""
    from transformers import masking_utils

    causal, window = _pattern(masking_utils, mask_function, local_size)
    aligned = not isinstance(q_offset, Tensor) and kv_offset + kv_length == q_offset + q_length
    as_asked = not (allow_is_causal_skip if causal else allow_is_bidirectional_skip)
    if causal is None or as_asked or q_length == 1 or ((causal or window >= 0) and not aligned):
        return masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
            allow_is_causal_skip, allow_is_bidirectional_skip, device=device, **kwargs,
        )  # fmt: skip
    there = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if there is not None and there.shape[-1] > kv_length:
        there = there[:, kv_offset : kv_offset + kv_length]
    if there is None or (not torch.compiler.is_compiling() and bool(there.all())):
        if not causal and window < 0:
            return None
        there = torch.ones(1, 1, dtype=torch.bool, device=device)
    described = there.bool()[:, None, None, None]
    return described.expand(-1, 1, 1 + causal, 1 + (window + 1), -1)


def _pattern(utils: Any, f: Any, local_size: int | None) -> tuple[bool | None, int]:
    """(whether a mask function is causal, its window to the left, −1 for none); (None, _) for one that we do not know."""
    if f is utils.causal_mask_function:
        return True, -1
    if f is utils.bidirectional_mask_function:
        return False, -1
    if isinstance(local_size, int) and local_size > 0:
        if _same(f, utils.sliding_window_causal_mask_function(local_size)):
            return True, local_size - 1
        for w in (local_size, local_size - 1):
            if _same(f, utils.sliding_window_bidirectional_mask_function(w)):
                return False, w
    return None, -1


def _same(a: Any, b: Any) -> bool:
    """Whether two functions have one code over the same cells."""
    if inspect.isfunction(a) and inspect.isfunction(b):
        cells = [[c.cell_contents for c in f.__closure__ or ()] for f in (a, b)]
        return a.__code__ is b.__code__ and _same(*map(tuple, cells))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) is int and a == b


def forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """(y, weights): query (N, H, Lq, D), key and value (N, Hk, Lk, D and Dv), y (N, Lq, H, Dv), weights (N, H, Lq, Lk).

    output_attentions: whether weights are there, in torch's operations and before dropout; else they are None.

    scaling: D^-1/2 by default. is_causal: the module's by default, and then from the upper left corner, for no mask and
    more than one query. s_aux: (H,), sinks. position_bias: broadcasts to (N, H, Lq, Lk), added to the scores.
    cu_seq_lens_q, cu_seq_lens_k: where packed sequences begin and end; for no mask and N = 1.
    """
    rows = query.shape[2]
    bias: Any = attention_mask
    how: dict[str, Any] = {}
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        how["causal"] = bool(causal) and rows > 1
        if cu_seq_lens_q is not None and query.shape[0] == 1:
            how |= {"cu_q": cu_seq_lens_q, "cu_k": cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k}
        elif how["causal"] and key.shape[2] > rows:  # a cache of fixed size, before its first tokens
            key, value = key[:, :, :rows], value[:, :, :rows]
            position_bias = None if position_bias is None else position_bias[..., :rows]
    elif attention_mask.dim() == 5:
        causal, window = attention_mask.shape[2] > 1, attention_mask.shape[3] - 2
        how = {"causal": causal, "window": (window, 0 if causal else window) if window >= 0 else (-1, -1)}
        how["corner"] = "bottom_right"
        there = attention_mask[:, :, 0, 0]
        bias = None if there.shape[-1] != key.shape[2] else there[:, :, None]
    if position_bias is not None:
        bias = _added(position_bias, bias, query.dtype)
    elif bias is not None and bias.dtype is not torch.bool:
        bias = bias.to(query.dtype)
    sinks = None if s_aux is None else s_aux.to(query.dtype)
    cap = softcap or 0.0
    y = attention(query, key, value, bias, sinks=sinks, scale=scaling, softcap=cap, dropout_p=dropout, **how)
    weights = _weights(query, key, bias, sinks, scaling, cap, **how) if output_attentions else None
    return y.transpose(1, 2).contiguous(), weights


def _weights(
    q: Tensor, k: Tensor, bias: Any, sinks: Any, scale: Any, softcap: float, causal: bool = False,
    window: tuple[int, int] = (-1, -1), corner: str = "top_left", cu_q: Any = None, cu_k: Any = None,
) -> Tensor:  # fmt: skip
    """What attention gives for values of ones on a diagonal."""
    ones = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
    return _composed(q, k, ones, bias, sinks, None, cu_q, cu_k, causal, window, corner, scale, softcap, 0.0)[0]


def _added(position: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One bias to add; what a mask hides is far below all, so that rows which see nothing are averages, as transformers'."""
    if bias is None:
        return position.to(dtype)
    if bias.dtype is torch.bool:
        return torch.where(bias, position.to(dtype), torch.finfo(dtype).min)
    return (position + bias).to(dtype)
