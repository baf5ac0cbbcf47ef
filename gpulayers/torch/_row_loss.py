"""Losses of one number a sample: torch.nn's, and torch.nn.functional's functions, over the one op of them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import loss as ops
from gpulayers.torch import _autocast
from gpulayers.torch._arguments import held
from gpulayers.torch._cross_entropy import reduction_of
from gpulayers.torch._op import TorchOp
from gpulayers.torch._pointwise_loss import _broadcast, _uncast, margin_ranking_loss

_TWINS = {
    "triplet_margin": lambda x, s, t, y, w, m, p, eps, swap, r: F.triplet_margin_loss(
        x, s, t, m, p, eps, swap, reduction=r
    ),
    "cosine_embedding": lambda x, s, t, y, w, m, p, eps, swap, r: F.cosine_embedding_loss(x, s, y, m, reduction=r),
    "multi_margin": lambda x, s, t, y, w, m, p, eps, swap, r: F.multi_margin_loss(
        x, y, int(p) if p in (1, 2) else p, m, w, reduction=r
    ),
    "multilabel_soft_margin": lambda x, s, t, y, w, m, p, eps, swap, r: F.multilabel_soft_margin_loss(
        x, s, w, reduction=r
    ),
}


def _twin(
    x: Tensor, second: Any, third: Any, target: Any, weight: Any,
    loss: str, margin: float, p: float, eps: float, swap: bool, reduction: str,
) -> Tensor:  # fmt: skip
    return _TWINS[loss](x, second, third, target, weight, margin, p, eps, swap, reduction)


_row_loss = TorchOp(
    ops.row_loss,
    _twin,
    "str loss, float margin, float p, float eps, bool swap, str reduction",
    buffers=("slopes",),
    cast=_autocast.LOSS,
)


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As ``torch.nn.functional.triplet_margin_loss``. Norms of p < 1 and p = ∞ go to torch's own function."""
    reduction = reduction_of(size_average, reduce, reduction)
    if margin <= 0 or not anchor.ndim == positive.ndim == negative.ndim:  # torch raises
        return F.triplet_margin_loss(anchor, positive, negative, margin, p, eps, swap, reduction=reduction)
    given = _broadcast(anchor, positive, negative)
    return _row_loss(*given, None, None, "triplet_margin", float(margin), float(p), float(eps), swap, reduction)


def triplet_margin_with_distance_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """As ``torch.nn.functional.triplet_margin_with_distance_loss``. A distance of your own computes as it is written."""
    own, pairwise = distance_function, isinstance(distance_function, nn.PairwiseDistance)
    wrong = reduction not in ("mean", "sum", "none") or margin <= 0
    if wrong or not anchor.ndim == positive.ndim == negative.ndim:  # torch raises
        return F.triplet_margin_with_distance_loss(
            anchor, positive, negative, distance_function=own, margin=margin, swap=swap, reduction=reduction
        )
    if own is None or (pairwise and not own.keepdim):  # type: ignore[attr-defined]
        p, eps = (own.norm, own.eps) if pairwise else (2.0, 1e-6)  # type: ignore[union-attr]
        with _uncast(anchor):
            return triplet_margin_loss(anchor, positive, negative, margin, p, eps, swap, reduction=reduction)
    near, far = own(anchor, positive), own(anchor, negative)
    far = far.minimum(own(positive, negative)) if swap else far
    return margin_ranking_loss(far, near, far.new_ones(()).expand(far.shape), margin, reduction=reduction)


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As ``torch.nn.functional.cosine_embedding_loss``."""
    reduction = reduction_of(size_average, reduce, reduction)
    target = target.detach() if target.requires_grad else target  # it chooses, and has no gradient
    return _row_loss(input1, input2, None, target, None, "cosine_embedding", float(margin), 2.0, 0.0, False, reduction)


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As ``torch.nn.functional.multi_margin_loss``."""
    reduction = reduction_of(size_average, reduce, reduction)
    return _row_loss(input, None, None, target, weight, "multi_margin", float(margin), float(p), 0.0, False, reduction)


def _multilabel_margin_twin(x: Tensor, target: Tensor, reduction: str) -> Tensor:
    return F.multilabel_margin_loss(x, target, reduction=reduction)


_multilabel_margin = TorchOp(
    ops.multilabel_margin, _multilabel_margin_twin, "str reduction", buffers=("hits",), cast=_autocast.LOSS
)


def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As ``torch.nn.functional.multilabel_margin_loss``."""
    return _multilabel_margin(input, target, reduction_of(size_average, reduce, reduction))


def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As ``torch.nn.functional.multilabel_soft_margin_loss``."""
    reduction = reduction_of(size_average, reduce, reduction)
    with _uncast(input):
        return _row_loss(input, target, None, None, weight, "multilabel_soft_margin", 1.0, 2.0, 0.0, False, reduction)


class TripletMarginLoss(nn.TripletMarginLoss):
    """``torch.nn.TripletMarginLoss`` over gpulayers' kernels."""

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return triplet_margin_loss(
            anchor, positive, negative, self.margin, self.p, self.eps, self.swap, reduction=self.reduction
        )


class TripletMarginWithDistanceLoss(nn.TripletMarginWithDistanceLoss):
    """``torch.nn.TripletMarginWithDistanceLoss`` over gpulayers' kernels."""

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return triplet_margin_with_distance_loss(
            anchor,
            positive,
            negative,
            distance_function=self.distance_function,
            margin=self.margin,
            swap=self.swap,
            reduction=self.reduction,
        )


class CosineEmbeddingLoss(nn.CosineEmbeddingLoss):
    """``torch.nn.CosineEmbeddingLoss`` over gpulayers' kernels."""

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        return cosine_embedding_loss(input1, input2, target, margin=self.margin, reduction=self.reduction)


class MultiMarginLoss(nn.MultiMarginLoss):
    """``torch.nn.MultiMarginLoss`` over gpulayers' kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return multi_margin_loss(input, target, self.p, self.margin, held(self, "weight"), reduction=self.reduction)


class MultiLabelMarginLoss(nn.MultiLabelMarginLoss):
    """``torch.nn.MultiLabelMarginLoss`` over gpulayers' kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return multilabel_margin_loss(input, target, reduction=self.reduction)


class MultiLabelSoftMarginLoss(nn.MultiLabelSoftMarginLoss):
    """``torch.nn.MultiLabelSoftMarginLoss`` over gpulayers' kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return multilabel_soft_margin_loss(input, target, held(self, "weight"), reduction=self.reduction)
