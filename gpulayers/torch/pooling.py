"""Pooling of images: maximum, mean, adaptive mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import pooling as ops
from gpulayers.torch._arguments import batched, pair
from gpulayers.torch._op import TorchOp


def _max_pool2d_twin(
    x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, indices: bool
) -> Any:
    both: Any = F.max_pool2d_with_indices if indices else F.max_pool2d
    return both(x, kernel, stride, padding, dilation, ceil_mode)


def _max_pool2d_again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    """dy goes to the pixel of the tap that won."""
    dy, tap, (n, c, h, w) = dys[0], saved["tap"].long(), inputs[0].shape
    rows, columns = (
        torch.arange(size, device=dy.device) * stride - padding
        for size, stride, padding in zip(dy.shape[2:], options["stride"], options["padding"])
    )
    r = rows[:, None] + tap.div(options["kernel_size"][1], rounding_mode="floor") * options["dilation"][0]
    q = columns + tap.remainder(options["kernel_size"][1]) * options["dilation"][1]
    none = tap < 0  # no tap lay on the image
    at = torch.where(none, 0, r * w + q).reshape(n, c, -1)
    dx = dy.new_zeros(n, c, h * w).scatter_add(2, at, torch.where(none, 0, dy).reshape(n, c, -1))
    return [dx.reshape(n, c, h, w)]


_max_pool2d = TorchOp(
    ops.max_pool2d,
    _max_pool2d_twin,
    "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode, bool return_indices",
    outputs=("y", "indices"),
    buffers=("tap",),
    again=_max_pool2d_again,
)
_avg_pool2d = TorchOp(
    ops.avg_pool2d,
    F.avg_pool2d,
    "int[] kernel_size, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, int? divisor_override",
)
_adaptive_avg_pool2d = TorchOp(ops.adaptive_avg_pool2d, F.adaptive_avg_pool2d, "SymInt[] output_size")


def _stride(stride: Any, kernel_size: Any) -> tuple:
    """The kernel's size where no stride is given."""
    return pair(kernel_size if stride is None or stride == [] or stride == () else stride)


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """As ``torch.nn.functional.max_pool2d``: (y, indices) where ``return_indices``, else y."""
    windows = (pair(kernel_size), _stride(stride, kernel_size), pair(padding), pair(dilation))
    found = batched(_max_pool2d, 4, input, *windows, ceil_mode, return_indices)
    return found[0] if isinstance(found, tuple) and not return_indices else found


def avg_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """As ``torch.nn.functional.avg_pool2d``."""
    windows = (pair(kernel_size), _stride(stride, kernel_size), pair(padding))
    return batched(_avg_pool2d, 4, input, *windows, ceil_mode, count_include_pad, divisor_override)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """As ``torch.nn.functional.adaptive_avg_pool2d``: output_size is a number or a pair; None keeps a size."""
    both = pair(output_size)
    if not isinstance(input, Tensor) or len(both) != 2:
        return F.adaptive_avg_pool2d(input, output_size)  # raises
    sizes = tuple(n if o is None else o for o, n in zip(both, input.shape[-2:]))
    return batched(_adaptive_avg_pool2d, 4, input, sizes)


class MaxPool2d(nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Any:
        return max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool2d(nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return adaptive_avg_pool2d(input, self.output_size)
