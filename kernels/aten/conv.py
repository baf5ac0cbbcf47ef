"""Convolution by torch (oneDNN, where it has it)."""

from __future__ import annotations

from typing import Any

import torch

from gpulayers.arrays import Spec, spec

from .._window import output_order
from ._tensors import FLOAT32, arranged, plainly, refusal

REFUSALS = {"dtype": FLOAT32, "empty": "an empty array is left to the NumPy kernel"}


def conv2d_refuses(x: Spec, weight: Spec, bias: Spec | None = None, *, needs: tuple, **options: Any) -> str | None:
    return refusal(x) or (REFUSALS["empty"] if 0 in (*x.shape, *weight.shape) else None)


def _around(x: torch.Tensor, padding: tuple) -> tuple[torch.Tensor, tuple[int, int]]:
    """(x, what torch pads on both sides): where the sides differ, x comes padded."""
    (top, bottom), (left, right) = padding
    if (top, left) == (bottom, right) and min(top, left) >= 0:
        return x, (top, left)
    return torch.nn.functional.pad(x, (left, right, top, bottom)), (0, 0)


def _convolved(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, stride: tuple, padding: tuple, dilation: tuple, groups: int
) -> torch.Tensor:
    wide, both = _around(x, padding)
    return torch.conv2d(wide, weight, bias, stride, both, dilation, groups)


def conv2d_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Any = None,
    *,
    needs: tuple = (),
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
) -> tuple[tuple, dict]:
    y = plainly(_convolved, x, weight, bias, stride, padding, dilation, groups)
    saved = {"x": x} if "weight" in needs else {}
    saved |= {"weight": weight} if "x" in needs else {}
    return (arranged(y, None if x.is_contiguous() else output_order(spec(x))),), saved  # type: ignore[arg-type]


def conv2d_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
) -> tuple:
    wanted = [name in needs for name in ("x", "weight", "bias")]
    return plainly(_gradients, dys[0], saved, inputs, wanted, stride, padding, dilation, groups)


def _gradients(
    dy: torch.Tensor, saved: dict, inputs: tuple, wanted: list, stride: tuple, padding: tuple, *options: Any
) -> tuple:
    # Of what is not saved torch looks at the shape alone.
    x, weight = (saved[name] if name in saved else dy.new_empty(s.shape) for name, s in zip(("x", "weight"), inputs))
    wide, both = _around(x, padding)
    dilation, groups = options
    how = [len(weight)], stride, both, dilation, False, (0, 0), groups, wanted
    found = torch.ops.aten.convolution_backward(dy, wide, weight, *how)
    dx, dweight, dbias = (g if w else None for g, w in zip(found, wanted))  # at times it gives more
    if dx is not None:
        if wide is not x:
            (top, _), (left, _) = padding
            dx = _inside(dx, x.shape, top, left)
        dx = arranged(dx, inputs[0].like().order)
    return dx, None if dweight is None else arranged(dweight, inputs[1].like().order), dbias


def _inside(wide: torch.Tensor, shape: Any, top: int, left: int) -> torch.Tensor:
    """The image that stood in a padded one; padding below zero had cut it."""
    h, w = shape[2:]
    return torch.nn.functional.pad(wide, (-left, w + left - wide.shape[3], -top, h + top - wide.shape[2]))
