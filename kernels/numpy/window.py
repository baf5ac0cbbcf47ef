"""Windows as columns, and back, a tap at a time: slices of the image itself, without padding around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gpulayers.arrays import Spec, compute_dtype, empty_numpy, float64

from .._window import Window
from ._images import over_blocks

REFUSALS = {"float64": "float64 is left to the definition"}


def _shown(size: int, count: int, first: int, stride: int) -> tuple[slice, slice]:
    """(windows, pixels) for a tap that lies on pixel ``first`` in the first window: those that meet on the image."""
    start = max(0, -(first // stride))
    stop = max(start, min(count, (size - 1 - first) // stride + 1))
    at = first + start * stride
    return slice(start, stop), slice(at, at + (stop - start - 1) * stride + 1 if stop > start else at, stride)


def _taps(window: Window, size: tuple, counts: tuple) -> Iterator[tuple]:
    """((r, q), windows' rows and columns, pixels' rows and columns) of each tap."""
    of_axes = [[_shown(n, o, t * d - p, s) for t in range(k)] for n, o, k, s, p, d in zip(size, counts, *window)]
    for r, (rows, tall) in enumerate(of_axes[0]):
        for q, (columns, wide) in enumerate(of_axes[1]):
            yield (r, q), (rows, columns), (tall, wide)


def _unfold(x: np.ndarray, y: np.ndarray, window: Window) -> None:
    """y, dense (N, C, kh, kw, OH, OW), from images."""
    counts = y.shape[4:]
    taps = list(_taps(window, x.shape[2:], counts))

    def work(y: np.ndarray, x: np.ndarray) -> None:
        for (r, q), (rows, columns), (tall, wide) in taps:
            one = y[:, :, r, q]
            if (rows.stop - rows.start, columns.stop - columns.start) != counts:
                one[...] = 0
            one[:, :, rows, columns] = x[:, :, tall, wide]

    over_blocks(work, [y], [x])


def _fold(y: np.ndarray, x: np.ndarray, window: Window) -> None:
    """Images, from y (N, C, kh, kw, OH, OW): each pixel the sum of the windows' places that lie on it."""
    kind = compute_dtype(x.dtype)
    taps = list(_taps(window, x.shape[2:], y.shape[4:]))

    def work(x: np.ndarray, y: np.ndarray) -> None:
        total = x if x.dtype == kind else np.empty(x.shape, kind)
        total[...] = 0
        for (r, q), (rows, columns), (tall, wide) in taps:
            total[:, :, tall, wide] += y[:, :, r, q, rows, columns]
        if total is not x:
            x[...] = total

    over_blocks(work, [x], [y])


def _apart(y: np.ndarray, c: int, window: Window, image: tuple) -> np.ndarray:
    """(N, C, kh, kw, OH, OW) of columns (N, C · kh · kw, OH · OW)."""
    return y.reshape(len(y), c, *window.kernel, *window.output_size(image, window.padding))


def unfold_forward(
    x: np.ndarray, *, needs: tuple = (), kernel_size: tuple, dilation: tuple, padding: tuple, stride: tuple
) -> tuple[tuple, dict]:
    window, (n, c, *size) = Window(kernel_size, stride, padding, dilation), x.shape
    counts = window.output_size(size, padding)
    y = np.empty((n, c * window.taps, counts[0] * counts[1]), x.dtype)
    _unfold(x, _apart(y, c, window, tuple(size)), window)
    return (y,), {}


def unfold_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, kernel_size: tuple, dilation: tuple, padding: tuple, stride: tuple
) -> tuple:  # fmt: skip
    window, (x,) = Window(kernel_size, stride, padding, dilation), inputs
    dx = empty_numpy(x.like())
    _fold(_apart(dys[0], x.shape[1], window, x.shape[2:]), dx, window)
    return (dx,)


def fold_forward(
    x: np.ndarray,
    *,
    needs: tuple = (),
    output_size: tuple,
    kernel_size: tuple,
    dilation: tuple,
    padding: tuple,
    stride: tuple,
) -> tuple[tuple, dict]:
    window = Window(kernel_size, stride, padding, dilation)
    c = x.shape[1] // window.taps
    y = np.empty((len(x), c, *output_size), x.dtype)
    _fold(_apart(x, c, window, output_size), y, window)
    return (y,), {}


def fold_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    output_size: tuple,
    kernel_size: tuple,
    dilation: tuple,
    padding: tuple,
    stride: tuple,
) -> tuple:
    window, (x,), (dy,) = Window(kernel_size, stride, padding, dilation), inputs, dys
    dx = np.empty(x.shape, x.dtype)
    _unfold(dy, _apart(dx, dy.shape[1], window, output_size), window)
    if (like := x.like()).order is None:
        return (dx,)
    laid = empty_numpy(like)
    laid[...] = dx
    return (laid,)


def unfold_refuses(x: Spec, *, needs: tuple, **options: Any) -> str | None:
    return REFUSALS["float64"] if x.dtype == float64 else None


fold_refuses = unfold_refuses
