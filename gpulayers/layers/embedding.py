"""Embeddings: rows of a table by their numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.layers._layer import OpLayer
from gpulayers.ops import embedding as ops
from gpulayers.ops._embedding import row_of_padding


class Embedding(OpLayer):
    """y[…] = weight[x[…]]: integers of any shape (…) → (…, embedding_dim). As torch.nn.Embedding.

    padding_idx: a row that is zero at the start and has no gradient. scale_grad_by_freq: a row's gradient is divided by how
    often its index occurs. Weights: ``weight`` (num_embeddings, embedding_dim), from the standard normal distribution. A
    limit on rows' norms is ``MaxNorm``'s.
    """

    op = ops.embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        scale_grad_by_freq: bool = False,
    ):
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = row_of_padding(padding_idx, num_embeddings)
        self.scale_grad_by_freq = scale_grad_by_freq
        self.weight = self.add_weight("weight", (num_embeddings, embedding_dim), self._start)

    def _start(self, shape: tuple, random: np.random.Generator) -> np.ndarray:
        rows = random.standard_normal(shape)
        if self.padding_idx is not None:
            rows[self.padding_idx] = 0
        return rows

    def arguments(self, *xs: Any, **_: Any) -> tuple:
        return self.weight, xs[0]

    def options(self) -> dict[str, Any]:
        return {"padding_idx": self.padding_idx, "scale_grad_by_freq": self.scale_grad_by_freq}

    def output_shape(self, *input_shapes: Any, **_: Any) -> tuple:
        return (*input_shapes[0], self.embedding_dim)
