"""What poolings share: their windows, images with as much around them as windows reach, and places in an image."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gpulayers.arrays import Spec, arranged, int64, namespace, up
from gpulayers.definition import ShapeError
from gpulayers.ops._op import require_float
from gpulayers.ops._window import AXES, numbers, require_images

place_dtype = np.dtype(np.int32)
"""Of the places that are saved, each in its image."""


def _output_size(size: Any, kernel: int, stride: int, padding: int, dilation: int, ceil: bool, axis: str) -> Any:
    """OH or OW; with ``ceil`` a last window that starts inside the image or its left padding counts too."""
    if size is None:
        return None
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (room + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (out - 1) * stride >= size + padding:
        out -= 1
    if out < 1:
        brackets = "⌈⌉" if ceil else "⌊⌋"
        formula = f"({axis} + 2 · {padding} − {dilation} · ({kernel} − 1) − 1) / {stride}"
        raise ShapeError("x", f"O{axis} = {brackets[0]}{formula}{brackets[1]} + 1 ≥ 1", f"{axis} = {size}")
    return out


def output_size(
    sizes: Sequence, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], ceil: bool
) -> tuple:  # fmt: skip
    """How many windows lie along each axis."""
    each = zip(sizes, kernel, stride, padding, dilation, AXES[len(sizes)])
    return tuple([_output_size(n, k, s, p, d, ceil, axis) for n, k, s, p, d, axis in each])


def windows(
    x: Spec, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, whole: bool = True
) -> tuple:  # fmt: skip
    """(normal kernel_size, stride, padding, dilation, output size), checked. whole: x has pixels."""
    require_float("x", x)
    count = require_images(x)
    if whole and 0 in x.shape[1:]:
        raise ShapeError("x", f"C, {', '.join(AXES[count])} ≥ 1 (N may be 0)", list(x.shape))
    kernel = numbers("kernel_size", kernel_size, 1, count)
    stride = kernel if stride is None else numbers("stride", stride, 1, count)
    padding, dilation = numbers("padding", padding, 0, count), numbers("dilation", dilation, 1, count)
    for p, k in zip(padding, kernel):
        if 2 * p > k:
            raise ShapeError("padding", "padding ≤ kernel_size / 2", f"padding {padding}, kernel_size {kernel}")
    return kernel, stride, padding, dilation, output_size(x.shape[2:], kernel, stride, padding, dilation, ceil_mode)


def full(
    x: Any, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    size: Sequence[int], fill: float,
) -> Any:  # fmt: skip
    """``x`` with as much of ``fill`` around it as the windows reach."""
    ends = [s * (o - 1) + d * (k - 1) + 1 for s, o, d, k in zip(stride, size, dilation, kernel)]
    after = [max(0, e - n - p) for e, n, p in zip(ends, x.shape[2:], padding)]
    return namespace(x).pad(x, [(0, 0), (0, 0), *zip(padding, after)], constant_values=fill)


def inside(dx: Any, x: Spec, padding: Sequence[int]) -> Any:
    """The gradient without its padding, as x lies in memory."""
    own = [slice(p, p + n) for p, n in zip(padding, x.shape[2:])]
    return arranged(dx[(slice(None), slice(None), *own)].astype(x.dtype), x.like().order)


def taps(kernel: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(number, place) of each tap of a window."""
    return enumerate(itertools.product(*map(range, kernel)))


def along(values: Any, axis: int, count: int) -> Any:
    """One number for each step along one of ``count`` spatial axes, so that it meets arrays over all of them."""
    return values.reshape(-1, *(1,) * (count - 1 - axis))


def positions(
    won: Any, sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Any:  # fmt: skip
    """Where in their images, counted row-major, the taps that won lie; −1 where none did."""
    xp, count = namespace(won), len(sizes)
    tap, total = won.astype(int64), None
    for axis in reversed(range(count)):
        of_axis = tap % kernel[axis] if axis else tap
        start = along(xp.arange(won.shape[2 + axis]) * stride[axis] - padding[axis], axis, count)
        at = (start + of_axis * dilation[axis]) * math.prod(sizes[axis + 1 :])
        total = at if total is None else total + at
        tap = tap // kernel[axis]
    return xp.where(won < 0, xp.asarray(-1, int64), total)


def to_where_it_won(dy: Any, index: Any, x: Spec) -> Any:
    """The gradient for x of the places, counted row-major in their image, whose numbers came out: sums of dy."""
    xp, rows, pixels = namespace(dy), math.prod(x.shape[:2]), math.prod(x.shape[2:])
    at = index.reshape(rows, math.prod(index.shape[2:])) + xp.arange(rows).reshape(-1, 1) * pixels
    g = up(dy)
    dx = xp.bincount(at.reshape(-1), weights=g.reshape(-1), minlength=rows * pixels)
    return arranged(dx.reshape(x.shape).astype(x.dtype), x.like().order)
