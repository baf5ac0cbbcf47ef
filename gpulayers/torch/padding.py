"""Padding: ``torch.nn.functional.pad`` and torch.nn's classes for sequences, images and volumes."""

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

_MOST_AXES = 3


def _other_end(padding: Sequence[int]) -> tuple[int, ...]:
    """Pairs in the other order of axes: torch's begin with the last, the op's with the first."""
    return tuple([side for at in range(len(padding) - 2, -1, -2) for side in padding[at : at + 2]])


def _pad_twin(x: Tensor, padding: Sequence[int], mode: str, value: float) -> Tensor:
    return F.pad(x, _other_end(padding), mode, value if mode == "constant" else None)


_pad = TorchOp(ops.pad, _pad_twin, "SymInt[] padding, str mode, float value")


def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """As ``torch.nn.functional.pad``: (left, right, top, bottom, …), the last axis first. A constant pads any axes of a
    tensor of any rank; other modes up to three, of (N, C, …) or (C, …)."""
    if not isinstance(input, Tensor) or not input.is_floating_point() or (mode != "constant" and value):
        return F.pad(input, pad, mode, value)
    count = len(pad) // 2
    before = input.dim() - count
    if 0 < count <= _MOST_AXES and before in (1, 2) and len(pad) % 2 == 0:
        if mode == "replicate" or (mode == "reflect" and count < 3):
            (input,) = _autocast.cast(_autocast.ON_CPU, (input,), 1)
        return batched(_pad, count + 2, input, _other_end(pad), mode, float(value or 0))
    if mode != "constant" or len(pad) % 2 or before < 0 or not count:
        return F.pad(input, pad, mode, value)
    return _pad_any(input, tuple(pad), before, value)


def _pad_any(input: Tensor, sides: tuple[int, ...], before: int, value: float | None) -> Tensor:
    """A constant around axes with no axis before them, or several, or around more axes than the op takes."""
    if len(sides) > 2 * _MOST_AXES:
        inner = pad(input, sides[: 2 * _MOST_AXES], "constant", value)
        outer = pad(inner.flatten(-_MOST_AXES), (0, 0, *sides[2 * _MOST_AXES :]), "constant", value)
        return outer.unflatten(-1, inner.shape[-_MOST_AXES:])
    if before == 0:
        return pad(input.unsqueeze(0), sides, "constant", value).squeeze(0)
    return pad(input.flatten(0, before - 2), sides, "constant", value).unflatten(0, input.shape[: before - 1])


class _Padding:
    """A class of torch.nn's that pads: its forward, with ours in place of torch's function."""

    padding: Any
    mode = "constant"
    value: Any = None

    def forward(self, input: Tensor) -> Tensor:
        return pad(input, self.padding, self.mode, self.value)


class _Reflecting(_Padding):
    mode = "reflect"


class _Replicating(_Padding):
    mode = "replicate"


class _Circling(_Padding):
    mode = "circular"

    def forward(self: Any, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return pad(input, self.padding, self.mode)


class ConstantPad1d(_Padding, nn.ConstantPad1d):
    """``torch.nn.ConstantPad1d`` over gpulayers' kernels."""


class ConstantPad2d(_Padding, nn.ConstantPad2d):
    """``torch.nn.ConstantPad2d`` over gpulayers' kernels."""


class ConstantPad3d(_Padding, nn.ConstantPad3d):
    """``torch.nn.ConstantPad3d`` over gpulayers' kernels."""


class ZeroPad1d(_Padding, nn.ZeroPad1d):
    """``torch.nn.ZeroPad1d`` over gpulayers' kernels."""


class ZeroPad2d(_Padding, nn.ZeroPad2d):
    """``torch.nn.ZeroPad2d`` over gpulayers' kernels."""


class ZeroPad3d(_Padding, nn.ZeroPad3d):
    """``torch.nn.ZeroPad3d`` over gpulayers' kernels."""


class ReflectionPad1d(_Reflecting, nn.ReflectionPad1d):
    """``torch.nn.ReflectionPad1d`` over gpulayers' kernels."""


class ReflectionPad2d(_Reflecting, nn.ReflectionPad2d):
    """``torch.nn.ReflectionPad2d`` over gpulayers' kernels."""


class ReflectionPad3d(_Reflecting, nn.ReflectionPad3d):
    """``torch.nn.ReflectionPad3d`` over gpulayers' kernels."""


class ReplicationPad1d(_Replicating, nn.ReplicationPad1d):
    """``torch.nn.ReplicationPad1d`` over gpulayers' kernels."""


class ReplicationPad2d(_Replicating, nn.ReplicationPad2d):
    """``torch.nn.ReplicationPad2d`` over gpulayers' kernels."""


class ReplicationPad3d(_Replicating, nn.ReplicationPad3d):
    """``torch.nn.ReplicationPad3d`` over gpulayers' kernels."""


class CircularPad1d(_Circling, nn.CircularPad1d):
    """``torch.nn.CircularPad1d`` over gpulayers' kernels."""


class CircularPad2d(_Circling, nn.CircularPad2d):
    """``torch.nn.CircularPad2d`` over gpulayers' kernels."""


class CircularPad3d(_Circling, nn.CircularPad3d):
    """``torch.nn.CircularPad3d`` over gpulayers' kernels."""
