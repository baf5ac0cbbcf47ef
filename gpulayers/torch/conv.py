"""Convolution of images: ``torch.nn.Conv2d`` and ``torch.nn.functional.conv2d``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import conv as ops
from gpulayers.torch import _autocast
from gpulayers.torch._arguments import batched, held, pair
from gpulayers.torch._op import TorchOp
from gpulayers.torch.padding import pad


def _conv2d_twin(
    x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Sequence[int], dilation: Any, groups: int
) -> Tensor:
    """padding: (top, bottom, left, right), or what torch's function takes."""
    if len(padding) == 4 and not isinstance(padding, str):
        top, bottom, left, right = padding
        if (top, left) != (bottom, right):
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        padding = (top, left)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _flops(x: Sequence[int], weight: Sequence[int], y: Sequence[int]) -> dict[str, int]:
    once, groups = 2 * math.prod(y) * math.prod(weight[1:]), x[1] // weight[1]
    return {"y": once, "x": once, "weight": once * groups}  # as torch counts the latter


_conv2d = TorchOp(
    ops.conv2d,
    _conv2d_twin,
    "int[] stride, int[] padding, int[] dilation, int groups",
    cast=_autocast.LOWER,
    flops=_flops,
    direct=True,
)


def _sides(padding: Any, weight: Tensor, dilation: Sequence[int]) -> tuple:
    """(top, bottom, left, right) of a padding in torch's words."""
    if padding == "same":
        reach = [d * (k - 1) for k, d in zip(weight.shape[2:], dilation)]
        return tuple(side for r in reach for side in (r // 2, r - r // 2))
    top, left = (0, 0) if padding == "valid" else pair(padding)
    return top, top, left, left


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """As ``torch.nn.functional.conv2d``: input (N, C, H, W) or (C, H, W), weight (O, C / groups, kh, kw)."""
    strides, dilations = pair(stride), pair(dilation)
    if isinstance(padding, str) and (padding not in ("same", "valid") or (padding == "same" and strides != (1, 1))):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)  # raises
    sides = _sides(padding, weight, dilations)
    return batched(_conv2d, 4, input, weight, bias, strides, sides, dilations, groups)


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, held(self, "weight"), held(self, "bias"))

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input, padding = pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)
