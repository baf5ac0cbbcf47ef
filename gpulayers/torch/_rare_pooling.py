"""Pooling over one to three spatial axes: maxima of so many parts, and norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import pooling as ops
from gpulayers.torch import _autocast
from gpulayers.torch._arguments import batched, each
from gpulayers.torch._op import TorchOp
from gpulayers.torch._pooling import Pool, Size, first, in_parts, of_volumes, to_where_it_won

_MAX: list[Any] = [F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d]
_INDICES: list[Any] = [
    F.adaptive_max_pool1d_with_indices,
    F.adaptive_max_pool2d_with_indices,
    F.adaptive_max_pool3d_with_indices,
]
_LP: list[Any] = [F.lp_pool1d, F.lp_pool2d, F.lp_pool3d]


def _max_twin(x: Tensor, size: Any, indices: bool) -> Any:
    return (_INDICES if indices else _MAX)[len(size) - 1](x, size)


def _max_again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    return [to_where_it_won(dys[0], saved["index"], inputs[0])]


_adaptive_max_pool = TorchOp(
    ops.adaptive_max_pool,
    _max_twin,
    "SymInt[] output_size, bool return_indices",
    outputs=("y", "indices"),
    buffers=("index",),
    again=_max_again,
)


def _lp_twin(x: Tensor, norm_type: float, kernel: Any, stride: Any, ceil_mode: bool) -> Tensor:
    size = kernel[0] if len(kernel) == 1 else kernel
    return _LP[len(kernel) - 1](x, norm_type, size, stride, ceil_mode)


_lp_pool = TorchOp(
    ops.lp_pool,
    _lp_twin,
    "float norm_type, int[] kernel_size, int[] stride, bool ceil_mode",
    cast=_autocast.ON_CUDA,
)


# --- functions -------------------------------------------------------------------------------------------------------


def adaptive_max_pool1d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """As ``torch.nn.functional.adaptive_max_pool1d``: (y, indices) where ``return_indices``, else y."""
    return first(in_parts(1, _adaptive_max_pool, _MAX[0], input, output_size, return_indices), return_indices)


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """As ``torch.nn.functional.adaptive_max_pool2d``: (y, indices) where ``return_indices``, else y."""
    return first(in_parts(2, _adaptive_max_pool, _MAX[1], input, output_size, return_indices), return_indices)


def adaptive_max_pool3d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """As ``torch.nn.functional.adaptive_max_pool3d``: (y, indices) where ``return_indices``, else y."""
    return first(in_parts(3, _adaptive_max_pool, _MAX[2], input, output_size, return_indices), return_indices)


def _normed(axes: int, input: Any, norm_type: Any, kernel: Any, stride: Any, ceil_mode: bool) -> Tensor:
    sizes, steps = each(kernel, axes), each(kernel if stride is None else stride, axes)
    plain = isinstance(norm_type, int | float) and norm_type != 0 and len(sizes) == len(steps) == axes
    if not plain or not isinstance(input, Tensor):
        return _LP[axes - 1](input, norm_type, kernel, stride, ceil_mode)  # raises, or records itself
    return batched(_lp_pool, axes + 2, of_volumes(axes, input), float(norm_type), sizes, steps, ceil_mode)


def lp_pool1d(
    input: Tensor, norm_type: float, kernel_size: int, stride: Size | None = None, ceil_mode: bool = False
) -> Tensor:
    """As ``torch.nn.functional.lp_pool1d``."""
    return _normed(1, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool2d(
    input: Tensor, norm_type: float, kernel_size: Size, stride: Size | None = None, ceil_mode: bool = False
) -> Tensor:
    """As ``torch.nn.functional.lp_pool2d``."""
    return _normed(2, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool3d(
    input: Tensor, norm_type: float, kernel_size: Size, stride: Size | None = None, ceil_mode: bool = False
) -> Tensor:
    """As ``torch.nn.functional.lp_pool3d``."""
    return _normed(3, input, norm_type, kernel_size, stride, ceil_mode)


# --- classes ---------------------------------------------------------------------------------------------------------


class _AdaptiveMaxPool(Pool):
    _options = ("output_size", "return_indices")


class AdaptiveMaxPool1d(_AdaptiveMaxPool, nn.AdaptiveMaxPool1d):
    """``torch.nn.AdaptiveMaxPool1d`` over gpulayers' kernels."""

    _function = staticmethod(adaptive_max_pool1d)


class AdaptiveMaxPool2d(_AdaptiveMaxPool, nn.AdaptiveMaxPool2d):
    """``torch.nn.AdaptiveMaxPool2d`` over gpulayers' kernels."""

    _function = staticmethod(adaptive_max_pool2d)


class AdaptiveMaxPool3d(_AdaptiveMaxPool, nn.AdaptiveMaxPool3d):
    """``torch.nn.AdaptiveMaxPool3d`` over gpulayers' kernels."""

    _function = staticmethod(adaptive_max_pool3d)


class _LPPool(Pool):
    _options = ("norm_type", "kernel_size", "stride", "ceil_mode")


class LPPool1d(_LPPool, nn.LPPool1d):
    """``torch.nn.LPPool1d`` over gpulayers' kernels."""

    _function = staticmethod(lp_pool1d)


class LPPool2d(_LPPool, nn.LPPool2d):
    """``torch.nn.LPPool2d`` over gpulayers' kernels."""

    _function = staticmethod(lp_pool2d)


class LPPool3d(_LPPool, nn.LPPool3d):
    """``torch.nn.LPPool3d`` over gpulayers' kernels."""

    _function = staticmethod(lp_pool3d)
