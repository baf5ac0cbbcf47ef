"""Embeddings: ``torch.nn.Embedding`` and ``torch.nn.functional.embedding``."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import embedding as ops
from gpulayers.torch._arguments import held
from gpulayers.torch._op import TorchOp


def _twin(weight: Tensor, indices: Tensor, padding_idx: int | None, scale_grad_by_freq: bool) -> Tensor:
    return F.embedding(indices, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)


_embedding = TorchOp(ops.embedding, _twin, "int? padding_idx, bool scale_grad_by_freq", direct=True)


def renormed(weight: Tensor, indices: Tensor, max_norm: float | None, norm_type: float) -> None:
    """Rows that are looked up are made as short as ``max_norm``, in place, as torch does: no gradient knows of it."""
    if max_norm is not None:
        with torch.no_grad():
            torch.embedding_renorm_(weight, indices.contiguous(), max_norm, norm_type)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """As ``torch.nn.functional.embedding``. Sparse gradients are torch's own: its optimizers alone read them."""
    if sparse or not isinstance(weight, Tensor) or not isinstance(input, Tensor):
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    renormed(weight, input, max_norm, norm_type)
    return _embedding(weight, input, padding_idx, scale_grad_by_freq)


class Embedding(nn.Embedding):
    """``torch.nn.Embedding`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return embedding(
            input,
            held(self, "weight"),
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
