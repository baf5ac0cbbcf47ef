"""Losses: cross entropy (of a linear layer's outputs, too), the negative log-likelihood, the mean squared error; and from
files of their own, others."""

from __future__ import annotations

import warnings
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import loss as ops
from gpulayers.torch import _autocast
from gpulayers.torch._adaptive import AdaptiveLogSoftmaxWithLoss as AdaptiveLogSoftmaxWithLoss
from gpulayers.torch._cross_entropy import _cross_entropy as _cross_entropy
from gpulayers.torch._cross_entropy import cross_entropy as cross_entropy
from gpulayers.torch._cross_entropy import reduction_of
from gpulayers.torch._ctc_loss import CTCLoss as CTCLoss
from gpulayers.torch._ctc_loss import _ctc_loss as _ctc_loss
from gpulayers.torch._ctc_loss import ctc_loss as ctc_loss
from gpulayers.torch._linear_cross_entropy import LinearCrossEntropyLoss as LinearCrossEntropyLoss
from gpulayers.torch._linear_cross_entropy import _linear_cross_entropy as _linear_cross_entropy
from gpulayers.torch._linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from gpulayers.torch._op import TorchOp
from gpulayers.torch._pointwise_loss import BCELoss as BCELoss
from gpulayers.torch._pointwise_loss import BCEWithLogitsLoss as BCEWithLogitsLoss
from gpulayers.torch._pointwise_loss import GaussianNLLLoss as GaussianNLLLoss
from gpulayers.torch._pointwise_loss import HingeEmbeddingLoss as HingeEmbeddingLoss
from gpulayers.torch._pointwise_loss import HuberLoss as HuberLoss
from gpulayers.torch._pointwise_loss import KLDivLoss as KLDivLoss
from gpulayers.torch._pointwise_loss import L1Loss as L1Loss
from gpulayers.torch._pointwise_loss import MarginRankingLoss as MarginRankingLoss
from gpulayers.torch._pointwise_loss import PoissonNLLLoss as PoissonNLLLoss
from gpulayers.torch._pointwise_loss import SmoothL1Loss as SmoothL1Loss
from gpulayers.torch._pointwise_loss import SoftMarginLoss as SoftMarginLoss
from gpulayers.torch._pointwise_loss import _pointwise_loss as _pointwise_loss
from gpulayers.torch._pointwise_loss import binary_cross_entropy as binary_cross_entropy
from gpulayers.torch._pointwise_loss import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from gpulayers.torch._pointwise_loss import gaussian_nll_loss as gaussian_nll_loss
from gpulayers.torch._pointwise_loss import hinge_embedding_loss as hinge_embedding_loss
from gpulayers.torch._pointwise_loss import huber_loss as huber_loss
from gpulayers.torch._pointwise_loss import kl_div as kl_div
from gpulayers.torch._pointwise_loss import l1_loss as l1_loss
from gpulayers.torch._pointwise_loss import margin_ranking_loss as margin_ranking_loss
from gpulayers.torch._pointwise_loss import poisson_nll_loss as poisson_nll_loss
from gpulayers.torch._pointwise_loss import smooth_l1_loss as smooth_l1_loss
from gpulayers.torch._pointwise_loss import soft_margin_loss as soft_margin_loss
from gpulayers.torch._row_loss import CosineEmbeddingLoss as CosineEmbeddingLoss
from gpulayers.torch._row_loss import MultiLabelMarginLoss as MultiLabelMarginLoss
from gpulayers.torch._row_loss import MultiLabelSoftMarginLoss as MultiLabelSoftMarginLoss
from gpulayers.torch._row_loss import MultiMarginLoss as MultiMarginLoss
from gpulayers.torch._row_loss import TripletMarginLoss as TripletMarginLoss
from gpulayers.torch._row_loss import TripletMarginWithDistanceLoss as TripletMarginWithDistanceLoss
from gpulayers.torch._row_loss import _multilabel_margin as _multilabel_margin
from gpulayers.torch._row_loss import _row_loss as _row_loss
from gpulayers.torch._row_loss import cosine_embedding_loss as cosine_embedding_loss
from gpulayers.torch._row_loss import multi_margin_loss as multi_margin_loss
from gpulayers.torch._row_loss import multilabel_margin_loss as multilabel_margin_loss
from gpulayers.torch._row_loss import multilabel_soft_margin_loss as multilabel_soft_margin_loss
from gpulayers.torch._row_loss import triplet_margin_loss as triplet_margin_loss
from gpulayers.torch._row_loss import triplet_margin_with_distance_loss as triplet_margin_with_distance_loss


def _nll_loss_twin(x: Tensor, target: Tensor, weight: Any, ignore_index: int, reduction: str) -> Tensor:
    return F.nll_loss(x, target, weight, ignore_index=ignore_index, reduction=reduction)


def _mse_twin(x: Tensor, target: Tensor, reduction: str) -> Tensor:
    return F.mse_loss(x, target, reduction=reduction)


_nll_loss = TorchOp(
    ops.nll_loss, _nll_loss_twin, "int ignore_index, str reduction", buffers=("total",), cast=_autocast.LOSS
)
_mse = TorchOp(ops.mse, _mse_twin, "str reduction", cast=_autocast.LOSS)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As ``torch.nn.functional.nll_loss``."""
    return _nll_loss(input, target, weight, ignore_index, reduction_of(size_average, reduce, reduction))


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """As ``torch.nn.functional.mse_loss``. Shapes that have to be broadcast, dtypes that differ and weights go to
    torch's own function."""
    reduction = reduction_of(size_average, reduce, reduction)
    if weight is not None:
        return F.mse_loss(input, target, reduction=reduction, weight=weight)  # type: ignore[call-arg]
    return _mse(input, target, reduction)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` over gpulayers' kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class NLLLoss(nn.NLLLoss):
    """``torch.nn.NLLLoss`` over gpulayers' kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return nll_loss(input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a class that is made of one that torch deprecates

    class NLLLoss2d(nn.NLLLoss2d):
        """``torch.nn.NLLLoss2d``, the older name of NLLLoss, over gpulayers' kernels."""

        def __init__(self, *args: Any, **kwargs: Any):
            warnings.warn(nn.NLLLoss2d.__deprecated__, FutureWarning, stacklevel=2)
            super().__init__(*args, **kwargs)

        forward = NLLLoss.forward  # type: ignore[assignment]


class MSELoss(nn.MSELoss):
    """``torch.nn.MSELoss`` over gpulayers' kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return mse_loss(input, target, reduction=self.reduction)
