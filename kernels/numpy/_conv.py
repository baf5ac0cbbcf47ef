"""What convolutions on NumPy share: the sizes and options of a call, and images split by the stride, for strided kernels
and for depthwise ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from math import gcd
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpulayers.arrays import compute_dtype

from . import _blocks

COLUMN_BYTES = 1 << 22
"""Of gathered pixels at a time."""
FEWEST_PIXELS = 512
"""Columns that a product should have: with fewer the weight is streamed for too little work."""
FEWEST_BYTES = 1 << 19
"""Of gathered pixels: with fewer the calls cost more than the work."""
FEWEST_CHANNELS = 32
"""For Winograd's algorithm, whose transforms cost as much as a few channels' products."""


class Options(NamedTuple):
    """A convolution's, in their normal form."""

    stride: tuple
    padding: tuple
    dilation: tuple
    groups: int


class Shape(NamedTuple):
    """The sizes and options of one call."""

    n: int
    c: int
    h: int
    w: int
    o: int
    kernel: tuple[int, int]
    size: tuple[int, int]
    """Of the output."""
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    groups: int
    kind: np.dtype
    """The dtype that sums are in."""

    @property
    def padded(self) -> tuple[int, int]:
        return self.h + sum(self.padding[0]), self.w + sum(self.padding[1])

    @property
    def strided(self) -> bool:
        return self.stride != (1, 1)

    @property
    def back(self) -> tuple[tuple[int, int], ...]:
        """What lies around dy where dx is a convolution of it, with stride 1."""
        axes = zip(self.kernel, self.dilation, self.padding, (self.h, self.w), self.size)
        return tuple((d * (k - 1) - before, n - out + before) for k, d, (before, _), n, out in axes)

    @property
    def depthwise(self) -> bool:
        return self.groups == self.c > 1

    @property
    def depth(self) -> int:
        """Terms of one sum."""
        return self.c // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def winograd(self) -> bool:
        """Whether fewer products pay for their transforms."""
        plain = self.kernel == (3, 3) and self.stride == self.dilation == (1, 1) and self.groups == 1
        enough = self.n * math.prod(self.size) >= 2 * max(self.c, self.o)  # or the weight's transform costs more
        return plain and enough and min(self.c, self.o) >= FEWEST_CHANNELS and max(map(max, self.padding)) <= 2

    def blocks(self) -> list[tuple[slice, list[tuple[int, int]]]]:
        """(some images, ranges of their output's rows) whose gathered pixels fit the cache; of images an even number
        of blocks, where that keeps them large enough for a thread each."""
        row_bytes = max(1, self.groups * self.depth * self.size[1] * self.kind.itemsize)
        image_bytes = row_bytes * self.size[0]
        wanted = max(-(-FEWEST_PIXELS // (self.size[0] * self.size[1])), FEWEST_BYTES // image_bytes)
        images = max(1, min(COLUMN_BYTES // image_bytes, wanted))
        if images < self.n:
            images = -(-self.n // (2 * -(-self.n // (2 * images))))
        step = max(1, COLUMN_BYTES // (row_bytes * images))
        rows = [(r, min(r + step, self.size[0])) for r in range(0, self.size[0], step)]
        return [(slice(i, min(i + images, self.n)), rows) for i in range(0, self.n, images)]


def shape_of(x: Any, weight: Any, size: Sequence[int], how: Options) -> Shape:
    """From arrays or specs of x and weight, and the output's size."""
    (o, _, *kernel), kind = weight.shape, compute_dtype(x.dtype)
    return Shape(*x.shape, o, tuple(kernel), tuple(size), *how, kind)  # type: ignore[call-arg]


def by_channels(channels: int, work: Callable[[int, int], None], elements: int) -> None:
    """work(lo, hi) for one run of channels a thread."""
    _blocks.over(channels, -(-channels // _blocks.threads()), work, elements)


class Taps(NamedTuple):
    """Taps of the kernel that fall on pixels of one parity (of one remainder by the stride)."""

    at: tuple[slice, slice]
    """Of the kernel."""
    phase: tuple[int, int]
    start: tuple[int, int]
    """Of the first tap, in rows and columns of the phase."""
    step: tuple[int, int]
    """From tap to tap."""
    taps: tuple[int, int]


def taps_by_phase(of: Shape) -> list[Taps]:
    def axis(kernel: int, stride: int, dilation: int) -> list[tuple]:
        every = stride // gcd(stride, dilation)
        return [
            (slice(k, None, every), k * dilation % stride, k * dilation // stride, dilation * every // stride, count)
            for k in range(min(kernel, every))
            if (count := -(-(kernel - k) // every))
        ]

    rows, columns = map(axis, of.kernel, of.stride, of.dilation)
    return [Taps(*zip(r, q)) for r in rows for q in columns]


def planes_of(x: np.ndarray, of: Shape) -> np.ndarray:
    """The padded images split by the stride, (sh, sw, n, c, rows + 1, columns): a tap's pixels are one run of a phase.

    The run takes what lies between two rows of output along, and at the end a part of the row more.
    """
    (sh, sw), ((top, _), (left, _)) = of.stride, of.padding
    height, width = of.padded
    planes = np.zeros((sh, sw, *x.shape[:2], -(-height // sh) + 1, -(-width // sw)), of.kind)

    def split(lo: int, hi: int) -> None:
        for a in range(sh):
            for b in range(sw):
                i, j = -(-max(0, top - a) // sh), -(-max(0, left - b) // sw)
                part = x[:, lo:hi, i * sh + a - top :: sh, j * sw + b - left :: sw]
                planes[a, b, :, lo:hi, i : i + part.shape[2], j : j + part.shape[3]] = part

    by_channels(x.shape[1], split, planes.size)
    return planes


def runs_of(plane: np.ndarray, start: Sequence[int], step: tuple, count: tuple, length: int) -> np.ndarray:
    """A view (n, c, *count, length) of planes (n, c, rows, columns): the runs that taps fall on."""
    n, c, row, item = plane.strides
    shape = (*plane.shape[:2], *count, length)
    return as_strided(plane[:, :, start[0] :, start[1] :], shape, (n, c, step[0] * row, step[1] * item, item))


class Back:
    """How dx comes of dy: each of its phases is a convolution of dy with the taps that fall on it, turned around."""

    def __init__(self, of: Shape):
        self.of, self.phases = of, taps_by_phase(of)
        reach = [[t.start[a] + t.step[a] * (t.taps[a] - 1) for t in self.phases] for a in (0, 1)]
        self.fringe = [max(r) for r in reach]
        """Zeros before dy."""
        self.size = [-(-p // s) for p, s in zip(of.padded, of.stride)]
        """Of a phase, its padding included."""
        self.full = [max(o, s) + f for o, s, f in zip(of.size, self.size, self.fringe)]

    def around(self, dy: np.ndarray) -> np.ndarray:
        """dy with zeros around it, and a row more for the last run."""
        wide = np.zeros((*dy.shape[:2], self.full[0] + 1, self.full[1]), self.of.kind)
        (top, left), (oh, ow) = self.fringe, self.of.size
        wide[:, :, top : top + oh, left : left + ow] = dy
        return wide

    def runs(self, wide: np.ndarray, t: Taps, first: int, rows: int) -> np.ndarray:
        """A view (n, c, *taps, rows · full width): what is under each tap for some rows of the phase."""
        start = [f - s - d * (k - 1) for f, s, d, k in zip(self.fringe, t.start, t.step, t.taps)]
        return runs_of(wide, (start[0] + first, start[1]), t.step, t.taps, rows * self.full[1])

    def put(self, total: np.ndarray, dx: np.ndarray, t: Taps, first: int) -> None:
        """Rows of a phase from ``first`` on, (n, c, rows, full width), to where they belong in dx."""
        (sh, sw), ((top, _), (left, _)) = self.of.stride, self.of.padding
        i, j = -(-max(0, top - t.phase[0]) // sh), -(-max(0, left - t.phase[1]) // sw)
        skip = max(0, i - first)
        to = dx[:, :, (first + skip) * sh + t.phase[0] - top :: sh, j * sw + t.phase[1] - left :: sw]
        rows = max(0, min(total.shape[2] - skip, to.shape[2]))
        to[:, :, :rows] = total[:, :, skip : skip + rows, j : j + to.shape[3]]
