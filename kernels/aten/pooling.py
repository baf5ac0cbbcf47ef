"""Max pooling by torch, whose indices in the image are turned into taps of the window, which every backend saves."""

from __future__ import annotations

from typing import Any

import torch

from gpulayers.arrays import Spec, spec

from .._window import output_order
from ._tensors import FLOAT32, arranged, plainly, refusal

REFUSALS = {
    "dtype": FLOAT32,
    "window": "its windows have up to 127 taps side by side, none past the end (dilation = 1, ceil_mode = False)",
    "empty": "an empty array is left to the NumPy kernel",
}
_aten = torch.ops.aten
Pair = tuple[int, int]


def max_pool2d_refuses(
    x: Spec, *, needs: tuple = (), kernel_size: Pair, dilation: Pair, ceil_mode: bool, **options: Any
) -> str | None:
    if (reason := refusal(x)) is not None or 0 in x.shape:
        return reason or REFUSALS["empty"]
    plain = dilation == (1, 1) and not ceil_mode and kernel_size[0] * kernel_size[1] <= 127
    return None if plain else REFUSALS["window"]


def _corners(size: Any, stride: Pair, padding: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each window's first tap lies: rows (OH, 1) and columns (OW,)."""
    tops, lefts = (torch.arange(n, dtype=torch.int32) * s - p for n, s, p in zip(size, stride, padding))
    return tops[:, None], lefts


def _with_taps(x: torch.Tensor, kernel: Pair, stride: Pair, padding: Pair) -> tuple:
    y, indices = _aten.max_pool2d_with_indices(x, kernel, stride, padding)
    tops, lefts = _corners(y.shape[2:], stride, padding)
    at, width = indices.int(), x.shape[3]
    rows = at.div(width, rounding_mode="floor")
    tap = (rows - tops) * kernel[1] + (at - rows * width - lefts)
    return y, indices, tap.to(torch.int8)


def max_pool2d_forward(
    x: torch.Tensor,
    *,
    needs: tuple = (),
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    return_indices: bool,
) -> tuple[tuple, dict]:
    y, indices, tap = plainly(_with_taps, x, kernel_size, stride, padding)
    order = None if x.is_contiguous() else output_order(spec(x))  # type: ignore[arg-type]
    outputs = (arranged(y, order), *([arranged(indices, order)] if return_indices else []))
    return outputs, {"tap": arranged(tap, order)} if needs else {}


def max_pool2d_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    return_indices: bool,
) -> tuple:
    dx = plainly(_gradient, dys[0], saved["tap"], inputs[0].shape, kernel_size, stride, padding)
    return (arranged(dx, inputs[0].like().order),)


def _gradient(
    dy: torch.Tensor, tap: torch.Tensor, shape: tuple, kernel: Pair, stride: Pair, padding: Pair
) -> torch.Tensor:
    tops, lefts = _corners(dy.shape[2:], stride, padding)
    row = tap.div(kernel[1], rounding_mode="floor").int()
    indices = ((row + tops) * shape[3] + (tap - row * kernel[1] + lefts)).long()
    image = dy.new_empty(shape)  # of which torch looks at the shape
    return _aten.max_pool2d_with_indices_backward(dy, image, kernel, stride, padding, (1, 1), False, indices)
