"""Rotary position embeddings of q and k in one launch. torch.nn has none; tables are those that models have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpulayers.ops import rotary as ops
from gpulayers.torch._op import TorchOp


def _of_tokens(table: Tensor, positions: Tensor | None, length: int) -> Tensor:
    if table.dim() == 3:
        return table[:, None]
    return table[None, None, :length] if positions is None else table[positions][:, None]


def turned_by(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    pairs, kind = cos.shape[-1], torch.promote_types(x.dtype, torch.float32)
    v, rest = x[..., : 2 * pairs].to(kind), x[..., 2 * pairs :]
    a, b = (v[..., ::2], v[..., 1::2]) if interleaved else v.split(pairs, -1)
    turned = a * cos - b * sin, b * cos + a * sin
    y = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([y.to(x.dtype), rest], -1)


def _twin(q: Tensor, cos: Tensor, sin: Tensor, k: Tensor | None, positions: Tensor | None, interleaved: bool) -> Any:
    c, s = (_of_tokens(t, positions, q.shape[2]) for t in (cos, sin))
    found = tuple(turned_by(x, c, s, interleaved) for x in (q, k) if x is not None)
    return found if len(found) > 1 else found[0]


_rotary = TorchOp(ops.rotary, _twin, "bool interleaved", outputs=("y", "z"))


def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> Any:
    """(q, k), or q alone where k is None, with each pair (a, b) of a head's numbers as (a cos − b sin, b cos + a sin).

    q: (N, H, L, D), k: (N, Hk, L, D), in any strides; nothing is copied. cos, sin: (P, pairs), by the position, which is l or
    positions (N or 1, L); or (N or 1, L, pairs), each token's own. A pair is (x[i], x[i + pairs]), or (x[2i], x[2i + 1]) where
    interleaved; what is past 2 pairs stays. ``gpulayers.ops.rotary.frequencies`` and ``tables`` make the tables.
    """
    found = _rotary(q, cos, sin, k, positions, interleaved)
    return found[0] if k is None and isinstance(found, tuple) else found  # a custom op gives both


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """(q, k) turned, as Hugging Face's models do it: cos and sin (N or 1, L, dim) have every angle twice, half by half.

    q: (N, H, L, D) and k: (N, Hk, L, D); where unsqueeze_dim is 2, (N, L, H, D) and (N, L, Hk, D).
    """
    pairs = cos.shape[-1] // 2
    if unsqueeze_dim == 1:
        return rotary(q, k, cos[..., :pairs], sin[..., :pairs])
    turned = rotary(q.transpose(1, 2), k.transpose(1, 2), cos[..., :pairs], sin[..., :pairs])
    return turned[0].transpose(1, 2), turned[1].transpose(1, 2)
