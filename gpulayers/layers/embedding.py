"""Embeddings: rows of a table by their numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.layers._layer import OpLayer
from gpulayers.ops import embedding as ops
from gpulayers.ops._embedding import row_of_padding


class _Table(OpLayer):
    """Rows by their numbers. Weights: ``weight`` (num_embeddings, embedding_dim), from the standard normal distribution."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, scale_grad_by_freq: bool):
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
        return self.weight, *xs

    def options(self) -> dict[str, Any]:
        return {"padding_idx": self.padding_idx, "scale_grad_by_freq": self.scale_grad_by_freq}

    def backward(self, *dys: Any, **_: Any) -> Any:
        factors = super().backward(*dys)  # or nothing: indices have no gradient
        return None if factors is None or isinstance(factors, tuple) else (None, None, factors)


class Embedding(_Table):
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
        super().__init__(num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq)

    def output_shape(self, *input_shapes: Any, **_: Any) -> tuple:
        return (*input_shapes[0], self.embedding_dim)


class EmbeddingBag(_Table):
    """The sum, mean or maximum of weight[i] over bags of indices: (B, L) → (B, embedding_dim), a bag in each row.

    As torch.nn.EmbeddingBag. ``layer(x, offsets)``: x (N,) in bags that begin at offsets (B,); include_last_offset: offsets is
    (B + 1,), its last one the end. ``layer(x, offsets or None, factors)``: a factor for each index, of x's shape (mode "sum").
    padding_idx: an index that belongs to no bag; its row is zero at the start. scale_grad_by_freq: a row's gradient is divided
    by how often its index occurs. Weights: ``weight`` (num_embeddings, embedding_dim), from the standard normal distribution.
    """

    op = ops.embedding_bag

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mode: str = "mean",
        padding_idx: int | None = None,
        *,
        include_last_offset: bool = False,
        scale_grad_by_freq: bool = False,
    ):
        super().__init__(num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq)
        self.mode, self.include_last_offset = mode, include_last_offset

    def options(self) -> dict[str, Any]:
        return super().options() | {"mode": self.mode, "include_last_offset": self.include_last_offset}

    def output_shape(self, *input_shapes: Any, **_: Any) -> tuple:
        if len(input_shapes) == 1 or not input_shapes[1]:
            return input_shapes[0][0], self.embedding_dim
        (starts,) = input_shapes[1]
        return None if starts is None else starts - self.include_last_offset, self.embedding_dim
