"""Maxima put back where they were: max_unpool over one to three spatial axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import pooling as ops
from gpulayers.torch import _autocast
from gpulayers.torch._arguments import each
from gpulayers.torch._op import TorchOp
from gpulayers.torch._pooling import Size

_size: Callable[..., Sequence[int]] = F._unpool_output_size  # type: ignore[attr-defined]
"""torch's own, which raises its errors."""


def _twin(x: Tensor, indices: Tensor, size: Any) -> Tensor:
    if len(size) == 1:
        return torch._C._nn.max_unpool2d(x.unsqueeze(-1), indices.unsqueeze(-1), [*size, 1]).squeeze(-1)
    if len(size) == 2:
        return torch._C._nn.max_unpool2d(x, indices, size)
    return torch._C._nn.max_unpool3d(x, indices, size, [1, 1, 1], [0, 0, 0])


_max_unpool = TorchOp(ops.max_unpool, _twin, "SymInt[] output_size", cast=_autocast.ON_CPU)


def _put_back(
    axes: int, theirs: Callable, input: Any, indices: Any, kernel: Any, stride: Any, padding: Any, output_size: Any
) -> Tensor:
    tensors = isinstance(input, Tensor) and isinstance(indices, Tensor)
    if not tensors or input.dim() not in (axes + 1, axes + 2) or indices.dim() != input.dim():
        return theirs(input, indices, kernel, stride, padding, output_size)  # raises, or records itself
    sizes, paddings = each(kernel, axes), each(padding, axes)
    steps = each(kernel if stride is None else stride, axes)
    found = tuple(_size(input, sizes, steps, paddings, output_size))
    if input.dim() == axes + 1:
        return _max_unpool(input.unsqueeze(0), indices.unsqueeze(0), found).squeeze(0)
    return _max_unpool(input, indices, found)


def max_unpool1d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Any = None,
) -> Tensor:
    """As ``torch.nn.functional.max_unpool1d``; of maxima with one place the last stays."""
    return _put_back(1, F.max_unpool1d, input, indices, kernel_size, stride, padding, output_size)


def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Any = None,
) -> Tensor:
    """As ``torch.nn.functional.max_unpool2d``; of maxima with one place the last stays."""
    return _put_back(2, F.max_unpool2d, input, indices, kernel_size, stride, padding, output_size)


def max_unpool3d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Any = None,
) -> Tensor:
    """As ``torch.nn.functional.max_unpool3d``; of maxima with one place the last stays."""
    return _put_back(3, F.max_unpool3d, input, indices, kernel_size, stride, padding, output_size)


class _MaxUnpool:
    _function: Callable[..., Tensor]

    def forward(self: Any, input: Tensor, indices: Tensor, output_size: Any = None) -> Tensor:
        return self._function(input, indices, self.kernel_size, self.stride, self.padding, output_size)


class MaxUnpool1d(_MaxUnpool, nn.MaxUnpool1d):
    """``torch.nn.MaxUnpool1d`` over gpulayers' kernels."""

    _function = staticmethod(max_unpool1d)


class MaxUnpool2d(_MaxUnpool, nn.MaxUnpool2d):
    """``torch.nn.MaxUnpool2d`` over gpulayers' kernels."""

    _function = staticmethod(max_unpool2d)


class MaxUnpool3d(_MaxUnpool, nn.MaxUnpool3d):
    """``torch.nn.MaxUnpool3d`` over gpulayers' kernels."""

    _function = staticmethod(max_unpool3d)
