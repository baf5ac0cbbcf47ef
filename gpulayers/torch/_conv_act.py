"""A convolution and what may follow it, as one call and one autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpulayers.torch import _epilogue
from gpulayers.torch._arguments import held
from gpulayers.torch._conv_norm import is_alike
from gpulayers.torch.conv import Conv1d, Conv2d, Conv3d, _conv, walks

CONVOLUTIONS = (Conv1d, Conv2d, Conv3d)


def conv_act(conv: Any, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """f(conv(x) + residual); NotImplemented for x without a batch, padding that torch refuses, a residual of another shape
    or dtype, and where the gradient of a gradient would need x, which nothing else keeps."""
    weight = held(conv, "weight")
    axes = weight.dim() - 2
    how = walks(axes, weight, conv.stride, conv.padding, conv.dilation) if x.dim() == axes + 2 else None
    if how is None or (residual is not None and not is_alike(residual, x, weight, how)):
        return NotImplemented
    if activation not in _epilogue.BY_Y and torch.is_grad_enabled() and not weight.requires_grad:
        return NotImplemented
    x, _ = conv.ready(x, weight)
    if conv.padding_mode != "zeros":  # it is done
        how = (how[0], (0,) * axes, how[2])
    return _conv(x, weight, held(conv, "bias"), None, residual, *how, conv.groups, activation)
