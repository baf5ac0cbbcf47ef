"""Convolution over one to three spatial axes, and transposed: torch.nn's classes and ``torch.nn.functional``'s functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import conv as ops
from gpulayers.torch import _autocast, _epilogue
from gpulayers.torch._arguments import batched, each, held
from gpulayers.torch._layout import as_weight
from gpulayers.torch._op import TorchOp
from gpulayers.torch.padding import pad

Size = int | Sequence[int]
_CONVS: list[Any] = [F.conv1d, F.conv2d, F.conv3d]
_TRANSPOSED: list[Any] = [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d]


def _around(padding: Sequence[int], sign: int = 1) -> list[int]:
    """(before, after, …) in the order of ``F.pad``: the last axis first. sign = −1: to cut off."""
    return [sign * p for at in range(len(padding) - 2, -1, -2) for p in padding[at : at + 2]]


def _conv_twin(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    scale: Any,
    residual: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    activation: str | None = None,
) -> Tensor:
    """padding: one number for each axis, or (before, after, …); or what torch's function takes."""
    axes = weight.dim() - 2
    if len(padding) == 2 * axes and not isinstance(padding, str):
        x, padding = F.pad(x, _around(padding)), 0
    z = _CONVS[axes - 1](x, weight, None if scale is not None else bias, stride, padding, dilation, groups)
    if scale is not None:
        rows = [None if row is None else row.reshape(-1, *(1,) * axes) for row in (scale, bias)]
        z = (z * rows[0] if rows[1] is None else z * rows[0] + rows[1]).to(z.dtype)
    if residual is not None:
        z = z + residual
    return _epilogue.applied(activation, z)


def _transpose_twin(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    output_padding: Any,
    dilation: Any,
    groups: int,
    activation: str | None = None,
) -> Tensor:
    axes = weight.dim() - 2
    function = _TRANSPOSED[axes - 1]
    if len(padding) == 2 * axes:
        z = F.pad(function(x, weight, bias, stride, 0, output_padding, groups, dilation), _around(padding, -1))
    else:
        z = function(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _epilogue.applied(activation, z)


def _again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    """By y, or by z computed again from what it depends on."""
    names = ("stride", "padding", "dilation", "groups")
    return gradients(_conv_twin, [options[k] for k in names], 5, dys[0], saved, inputs, options["activation"])


def _transpose_again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    names = ("stride", "padding", "output_padding", "dilation", "groups")
    return gradients(_transpose_twin, [options[k] for k in names], 3, dys[0], saved, inputs, options["activation"])


def gradients(
    twin: Callable[..., Tensor], how: list, count: int, dy: Tensor, saved: dict, inputs: tuple, activation: str | None
) -> list:
    """Of an op with so many inputs, which ``twin`` computes in torch's operations."""
    x, weight, scale, kept = (saved.get(k) for k in ("x", "weight", "scale", "y"))
    if activation is not None and kept is None:
        if x is None:
            raise NotImplementedError(
                f"convolution: the gradient of a gradient through activation={activation!r} needs a weight that requires one"
            )
        given = [saved.get(k) for k in ("x", "weight", "bias", "scale", "residual")[:count]]
        with torch.enable_grad():
            kept = twin(*given, *how)
    dz = _epilogue.gradient(activation, dy, kept)
    g = dz if scale is None else (dz * scale.reshape(-1, *(1,) * (dz.dim() - 2))).to(dz.dtype)
    grads: list[Any] = [None] * count
    with torch.enable_grad():
        # Of what is not saved the gradients look at the shape alone; views keep equal tensors apart.
        ins = [_stand_in(t, spec, dy) for t, spec in zip((x, weight), inputs)]
        wanted = [i for i, other in enumerate((weight, x)) if other is not None]
        if wanted:
            found = torch.autograd.grad(
                twin(*ins, *[None] * (count - 2), *how), [ins[i] for i in wanted], g, create_graph=True
            )
            for i, grad in zip(wanted, found):
                grads[i] = grad
    if inputs[2] is not None:
        grads[2] = dz.sum((0, *range(2, dz.dim())))
    if count > 3 and inputs[4] is not None:
        grads[4] = dz
    return grads


def _stand_in(t: Tensor | None, spec: Any, like: Tensor) -> Tensor:
    if t is None:
        return like.new_zeros(spec.shape, requires_grad=True)
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def _flops(x: Sequence[int], weight: Sequence[int], y: Sequence[int]) -> dict[str, int]:
    once, groups = 2 * math.prod(y) * math.prod(weight[1:]), x[1] // weight[1]
    return {"y": once, "x": once, "weight": once * groups}  # as torch counts the latter


def _transpose_flops(x: Sequence[int], weight: Sequence[int], y: Sequence[int]) -> dict[str, int]:
    return _flops(y, weight, x)  # a convolution's, walked back


_conv = TorchOp(
    ops.conv,
    _conv_twin,
    "int[] stride, int[] padding, int[] dilation, int groups, str? activation",
    buffers=("z",),
    again=_again,
    cast=_autocast.LOWER,
    casts=3,
    flops=_flops,
    direct=True,
)
_conv_transpose = TorchOp(
    ops.conv_transpose,
    _transpose_twin,
    "int[] stride, int[] padding, int[] output_padding, int[] dilation, int groups, str? activation",
    buffers=("z",),
    again=_transpose_again,
    cast=_autocast.LOWER,
    flops=_transpose_flops,
    direct=True,
)


def _same(weight: Tensor, stride: tuple, dilation: Sequence[int]) -> Any:
    """(before, after, …) of padding = "same"; None where torch refuses it."""
    reach = [d * (k - 1) for k, d in zip(weight.shape[2:], dilation)]
    return tuple([side for r in reach for side in (r // 2, r - r // 2)]) if set(stride) == {1} else None


def _fits(weight: Any, axes: int) -> bool:
    """Whether it has a weight's rank; of what only stands for a tensor nobody knows."""
    return weight.dim() == axes + 2 if isinstance(weight, Tensor) else hasattr(weight, "__torch_function__")


def walks(axes: int, weight: Any, stride: Any, padding: Any, dilation: Any) -> tuple[tuple, tuple, tuple] | None:
    """(stride, padding, dilation) as the op takes them; None for what torch refuses."""
    sides: Any = None
    strides, dilations = each(stride, axes), each(dilation, axes)
    if _fits(weight, axes):
        if not isinstance(padding, str):
            sides = each(padding, axes)
        elif padding == "same":
            sides = _same(weight, strides, dilations)
        elif padding == "valid":
            sides = (0,) * axes
    return None if sides is None or (len(sides) != axes and padding != "same") else (strides, sides, dilations)


def _convolved(
    axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    scale: Any = None,
    residual: Any = None,
    activation: str | None = None,
) -> Tensor:
    how = walks(axes, weight, stride, padding, dilation)
    if how is None:
        return _CONVS[axes - 1](input, weight, bias, stride, padding, dilation, groups)  # raises
    if residual is not None and isinstance(input, Tensor) and input.dim() == residual.dim() == axes + 1:
        residual = residual.unsqueeze(0)
    return batched(_conv, axes + 2, input, weight, bias, scale, residual, *how, groups, activation)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """As ``torch.nn.functional.conv1d``: input (N, C, L) or (C, L), weight (O, C / groups, k).

    And y = f(scale · conv + bias + residual) in the same pass. scale: (O,), in the dtype of the input or float32. residual: of
    y's shape and dtype. activation: f, a name in ``gpulayers.ops.activation.ACTIVATIONS``.
    """
    return _convolved(1, input, weight, bias, stride, padding, dilation, groups, scale, residual, activation)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """As ``torch.nn.functional.conv2d``: input (N, C, H, W) or (C, H, W), weight (O, C / groups, kh, kw).

    And y = f(scale · conv + bias + residual) in the same pass. scale: (O,), in the dtype of the input or float32. residual: of
    y's shape and dtype. activation: f, a name in ``gpulayers.ops.activation.ACTIVATIONS``.
    """
    return _convolved(2, input, weight, bias, stride, padding, dilation, groups, scale, residual, activation)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """As ``torch.nn.functional.conv3d``: input (N, C, D, H, W) or (C, D, H, W), weight (O, C / groups, kd, kh, kw).

    And y = f(scale · conv + bias + residual) in the same pass. scale: (O,), in the dtype of the input or float32. residual: of
    y's shape and dtype. activation: f, a name in ``gpulayers.ops.activation.ACTIVATIONS``.
    """
    return _convolved(3, input, weight, bias, stride, padding, dilation, groups, scale, residual, activation)


def _walked_back(
    axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    more: Any,
    groups: int,
    dilation: Any,
) -> Tensor:
    sides: Any = ()
    if _fits(weight, axes) and not isinstance(padding, str):
        sides = each(padding, axes)
    if len(sides) != axes:
        return _TRANSPOSED[axes - 1](input, weight, bias, stride, padding, more, groups, dilation)  # raises
    options = each(stride, axes), sides, each(more, axes), each(dilation, axes), groups, None
    return batched(_conv_transpose, axes + 2, input, weight, bias, *options)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """As ``torch.nn.functional.conv_transpose1d``: input (N, C, L) or (C, L), weight (C, O / groups, k)."""
    return _walked_back(1, input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """As ``torch.nn.functional.conv_transpose2d``: input (N, C, H, W) or (C, H, W), weight (C, O / groups, kh, kw)."""
    return _walked_back(2, input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """As ``torch.nn.functional.conv_transpose3d``: input (N, C, D, H, W) or (C, D, H, W), weight (C, O / groups, kd, kh,
    kw)."""
    return _walked_back(3, input, weight, bias, stride, padding, output_padding, groups, dilation)


class Convolution:
    """A class of torch.nn's that convolves, one way or the other."""


class _Conv(Convolution):
    """A class of torch.nn's that convolves: its forward, with ours in the place of torch's function."""

    _function: Callable[..., Tensor]
    padding: Any
    padding_mode: str
    stride: Any
    dilation: Any
    groups: int
    _reversed_padding_repeated_twice: list[int]

    def forward(self: Any, input: Tensor) -> Tensor:
        return self._conv_forward(input, held(self, "weight"), held(self, "bias"))

    def ready(self, input: Tensor, weight: Tensor) -> tuple[Tensor, Any]:
        """(the input, padded by what is no zeros and in the weight's memory layout; what is left to pad)."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input, padding = pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return as_weight(input, weight), padding

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = self.ready(input, weight)
        return self._function(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class _ConvTranspose(Convolution):
    _function: Callable[..., Tensor]
    kernel_size: Any

    def forward(self: Any, input: Tensor, output_size: Any = None) -> Tensor:
        more = self.output_padding
        if output_size is not None:
            axes, sizes = len(self.kernel_size), (self.stride, self.padding, self.kernel_size)
            more = self._output_padding(input, output_size, *sizes, axes, self.dilation)
        weight, bias = held(self, "weight"), held(self, "bias")
        input = as_weight(input, weight)
        return self._function(input, weight, bias, self.stride, self.padding, more, self.groups, self.dilation)


class Conv1d(_Conv, nn.Conv1d):
    """``torch.nn.Conv1d`` over gpulayers' kernels."""

    _function = staticmethod(conv1d)


class Conv2d(_Conv, nn.Conv2d):
    """``torch.nn.Conv2d`` over gpulayers' kernels."""

    _function = staticmethod(conv2d)


class Conv3d(_Conv, nn.Conv3d):
    """``torch.nn.Conv3d`` over gpulayers' kernels."""

    _function = staticmethod(conv3d)


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` over gpulayers' kernels."""

    _function = staticmethod(conv_transpose1d)


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` over gpulayers' kernels."""

    _function = staticmethod(conv_transpose2d)


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` over gpulayers' kernels."""

    _function = staticmethod(conv_transpose3d)


class LazyConv1d(_Conv, nn.LazyConv1d):
    """``torch.nn.LazyConv1d``: its first call makes it a Conv1d over gpulayers' kernels."""

    _function = staticmethod(conv1d)
    cls_to_become = Conv1d  # type: ignore[assignment]


class LazyConv2d(_Conv, nn.LazyConv2d):
    """``torch.nn.LazyConv2d``: its first call makes it a Conv2d over gpulayers' kernels."""

    _function = staticmethod(conv2d)
    cls_to_become = Conv2d  # type: ignore[assignment]


class LazyConv3d(_Conv, nn.LazyConv3d):
    """``torch.nn.LazyConv3d``: its first call makes it a Conv3d over gpulayers' kernels."""

    _function = staticmethod(conv3d)
    cls_to_become = Conv3d  # type: ignore[assignment]


class LazyConvTranspose1d(_ConvTranspose, nn.LazyConvTranspose1d):
    """``torch.nn.LazyConvTranspose1d``: its first call makes it a ConvTranspose1d over gpulayers' kernels."""

    _function = staticmethod(conv_transpose1d)
    cls_to_become = ConvTranspose1d  # type: ignore[assignment]


class LazyConvTranspose2d(_ConvTranspose, nn.LazyConvTranspose2d):
    """``torch.nn.LazyConvTranspose2d``: its first call makes it a ConvTranspose2d over gpulayers' kernels."""

    _function = staticmethod(conv_transpose2d)
    cls_to_become = ConvTranspose2d  # type: ignore[assignment]


class LazyConvTranspose3d(_ConvTranspose, nn.LazyConvTranspose3d):
    """``torch.nn.LazyConvTranspose3d``: its first call makes it a ConvTranspose3d over gpulayers' kernels."""

    _function = staticmethod(conv_transpose3d)
    cls_to_become = ConvTranspose3d  # type: ignore[assignment]
