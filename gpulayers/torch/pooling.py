"""Pooling over one to three spatial axes: maximum, mean, adaptive mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import pooling as ops
from gpulayers.torch._arguments import batched, each
from gpulayers.torch._op import TorchOp
from gpulayers.torch._pooling import Pool, Size, in_parts, of_volumes

_MAX: list[Any] = [F.max_pool1d, F.max_pool2d, F.max_pool3d]
_MAX_INDICES: list[Any] = [F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices]
_AVG: list[Any] = [F.avg_pool1d, F.avg_pool2d, F.avg_pool3d]
_ADAPTIVE_AVG: list[Any] = [F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d]


def _max_twin(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, indices: bool) -> Any:
    return (_MAX_INDICES if indices else _MAX)[len(kernel) - 1](x, kernel, stride, padding, dilation, ceil_mode)


def _max_again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    """dy goes to the pixel of the tap that won."""
    dy, tap, (n, c, *sizes) = dys[0], saved["tap"].long(), inputs[0].shape
    none, at, count = tap < 0, 0, len(sizes)  # none: no tap lay on the image
    for axis in reversed(range(count)):
        k, stride, padding, dilation = (
            options[name][axis] for name in ("kernel_size", "stride", "padding", "dilation")
        )
        first = torch.arange(dy.shape[2 + axis], device=dy.device) * stride - padding
        of_axis = first.view(-1, *(1,) * (count - 1 - axis)) + tap.remainder(k) * dilation
        at = at + of_axis * math.prod(sizes[axis + 1 :])
        tap = tap.div(k, rounding_mode="floor")
    places = torch.where(none, 0, at).reshape(n, c, -1)
    dx = dy.new_zeros(n, c, math.prod(sizes)).scatter_add(2, places, torch.where(none, 0, dy).reshape(n, c, -1))
    return [dx.reshape(n, c, *sizes)]


def _avg_twin(
    x: Tensor, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool, divisor: int | None
) -> Tensor:
    more = () if len(kernel) == 1 else (divisor,)
    return _AVG[len(kernel) - 1](x, kernel, stride, padding, ceil_mode, count_include_pad, *more)


def _adaptive_avg_twin(x: Tensor, size: Any) -> Tensor:
    return _ADAPTIVE_AVG[len(size) - 1](x, size)


_max_pool = TorchOp(
    ops.max_pool,
    _max_twin,
    "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode, bool return_indices",
    outputs=("y", "indices"),
    buffers=("tap",),
    again=_max_again,
)
_avg_pool = TorchOp(
    ops.avg_pool,
    _avg_twin,
    "int[] kernel_size, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, int? divisor_override",
)
_adaptive_avg_pool = TorchOp(ops.adaptive_avg_pool, _adaptive_avg_twin, "SymInt[] output_size")


def _windows(axes: int, kernel_size: Any, stride: Any, *more: Any) -> tuple:
    """Each option for each axis, the stride the kernel's size where none is given; empty where one has another length."""
    stride = kernel_size if stride is None or stride == [] or stride == () else stride
    found = tuple([each(value, axes) for value in (kernel_size, stride, *more)])
    return found if all([len(value) == axes for value in found]) else ()


def _largest(
    axes: int, input: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, indices: bool
) -> Any:  # fmt: skip
    windows = _windows(axes, kernel, stride, padding, dilation)
    if not windows:
        return _MAX[axes - 1](input, kernel, stride, padding, dilation, ceil_mode, indices)  # raises
    found = batched(_max_pool, axes + 2, input if indices else of_volumes(axes, input), *windows, ceil_mode, indices)
    return found[0] if isinstance(found, tuple) and not indices else found


def max_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """As ``torch.nn.functional.max_pool1d``: (y, indices) where ``return_indices``, else y."""
    return _largest(1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """As ``torch.nn.functional.max_pool2d``: (y, indices) where ``return_indices``, else y."""
    return _largest(2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool3d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """As ``torch.nn.functional.max_pool3d``: (y, indices) where ``return_indices``, else y."""
    return _largest(3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def _averaged(
    axes: int, input: Any, kernel: Any, stride: Any, padding: Any, ceil: bool, include: bool, divisor: Any
) -> Tensor:  # fmt: skip
    windows = _windows(axes, kernel, stride, padding)
    if not windows:
        return _AVG[axes - 1](input, kernel, stride, padding, ceil, include)  # raises
    return batched(_avg_pool, axes + 2, of_volumes(axes, input), *windows, ceil, include, divisor)


def avg_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """As ``torch.nn.functional.avg_pool1d``."""
    return _averaged(1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """As ``torch.nn.functional.avg_pool2d``."""
    return _averaged(2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def avg_pool3d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """As ``torch.nn.functional.avg_pool3d``."""
    return _averaged(3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def adaptive_avg_pool1d(input: Tensor, output_size: Any) -> Tensor:
    """As ``torch.nn.functional.adaptive_avg_pool1d``."""
    return in_parts(1, _adaptive_avg_pool, F.adaptive_avg_pool1d, input, output_size)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """As ``torch.nn.functional.adaptive_avg_pool2d``: output_size is a number or a pair; None keeps a size."""
    return in_parts(2, _adaptive_avg_pool, F.adaptive_avg_pool2d, input, output_size)


def adaptive_avg_pool3d(input: Tensor, output_size: Any) -> Tensor:
    """As ``torch.nn.functional.adaptive_avg_pool3d``: output_size is a number or three; None keeps a size."""
    return in_parts(3, _adaptive_avg_pool, F.adaptive_avg_pool3d, input, output_size)


class _MaxPool(Pool):
    _options = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


class MaxPool1d(_MaxPool, nn.MaxPool1d):
    """``torch.nn.MaxPool1d`` over gpulayers' kernels."""

    _function = staticmethod(max_pool1d)


class MaxPool2d(_MaxPool, nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` over gpulayers' kernels."""

    _function = staticmethod(max_pool2d)


class MaxPool3d(_MaxPool, nn.MaxPool3d):
    """``torch.nn.MaxPool3d`` over gpulayers' kernels."""

    _function = staticmethod(max_pool3d)


class _AvgPool(Pool):
    _options: tuple[str, ...] = (
        *("kernel_size", "stride", "padding", "ceil_mode"),
        *("count_include_pad", "divisor_override"),
    )


class AvgPool1d(_AvgPool, nn.AvgPool1d):
    """``torch.nn.AvgPool1d`` over gpulayers' kernels."""

    _function = staticmethod(avg_pool1d)
    _options = _AvgPool._options[:-1]


class AvgPool2d(_AvgPool, nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` over gpulayers' kernels."""

    _function = staticmethod(avg_pool2d)


class AvgPool3d(_AvgPool, nn.AvgPool3d):
    """``torch.nn.AvgPool3d`` over gpulayers' kernels."""

    _function = staticmethod(avg_pool3d)


class _AdaptivePool(Pool):
    _options = ("output_size",)


class AdaptiveAvgPool1d(_AdaptivePool, nn.AdaptiveAvgPool1d):
    """``torch.nn.AdaptiveAvgPool1d`` over gpulayers' kernels."""

    _function = staticmethod(adaptive_avg_pool1d)


class AdaptiveAvgPool2d(_AdaptivePool, nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` over gpulayers' kernels."""

    _function = staticmethod(adaptive_avg_pool2d)


class AdaptiveAvgPool3d(_AdaptivePool, nn.AdaptiveAvgPool3d):
    """``torch.nn.AdaptiveAvgPool3d`` over gpulayers' kernels."""

    _function = staticmethod(adaptive_avg_pool3d)
