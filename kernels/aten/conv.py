"""Convolution over one to three spatial axes, and transposed, by torch (oneDNN, where it has it)."""

from __future__ import annotations

from typing import Any

import torch

from gpulayers.arrays import Spec, spec

from .._conv import conv_saved
from .._window import output_order
from ._tensors import FLOAT32, arranged, plainly, refusal

REFUSALS = {
    "dtype": FLOAT32,
    "empty": "an empty array is left to the NumPy kernel",
    "epilogue": "with a scale, a residual or an activation the NumPy kernel computes",
}


def conv_refuses(
    x: Spec,
    weight: Spec,
    bias: Spec | None = None,
    scale: Spec | None = None,
    residual: Spec | None = None,
    *,
    needs: tuple,
    activation: str | None = None,
    **options: Any,
) -> str | None:
    if activation is not None or scale is not None or residual is not None:
        return REFUSALS["epilogue"]
    return refusal(x) or (REFUSALS["empty"] if 0 in (*x.shape, *weight.shape) else None)


conv_transpose_refuses = conv_refuses


def _both(padding: tuple) -> list[int]:
    """What torch pads on both sides; none where some sides differ."""
    return [before if before == after else 0 for before, after in padding]


def _flat(padding: tuple, both: list, sign: int = 1) -> list[int]:
    """What is left to pad, in the order of torch's ``pad``; sign = −1: to cut off."""
    return [sign * (side - p) for (a, b), p in zip(reversed(padding), reversed(both)) for side in (a, b)]


def _padded(x: torch.Tensor, padding: tuple, both: list, sign: int = 1) -> torch.Tensor:
    left = _flat(padding, both, sign)
    return torch.nn.functional.pad(x, left) if any(left) else x


def _output(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return arranged(y, None if x.is_contiguous() else output_order(spec(x)))


def _gradients(dy: torch.Tensor, saved: dict, inputs: tuple, needs: tuple, *options: Any) -> tuple:
    """torch's gradients for (x, weight, bias), of inputs as torch's convolution sees them. Of what is not saved torch looks
    at the shape alone."""
    x, weight = (saved[name] if name in saved else dy.new_empty(s.shape) for name, s in zip(("x", "weight"), inputs))
    wanted = [name in needs for name in ("x", "weight", "bias")]
    channels = inputs[2].shape if inputs[2] is not None else None
    found = torch.ops.aten.convolution_backward(dy, x, weight, channels, *options, wanted)
    return tuple(g if w else None for g, w in zip(found, wanted))  # at times it gives more


def _arranged_gradients(found: tuple, inputs: tuple) -> tuple:
    dx, dweight, dbias = found
    return *(None if g is None else arranged(g, s.like().order) for g, s in zip((dx, dweight), inputs)), dbias


# --- conv ------------------------------------------------------------------------------------------------------------


def _convolved(x: Any, weight: Any, bias: Any, stride: tuple, padding: tuple, dilation: tuple, groups: int) -> Any:
    both = _both(padding)
    wide = _padded(x, padding, both)
    return torch.convolution(wide, weight, bias, stride, both, dilation, False, (0,) * len(stride), groups)


def conv_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Any = None,
    scale: Any = None,
    residual: Any = None,
    *,
    needs: tuple = (),
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
    activation: str | None = None,
) -> tuple[tuple, dict]:
    y = plainly(_convolved, x, weight, bias, stride, padding, dilation, groups)
    return (_output(y, x),), conv_saved(needs, None, y, None, x, weight)


def _conv_gradients(
    dy: Any, saved: dict, inputs: tuple, needs: tuple, stride: tuple, padding: tuple, dilation: tuple, groups: int
) -> tuple:
    both = _both(padding)
    grown = [n + a + b - 2 * p for n, (a, b), p in zip(inputs[0].shape[2:], padding, both)]
    wide = inputs[0]._replace(shape=(*inputs[0].shape[:2], *grown))
    given = saved | ({"x": _padded(saved["x"], padding, both)} if "x" in saved else {})
    options = stride, both, dilation, False, (0,) * len(stride), groups
    dx, *rest = _gradients(dy, given, (wide, *inputs[1:]), needs, *options)
    return (None if dx is None else _padded(dx, padding, both, -1)), *rest


def conv_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
    activation: str | None = None,
) -> tuple:
    found = plainly(_conv_gradients, dys[0], saved, inputs[:3], needs, stride, padding, dilation, groups)
    return *_arranged_gradients(found, inputs), None, None


# --- conv_transpose --------------------------------------------------------------------------------------------------


def _transposed(
    x: Any, weight: Any, bias: Any, stride: tuple, padding: tuple, more: tuple, dilation: tuple, groups: int
) -> Any:
    both = _both(padding)
    y = torch.convolution(x, weight, bias, stride, both, dilation, True, more, groups)
    return _padded(y, padding, both, -1)


def conv_transpose_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Any = None,
    *,
    needs: tuple = (),
    stride: tuple,
    padding: tuple,
    output_padding: tuple,
    dilation: tuple,
    groups: int,
    activation: str | None = None,
) -> tuple[tuple, dict]:
    y = plainly(_transposed, x, weight, bias, stride, padding, output_padding, dilation, groups)
    return (_output(y, x),), conv_saved(needs, None, y, None, x, weight)


def _transposed_gradients(
    dy: Any, saved: dict, inputs: tuple, needs: tuple, stride: tuple, padding: tuple, more: tuple, *options: Any
) -> tuple:
    both, (dilation, groups) = _both(padding), options
    wide = _padded(dy, padding, both)
    found = _gradients(wide, saved, inputs, needs, stride, both, dilation, True, more, groups)
    return found


def conv_transpose_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    stride: tuple,
    padding: tuple,
    output_padding: tuple,
    dilation: tuple,
    groups: int,
    activation: str | None = None,
) -> tuple:
    how = (stride, padding, output_padding, dilation, groups)
    return _arranged_gradients(plainly(_transposed_gradients, dys[0], saved, inputs, needs, *how), inputs)
