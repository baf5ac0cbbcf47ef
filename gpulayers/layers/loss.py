"""Losses as layers of two inputs: y = loss(x, target)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpulayers import arrays
from gpulayers.layers._ctc_loss import CTCLoss as CTCLoss
from gpulayers.layers._layer import OpLayer
from gpulayers.layers._pointwise_loss import BCELoss as BCELoss
from gpulayers.layers._pointwise_loss import BCEWithLogitsLoss as BCEWithLogitsLoss
from gpulayers.layers._pointwise_loss import GaussianNLLLoss as GaussianNLLLoss
from gpulayers.layers._pointwise_loss import HingeEmbeddingLoss as HingeEmbeddingLoss
from gpulayers.layers._pointwise_loss import HuberLoss as HuberLoss
from gpulayers.layers._pointwise_loss import KLDivLoss as KLDivLoss
from gpulayers.layers._pointwise_loss import L1Loss as L1Loss
from gpulayers.layers._pointwise_loss import MarginRankingLoss as MarginRankingLoss
from gpulayers.layers._pointwise_loss import PoissonNLLLoss as PoissonNLLLoss
from gpulayers.layers._pointwise_loss import SmoothL1Loss as SmoothL1Loss
from gpulayers.layers._pointwise_loss import SoftMarginLoss as SoftMarginLoss
from gpulayers.layers._row_loss import CosineEmbeddingLoss as CosineEmbeddingLoss
from gpulayers.layers._row_loss import MultiLabelMarginLoss as MultiLabelMarginLoss
from gpulayers.layers._row_loss import MultiLabelSoftMarginLoss as MultiLabelSoftMarginLoss
from gpulayers.layers._row_loss import MultiMarginLoss as MultiMarginLoss
from gpulayers.layers._row_loss import TripletMarginLoss as TripletMarginLoss
from gpulayers.layers.linear import Linear
from gpulayers.ops import loss as ops


class _LossOverClasses(OpLayer):
    """weight: a factor for each class; it is not trained."""

    casts_weights = True

    def __init__(self, weight: Any, ignore_index: int, reduction: str):
        self.ignore_index, self.reduction = ignore_index, reduction
        self.weight = None
        if weight is not None:
            values = np.asarray(weight, np.float32)
            self.weight = self.add_weight("weight", values.shape, lambda *_: values, trainable=False)

    def arguments(self, *xs: Any) -> tuple:
        return (*xs, self.weight)

    def options(self) -> dict[str, Any]:
        return {"ignore_index": self.ignore_index, "reduction": self.reduction}

    def output_shape(self, *input_shapes: tuple) -> tuple:
        x = input_shapes[0]
        return () if self.reduction != "none" or len(x) == 1 else (x[0], *x[2:])

    def mean_over(self, x: Any, target: Any) -> Any:
        """What a mean over these divides by: the samples, or the weights of their classes; 0 for those ignored."""
        if arrays.library(target).dtype(target) in arrays.FLOATS:
            return math.prod(n for axis, n in enumerate(target.shape) if axis != min(1, target.ndim - 1))
        counted = target != self.ignore_index
        if self.weight is None:
            return counted.sum()
        return (self.weight.data[(target * counted).clip(0, self.weight.size - 1)] * counted).sum()


class CrossEntropyLoss(_LossOverClasses):
    """−log softmax(x)[target], by default averaged. As torch.nn.CrossEntropyLoss.

    x: logits (C,), (N, C) or (N, C, *d). target: class indices, () or (N, *d), or class probabilities of x's shape.
    weight: a factor for each class; it is not trained.
    """

    op = ops.cross_entropy

    def __init__(
        self,
        weight: Any = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ):
        super().__init__(weight, ignore_index, reduction)
        self.label_smoothing = label_smoothing

    def options(self) -> dict[str, Any]:
        return {**super().options(), "label_smoothing": self.label_smoothing}


class LinearCrossEntropyLoss(_LossOverClasses):
    """CrossEntropyLoss of a linear layer's outputs, which are never all there at once: a language model's head with its loss.

    As torch.nn.LinearCrossEntropyLoss. x: (…, in_features). target: class indices (…). Weights: ``linear.weight``
    (num_classes, in_features), which may be an embedding's (``loss.linear.weight = embedding.weight``), and with bias
    ``linear.bias`` (num_classes,). weight: a factor for each class; it is not trained. z_loss: a factor of the square of
    log Σ exp logits, that is added to each loss; softcap: logits are softcap · tanh(logits / softcap), 0: as they are.
    """

    op = ops.linear_cross_entropy

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = False,
        weight: Any = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float = 0.0,
    ):
        super().__init__(weight, ignore_index, reduction)
        self.linear = Linear(in_features, num_classes, bias)
        self.label_smoothing, self.z_loss, self.softcap = label_smoothing, z_loss, softcap

    def arguments(self, *xs: Any) -> tuple:
        return xs[0], self.linear.weight, xs[1], self.linear.bias, self.weight

    def options(self) -> dict[str, Any]:
        own = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss, "softcap": self.softcap}
        return super().options() | own

    def output_shape(self, *input_shapes: tuple) -> tuple:
        return () if self.reduction != "none" else tuple(input_shapes[0][:-1])


class NLLLoss(_LossOverClasses):
    """−x[target] for log-probabilities x, by default averaged. As torch.nn.NLLLoss.

    x: (C,), (N, C) or (N, C, *d). target: class indices, () or (N, *d). weight: a factor for each class; it is not
    trained.
    """

    op = ops.nll_loss

    def __init__(self, weight: Any = None, ignore_index: int = -100, reduction: str = "mean"):
        super().__init__(weight, ignore_index, reduction)


class MSELoss(OpLayer):
    """(x − target)², by default averaged. As torch.nn.MSELoss, but x and target must have one shape."""

    op = ops.mse

    def __init__(self, reduction: str = "mean"):
        self.reduction = reduction

    def options(self) -> dict[str, Any]:
        return {"reduction": self.reduction}
