"""Losses as layers of two inputs: y = loss(x, target)."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.layers._layer import OpLayer
from gpulayers.ops import loss as ops


class CrossEntropyLoss(OpLayer):
    """−log softmax(x)[target], by default averaged. As torch.nn.CrossEntropyLoss.

    x: logits (C,), (N, C) or (N, C, *d). target: class indices, () or (N, *d), or class probabilities of x's shape.
    weight: a factor for each class; it is not trained.
    """

    op = ops.cross_entropy
    casts_weights = True

    def __init__(
        self,
        weight: Any = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ):
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.weight = None
        if weight is not None:
            values = np.asarray(weight, np.float32)
            self.weight = self.add_weight("weight", values.shape, lambda *_: values, trainable=False)

    def arguments(self, *xs: Any) -> tuple:
        return (*xs, self.weight)

    def options(self) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
        }

    def output_shape(self, *input_shapes: tuple) -> tuple:
        x = input_shapes[0]
        return () if self.reduction != "none" or len(x) == 1 else (x[0], *x[2:])


class MSELoss(OpLayer):
    """(x − target)², by default averaged. As torch.nn.MSELoss, but x and target must have one shape."""

    op = ops.mse

    def __init__(self, reduction: str = "mean"):
        self.reduction = reduction

    def options(self) -> dict[str, Any]:
        return {"reduction": self.reduction}
