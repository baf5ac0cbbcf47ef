"""What poolings share: where the taps of windows fall on images, and the parts of an image."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from .._pooling import Divisor
from .._window import Window
from ._images import empty_like


class Taps:
    """Where the taps of a window fall on images that reach as far as the windows do."""

    def __init__(self, of: Window, image: tuple[int, ...], size: tuple[int, ...]):
        self.of, self.image, self.size, self.kernel = of, image, size, of.kernel
        ends = of.reach(size)
        self.full = tuple(max(n + p, e) if p or e > n else n for n, p, e in zip(image, of.padding, ends))
        self.apart = max(of.laps) == 1
        """No pixel lies in two windows."""

    def along(self, axis: int, tap: int) -> tuple:
        """The index of what lies under one row (or column) of taps, along this spatial axis."""
        start, step = tap * self.of.dilation[axis], self.of.stride[axis]
        under = slice(start, start + step * (self.size[axis] - 1) + 1, step)
        return (..., under, *(slice(None),) * (len(self.size) - 1 - axis))

    def each(self) -> list[tuple[int, tuple]]:
        """(number, index of what lies under it) of each tap."""
        places = itertools.product(*map(range, self.kernel))
        return [(t, (..., *[self.along(a, k)[1] for a, k in enumerate(tap)])) for t, tap in enumerate(places)]

    def spread(self, wide: np.ndarray, narrow: np.ndarray, number: int) -> None:
        """``wide``: along an axis the sum of ``narrow`` over the taps that fall on each place."""
        wide.fill(0)
        for tap in range(self.kernel[number - 2]):
            wide[self.along(number - 2, tap)] += narrow

    def inside(self, full: np.ndarray) -> np.ndarray:
        return full[(..., *[slice(p, p + n) for p, n in zip(self.of.padding, self.image)])]

    def widen(self, x: np.ndarray, kind: np.dtype, fill: float) -> np.ndarray:
        """x in dtype ``kind`` with ``fill`` around it; x itself where it is so already."""
        if self.full == self.image:
            return x.astype(kind, copy=False)
        wide = empty_like(x, self.full, kind)
        wide.fill(fill)
        self.inside(wide)[...] = x
        return wide

    def first_taps(self) -> np.ndarray:
        """The number of the first tap on the image for each window, −1 for a window with none: (OH, OW)."""
        first = []
        for n, o, k, s, p, d in zip(self.image, self.size, *self.of):
            start = np.arange(o) * s - p
            tap = np.maximum(0, -(start // d))
            first.append(np.where((tap < k) & (start + tap * d < n), tap, -1))
        total = np.zeros((), np.int64)
        for axis, (tap, k) in enumerate(zip(first, self.kernel)):
            tap = spread_out(tap, axis, len(first))
            total = np.where((total < 0) | (tap < 0), -1, total * k + tap)
        return total

    def places(self, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(a, b): h · W + w of tap t of window (i, j) is a[i, j] + b[t]; b has a last element for the tap −1."""
        windows, taps = np.zeros((), np.int64), np.zeros((), np.int64)
        for axis, (n, o, k, s, p, d) in enumerate(zip(self.image, self.size, *self.of)):
            windows = windows * n + spread_out(np.arange(o) * s - p, axis, len(self.size))
            taps = taps * n + spread_out(np.arange(k) * d, axis, len(self.size))
        return np.where(first < 0, -1, windows), np.append(taps, 0)


def spread_out(values: np.ndarray, axis: int, count: int) -> np.ndarray:
    """One number for each step along one of ``count`` axes, so that it meets arrays over all of them."""
    return values.reshape(-1, *(1,) * (count - 1 - axis))


def weights_of(taps: Taps, kind: np.dtype, divisor: Divisor) -> Any:
    """1 / divisor of each window: (OH, OW), or one number where all are equal."""
    if divisor.override is not None:
        return kind.type(1 / divisor.override)
    counts = []
    for n, o, k, s, p in zip(taps.image, taps.size, *taps.of[:3]):
        start = np.arange(o) * s - p
        end = np.minimum(start + k, n + p)
        counts.append(end - start if divisor.include_pad else np.minimum(end, n) - np.maximum(start, 0))
    return (1 / math.prod(spread_out(c, axis, len(counts)) for axis, c in enumerate(counts))).astype(kind)


def parts_of(image: tuple, parts: tuple) -> list[list[slice]]:
    """The parts along each axis."""
    return [[slice(i * n // o, -(-(i + 1) * n // o)) for i in range(o)] for n, o in zip(image, parts)]
