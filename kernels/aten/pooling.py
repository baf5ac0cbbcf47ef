"""Max pooling by torch, whose indices in the image are turned into taps of the window, which every backend saves."""

from __future__ import annotations

import math
from typing import Any

import torch

from gpulayers.arrays import Spec, spec

from .._window import image, output_order
from ._tensors import FLOAT32, arranged, plainly, refusal

REFUSALS = {
    "dtype": FLOAT32,
    "window": "its windows have up to 127 taps side by side, none past the end (dilation = 1, ceil_mode = False)",
    "empty": "an empty array is left to the NumPy kernel",
}
_aten = torch.ops.aten


def max_pool_refuses(
    x: Spec, *, needs: tuple = (), kernel_size: tuple, dilation: tuple, ceil_mode: bool, **options: Any
) -> str | None:
    if (reason := refusal(x)) is not None or 0 in x.shape:
        return reason or REFUSALS["empty"]
    plain = set(dilation) == {1} and not ceil_mode and math.prod(kernel_size) <= 127
    return None if plain else REFUSALS["window"]


class _Windows:
    """A window's options over an image, or a sequence as an image of one row, or a volume."""

    def __init__(self, kernel: tuple, stride: tuple, padding: tuple):
        if len(kernel) == 1:
            kernel, stride, padding = (1, *kernel), (1, *stride), (0, *padding)
        self.kernel, self.stride, self.padding = kernel, stride, padding
        deep = len(kernel) == 3
        self.forward = _aten.max_pool3d_with_indices if deep else _aten.max_pool2d_with_indices
        self.backward = _aten.max_pool3d_with_indices_backward if deep else _aten.max_pool2d_with_indices_backward

    def firsts(self, size: Any) -> list[torch.Tensor]:
        """Where each window's first tap lies, along each axis."""
        each = zip(size, self.stride, self.padding)
        starts = [torch.arange(n, dtype=torch.int32) * s - p for n, s, p in each]
        return [first.view(-1, *(1,) * (len(starts) - 1 - axis)) for axis, first in enumerate(starts)]


def _with_taps(x: torch.Tensor, of: _Windows) -> tuple:
    y, indices = of.forward(x, of.kernel, of.stride, of.padding)
    tap, at, factor = None, indices.int(), 1
    for size, first, k in reversed(list(zip(x.shape[2:], of.firsts(y.shape[2:]), of.kernel))):
        rest = at.div(size, rounding_mode="floor")
        along = (at - rest * size - first) * factor
        tap, at, factor = along if tap is None else tap + along, rest, factor * k
    return y, indices, tap.to(torch.int8)


def max_pool_forward(
    x: torch.Tensor,
    *,
    needs: tuple = (),
    kernel_size: tuple,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    ceil_mode: bool,
    return_indices: bool,
) -> tuple[tuple, dict]:
    found = plainly(_with_taps, image(x), _Windows(kernel_size, stride, padding))
    y, indices, tap = (a.squeeze(2) for a in found) if x.ndim == 3 else found
    order = None if x.is_contiguous() else output_order(spec(x))  # type: ignore[arg-type]
    outputs = (arranged(y, order), *([arranged(indices, order)] if return_indices else []))
    return outputs, {"tap": arranged(tap, order)} if needs else {}


def max_pool_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    kernel_size: tuple,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    ceil_mode: bool,
    return_indices: bool,
) -> tuple:
    (n, c, *sizes), windows = inputs[0].shape, _Windows(kernel_size, stride, padding)
    sizes = [1, *sizes] if len(sizes) == 1 else sizes
    dx = plainly(_gradient, image(dys[0]), image(saved["tap"]), (n, c, *sizes), windows)
    return (arranged(dx.view(inputs[0].shape) if dx.ndim != inputs[0].ndim else dx, inputs[0].like().order),)


def _gradient(dy: torch.Tensor, tap: torch.Tensor, shape: tuple, of: _Windows) -> torch.Tensor:
    indices, rest, factor = None, tap.int(), 1
    for size, first, k in reversed(list(zip(shape[2:], of.firsts(dy.shape[2:]), of.kernel))):
        before = rest.div(k, rounding_mode="floor")
        along = (rest - before * k + first) * factor
        indices, rest, factor = along if indices is None else indices + along, before, factor * size
    given = dy.new_empty(shape)  # of which torch looks at the shape
    ones = (1,) * len(of.kernel)
    return of.backward(dy, given, of.kernel, of.stride, of.padding, ones, False, indices.long())
