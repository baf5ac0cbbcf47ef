"""Cross entropy, and the reduction of every loss: ``torch.nn.functional.cross_entropy``."""

from __future__ import annotations

from typing import Any

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


_cross_entropy = TorchOp(
    ops.cross_entropy,
    _cross_entropy_twin,
    "int ignore_index, float label_smoothing, str reduction",
    buffers=("lse", "mass", "total"),
    cast=_autocast.LOSS,
)


def reduction_of(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
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
    reduction = reduction_of(size_average, reduce, reduction)
    return _cross_entropy(input, target, weight, ignore_index, label_smoothing, reduction)
