"""Padding of images: ``torch.nn.functional.pad`` and torch.nn's classes for images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import padding as ops
from gpulayers.torch import _autocast
from gpulayers.torch._arguments import batched
from gpulayers.torch._op import TorchOp


def _pad2d_twin(x: Tensor, padding: Sequence[int], mode: str, value: float) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom), mode, value if mode == "constant" else None)


_pad2d = TorchOp(ops.pad2d, _pad2d_twin, "SymInt[] padding, str mode, float value")


def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """As ``torch.nn.functional.pad``. Images, (N, C, H, W) or (C, H, W), padded in height and width are gpulayers', and so
    are sequences and volumes padded by other than a constant; all else is torch's."""
    axes = len(pad) // 2
    served = isinstance(input, Tensor) and input.is_floating_point() and input.dim() in (axes + 1, axes + 2)
    if not served or len(pad) not in ((4,) if mode == "constant" else (2, 4, 6)) or (mode != "constant" and value):
        return F.pad(input, pad, mode, value)
    if mode in ("reflect", "replicate"):
        (input,) = _autocast.cast(_autocast.ON_CPU, (input,), 1)
    rank = input.dim()
    if axes == 1:
        return _images(input.unsqueeze(-2), (*pad, 0, 0), mode, value).squeeze(-2)
    if axes == 2:
        return _images(input, pad, mode, value)
    wide = _images(
        input.flatten(rank - 4, rank - 3), pad[:4], mode, value
    )  # height and width, the depth among channels
    wide = wide.unflatten(rank - 4, input.shape[rank - 4 : rank - 2])
    deep = _images(wide.flatten(rank - 2), (0, 0, *pad[4:]), mode, value)
    return deep.unflatten(rank - 2, wide.shape[rank - 2 :])


def _images(input: Tensor, pad: Sequence[int], mode: str, value: float | None) -> Tensor:
    left, right, top, bottom = pad
    return batched(_pad2d, 4, input, (top, bottom, left, right), mode, float(value or 0))


class _Padding:
    """A class of torch.nn's that pads: its forward, with ours in place of torch's function."""

    padding: Any
    mode = "constant"
    value: Any = None

    def forward(self, input: Tensor) -> Tensor:
        return pad(input, self.padding, self.mode, self.value)


class ConstantPad2d(_Padding, nn.ConstantPad2d):
    """``torch.nn.ConstantPad2d`` over gpulayers' kernels."""


class ZeroPad2d(_Padding, nn.ZeroPad2d):
    """``torch.nn.ZeroPad2d`` over gpulayers' kernels."""


class ReflectionPad2d(_Padding, nn.ReflectionPad2d):
    """``torch.nn.ReflectionPad2d`` over gpulayers' kernels."""

    mode = "reflect"


class ReplicationPad2d(_Padding, nn.ReplicationPad2d):
    """``torch.nn.ReplicationPad2d`` over gpulayers' kernels."""

    mode = "replicate"


class CircularPad2d(_Padding, nn.CircularPad2d):
    """``torch.nn.CircularPad2d`` over gpulayers' kernels."""

    mode = "circular"

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return super().forward(input)
