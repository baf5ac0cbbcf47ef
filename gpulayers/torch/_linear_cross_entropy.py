"""Cross entropy of a linear layer's outputs: ``torch.nn.LinearCrossEntropyLoss`` and ``torch.nn.functional.linear_cross_entropy``
of newer torch, in any."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import loss as ops
from gpulayers.torch import _autocast, linear
from gpulayers.torch._arguments import held
from gpulayers.torch._cross_entropy import cross_entropy
from gpulayers.torch._op import TorchOp


def _twin(
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
    wide: bool,
) -> Tensor:
    logits = F.linear(x, weight, bias).reshape(-1, weight.shape[0])
    logits = logits.float() if wide else logits
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


_linear_cross_entropy = TorchOp(
    ops.linear_cross_entropy,
    _twin,
    "int ignore_index, float label_smoothing, str reduction, float z_loss, float softcap, bool wide",
    buffers=("dx", "dweight", "dbias", "total"),
)


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

    As ``torch.nn.functional.linear_cross_entropy`` of newer torch; input may also be (…, D) for target (…). z_loss, softcap:
    as in ``gpulayers.ops.loss.linear_cross_entropy``. Under autocast the loss is float32, as torch's. Probabilities, and
    weights (C, *d, D) of several losses a sample, go through all logits at once: ``linear`` and ``cross_entropy``. options,
    which say how torch cuts the tokens, are ignored: gradients of gradients, too, are there for all calls.
    """
    ignored = -100 if ignore_index is None else ignore_index
    how = ignored, float(label_smoothing), reduction, float(z_loss), float(softcap)
    plain = isinstance(input, Tensor) and isinstance(linear_weight, Tensor) and isinstance(target, Tensor)
    if not plain or linear_weight.dim() != 2 or target.is_floating_point() or input.dim() < 1:
        return _of_all_logits(input, linear_weight, target, linear_bias, weight, ignore_index is not None, *how)
    wide = False
    if _autocast.is_on(input.device.type):
        given = input, linear_weight, target, linear_bias
        input, linear_weight, target, linear_bias = _autocast.cast(_autocast.LOWER, given, 4)
        wide = input.dtype.itemsize == 2
        weight = weight.float() if wide and weight is not None else weight
    return _linear_cross_entropy(input, linear_weight, target, linear_bias, weight, *how, wide)


def _of_all_logits(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    bias: Any,
    weight: Any,
    ignores: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """Raises RuntimeError by torch's rules for shapes."""
    _require_shapes(input, linear_weight, bias)
    if z_loss or softcap:
        rule = "class indices and linear_weight (C, D) where z_loss or softcap are given"
        raise RuntimeError(
            f"linear_cross_entropy: target: the rule is {rule}; got {target.dtype}, {list(linear_weight.shape)}"
        )
    (classes, *several), features = linear_weight.shape[:-1], linear_weight.shape[-1]
    logits = linear.linear(input, linear_weight.reshape(-1, features), None if bias is None else bias.flatten())
    logits = logits.reshape(*input.shape[:-1], classes, *several)
    if ignores and target.shape == logits.shape:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    how: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    return cross_entropy(logits, target, weight, reduction=reduction, **how)


def _require_shapes(x: Tensor, weight: Tensor, bias: Any) -> None:
    rules = {
        "input": (x, "input.shape = (D,) or (N, D)", x.dim() in (1, 2)),
        "linear_weight": (
            weight,
            "linear_weight.shape = (C, *d, D)",
            weight.dim() > 1 and weight.shape[-1:] == x.shape[-1:],
        ),
        "linear_bias": (bias, "linear_bias.shape = (C, *d)", bias is None or bias.shape == weight.shape[:-1]),
    }
    for name, (t, rule, holds) in rules.items():
        if not holds:
            raise RuntimeError(f"linear_cross_entropy: {name}: the rule is {rule}; got {list(t.shape)}")
    if x.dim() == 1 and weight.dim() > 2:
        rule = "input.shape = (N, D) for linear_weight.shape = (C, *d, D)"
        raise RuntimeError(
            f"linear_cross_entropy: input: the rule is {rule}; got {list(x.shape)}, {list(weight.shape)}"
        )


class _Loss(nn.modules.loss._WeightedLoss):
    """``torch.nn.LinearCrossEntropyLoss`` for a torch that has none."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ):
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        super().__init__(weight, reduction=reduction)
        self.num_classes, self.out_features, self.ignore_index = num_classes, out_features, ignore_index
        self.label_smoothing, self.options = label_smoothing, options
        self.linear = nn.Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)

    def extra_repr(self) -> str:
        shown = {
            "in_features": self.linear.in_features,
            "num_classes": self.num_classes,
            "out_features": self.out_features,
        }
        shown |= {"bias": self.linear.bias is not None, "reduction": self.reduction, "ignore_index": self.ignore_index}
        shown |= {"label_smoothing": self.label_smoothing, "options": self.options}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


_Base: Any = getattr(nn, "LinearCrossEntropyLoss", _Loss)


class LinearCrossEntropyLoss(_Base):
    """``torch.nn.LinearCrossEntropyLoss`` over gpulayers' kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        weight, bias = held(self.linear, "weight"), held(self.linear, "bias")
        if self.out_features:
            shape = (self.num_classes, *self.out_features)
            weight, bias = weight.reshape(*shape, -1), None if bias is None else bias.reshape(shape)
        return linear_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
