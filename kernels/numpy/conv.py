"""Convolution as matrix products: the pixels under the kernel are gathered for a few images at a time (im2col).

What is gathered stays in the cache, so the product dominates; for 3×3 kernels Winograd's algorithm takes fewer of them.
A depthwise convolution has a product of one row a channel. 16-bit arrays become float32 while they are gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from math import gcd
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpulayers.arrays import Spec, arranged, compute_dtype, empty_numpy, float64, spec

from . import _blocks, _winograd

COLUMN_BYTES = 1 << 22
"""Of gathered pixels at a time."""
FEWEST_PIXELS = 512
"""Columns that a product should have: with fewer the weight is streamed for too little work."""
FEWEST_BYTES = 1 << 19
"""Of gathered pixels: with fewer the calls cost more than the work."""
FEWEST_CHANNELS = 32
"""For Winograd's algorithm, whose transforms cost as much as a few channels' products."""
ALONE = 9000
"""Elements of a matrix below which BLAS multiplies it with a row in one thread."""
CHANNELS_LAST = (0, 2, 3, 1)
REFUSALS = {"float64": "float64 is left to the definition"}


class _Shape(NamedTuple):
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


def _shape(x: Any, weight: Any, stride: tuple, padding: tuple, dilation: tuple, groups: int) -> _Shape:
    """From arrays or specs of x and weight, and the options in their normal form."""
    size = tuple(
        (n + sum(sides) - d * (k - 1) - 1) // s + 1
        for n, sides, k, d, s in zip(x.shape[2:], padding, weight.shape[2:], dilation, stride)
    )
    kind, (o, _, *kernel) = compute_dtype(x.dtype), weight.shape
    return _Shape(*x.shape, o, tuple(kernel), size, stride, padding, dilation, groups, kind)  # type: ignore[arg-type, call-arg]


def _padded(x: np.ndarray, of: _Shape) -> np.ndarray:
    """These images, row-major in the dtype of sums, with zeros around them; x itself where it is so already."""
    (top, _), (left, _) = of.padding
    if of.padded == x.shape[2:] and x.dtype == of.kind and x.flags.c_contiguous:
        return x
    wide = np.zeros((*x.shape[:2], *of.padded), of.kind)
    wide[:, :, top : top + of.h, left : left + of.w] = x
    return wide


def _under(wide: np.ndarray, of: _Shape, first: int, last: int) -> np.ndarray:
    """A view (C, kh, kw, n, rows, OW): the pixels under each tap for these rows of output."""
    n, c, y, x = wide.strides
    (sh, sw), (dh, dw) = of.stride, of.dilation
    shape = (wide.shape[1], *of.kernel, wide.shape[0], last - first, of.size[1])
    return as_strided(wide[:, :, first * sh :], shape, (c, dh * y, dw * x, n, sh * y, sw * x))


def _by_channels(channels: int, work: Callable[[int, int], None], elements: int) -> None:
    """work(lo, hi) for one run of channels a thread."""
    _blocks.over(channels, -(-channels // _blocks.threads()), work, elements)


class _Pixels:
    """Some images, ready to be gathered: the pixels under each tap, as a matrix for each group.

    A strided kernel's taps step over pixels, which is slow to copy: then images are split by the stride, and a tap's
    pixels are runs of ``pitch`` a row, of which the first OW count.
    """

    def __init__(self, x: np.ndarray, of: _Shape):
        self.n, self.of = len(x), of
        self.split = of.strided and of.kernel != (1, 1)
        self.wide = _planes(x, of) if self.split else _padded(x, of)
        self.pitch = self.wide.shape[-1] if self.split else of.size[1]

    def columns(self, first: int, last: int) -> np.ndarray:
        """For these rows of output: (groups, depth, n · rows · pitch)."""
        of = self.of
        shape = (of.groups, of.depth, self.n * (last - first) * self.pitch)
        if self.split:
            columns = np.empty((of.c, *of.kernel, self.n, shape[2] // self.n), of.kind)
        else:
            under = _under(self.wide, of, first, last)
            if of.kernel == of.stride == (1, 1) and self.n == 1:
                return under.reshape(shape)
            columns = np.empty(under.shape, of.kind)

        def copy(lo: int, hi: int) -> None:
            if not self.split:
                columns[lo:hi] = under[lo:hi]
                return
            for t in _taps_by_phase(of):
                plane, start = self.wide[t.phase][:, lo:hi], (t.start[0] + first, t.start[1])
                columns[lo:hi, *t.at] = _runs(plane, start, t.step, t.taps, columns.shape[-1]).transpose(1, 2, 3, 0, 4)

        _by_channels(of.c, copy, columns.size)
        return columns.reshape(shape)

    def products(self, dy: np.ndarray, first: int, last: int) -> np.ndarray:
        """Σ dy · pixel for these rows of output and each tap: (groups, O / groups, depth)."""
        rows, columns = self.rows(dy, first, last), self.columns(first, last)
        found = np.matmul(rows, columns.swapaxes(1, 2))
        if self.split and not np.isfinite(found).all():  # what lies between two rows met zeros of dy, and was infinite
            columns.reshape(-1, self.pitch)[:, self.of.size[1] :] = 0
            np.matmul(rows, columns.swapaxes(1, 2), out=found)
        return found

    def rows(self, dy: np.ndarray, first: int, last: int) -> np.ndarray:
        """These rows of dy (n, O, OH, OW) beside the columns: (groups, O / groups, n · rows · pitch)."""
        part = _rows(dy, self.of, first, last)
        if self.pitch == self.of.size[1]:
            return part
        wide = np.zeros((*part.shape[:2], self.n, last - first, self.pitch), self.of.kind)
        wide[..., : self.of.size[1]] = part.reshape(*wide.shape[:4], -1)
        return wide.reshape(*part.shape[:2], -1)

    def images(self, part: np.ndarray) -> np.ndarray:
        """Rows of output as the product gives them, as a view (n, O, rows, OW)."""
        return part.reshape(self.of.o, self.n, -1, self.pitch)[..., : self.of.size[1]].swapaxes(0, 1)


def _rows(y: np.ndarray, of: _Shape, first: int, last: int) -> np.ndarray:
    """These rows of (n, O, OH, OW) as a matrix for each group: (groups, O / groups, n · rows · OW)."""
    part = y[:, :, first:last].astype(of.kind, copy=False)
    return part.swapaxes(0, 1).reshape(of.groups, part.shape[1] // of.groups, -1)


def _taps(weight: np.ndarray, of: _Shape) -> np.ndarray:
    """weight as a matrix for each group: (groups, O / groups, depth)."""
    return np.ascontiguousarray(weight, of.kind).reshape(of.groups, of.o // of.groups, of.depth)


def _empty(shape: tuple, like: Spec) -> np.ndarray:
    """For an output: channels-last where x is."""
    return empty_numpy(
        Spec(shape, like.dtype, CHANNELS_LAST if like.contiguous and like.order == CHANNELS_LAST else None)
    )


def _convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, of: _Shape, y: np.ndarray) -> None:
    """y = x * weight + bias, by blocks of images."""
    if of.winograd and _winograd.convolve(x, weight, bias, of.padding, y):
        return
    taps = _taps(weight, of)
    add = None if bias is None else bias.astype(of.kind, copy=False).reshape(of.groups, -1, 1)
    direct = y.flags.c_contiguous and y.dtype == of.kind

    def work(block: tuple) -> None:
        images, rows = block
        pixels = _Pixels(x[images], of)
        for first, last in rows:
            out = _rows(y[images], of, first, last) if direct and pixels.n == 1 and not pixels.split else None
            part = np.matmul(taps, pixels.columns(first, last), out=out)
            if add is not None:
                part += add
            if out is None:
                y[images, :, first:last] = pixels.images(part)

    _blocks.apart(of.blocks(), work)


def _input_gradient(dy: np.ndarray, weight: np.ndarray, x: Spec, of: _Shape) -> np.ndarray:
    dx = empty_numpy(x.like())
    back = tuple((d * (k - 1) - a, d * (k - 1) - b) for (a, b), k, d in zip(of.padding, of.kernel, of.dilation))
    few = 2 * of.c <= of.o or (not of.strided and of.n * math.prod(of.size) < of.o)  # or turning the kernel costs more
    if few or (not of.strided and min(map(min, back)) < 0):
        _scattered_gradient(dy, weight, dx, of)
    elif of.strided:
        _gathered_gradient(dy, weight, dx, of)
    elif not (of.winograd and _winograd.convolve(dy, weight, None, back, dx, turned=True)):
        # A convolution too: of dy, with the kernel turned around.
        turned = weight.reshape(of.groups, -1, *weight.shape[1:]).swapaxes(1, 2)[..., ::-1, ::-1]
        turned = turned.reshape(of.c, of.o // of.groups, *of.kernel)
        there = of._replace(c=of.o, h=of.size[0], w=of.size[1], o=of.c, size=(of.h, of.w), padding=back)
        _convolve(dy, turned, None, there, dx)
    return dx


def _scattered_gradient(dy: np.ndarray, weight: np.ndarray, dx: np.ndarray, of: _Shape) -> None:
    """dx by blocks of images: what each tap gives is added where its pixels are."""
    taps = _taps(weight, of).swapaxes(1, 2)
    (top, _), (left, _) = of.padding

    def work(block: tuple) -> None:
        images, rows = block
        wide = np.zeros((images.stop - images.start, of.c, *of.padded), of.kind)
        for first, last in rows:
            under = _under(wide, of, first, last)
            columns = np.matmul(taps, _rows(dy[images], of, first, last)).reshape(under.shape)

            def add(lo: int, hi: int) -> None:
                for r in range(of.kernel[0]):
                    for q in range(of.kernel[1]):
                        under[lo:hi, r, q] += columns[lo:hi, r, q]  # noqa: B023

            _by_channels(of.c, add, columns.size)
        dx[images] = wide[:, :, top : top + of.h, left : left + of.w]

    _blocks.apart(of.blocks(), work)


def _gathered_gradient(dy: np.ndarray, weight: np.ndarray, dx: np.ndarray, of: _Shape) -> None:
    """dx of a strided kernel by blocks of images: each phase of dx is a convolution of dy."""
    back = _Back(of)
    weight = weight.reshape(of.groups, -1, *weight.shape[1:]).swapaxes(1, 2)  # (groups, C / groups, O / groups, kh, kw)
    kernels = [
        np.ascontiguousarray(weight[..., *t.at][..., ::-1, ::-1], of.kind).reshape(of.groups, of.c // of.groups, -1)
        for t in back.phases
    ]
    most = max(t.taps[0] * t.taps[1] for t in back.phases)

    def work(block: tuple) -> None:
        images, _ = block
        wide, out = back.around(dy[images]), dx[images]
        n = len(wide)
        step = max(1, COLUMN_BYTES // (n * of.o * most * back.full[1] * of.kind.itemsize))
        if len(back.phases) < math.prod(of.stride):
            out[...] = 0
        for t, taps in zip(back.phases, kernels):
            for first in range(0, back.size[0], step):
                rows = min(step, back.size[0] - first)
                columns = np.empty((of.o, *t.taps, n, rows * back.full[1]), of.kind)

                def copy(lo: int, hi: int) -> None:
                    columns[lo:hi] = back.runs(wide[:, lo:hi], t, first, rows).transpose(1, 2, 3, 0, 4)  # noqa: B023

                _by_channels(of.o, copy, columns.size)
                total = np.matmul(taps, columns.reshape(of.groups, taps.shape[2], -1))
                back.put(total.reshape(of.c, n, rows, back.full[1]).swapaxes(0, 1), out, t, first)

    _blocks.apart(of.blocks(), work)


def _weight_gradient(dy: np.ndarray, x: np.ndarray, weight: Spec, of: _Shape) -> np.ndarray:
    def work(block: tuple) -> np.ndarray:
        images, rows = block
        pixels = _Pixels(x[images], of)
        found = np.zeros((of.groups, of.o // of.groups, of.depth), of.kind)
        for first, last in rows:
            found += pixels.products(dy[images], first, last)
        return found

    total = _winograd.weight_gradient(dy, x, of.padding) if of.winograd and of.n else None
    if of.n == 0:
        total = np.zeros(weight.shape, of.kind)
    elif total is None:
        total = _blocks.total(of.blocks(), work).reshape(weight.shape)
    return arranged(total.astype(weight.dtype, copy=False), weight.like().order)


# --- images split by the stride: for strided kernels and for depthwise ones ------------------------------------------


class _Taps(NamedTuple):
    """Taps of the kernel that fall on pixels of one parity (of one remainder by the stride)."""

    at: tuple[slice, slice]
    """Of the kernel."""
    phase: tuple[int, int]
    start: tuple[int, int]
    """Of the first tap, in rows and columns of the phase."""
    step: tuple[int, int]
    """From tap to tap."""
    taps: tuple[int, int]


def _taps_by_phase(of: _Shape) -> list[_Taps]:
    def axis(kernel: int, stride: int, dilation: int) -> list[tuple]:
        every = stride // gcd(stride, dilation)
        return [
            (slice(k, None, every), k * dilation % stride, k * dilation // stride, dilation * every // stride, count)
            for k in range(min(kernel, every))
            if (count := -(-(kernel - k) // every))
        ]

    rows, columns = map(axis, of.kernel, of.stride, of.dilation)
    return [_Taps(*zip(r, q)) for r in rows for q in columns]


def _planes(x: np.ndarray, of: _Shape) -> np.ndarray:
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

    _by_channels(x.shape[1], split, planes.size)
    return planes


def _runs(plane: np.ndarray, start: Sequence[int], step: tuple, count: tuple, length: int) -> np.ndarray:
    """A view (n, c, *count, length) of planes (n, c, rows, columns): the runs that taps fall on."""
    n, c, row, item = plane.strides
    shape = (*plane.shape[:2], *count, length)
    return as_strided(plane[:, :, start[0] :, start[1] :], shape, (n, c, step[0] * row, step[1] * item, item))


class _Back:
    """How dx comes of dy: each of its phases is a convolution of dy with the taps that fall on it, turned around."""

    def __init__(self, of: _Shape):
        self.of, self.phases = of, _taps_by_phase(of)
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

    def runs(self, wide: np.ndarray, t: _Taps, first: int, rows: int) -> np.ndarray:
        """A view (n, c, *taps, rows · full width): what is under each tap for some rows of the phase."""
        start = [f - s - d * (k - 1) for f, s, d, k in zip(self.fringe, t.start, t.step, t.taps)]
        return _runs(wide, (start[0] + first, start[1]), t.step, t.taps, rows * self.full[1])

    def put(self, total: np.ndarray, dx: np.ndarray, t: _Taps, first: int) -> None:
        """Rows of a phase from ``first`` on, (n, c, rows, full width), to where they belong in dx."""
        (sh, sw), ((top, _), (left, _)) = self.of.stride, self.of.padding
        i, j = -(-max(0, top - t.phase[0]) // sh), -(-max(0, left - t.phase[1]) // sw)
        skip = max(0, i - first)
        to = dx[:, :, (first + skip) * sh + t.phase[0] - top :: sh, j * sw + t.phase[1] - left :: sw]
        rows = max(0, min(total.shape[2] - skip, to.shape[2]))
        to[:, :, :rows] = total[:, :, skip : skip + rows, j : j + to.shape[3]]


def _pieces(columns: np.ndarray, rows: int) -> np.ndarray:
    """(n, c, taps, rows · pitch) as (n, c, pieces, taps, run): BLAS calls no threads of its own for a short run."""
    n, c, taps, length = columns.shape
    most = max(1, ALONE // (taps * (length // rows)))
    each = max(d for d in range(1, rows + 1) if rows % d == 0 and d <= most)
    return columns.reshape(n, c, taps, rows // each, -1).swapaxes(2, 3)


def _gathered(x: np.ndarray, of: _Shape) -> np.ndarray:
    """The pixels under each tap, (n, c, pieces, taps, run), rows of output with the pitch of a phase."""
    planes = _planes(x, of)
    columns = np.empty((*x.shape[:2], *of.kernel, of.size[0] * planes.shape[-1]), of.kind)
    for t in _taps_by_phase(of):
        columns[:, :, *t.at] = _runs(planes[t.phase], t.start, t.step, t.taps, columns.shape[-1])
    return _pieces(columns.reshape(*x.shape[:2], -1, columns.shape[-1]), of.size[0])


def _over_planes(of: _Shape, work: Any) -> list:
    """[work(images, channels) for each block that fits the cache], in order, on several threads."""
    pixels = of.size[0] * -(-of.padded[1] // of.stride[1])
    plane = pixels * of.kernel[0] * of.kernel[1] * (of.o // of.groups) * of.kind.itemsize
    channels = max(1, min(of.c, COLUMN_BYTES // plane))
    images = max(1, min(of.n, COLUMN_BYTES // (plane * channels)))
    starts = [(i, c) for i in range(0, of.n, images) for c in range(0, of.c, channels)]

    def block(lo: int, hi: int) -> Any:
        i, c = starts[lo]
        return work(slice(i, min(i + images, of.n)), slice(c, min(c + channels, of.c)))

    return _blocks.over(len(starts), 1, block, of.n * of.o * of.size[0] * of.size[1])


def _depthwise(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, of: _Shape, y: np.ndarray) -> None:
    """y = x * weight + bias."""
    many, (oh, ow) = of.o // of.groups, of.size
    taps = weight.astype(of.kind, copy=False).reshape(of.c, 1, many, -1)

    def work(images: slice, channels: slice) -> None:
        total = np.matmul(taps[channels], _gathered(x[images, channels], of))  # (n, c, pieces, many, run)
        total = total.swapaxes(2, 3).reshape(len(total), -1, oh, total.shape[2] * total.shape[4] // oh)[..., :ow]
        outs = slice(channels.start * many, channels.stop * many)
        if bias is None:
            y[images, outs] = total
        else:
            np.add(total, bias[outs, None, None], out=y[images, outs], casting="same_kind")

    _over_planes(of, work)


def _depthwise_input_gradient(dy: np.ndarray, weight: np.ndarray, dx: np.ndarray, of: _Shape) -> None:
    """Each phase of dx is a convolution of dy with the taps that fall on it, turned around."""
    back, many = _Back(of), of.o // of.groups
    weight = weight.astype(of.kind, copy=False).reshape(of.c, many, *of.kernel)

    def work(images: slice, channels: slice) -> None:
        wide = back.around(dy[images, channels.start * many : channels.stop * many])
        out = dx[images, channels]
        if len(back.phases) < math.prod(of.stride):
            out[...] = 0
        for t in back.phases:
            columns = np.ascontiguousarray(back.runs(wide, t, 0, back.size[0]))
            columns = columns.reshape(len(wide), -1, many * t.taps[0] * t.taps[1], columns.shape[-1])
            taps = np.ascontiguousarray(weight[channels, :, *t.at][..., ::-1, ::-1]).reshape(out.shape[1], 1, 1, -1)
            total = np.matmul(taps, _pieces(columns, back.size[0])).reshape(*out.shape[:2], back.size[0], back.full[1])
            back.put(total, out, t, 0)

    _over_planes(of, work)


def _depthwise_weight_gradient(dy: np.ndarray, x: np.ndarray, weight: Spec, of: _Shape) -> np.ndarray:
    many, (oh, ow) = of.o // of.groups, of.size

    def work(images: slice, channels: slice) -> tuple[slice, np.ndarray]:
        under = _gathered(x[images, channels], of)
        n, c, pieces, _, run = under.shape
        pitch = pieces * run // oh
        g = np.zeros((n, c, many, oh, pitch), of.kind)
        g[..., :ow] = dy[images, channels.start * many : channels.stop * many].reshape(*g.shape[:4], ow)
        g = g.reshape(n, c, many, pieces, run).swapaxes(2, 3)
        found = np.matmul(g, under.swapaxes(3, 4)).sum((0, 2))
        if not np.isfinite(found).all():  # what lies between two rows met zeros of dy, and was infinite
            under.reshape(*under.shape[:4], -1, pitch)[..., ow:] = 0
            found = np.matmul(g, under.swapaxes(3, 4)).sum((0, 2))
        return channels, found

    total = np.zeros((of.c, many, of.kernel[0] * of.kernel[1]), of.kind)
    for channels, sums in _over_planes(of, work):
        total[channels] += sums
    return arranged(total.reshape(weight.shape).astype(weight.dtype, copy=False), weight.like().order)


# --- the op ----------------------------------------------------------------------------------------------------------


def conv2d_forward(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    needs: tuple = (),
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
) -> tuple[tuple, dict]:
    of = _shape(x, weight, stride, padding, dilation, groups)
    y = _empty((of.n, of.o, *of.size), spec(x))  # type: ignore[arg-type]
    (_depthwise if of.groups == of.c > 1 else _convolve)(x, weight, bias, of, y)
    saved = {"x": x} if "weight" in needs else {}
    saved |= {"weight": weight} if "x" in needs else {}
    return (y,), saved


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
    (dy,), (x, weight, bias) = dys, inputs
    of = _shape(x, weight, stride, padding, dilation, groups)
    depthwise = of.groups == of.c > 1
    dx = dweight = None
    if "x" in needs and depthwise:
        dx = empty_numpy(x.like())
        _depthwise_input_gradient(dy, saved["weight"], dx, of)
    elif "x" in needs:
        dx = _input_gradient(dy, saved["weight"], x, of)
    if "weight" in needs:
        dweight = (_depthwise_weight_gradient if depthwise else _weight_gradient)(dy, saved["x"], weight, of)
    dbias = dy.sum((0, 2, 3), dtype=of.kind).astype(bias.dtype, copy=False) if "bias" in needs else None
    return dx, dweight, dbias


def conv2d_refuses(x: Spec, weight: Spec, bias: Spec | None, *, needs: tuple, **options: Any) -> str | None:
    return REFUSALS["float64"] if x.dtype == float64 else None
