"""Convolution over one to three spatial axes, and transposed convolution."""

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
from gpulayers.ops._window import numbers
from gpulayers.ops.padding import pad

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class _Windows(OpLayer):
    """What both kinds have: channels in groups, a kernel, its options, weight and bias."""

    neuron_type = "convolutional"
    casts_weights = True
    spatial = 2
    """How many spatial axes x has."""
    kernel_size: tuple[int, ...]
    activation: str | None = None

    def _set_channels(self, in_channels: int, out_channels: int, groups: int) -> None:
        if groups < 1:
            raise ArgumentError("groups", "groups ≥ 1", groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ArgumentError(name, f"a multiple of groups = {groups}", channels)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups

    def _numbers(self, argument: str, value: Any, least: int = 1) -> tuple[int, ...]:
        return numbers(argument, value, least, self.spatial)

    def _add_weights(self, channels: int, each: int, bias: bool) -> None:
        shape = (channels, each, *self.kernel_size)
        self.weight = self.add_weight("weight", shape, "fan_in_uniform")
        self.bias: Weight | None = None
        if bias:
            self.bias = self.add_weight("bias", (self.out_channels,), uniform(max(1, fans(shape)[0]) ** -0.5))

    def arguments(self, x: Any) -> tuple:
        return x, self.weight, self.bias


class Convolutional(_Windows):
    """The convolutional neuron type: every output sees a window. Start here for such a layer of your own.

    y = f(x * weight + bias): (N, C, H, W) → (N, O, OH, OW); with ``spatial = 1`` or 3 in the class, (N, C, L) or
    (N, C, D, H, W).

    weight: (O, C / groups, kh, kw), bias: (O,), both uniform in ±1 / √(C / groups · kh · kw). padding: an integer, one
    for each axis, ((top, bottom), (left, right)), "valid" or "same". padding_mode says what lies there: "zeros", or as
    pad has it, "reflect", "replicate" or "circular". activation: f, in the same pass: None, "relu", "gelu", "silu", … (the
    names in ops.activation.ACTIVATIONS).
    """

    op = ops.conv
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
        *,
        activation: str | None = None,
    ):
        with named(self):
            if padding_mode not in PADDING_MODES:
                raise ArgumentError("padding_mode", f"one of {', '.join(PADDING_MODES)}", repr(padding_mode))
            self._set_channels(in_channels, out_channels, groups)
            if padding == "same" and set(self._numbers("stride", stride)) != {1}:
                raise ArgumentError("padding", 'stride = 1 where padding = "same"', f"stride {stride}")
            self.kernel_size = self._numbers("kernel_size", kernel_size)
        self.stride, self.padding, self.dilation, self.padding_mode = stride, padding, dilation, padding_mode
        self.activation = activation
        self._add_weights(out_channels, in_channels // groups, bias)

    def options(self) -> dict[str, Any]:
        padding = self.padding if self.padding_mode == "zeros" else 0  # pad comes before
        names = ("stride", "dilation", "groups", "activation")
        return {"padding": padding} | {name: getattr(self, name) for name in names}

    def _around(self) -> tuple[tuple[int, int], ...]:
        """((before, after), …) of the padding that comes before; empty where there is nothing to pad but zeros, if
        anything."""
        if self.padding_mode == "zeros":
            return ()
        options = (self._numbers(name, getattr(self, name)) for name in ("stride", "dilation"))
        sides = ops.padding_sides(self.padding, self.kernel_size, *options)
        return sides if any(map(any, sides)) else ()

    def forward(self, x: Any) -> Any:
        if around := self._around():
            x = self.run(pad, x, padding=around, mode=self.padding_mode)
        return super().forward(x)

    def backward(self, dy: Any) -> Any:
        dx = super().backward(dy)
        return self.run_backward(dx) if dx is not None and self._around() else dx

    def output_shape(self, input_shape: tuple) -> tuple:
        shape, around = tuple(input_shape), self._around()
        if around and len(shape) == self.spatial + 2:
            try:
                shape = pad.rule(Spec(shape, arrays.float32), padding=around, mode=self.padding_mode).outputs["y"].shape
            except RuleError as error:
                error.where = self.name
                raise
        return super().output_shape(shape)


class Conv1d(Convolutional):
    """As torch.nn.Conv1d: (N, C, L) → (N, O, OL); see Convolutional."""

    spatial = 1


class Conv2d(Convolutional):
    """As torch.nn.Conv2d: (N, C, H, W) → (N, O, OH, OW); see Convolutional."""


class Conv3d(Convolutional):
    """As torch.nn.Conv3d: (N, C, D, H, W) → (N, O, OD, OH, OW); see Convolutional."""

    spatial = 3


class Transposed(_Windows):
    """What transposed convolutions have in common: y = f(weight walked back over x, + bias), f as Convolutional's."""

    op = ops.conv_transpose

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Any = 1,
        padding_mode: str = "zeros",
        *,
        activation: str | None = None,
    ):
        with named(self):
            if padding_mode != "zeros":
                raise ArgumentError("padding_mode", "zeros for a transposed convolution", repr(padding_mode))
            self._set_channels(in_channels, out_channels, groups)
            self.kernel_size = self._numbers("kernel_size", kernel_size)
        self.stride, self.padding, self.output_padding, self.dilation = stride, padding, output_padding, dilation
        self.padding_mode, self.activation = padding_mode, activation
        self._add_weights(in_channels, out_channels // groups, bias)

    def options(self) -> dict[str, Any]:
        names = ("stride", "padding", "output_padding", "dilation", "groups", "activation")
        return {name: getattr(self, name) for name in names}


class ConvTranspose1d(Transposed):
    """As torch.nn.ConvTranspose1d: (N, C, L) → (N, O, OL), OL as conv_transpose has it.

    weight: (C, O / groups, k), bias: (O,), both uniform in ±1 / √(O / groups · k). padding: an integer or ((left, right),).
    """

    spatial = 1


class ConvTranspose2d(Transposed):
    """As torch.nn.ConvTranspose2d: (N, C, H, W) → (N, O, OH, OW), sizes as conv_transpose has them.

    weight: (C, O / groups, kh, kw), bias: (O,), both uniform in ±1 / √(O / groups · kh · kw). padding: an integer, a pair or
    ((top, bottom), (left, right)).
    """


class ConvTranspose3d(Transposed):
    """As torch.nn.ConvTranspose3d: (N, C, D, H, W) → (N, O, OD, OH, OW), sizes as conv_transpose has them.

    weight: (C, O / groups, kd, kh, kw), bias: (O,), both uniform in ±1 / √(O / groups · kd · kh · kw). padding: an integer,
    three, or ((before, after), …).
    """

    spatial = 3
