"""Attention by torch's flash kernel for the CPU: of whole or causal scores, without more."""

from __future__ import annotations

import math
from typing import Any

import torch

from gpulayers.arrays import spec

from .._attention import order_of_gradient, order_of_y
from ._tensors import FLOAT32, arranged, plainly, refusal

REFUSALS = {
    "dtype": FLOAT32,
    "options": "a bias, sinks, dropout, packed sequences, a window, a cap and groups are left to the NumPy kernel",
    "empty": "an empty array is left to the NumPy kernel",
}
_aten = torch.ops.aten


def attention_refuses(
    q: Any, k: Any, v: Any, *more: Any, needs: tuple = (), causal: bool = False, window: tuple = (-1, -1),
    corner: str = "top_left", scale: float | None = None, softcap: float = 0.0,
) -> str | None:  # fmt: skip
    if (reason := refusal(q)) is not None:
        return reason
    if 0 in (*q.shape, *v.shape, *k.shape):
        return REFUSALS["empty"]
    turned = corner != "top_left" and q.shape[2] != k.shape[2]
    plain = window in ((-1, -1), (-1, 0)) and not softcap and not turned and q.shape[1] == k.shape[1]
    fits = plain and q.shape[3] == v.shape[3] and all(x is None for x in more)
    return None if fits else REFUSALS["options"]


def attention_forward(
    q: Any, k: Any, v: Any, bias: Any = None, sinks: Any = None, seed: Any = None, cu_q: Any = None, cu_k: Any = None,
    *, needs: tuple = (), causal: bool = False, window: tuple = (-1, -1), corner: str = "top_left",
    scale: float | None = None, softcap: float = 0.0, p: float = 0.0,
) -> tuple[tuple, dict]:  # fmt: skip
    flash = _aten._scaled_dot_product_flash_attention_for_cpu
    y, lse = plainly(lambda: flash(q, k, v, 0.0, window[1] == 0, attn_mask=None, scale=scale))
    given = spec(q)
    y, lse = arranged(y, order_of_y(given.order, given.contiguous)), lse.contiguous()
    saved = {"q": q, "k": k, "v": v, "y": y, "lse": lse}
    return (y, lse), saved if needs else {}


def attention_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, causal: bool = False, window: tuple = (-1, -1),
    corner: str = "top_left", scale: float | None = None, softcap: float = 0.0, p: float = 0.0,
) -> tuple:  # fmt: skip
    found = plainly(_gradients, dys, saved, window[1] == 0, scale)
    grads = (
        arranged(g, order_of_gradient(like)) if name in needs else None for name, g, like in zip("qkv", found, inputs)
    )
    return (*grads, *(None,) * 5)


def _gradients(dys: tuple, saved: dict, causal: bool, scale: float | None) -> tuple:
    (dy, dlse), (q, k, v, y, lse) = dys, saved.values()
    if dlse is None:
        backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(dy, q, k, v, y, lse, 0.0, causal, attn_mask=None, scale=scale)
    by = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    scores = q @ k.transpose(2, 3) * by
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    weights = torch.exp(scores - lse[..., None])
    less = -dlse if dy is None else (dy * y).sum(3) - dlse
    ds = weights * ((0.0 if dy is None else dy @ v.transpose(2, 3)) - less[..., None]) * by
    dv = torch.zeros_like(v) if dy is None else weights.transpose(2, 3) @ dy
    return ds @ k, ds.transpose(2, 3) @ q, dv
