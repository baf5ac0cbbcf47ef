"""Losses: layers of (prediction, target) with one number out; ``backward()`` starts from dy = 1."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.layers._layer import OpLayer
from gpulayers.layers._weight import Weight
from gpulayers.ops import loss as ops


class _Loss(OpLayer):
    reduction: str

    def output_shape(self, x_shape: tuple, target_shape: tuple) -> tuple:
        return self.each(x_shape, target_shape) if self.reduction == "none" else ()

    def each(self, x_shape: tuple, target_shape: tuple) -> tuple:
        """The shape without a reduction."""
        raise NotImplementedError


class CrossEntropyLoss(_Loss):
    """−log softmax(x) at the target. As torch.nn.CrossEntropyLoss.

    x: (N, C), (C,) or (N, C, …); target: class indices without the axis C, or probabilities of x's shape.
    weight: one number for each class.
    """

    op = ops.cross_entropy

    def __init__(
        self, weight: Any = None, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0
    ):
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.weight: Weight | None = None
        if weight is not None:
            given = np.asarray(weight, np.float32)
            self.weight = self.add_weight("weight", given.shape, lambda *_: given, trainable=False)

    def arguments(self, x: Any, target: Any) -> tuple:
        return x, target, self.weight

    def options(self) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "reduction": self.reduction,
        }

    def each(self, x_shape: tuple, target_shape: tuple) -> tuple:
        return x_shape[:-1] if len(x_shape) < 2 else (x_shape[0], *x_shape[2:])


class MSELoss(_Loss):
    """(x − target)². As torch.nn.MSELoss."""

    op = ops.mse

    def __init__(self, reduction: str = "mean"):
        self.reduction = reduction

    def arguments(self, x: Any, target: Any) -> tuple:
        return x, target

    def options(self) -> dict[str, Any]:
        return {"reduction": self.reduction}

    def each(self, x_shape: tuple, target_shape: tuple) -> tuple:
        return tuple(np.broadcast_shapes(x_shape, target_shape))
