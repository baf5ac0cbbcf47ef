"""Convolution of images."""

from __future__ import annotations

from typing import Any

from gpulayers import arrays
from gpulayers.arrays import Spec
from gpulayers.definition import ArgumentError, RuleError
from gpulayers.layers._calls import named
from gpulayers.layers._initial import fans, uniform
from gpulayers.layers._layer import OpLayer
from gpulayers.layers._weight import Weight
from gpulayers.ops import conv as ops
from gpulayers.ops._window import pair
from gpulayers.ops.padding import pad2d

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class Convolutional(OpLayer):
    """The convolutional neuron type: every output sees a window. Start here for such a layer of your own.

    y = x * weight + bias: (N, C, H, W) → (N, O, OH, OW).

    weight: (O, C / groups, kh, kw), bias: (O,), both uniform in ±1 / √(C / groups · kh · kw). padding: an integer, a
    pair, ((top, bottom), (left, right)), "valid" or "same". padding_mode says what lies there: "zeros", or as pad2d
    has it, "reflect", "replicate" or "circular".
    """

    op = ops.conv2d
    neuron_type = "convolutional"
    casts_weights = True
    skips_input_grad = True

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
        with named(self):
            if padding_mode not in PADDING_MODES:
                raise ArgumentError("padding_mode", f"one of {', '.join(PADDING_MODES)}", repr(padding_mode))
            if groups < 1:
                raise ArgumentError("groups", "groups ≥ 1", groups)
            for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
                if channels % groups:
                    raise ArgumentError(name, f"a multiple of groups = {groups}", channels)
            if padding == "same" and pair("stride", stride, 1) != (1, 1):
                raise ArgumentError("padding", 'stride = 1 where padding = "same"', f"stride {stride}")
            self.kernel_size = pair("kernel_size", kernel_size, 1)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.padding_mode = padding_mode
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = self.add_weight("weight", shape, "fan_in_uniform")
        self.bias: Weight | None = None
        if bias:
            bound = max(1, fans(shape)[0]) ** -0.5
            self.bias = self.add_weight("bias", (out_channels,), uniform(bound))

    def arguments(self, x: Any) -> tuple:
        return x, self.weight, self.bias

    def options(self) -> dict[str, Any]:
        padding = self.padding if self.padding_mode == "zeros" else 0  # pad2d comes before
        return {"stride": self.stride, "padding": padding, "dilation": self.dilation, "groups": self.groups}

    def _around(self) -> dict[str, Any] | None:
        """The options of the pad2d that comes before; None where there is nothing to pad but zeros, if anything."""
        if self.padding_mode == "zeros":
            return None
        pairs = (pair(name, getattr(self, name), 1) for name in ("stride", "dilation"))
        padding = ops.padding_sides(self.padding, self.kernel_size, *pairs)
        return {"padding": padding, "mode": self.padding_mode} if any(map(any, padding)) else None

    def forward(self, x: Any) -> Any:
        if around := self._around():
            x = self.run(pad2d, x, **around)
        return super().forward(x)

    def backward(self, dy: Any) -> Any:
        dx = super().backward(dy)
        return dx if dx is None or not self._around() else self.run_backward(dx)

    def output_shape(self, input_shape: tuple) -> tuple:
        if around := self._around():
            try:
                padded = pad2d.rule(Spec(tuple(input_shape), arrays.float32), **around)
            except RuleError as error:
                error.where = self.name
                raise
            input_shape = padded.outputs["y"].shape
        return super().output_shape(input_shape)


class Conv2d(Convolutional):
    """As torch.nn.Conv2d; see Convolutional."""
