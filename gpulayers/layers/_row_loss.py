"""Losses of one number a sample, as layers. As torch.nn's of their names; their formulas are those of
``gpulayers.ops.loss.row_loss``."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.layers._layer import OpLayer
from gpulayers.ops import loss as ops


class _RowLoss(OpLayer):
    """Its formula by name, what that takes, and its reduction: "mean", "sum" or "none"."""

    op = ops.row_loss
    casts_weights = True
    loss = ""
    margin = 1.0
    p, eps, swap = 2.0, 1e-6, False
    weight: Any = None

    def __init__(self, weight: Any, reduction: str):
        self.reduction = reduction
        if weight is not None:
            values = np.asarray(weight, np.float32)
            self.weight = self.add_weight("weight", values.shape, lambda *_: values, trainable=False)

    def options(self) -> dict[str, Any]:
        numbers = {"margin": float(self.margin), "p": float(self.p), "eps": self.eps, "swap": self.swap}
        return {"loss": self.loss, **numbers, "reduction": self.reduction}

    def output_shape(self, *input_shapes: tuple) -> tuple:
        return () if self.reduction != "none" else tuple(input_shapes[0][:-1])


class TripletMarginLoss(_RowLoss):
    """max(margin + d(x, positive) − d(x, negative), 0), by default averaged. As torch.nn.TripletMarginLoss.

    Called with x, positive and negative, of one shape (…, D). d(a, b) = (Σ |a − b + eps|^p)^(1 / p). swap: the positive's
    distance from the negative stands for x's where it is smaller.
    """

    loss = "triplet_margin"

    def __init__(
        self, margin: float = 1.0, p: float = 2.0, eps: float = 1e-6, swap: bool = False, reduction: str = "mean"
    ):
        super().__init__(None, reduction)
        self.margin, self.p, self.eps, self.swap = margin, p, eps, swap


class CosineEmbeddingLoss(_RowLoss):
    """1 − cos(x, other) where the target is 1, max(cos(x, other) − margin, 0) where it is −1, by default averaged.

    Called with x, other (N, D) and the target (N,). As torch.nn.CosineEmbeddingLoss.
    """

    loss = "cosine_embedding"

    def __init__(self, margin: float = 0.0, reduction: str = "mean"):
        super().__init__(None, reduction)
        self.margin = margin

    def arguments(self, *xs: Any) -> tuple:
        x, other, target = xs
        return x, other, None, target

    def backward(self, *dys: Any, **_: Any) -> Any:
        return (*super().backward(*dys), None)


class MultiMarginLoss(_RowLoss):
    """Σ max(margin − x[t] + x[c], 0)^p / C over the other classes c, by default averaged. As torch.nn.MultiMarginLoss.

    x: (N, C) or (C,). target: classes t, integers (N,) or (). p: 1 or 2. weight: a factor for each class; not trained.
    """

    loss = "multi_margin"

    def __init__(self, p: int = 1, margin: float = 1.0, weight: Any = None, reduction: str = "mean"):
        super().__init__(weight, reduction)
        self.p, self.margin = p, margin

    def arguments(self, *xs: Any) -> tuple:
        x, target = xs
        return x, None, None, target, self.weight


class MultiLabelMarginLoss(OpLayer):
    """Σ max(1 − x[i] + x[j], 0) / C over a sample's classes i and all others j, by default averaged. As
    torch.nn.MultiLabelMarginLoss.

    x: (N, C) or (C,). target: x's shape, integers: each sample's classes, up to the first −1.
    """

    op = ops.multilabel_margin

    def __init__(self, reduction: str = "mean"):
        self.reduction = reduction

    def options(self) -> dict[str, Any]:
        return {"reduction": self.reduction}

    def output_shape(self, *input_shapes: tuple) -> tuple:
        return () if self.reduction != "none" else tuple(input_shapes[0][:-1])


class MultiLabelSoftMarginLoss(_RowLoss):
    """BCEWithLogitsLoss of the classes of each sample, their mean, by default averaged. As torch.nn.MultiLabelSoftMarginLoss.

    x, target: (…, C), the target labels in [0, 1]. weight: a factor for each class; it is not trained.
    """

    loss = "multilabel_soft_margin"

    def __init__(self, weight: Any = None, reduction: str = "mean"):
        super().__init__(weight, reduction)

    def arguments(self, *xs: Any) -> tuple:
        x, target = xs
        return x, target, None, None, self.weight
