"""Distances and angles between the rows of two arrays: y = layer(x1, x2)."""

from __future__ import annotations

from typing import Any

from gpulayers.layers._layer import OpLayer
from gpulayers.ops import distance as ops


class PairwiseDistance(OpLayer):
    """y = ‖x1 − x2 + eps‖ₚ over the last axis: (…, N), (…, N) → (…). As torch.nn.PairwiseDistance, of one shape."""

    op = ops.pairwise_distance

    def __init__(self, p: float = 2.0, eps: float = 1e-6):
        self.p, self.eps = p, eps

    def options(self) -> dict[str, Any]:
        return {"p": self.p, "eps": self.eps}


class CosineSimilarity(OpLayer):
    """y = x1 · x2 / (‖x1‖ ‖x2‖) over axis ``dim``, no norm below eps. As torch.nn.CosineSimilarity, of one shape."""

    op = ops.cosine_similarity

    def __init__(self, dim: int = 1, eps: float = 1e-8):
        self.dim, self.eps = dim, eps

    def options(self) -> dict[str, Any]:
        return {"axis": self.dim, "eps": self.eps}


class Normalize(OpLayer):
    """y = x / ‖x‖ₚ over axis ``dim``, no norm below eps; any shape. As torch.nn.functional.normalize."""

    op = ops.normalize

    def __init__(self, p: float = 2.0, dim: int = 1, eps: float = 1e-12):
        self.p, self.dim, self.eps = p, dim, eps

    def options(self) -> dict[str, Any]:
        return {"p": self.p, "axis": self.dim, "eps": self.eps}
