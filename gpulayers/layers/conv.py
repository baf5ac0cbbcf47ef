"""Convolution of images."""

from __future__ import annotations

from typing import Any

from gpulayers.layers._layer import OpLayer
from gpulayers.layers._weight import Weight, fans, uniform
from gpulayers.ops import conv as ops
from gpulayers.ops._op import ArgumentError
from gpulayers.ops._window import pair


class Convolutional(OpLayer):
    """The convolutional neuron type: every output sees a window. Start here for such a layer of your own.

    y = x * weight + bias: (N, C, H, W) → (N, O, OH, OW).

    weight: (O, C / groups, kh, kw), bias: (O,), both uniform in ±1 / √(C / groups · kh · kw). padding: an integer, a
    pair, ((top, bottom), (left, right)), "valid" or "same"; zeros lie there.
    """

    op = ops.conv2d
    neuron_type = "convolutional"
    casts_weights = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ):
        if padding_mode != "zeros":
            raise ArgumentError("padding_mode", '"zeros"', repr(padding_mode))
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ArgumentError(name, f"a multiple of groups = {groups}", channels)
        if padding == "same" and pair("stride", stride, 1) != (1, 1):
            raise ArgumentError("padding", 'stride = 1 where padding = "same"', f"stride {stride}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.kernel_size = pair("kernel_size", kernel_size, 1)
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = self.add_weight("weight", shape, "fan_in_uniform")
        self.bias: Weight | None = None
        if bias:
            bound = max(1, fans(shape)[0]) ** -0.5
            self.bias = self.add_weight("bias", (out_channels,), uniform(bound))

    def arguments(self, x: Any) -> tuple:
        return x, self.weight, self.bias

    def options(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}


class Conv2d(Convolutional):
    """As torch.nn.Conv2d; see Convolutional."""
