"""Linear: ``torch.nn.Linear`` and ``torch.nn.functional.linear``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import linear as ops
from gpulayers.torch import _autocast
from gpulayers.torch._arguments import held
from gpulayers.torch._op import TorchOp


def _flops(x: Sequence[int], weight: Sequence[int], y: Sequence[int]) -> dict[str, int]:
    return dict.fromkeys(("y", "x", "weight"), 2 * math.prod(x) * math.prod(weight[:-1]))


_linear = TorchOp(ops.linear, F.linear, cast=_autocast.LOWER, flops=_flops)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b; input: (…, in), weight: (out, in) or (in,), bias: (out,). As ``torch.nn.functional.linear``."""
    return _linear(input, weight, bias)


class Linear(nn.Linear):
    """``torch.nn.Linear`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, held(self, "weight"), held(self, "bias"))


class Flatten(nn.Flatten):
    """``torch.nn.Flatten``: a view, nothing to compute."""
