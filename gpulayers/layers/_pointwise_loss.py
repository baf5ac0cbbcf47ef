"""Losses of one formula an element, as layers of x and its target. As torch.nn's of their names, but x and the target have
one shape; their formulas are those of ``gpulayers.ops.loss.pointwise_loss``."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.layers._layer import OpLayer
from gpulayers.ops import loss as ops


class _PointwiseLoss(OpLayer):
    """Its formula by name, its number, and its reduction: "mean", "sum" or "none"."""

    op = ops.pointwise_loss
    casts_weights = True
    loss = ""
    number = 1.0
    log = full = False
    weight: Any = None
    pos_weight: Any = None

    def __init__(self, reduction: str = "mean"):
        self.reduction = reduction

    def _factor(self, name: str, values: Any) -> Any:
        """A factor of each element, or None; it is not trained."""
        if values is None:
            return None
        values = np.asarray(values, np.float32)
        return self.add_weight(name, values.shape, lambda *_: values, trainable=False)

    def arguments(self, *xs: Any) -> tuple:
        x, target, *other = xs
        return x, target, *(other or [None]), self.weight, self.pos_weight

    def options(self) -> dict[str, Any]:
        numbers = {"number": self.number, "log": self.log, "full": self.full}
        return {"loss": self.loss, **numbers, "reduction": self.reduction}


class BCELoss(_PointwiseLoss):
    """−t log x − (1 − t) log(1 − x), logarithms at least −100, by default averaged. As torch.nn.BCELoss.

    x: probabilities. target: x's shape. weight: a factor of each element, of a shape that broadcasts to x's; not trained.
    """

    loss = "bce"

    def __init__(self, weight: Any = None, reduction: str = "mean"):
        super().__init__(reduction)
        self.weight = self._factor("weight", weight)


class BCEWithLogitsLoss(_PointwiseLoss):
    """BCELoss of σ(x), without its overflow, by default averaged. As torch.nn.BCEWithLogitsLoss.

    x: logits. target: x's shape. weight: a factor of each element; pos_weight: one of the targets' part t log σ(x); of
    shapes that broadcast to x's, and not trained.
    """

    loss = "bce_with_logits"

    def __init__(self, weight: Any = None, reduction: str = "mean", pos_weight: Any = None):
        super().__init__(reduction)
        self.weight = self._factor("weight", weight)
        self.pos_weight = self._factor("pos_weight", pos_weight)


class KLDivLoss(_PointwiseLoss):
    """t (log t − x) for log-probabilities x, by default averaged over all elements. As torch.nn.KLDivLoss.

    log_target: the target is log t. reduction: "batchmean" too, the sum by the number of samples: the divergence itself.
    """

    loss = "kl_div"

    def __init__(self, reduction: str = "mean", log_target: bool = False):
        super().__init__(reduction)
        self.log_target = self.log = log_target


class L1Loss(_PointwiseLoss):
    """|x − target|, by default averaged. As torch.nn.L1Loss."""

    loss = "l1"


class SmoothL1Loss(_PointwiseLoss):
    """d² / (2 beta) where d = |x − target| < beta, else d − beta / 2, by default averaged. As torch.nn.SmoothL1Loss."""

    loss = "smooth_l1"

    def __init__(self, reduction: str = "mean", beta: float = 1.0):
        super().__init__(reduction)
        self.beta = self.number = beta


class HuberLoss(_PointwiseLoss):
    """d² / 2 where d = |x − target| < delta, else delta (d − delta / 2), by default averaged. As torch.nn.HuberLoss."""

    loss = "huber"

    def __init__(self, reduction: str = "mean", delta: float = 1.0):
        super().__init__(reduction)
        self.delta = self.number = delta


class PoissonNLLLoss(_PointwiseLoss):
    """exp(x) − t x, or without log_input x − t log(x + eps), by default averaged. As torch.nn.PoissonNLLLoss.

    target: counts t, float or integer. full: with Stirling's approximation of log t!.
    """

    loss = "poisson_nll"

    def __init__(self, log_input: bool = True, full: bool = False, eps: float = 1e-8, reduction: str = "mean"):
        super().__init__(reduction)
        self.log_input = self.log = log_input
        self.full = full
        self.eps = self.number = eps


class GaussianNLLLoss(_PointwiseLoss):
    """(log v + (x − t)² / v) / 2 with v = max(variance, eps), by default averaged. As torch.nn.GaussianNLLLoss.

    Called with x, target and variance, all of one shape. full: with log(2π) / 2.
    """

    loss = "gaussian_nll"

    def __init__(self, full: bool = False, eps: float = 1e-6, reduction: str = "mean"):
        super().__init__(reduction)
        self.full = full
        self.eps = self.number = eps


class HingeEmbeddingLoss(_PointwiseLoss):
    """x where the target is 1, max(margin − x, 0) where it is −1, by default averaged. As torch.nn.HingeEmbeddingLoss."""

    loss = "hinge_embedding"

    def __init__(self, margin: float = 1.0, reduction: str = "mean"):
        super().__init__(reduction)
        self.margin = self.number = margin


class MarginRankingLoss(_PointwiseLoss):
    """max(margin − t (x − other), 0), by default averaged: t is 1 where x ought to be the larger one, −1 where other.

    Called with x, other and target, all of one shape. As torch.nn.MarginRankingLoss.
    """

    loss = "margin_ranking"

    def __init__(self, margin: float = 0.0, reduction: str = "mean"):
        super().__init__(reduction)
        self.margin = self.number = margin

    def arguments(self, *xs: Any) -> tuple:
        x, other, target = xs
        return x, target, other

    def backward(self, *dys: Any, **_: Any) -> Any:
        found = super().backward(*dys)
        return (found[0], found[2], found[1]) if len(found) == 3 else (*found, None)


class SoftMarginLoss(_PointwiseLoss):
    """log(1 + exp(−t x)) for targets t = ±1, by default averaged. As torch.nn.SoftMarginLoss."""

    loss = "soft_margin"
