"""Pooling of images."""

from __future__ import annotations

from typing import Any

from gpulayers.layers._layer import OpLayer
from gpulayers.ops import pooling as ops


class Pooling(OpLayer):
    """The pooling neuron type: every output sums up a window; no weights. Start here for such a layer of your own.

    A subclass names its ``op``, and its options.
    """

    neuron_type = "pooling"


class MaxPool2d(Pooling):
    """The maximum under a window: (N, C, H, W) → (N, C, OH, OW), and where it lies. As torch.nn.MaxPool2d."""

    op = ops.max_pool2d

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ):
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.dilation, self.return_indices, self.ceil_mode = dilation, return_indices, ceil_mode

    def options(self) -> dict[str, Any]:
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "ceil_mode": self.ceil_mode,
            "return_indices": self.return_indices,
        }


class AvgPool2d(Pooling):
    """The mean under a window: (N, C, H, W) → (N, C, OH, OW). As torch.nn.AvgPool2d."""

    op = ops.avg_pool2d

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ):
        self.kernel_size, self.stride, self.padding, self.ceil_mode = kernel_size, stride, padding, ceil_mode
        self.count_include_pad, self.divisor_override = count_include_pad, divisor_override

    def options(self) -> dict[str, Any]:
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "ceil_mode": self.ceil_mode,
            "count_include_pad": self.count_include_pad,
            "divisor_override": self.divisor_override,
        }


class AdaptiveAvgPool2d(Pooling):
    """The means of OH × OW parts of the image: (N, C, H, W) → (N, C, OH, OW). As torch.nn.AdaptiveAvgPool2d."""

    op = ops.adaptive_avg_pool2d

    def __init__(self, output_size: Any):
        self.output_size = output_size

    def options(self) -> dict[str, Any]:
        return {"output_size": self.output_size}


class GlobalAvgPool2d(Pooling):
    """The mean of each channel: (N, C, H, W) → (N, C, 1, 1)."""

    op = ops.adaptive_avg_pool2d

    def options(self) -> dict[str, Any]:
        return {"output_size": 1}
