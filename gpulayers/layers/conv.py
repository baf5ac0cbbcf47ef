"""Convolution over one to three spatial axes, and transposed convolution."""

from __future__ import annotations

import math
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
from gpulayers.ops.padding import pad2d

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_PLANES: dict[int, tuple] = {1: ((None, 0),), 2: ((0, 1),), 3: ((1, 2), (0, None))}
"""The spatial axes that pad2d pads as (rows, columns), one call after the other."""


class _Windows(OpLayer):
    """What both kinds have: channels in groups, a kernel, its options, weight and bias."""

    neuron_type = "convolutional"
    casts_weights = True
    spatial = 2
    """How many spatial axes x has."""
    kernel_size: tuple[int, ...]

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

    y = x * weight + bias: (N, C, H, W) → (N, O, OH, OW); with ``spatial = 1`` or 3 in the class, (N, C, L) or
    (N, C, D, H, W).

    weight: (O, C / groups, kh, kw), bias: (O,), both uniform in ±1 / √(C / groups · kh · kw). padding: an integer, one
    for each axis, ((top, bottom), (left, right)), "valid" or "same". padding_mode says what lies there: "zeros", or as
    pad2d has it, "reflect", "replicate" or "circular".
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
    ):
        with named(self):
            if padding_mode not in PADDING_MODES:
                raise ArgumentError("padding_mode", f"one of {', '.join(PADDING_MODES)}", repr(padding_mode))
            self._set_channels(in_channels, out_channels, groups)
            if padding == "same" and set(self._numbers("stride", stride)) != {1}:
                raise ArgumentError("padding", 'stride = 1 where padding = "same"', f"stride {stride}")
            self.kernel_size = self._numbers("kernel_size", kernel_size)
        self.stride, self.padding, self.dilation, self.padding_mode = stride, padding, dilation, padding_mode
        self._add_weights(out_channels, in_channels // groups, bias)

    def options(self) -> dict[str, Any]:
        padding = self.padding if self.padding_mode == "zeros" else 0  # pad2d comes before
        return {"stride": self.stride, "padding": padding, "dilation": self.dilation, "groups": self.groups}

    def _around(self) -> tuple[tuple[int, int], ...]:
        """((before, after), …) of the padding that comes before; empty where there is nothing to pad but zeros, if
        anything."""
        if self.padding_mode == "zeros":
            return ()
        options = (self._numbers(name, getattr(self, name)) for name in ("stride", "dilation"))
        sides = ops.padding_sides(self.padding, self.kernel_size, *options)
        return sides if any(map(any, sides)) else ()

    def _planes(self) -> list[tuple[Any, Any, dict[str, Any]]]:
        """(rows, columns, options) of the calls of pad2d that come before."""
        sides: dict[int | None, tuple] = {None: (0, 0), **dict(enumerate(self._around()))}
        planes = _PLANES[self.spatial] if len(sides) > 1 else ()
        return [(r, q, {"padding": (sides[r], sides[q]), "mode": self.padding_mode}) for r, q in planes]

    def forward(self, x: Any) -> Any:
        for r, q, how in self._planes():
            shape = _grown(x.shape, r, q, how, 1)
            x = self._view(self.run(pad2d, self._view(x, _plane(x.shape, r, q)), **how), shape)
        return super().forward(x)

    def _view(self, x: Any, shape: tuple) -> Any:
        """``x`` in this shape; nobody asks for its gradient where nobody asks for that of x."""
        if tuple(x.shape) == shape:
            return x
        view, frame = x.reshape(shape), self._frame("for forward")
        if frame.is_data(x):
            frame.data.append(view)
        return view

    def backward(self, dy: Any) -> Any:
        dx = super().backward(dy)
        for r, q, how in reversed(self._planes()):
            if dx is None:
                break
            shape = _grown(dx.shape, r, q, how, -1)
            dx = self.run_backward(dx.reshape(_plane(dx.shape, r, q)))
            dx = dx if dx is None else dx.reshape(shape)
        return dx

    def output_shape(self, input_shape: tuple) -> tuple:
        shape = tuple(input_shape)
        for r, q, how in self._planes() if len(shape) == self.spatial + 2 else ():
            try:
                pad2d.rule(Spec(tuple(_plane(shape, r, q)), arrays.float32), **how)
            except RuleError as error:
                error.where = self.name
                raise
            shape = _grown(shape, r, q, how, 1)
        return super().output_shape(shape)


def _plane(shape: tuple, rows: int | None, columns: int | None) -> tuple:
    """(N, C · what is before, rows, columns · what is behind): the shape in which pad2d sees two axes, or one."""
    n, c, *sizes = shape
    before, behind = rows if rows is not None else columns, len(sizes) if columns is not None else (rows or 0) + 1
    high = 1 if rows is None else sizes[rows]
    wide = sizes[columns] if columns is not None else math.prod(sizes[behind:])
    return n, c * math.prod(sizes[:before]), high, wide


def _grown(shape: tuple, rows: int | None, columns: int | None, how: dict, sign: int) -> tuple:
    """The shape with what pad2d adds; sign = −1: without it."""
    grown = list(shape)
    for axis, around in zip((rows, columns), how["padding"]):
        if axis is not None:
            grown[axis + 2] += sign * sum(around)
    return tuple(grown)


class Conv1d(Convolutional):
    """As torch.nn.Conv1d: (N, C, L) → (N, O, OL); see Convolutional."""

    spatial = 1


class Conv2d(Convolutional):
    """As torch.nn.Conv2d: (N, C, H, W) → (N, O, OH, OW); see Convolutional."""


class Conv3d(Convolutional):
    """As torch.nn.Conv3d: (N, C, D, H, W) → (N, O, OD, OH, OW); see Convolutional."""

    spatial = 3


class Transposed(_Windows):
    """What transposed convolutions have in common."""

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
    ):
        with named(self):
            if padding_mode != "zeros":
                raise ArgumentError("padding_mode", "zeros for a transposed convolution", repr(padding_mode))
            self._set_channels(in_channels, out_channels, groups)
            self.kernel_size = self._numbers("kernel_size", kernel_size)
        self.stride, self.padding, self.output_padding, self.dilation = stride, padding, output_padding, dilation
        self.padding_mode = padding_mode
        self._add_weights(in_channels, out_channels // groups, bias)

    def options(self) -> dict[str, Any]:
        names = ("stride", "padding", "output_padding", "dilation", "groups")
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
