"""Losses of one formula an element: torch.nn's, and torch.nn.functional's functions, over the one op of them all."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import loss as ops
from gpulayers.torch import _autocast
from gpulayers.torch._arguments import held
from gpulayers.torch._cross_entropy import reduction_of
from gpulayers.torch._op import TorchOp


def _kl_div(x: Tensor, target: Tensor, reduction: str, log_target: bool) -> Tensor:
    """Without the warning, which who calls gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return F.kl_div(x, target, reduction=reduction, log_target=log_target)


def _huber(x: Tensor, target: Tensor, reduction: str, delta: float, weight: Tensor | None) -> Tensor:
    """Weights are newer than the function."""
    weights = {} if weight is None else {"weight": weight}
    return F.huber_loss(x, target, reduction, delta, **weights)  # type: ignore[arg-type]


_TWINS = {
    "bce": lambda x, t, o, w, p, n, log, full, r: F.binary_cross_entropy(x, t, w, reduction=r),
    "bce_with_logits": lambda x, t, o, w, p, n, log, full, r: F.binary_cross_entropy_with_logits(
        x, t, w, reduction=r, pos_weight=p
    ),
    "kl_div": lambda x, t, o, w, p, n, log, full, r: _kl_div(x, t, r, log),
    "l1": lambda x, t, o, w, p, n, log, full, r: F.l1_loss(x, t, reduction=r),
    "smooth_l1": lambda x, t, o, w, p, n, log, full, r: F.smooth_l1_loss(x, t, reduction=r, beta=n),
    "huber": lambda x, t, o, w, p, n, log, full, r: _huber(x, t, r, n, w),
    "poisson_nll": lambda x, t, o, w, p, n, log, full, r: F.poisson_nll_loss(x, t, log, full, eps=n, reduction=r),
    "gaussian_nll": lambda x, t, o, w, p, n, log, full, r: F.gaussian_nll_loss(x, t, o, full, n, r),
    "hinge_embedding": lambda x, t, o, w, p, n, log, full, r: F.hinge_embedding_loss(x, t, n, reduction=r),
    "margin_ranking": lambda x, t, o, w, p, n, log, full, r: F.margin_ranking_loss(x, o, t, n, reduction=r),
    "soft_margin": lambda x, t, o, w, p, n, log, full, r: F.soft_margin_loss(x, t, reduction=r),
}


def _twin(
    x: Tensor, target: Tensor, other: Any, weight: Any, pos_weight: Any,
    loss: str, number: float, log: bool, full: bool, reduction: str,
) -> Tensor:  # fmt: skip
    return _TWINS[loss](x, target, other, weight, pos_weight, number, log, full, reduction)


_pointwise_loss = TorchOp(
    ops.pointwise_loss, _twin, "str loss, float number, bool log, bool full, str reduction", cast=_autocast.LOSS
)


def _of_one_size(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both broadcast to one shape, with torch's warning that this is seldom meant."""
    if target.shape != input.shape:
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=3,
        )
        input, target = torch.broadcast_tensors(input, target)
    return input, target


def _uncast(input: Tensor) -> contextlib.AbstractContextManager:
    """Without autocast on a CPU, which casts none of the operations that torch's own function is made of."""
    if input.is_cpu and torch.is_autocast_enabled("cpu"):
        return torch.autocast("cpu", enabled=False)
    return contextlib.nullcontext()


def _broadcast(*given: Tensor) -> tuple[Tensor, ...]:
    shape = given[0].shape
    return given if all(t.shape == shape for t in given) else tuple(torch.broadcast_tensors(*given))


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As ``torch.nn.functional.binary_cross_entropy``."""
    reduction = reduction_of(size_average, reduce, reduction)
    if target.shape != input.shape or (input.is_cuda and torch.is_autocast_enabled("cuda")):
        return F.binary_cross_entropy(input, target, weight, reduction=reduction)  # torch raises
    return _pointwise_loss(input, target, None, weight, None, "bce", 1.0, False, False, reduction)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """As ``torch.nn.functional.binary_cross_entropy_with_logits``."""
    reduction = reduction_of(size_average, reduce, reduction)
    return _pointwise_loss(input, target, None, weight, pos_weight, "bce_with_logits", 1.0, False, False, reduction)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """As ``torch.nn.functional.kl_div``, with its warning of "mean"."""
    if (size_average is None and reduce is None and reduction == "mean") or target.shape != input.shape:
        if reduction == "batchmean":  # it is the size of what is broadcast that torch divides by
            return F.kl_div(input, target, reduction=reduction, log_target=log_target)
        if reduction == "mean":
            warnings.warn(
                "reduction: 'mean' divides the total loss by both the batch size and the support size."
                "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
                "'mean' will be changed to behave the same as 'batchmean' in the next major release.",
                stacklevel=2,
            )
        input, target = _broadcast(input, target)
    reduction = reduction_of(size_average, reduce, reduction)
    return _pointwise_loss(input, target, None, None, None, "kl_div", 1.0, log_target, False, reduction)


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """As ``torch.nn.functional.l1_loss``. Weights, whose sum a mean is divided by, go to torch's own function."""
    if weight is not None:
        return F.l1_loss(input, target, size_average, reduce, reduction, weight)  # type: ignore[call-arg]
    input, target = _of_one_size(input, target)
    reduction = reduction_of(size_average, reduce, reduction)
    return _pointwise_loss(input, target, None, None, None, "l1", 1.0, False, False, reduction)


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    """As ``torch.nn.functional.smooth_l1_loss``."""
    input, target = _of_one_size(input, target)
    reduction = reduction_of(size_average, reduce, reduction)
    return _pointwise_loss(input, target, None, None, None, "smooth_l1", beta, False, False, reduction)


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """As ``torch.nn.functional.huber_loss``."""
    if weight is not None and weight.shape != input.shape:
        return _huber(input, target, reduction, delta, weight)  # torch raises
    input, target = _of_one_size(input, target)
    return _pointwise_loss(input, target, None, weight, None, "huber", delta, False, False, reduction)


def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As ``torch.nn.functional.poisson_nll_loss``."""
    input, target = _broadcast(input, target)
    reduction = reduction_of(size_average, reduce, reduction)
    return _pointwise_loss(input, target, None, None, None, "poisson_nll", eps, log_input, full, reduction)


def _variances(input: Tensor, var: Tensor) -> Tensor | None:
    """``var`` with an axis for each of the input's; None where its size is wrong."""
    if var.shape == input.shape:
        return var
    if input.shape[:-1] == var.shape:
        return var.unsqueeze(-1)
    differing = [n for m, n in zip(input.shape, var.shape) if m != n]
    return var if input.ndim == var.ndim and differing == [1] else None


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """As ``torch.nn.functional.gaussian_nll_loss``, but a GPU is not waited for: there a negative variance makes NaN."""
    if isinstance(var, float):
        if var < 0:
            return F.gaussian_nll_loss(input, target, var, full, eps, reduction)  # torch raises
        var = torch.full((), var, dtype=input.dtype, device=input.device)
        given = input, target, var
    else:
        spread = _variances(input, var)
        if spread is None:
            return F.gaussian_nll_loss(input, target, var, full, eps, reduction)  # torch raises
        given = input, target, spread
    input, target, var = _broadcast(*given)
    with _uncast(input):
        return _pointwise_loss(input, target, var, None, None, "gaussian_nll", eps, False, full, reduction)


def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As ``torch.nn.functional.hinge_embedding_loss``."""
    input, target = _broadcast(input, target)
    reduction = reduction_of(size_average, reduce, reduction)
    target = target.detach() if target.requires_grad else target  # it chooses, and has no gradient
    return _pointwise_loss(input, target, None, None, None, "hinge_embedding", float(margin), False, False, reduction)


def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As ``torch.nn.functional.margin_ranking_loss``."""
    reduction = reduction_of(size_average, reduce, reduction)
    if not input1.ndim == input2.ndim == target.ndim:
        return F.margin_ranking_loss(input1, input2, target, margin, reduction=reduction)  # torch raises
    input1, target, input2 = _broadcast(input1, target, input2)
    return _pointwise_loss(input1, target, input2, None, None, "margin_ranking", float(margin), False, False, reduction)


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As ``torch.nn.functional.soft_margin_loss``, without its overflow where −t x is large."""
    reduction = reduction_of(size_average, reduce, reduction)
    if target.requires_grad:
        return F.soft_margin_loss(input, target, reduction=reduction)  # torch raises
    return _pointwise_loss(input, target, None, None, None, "soft_margin", 1.0, False, False, reduction)


class BCELoss(nn.BCELoss):
    """``torch.nn.BCELoss`` over gpulayers' kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy(input, target, held(self, "weight"), reduction=self.reduction)


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """``torch.nn.BCEWithLogitsLoss`` over gpulayers' kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(
            input, target, held(self, "weight"), pos_weight=held(self, "pos_weight"), reduction=self.reduction
        )


class KLDivLoss(nn.KLDivLoss):
    """``torch.nn.KLDivLoss`` over gpulayers' kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class L1Loss(nn.L1Loss):
    """``torch.nn.L1Loss`` over gpulayers' kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(nn.SmoothL1Loss):
    """``torch.nn.SmoothL1Loss`` over gpulayers' kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(nn.HuberLoss):
    """``torch.nn.HuberLoss`` over gpulayers' kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class PoissonNLLLoss(nn.PoissonNLLLoss):
    """``torch.nn.PoissonNLLLoss`` over gpulayers' kernels."""

    def forward(self, log_input: Tensor, target: Tensor) -> Tensor:
        return poisson_nll_loss(
            log_input, target, log_input=self.log_input, full=self.full, eps=self.eps, reduction=self.reduction
        )


class GaussianNLLLoss(nn.GaussianNLLLoss):
    """``torch.nn.GaussianNLLLoss`` over gpulayers' kernels."""

    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        return gaussian_nll_loss(input, target, var, full=self.full, eps=self.eps, reduction=self.reduction)


class HingeEmbeddingLoss(nn.HingeEmbeddingLoss):
    """``torch.nn.HingeEmbeddingLoss`` over gpulayers' kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return hinge_embedding_loss(input, target, margin=self.margin, reduction=self.reduction)


class MarginRankingLoss(nn.MarginRankingLoss):
    """``torch.nn.MarginRankingLoss`` over gpulayers' kernels."""

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        return margin_ranking_loss(input1, input2, target, margin=self.margin, reduction=self.reduction)


class SoftMarginLoss(nn.SoftMarginLoss):
    """``torch.nn.SoftMarginLoss`` over gpulayers' kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return soft_margin_loss(input, target, reduction=self.reduction)
