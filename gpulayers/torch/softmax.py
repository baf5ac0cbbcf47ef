"""Softmax, log-softmax, softmin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import softmax as ops
from gpulayers.torch import _autocast
from gpulayers.torch._op import TorchOp


def _softmax_again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    (dy,), y = dys, saved["y"]
    return [y * (dy - (dy * y).sum(options["axis"], keepdim=True))]


def _softmin_again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    return [-g for g in _softmax_again(dys, saved, inputs, options)]


def _log_softmax_again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    (dy,), y = dys, saved["y"]
    return [dy - y.exp() * dy.sum(options["axis"], keepdim=True)]


_softmax = TorchOp(ops.softmax, F.softmax, "int axis", cast=_autocast.ON_CUDA, again=_softmax_again)
_softmin = TorchOp(ops.softmin, F.softmin, "int axis", cast=_autocast.ON_CUDA, again=_softmin_again)
_log_softmax = TorchOp(ops.log_softmax, F.log_softmax, "int axis", cast=_autocast.ON_CUDA, again=_log_softmax_again)


def _dim(function: str, input: Tensor, dim: int | None, stacklevel: int) -> int:
    return F._get_softmax_dim(function, input.dim(), stacklevel + 1) if dim is None else dim  # type: ignore[attr-defined]


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """As ``torch.nn.functional.softmax``."""
    return _softmax(input if dtype is None else input.to(dtype), _dim("softmax", input, dim, _stacklevel))


def softmin(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """As ``torch.nn.functional.softmin``: the softmax of −input."""
    return _softmin(input if dtype is None else input.to(dtype), _dim("softmin", input, dim, _stacklevel))


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """As ``torch.nn.functional.log_softmax``."""
    return _log_softmax(input if dtype is None else input.to(dtype), _dim("log_softmax", input, dim, _stacklevel))


class Softmax(nn.Softmax):
    """``torch.nn.Softmax`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(nn.LogSoftmax):
    """``torch.nn.LogSoftmax`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return log_softmax(input, self.dim, _stacklevel=5)


class Softmin(nn.Softmin):
    """``torch.nn.Softmin`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return softmin(input, self.dim, _stacklevel=5)


class Softmax2d(nn.Softmax2d):
    """``torch.nn.Softmax2d`` over gpulayers' kernels: over the channels of (N, C, H, W) or (C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (3, 4):
            raise ValueError(f"Softmax2d: expected input to be 3D or 4D, got {input.dim()}D instead")
        return softmax(input, -3, _stacklevel=5)
