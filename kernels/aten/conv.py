"""Convolution over one to three spatial axes, and transposed, by torch (oneDNN, where it has it)."""

from __future__ import annotations

from typing import Any

import torch

from gpulayers.arrays import Spec, spec

from .._conv import conv_saved
from .._window import output_order
from ..numpy import _blocks
from ..numpy._epilogue import before, epilogue
from ._tensors import FLOAT32, arranged, lent, plainly, refusal

REFUSALS = {"dtype": FLOAT32, "empty": "an empty array is left to the NumPy kernel"}


def conv_refuses(x: Spec, weight: Spec, *others: Spec | None, needs: tuple, **options: Any) -> str | None:
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


# --- the epilogue: its activation is NumPy's, on the same memory -------------------------------------------------------


def _finished(
    y: torch.Tensor, needs: tuple, bias: Any, scale: Any, residual: Any, activation: str | None
) -> torch.Tensor | None:
    """y = f(scale · y + bias + residual), in place; gives z where backward computes from it."""
    for change, row in ((y.mul_, scale), (y.add_, bias)):
        if row is not None:
            change(_row(row, y))
    if residual is not None:
        y.add_(residual)
    if activation is None:
        return None
    end = epilogue(y.numpy(), needs, None, None, None, activation)
    end.added(y.numpy(), ())
    end.activated(_blocks.flat(y.numpy()))
    return None if end.z is None else torch.from_numpy(end.z)


def _row(values: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return values.detach().reshape(-1, *(1,) * (y.dim() - 2))


def _before(dy: torch.Tensor, saved: dict, activation: str | None) -> torch.Tensor:
    """dz = dy f'(z)."""
    if activation is None:
        return dy
    kept = {k: lent(saved[k]) for k in ("y", "z") if k in saved}
    return torch.from_numpy(before(lent(dy), kept, activation))


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
    y = plainly(_convolved, x, weight, None if scale is not None else bias, stride, padding, dilation, groups)
    y = _output(y, x)
    z = plainly(_finished, y, needs, None if scale is None else bias, scale, residual, activation)
    return (y,), conv_saved(needs, activation, y, z, x, weight, bias, scale, residual)


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
    how = stride, padding, dilation, groups
    dz = plainly(_before, dys[0], saved, activation)
    if "scale" not in saved:
        found = plainly(_conv_gradients, dz, saved, inputs[:3], needs, *how)
    else:
        rest = tuple([name for name in needs if name in ("x", "weight")])
        dx, dweight, _ = plainly(_conv_gradients, plainly(_scaled, dz, saved["scale"]), saved, inputs[:3], rest, *how)
        found = dx, dweight, plainly(_sums, dz) if "bias" in needs else None
    dresidual = plainly(_copied, dz, inputs[0]) if "residual" in needs else None
    if "x" in needs and len(dys) > 1:
        plainly(found[0].add_, dys[1])
    return *_arranged_gradients(found, inputs), None, dresidual


def _scaled(dz: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return dz * _row(scale, dz)


def _sums(dz: torch.Tensor) -> torch.Tensor:
    return dz.sum((0, *range(2, dz.dim())))


def _copied(dz: torch.Tensor, x: Spec) -> torch.Tensor:
    return arranged(dz.clone(), output_order(x))


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
    y = _output(plainly(_transposed, x, weight, bias, stride, padding, output_padding, dilation, groups), x)
    z = plainly(_finished, y, needs, None, None, None, activation)
    return (y,), conv_saved(needs, activation, y, z, x, weight, bias)


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
    dz = plainly(_before, dys[0], saved, activation)
    return _arranged_gradients(plainly(_transposed_gradients, dz, saved, inputs, needs, *how), inputs)
