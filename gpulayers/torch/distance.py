"""Distances, cosine similarity and rows of length 1."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import distance as ops
from gpulayers.torch import _autocast
from gpulayers.torch._op import TorchOp


def _normalize_twin(x: Tensor, p: float, axis: int, eps: float) -> Tensor:
    return F.normalize(x, p, axis, eps)


_pairwise_distance = TorchOp(
    ops.pairwise_distance, F.pairwise_distance, "float p, float eps", buffers=("norm",), cast=_autocast.ON_CUDA
)
_cosine_similarity = TorchOp(
    ops.cosine_similarity,
    F.cosine_similarity,
    "int axis, float eps",
    buffers=("norm1", "norm2", "cosine"),
    cast=_autocast.ON_CUDA,
)
_normalize = TorchOp(
    ops.normalize, _normalize_twin, "float p, int axis, float eps", buffers=("norm",), cast=_autocast.ON_CUDA
)
_pdist = TorchOp(ops.pdist, F.pdist, "float p", buffers=("norm",), cast=_autocast.ON_CUDA)


def _alike(x1: Any, x2: Any) -> tuple[Any, Any]:
    """Both of one shape and dtype, as torch's promotion has them; as they came where there is nothing to do, or no way."""
    if isinstance(x1, Tensor) and isinstance(x2, Tensor):
        if x1.dtype != x2.dtype:
            dtype = torch.result_type(x1, x2)
            x1, x2 = x1.to(dtype), x2.to(dtype)
        if x1.shape != x2.shape:
            try:
                return torch.broadcast_tensors(x1, x2)  # type: ignore[no-any-return]
            except RuntimeError:
                pass  # torch's function says it in its own words
    return x1, x2


def pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Tensor:
    """As ``torch.nn.functional.pairwise_distance``: x1, x2 (…, N), broadcast to one shape; y (…), or (…, 1)."""
    y = _pairwise_distance(*_alike(x1, x2), p, eps)
    return y.unsqueeze(-1) if keepdim else y


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """As ``torch.nn.functional.cosine_similarity``: x1, x2 broadcast to one shape; y of that shape without ``dim``."""
    return _cosine_similarity(*_alike(x1, x2), dim, eps)


def normalize(
    input: Tensor, p: float = 2.0, dim: int | tuple[int, ...] = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    """As ``torch.nn.functional.normalize``. Several axes, and ``out``, are torch's own."""
    if out is not None or not isinstance(dim, int):
        return F.normalize(input, p, dim, eps, out)  # type: ignore[arg-type]
    return _normalize(input, p, dim, eps)


def pdist(input: Tensor, p: float = 2) -> Tensor:
    """As ``torch.nn.functional.pdist``: input (N, D); y (N (N − 1) / 2,)."""
    return _pdist(input, p)


class PairwiseDistance(nn.PairwiseDistance):
    """``torch.nn.PairwiseDistance`` over gpulayers' kernels."""

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return pairwise_distance(x1, x2, self.norm, self.eps, self.keepdim)


class CosineSimilarity(nn.CosineSimilarity):
    """``torch.nn.CosineSimilarity`` over gpulayers' kernels."""

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return cosine_similarity(x1, x2, self.dim, self.eps)
