"""Embeddings: ``torch.nn.Embedding`` and ``EmbeddingBag``, ``torch.nn.functional.embedding`` and ``embedding_bag``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.definition import RuleError
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


def _bag_twin(
    weight: Tensor,
    indices: Tensor,
    offsets: Any,
    per_sample_weights: Any,
    mode: str,
    padding_idx: int | None,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
) -> Tensor:
    return F.embedding_bag(
        indices,
        weight,
        offsets,
        scale_grad_by_freq=scale_grad_by_freq,
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
    )


_embedding_bag = TorchOp(
    ops.embedding_bag,
    _bag_twin,
    "str mode, int? padding_idx, bool include_last_offset, bool scale_grad_by_freq",
    buffers=("winners", "sizes"),
    direct=True,
)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """As ``torch.nn.functional.embedding_bag``. Sparse gradients, nested tensors and torch's old order of the first two
    arguments are left to torch."""
    plain = all(isinstance(t, Tensor) and not t.is_nested for t in (input, weight))
    if sparse or not plain or input.is_floating_point() or (include_last_offset and input.dim() == 2):
        return F.embedding_bag(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip
    renormed(weight, input, max_norm, norm_type)
    return _embedding_bag(
        weight, input, offsets, per_sample_weights, mode, padding_idx, include_last_offset, scale_grad_by_freq
    )


class EmbeddingBag(nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag`` over gpulayers' kernels."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return embedding_bag(
            input,
            held(self, "weight"),
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )


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


_one_hot = TorchOp(ops.one_hot, F.one_hot, "SymInt num_classes")


def one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """As ``torch.nn.functional.one_hot``: int64 (…) to int64 (…, num_classes); −1 for the largest index and one more."""
    whole = isinstance(tensor, Tensor) and tensor.dtype is torch.int64 and isinstance(num_classes, int)
    if not whole or tensor.numel() == 0 or num_classes < -1 or num_classes == 0:
        return F.one_hot(tensor, num_classes)  # raises, or has nothing to do
    try:
        return _one_hot(tensor, int(tensor.max()) + 1 if num_classes == -1 else num_classes)
    except RuleError:
        return F.one_hot(tensor, num_classes)  # raises in its own words
