"""Losses: cross entropy, the negative log-likelihood, the mean squared error."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import loss as ops
from gpulayers.torch import _autocast
from gpulayers.torch._op import TorchOp


def _cross_entropy_twin(
    x: Tensor, target: Tensor, weight: Any, ignore_index: int, label_smoothing: float, reduction: str
) -> Tensor:
    return F.cross_entropy(
        x, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


def _nll_loss_twin(x: Tensor, target: Tensor, weight: Any, ignore_index: int, reduction: str) -> Tensor:
    return F.nll_loss(x, target, weight, ignore_index=ignore_index, reduction=reduction)


def _mse_twin(x: Tensor, target: Tensor, reduction: str) -> Tensor:
    return F.mse_loss(x, target, reduction=reduction)


_cross_entropy = TorchOp(
    ops.cross_entropy,
    _cross_entropy_twin,
    "int ignore_index, float label_smoothing, str reduction",
    buffers=("lse", "mass", "total"),
    cast=_autocast.LOSS,
)
_nll_loss = TorchOp(
    ops.nll_loss, _nll_loss_twin, "int ignore_index, str reduction", buffers=("total",), cast=_autocast.LOSS
)
_mse = TorchOp(ops.mse, _mse_twin, "str reduction", cast=_autocast.LOSS)


def _linear_twin(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Any,
    class_weight: Any,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    z_loss: float,
    softcap: float,
) -> Tensor:
    logits = F.linear(x, weight, bias).flatten(0, -2)
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    labels = target.flatten()
    how: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if not z_loss:
        loss = F.cross_entropy(logits, labels, class_weight, reduction=reduction, **how)
        return loss.reshape(target.shape) if reduction == "none" else loss
    counts = labels != ignore_index
    each = F.cross_entropy(logits, labels, class_weight, reduction="none", **how)
    each = each + z_loss * torch.where(counts, logits.logsumexp(-1).square(), 0)
    if reduction == "none":
        return each.reshape(target.shape)
    share = counts if class_weight is None else torch.where(counts, class_weight[torch.where(counts, labels, 0)], 0)
    return each.sum() / share.sum() if reduction == "mean" else each.sum()


def _once(*_: Any) -> list:
    raise NotImplementedError(
        "linear_cross_entropy: no gradient of its gradient, which is made in the forward pass; use linear and cross_entropy"
    )


_linear_cross_entropy = TorchOp(
    ops.linear_cross_entropy,
    _linear_twin,
    "int ignore_index, float label_smoothing, str reduction, float z_loss, float softcap",
    buffers=("dx", "dweight", "dbias"),
    again=_once,
)


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The reduction that torch's older arguments stand for."""
    if size_average is None and reduce is None:
        return reduction
    return nn._reduction.legacy_get_string(size_average, reduce)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """As ``torch.nn.functional.cross_entropy``: target is class indices, or probabilities."""
    reduction = _reduction(size_average, reduce, reduction)
    return _cross_entropy(input, target, weight, ignore_index, label_smoothing, reduction)


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
    return _nll_loss(input, target, weight, ignore_index, _reduction(size_average, reduce, reduction))


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
    reduction = _reduction(size_average, reduce, reduction)
    if weight is not None:
        return F.mse_loss(input, target, reduction=reduction, weight=weight)  # type: ignore[call-arg]
    return _mse(input, target, reduction)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """Cross entropy of linear(input, linear_weight, linear_bias), whose logits are there for some tokens at a time only.

    As ``torch.nn.functional.linear_cross_entropy`` of newer torch, for class indices and weights (C, D); input may be
    (…, D) for target (…). z_loss, softcap: as in ``gpulayers.ops.loss.linear_cross_entropy``. options, which say how torch
    cuts the tokens, are ignored; probabilities and weights of more dimensions are torch's own function's.
    """
    plain = isinstance(input, Tensor) and isinstance(linear_weight, Tensor) and isinstance(target, Tensor)
    if not plain or linear_weight.dim() != 2 or target.is_floating_point() or input.dim() < 2:
        theirs: Any = F.linear_cross_entropy  # type: ignore[attr-defined]
        return theirs(
            input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction,
            ignore_index=ignore_index, label_smoothing=label_smoothing, options=options,
        )  # fmt: skip
    ignored = -100 if ignore_index is None else ignore_index
    how = ignored, float(label_smoothing), reduction, float(z_loss), float(softcap)
    given = _autocast.cast(_autocast.LOWER, (input, linear_weight, target, linear_bias, weight), 5)
    loss = _linear_cross_entropy(*given, *how)
    return loss.float() if given[0] is not input else loss  # as torch's loss of what autocast made


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


class MSELoss(nn.MSELoss):
    """``torch.nn.MSELoss`` over gpulayers' kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return mse_loss(input, target, reduction=self.reduction)
