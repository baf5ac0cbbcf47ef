"""Convolution as matrix products: the pixels under the kernel are gathered for a few images at a time (im2col).

What is gathered stays in the cache, so the product dominates; for 3×3 kernels Winograd's algorithm takes fewer of them.
A depthwise convolution has a product of one row a channel. 16-bit arrays become float32 while they are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpulayers.arrays import Spec, arranged, compute_dtype, empty_numpy, float64, spec

from . import _blocks, _winograd

COLUMN_BYTES = 1 << 22
"""Of gathered pixels at a time."""
FEWEST_PIXELS = 512
"""Columns that a product should have: with fewer the weight is streamed for too little work."""
FEWEST_BYTES = 1 << 17
"""Of gathered pixels: with fewer the calls cost more than the work."""
FEWEST_CHANNELS = 32
"""For Winograd's algorithm, whose transforms cost as much as a few channels' products."""
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
    def depth(self) -> int:
        """Terms of one sum."""
        return self.c // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def winograd(self) -> bool:
        """Whether fewer products pay for their transforms."""
        plain = self.kernel == (3, 3) and self.stride == self.dilation == (1, 1) and self.groups == 1
        return plain and min(self.c, self.o) >= FEWEST_CHANNELS and max(map(max, self.padding)) <= 2

    def blocks(self) -> Iterator[tuple[slice, list[tuple[int, int]]]]:
        """(some images, ranges of their output's rows) whose gathered pixels fit the cache."""
        row_bytes = max(1, self.groups * self.depth * self.size[1] * self.kind.itemsize)
        image_bytes = row_bytes * self.size[0]
        wanted = max(-(-FEWEST_PIXELS // (self.size[0] * self.size[1])), FEWEST_BYTES // image_bytes)
        images = max(1, min(COLUMN_BYTES // image_bytes, wanted))
        step = max(1, COLUMN_BYTES // (row_bytes * images))
        rows = [(r, min(r + step, self.size[0])) for r in range(0, self.size[0], step)]
        for i in range(0, self.n, images):
            yield slice(i, min(i + images, self.n)), rows


def _shape(x: Any, weight: Any, stride: tuple, padding: tuple, dilation: tuple, groups: int) -> _Shape:
    """From arrays or specs of x and weight, and the options in their normal form."""
    size = tuple(
        (n + sum(sides) - d * (k - 1) - 1) // s + 1
        for n, sides, k, d, s in zip(x.shape[2:], padding, weight.shape[2:], dilation, stride)
    )
    kind, (o, _, *kernel) = compute_dtype(x.dtype), weight.shape
    return _Shape(*x.shape, o, tuple(kernel), size, stride, padding, dilation, groups, kind)  # type: ignore[arg-type]


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


def _columns(wide: np.ndarray, of: _Shape, first: int, last: int) -> np.ndarray:
    """The pixels under each tap as a matrix for each group: (groups, depth, n · rows · OW)."""
    under = _under(wide, of, first, last)
    shape = (of.groups, of.depth, under.shape[3] * under.shape[4] * under.shape[5])
    if of.kernel == of.stride == (1, 1) and len(wide) == 1:
        return under.reshape(shape)
    columns = np.empty(under.shape, of.kind)

    def copy(lo: int, hi: int) -> None:
        columns[lo:hi] = under[lo:hi]

    _blocks.over(of.c, -(-of.c // _blocks.threads()), copy, columns.size)
    return columns.reshape(shape)


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
    if of.winograd:
        return _winograd.convolve(x, weight, bias, of.padding, y)
    taps = _taps(weight, of)
    add = None if bias is None else bias.astype(of.kind, copy=False).reshape(of.groups, -1, 1)
    direct = y.flags.c_contiguous and y.dtype == of.kind
    for images, rows in of.blocks():
        wide = _padded(x[images], of)
        for first, last in rows:
            out = _rows(y[images], of, first, last) if direct and len(wide) == 1 else None
            part = np.matmul(taps, _columns(wide, of, first, last), out=out)
            if add is not None:
                part += add
            if out is None:
                part = part.reshape(of.o, len(wide), last - first, of.size[1])
                y[images, :, first:last] = part.swapaxes(0, 1)


def _input_gradient(dy: np.ndarray, weight: np.ndarray, x: Spec, of: _Shape) -> np.ndarray:
    dx = empty_numpy(x.like())
    back = tuple((d * (k - 1) - a, d * (k - 1) - b) for (a, b), k, d in zip(of.padding, of.kernel, of.dilation))
    if of.stride == (1, 1) and min(map(min, back)) >= 0 and 2 * of.c > of.o:
        # A convolution too: of dy, with the kernel turned around.
        if of.winograd:
            _winograd.convolve(dy, weight, None, back, dx, turned=True)
            return dx
        turned = weight.reshape(of.groups, -1, *weight.shape[1:]).swapaxes(1, 2)[..., ::-1, ::-1]
        turned = turned.reshape(of.c, of.o // of.groups, *of.kernel)
        there = of._replace(c=of.o, h=of.size[0], w=of.size[1], o=of.c, size=(of.h, of.w), padding=back)
        _convolve(dy, turned, None, there, dx)
        return dx
    taps = _taps(weight, of).swapaxes(1, 2)
    (top, _), (left, _) = of.padding
    for images, rows in of.blocks():
        wide = np.zeros((images.stop - images.start, of.c, *of.padded), of.kind)
        for first, last in rows:
            columns = np.matmul(taps, _rows(dy[images], of, first, last))
            under = _under(wide, of, first, last)
            columns = columns.reshape(under.shape)

            def add(lo: int, hi: int) -> None:
                for r in range(of.kernel[0]):
                    for q in range(of.kernel[1]):
                        under[lo:hi, r, q] += columns[lo:hi, r, q]  # noqa: B023

            _blocks.over(of.c, -(-of.c // _blocks.threads()), add, columns.size)
        dx[images] = wide[:, :, top : top + of.h, left : left + of.w]
    return dx


def _weight_gradient(dy: np.ndarray, x: np.ndarray, weight: Spec, of: _Shape) -> np.ndarray:
    if of.winograd:
        total = _winograd.weight_gradient(dy, x, of.padding)
        return arranged(total.astype(weight.dtype, copy=False), weight.like().order)
    total = np.zeros((of.groups, of.o // of.groups, of.depth), of.kind)
    for images, rows in of.blocks():
        wide = _padded(x[images], of)
        for first, last in rows:
            total += np.matmul(_rows(dy[images], of, first, last), _columns(wide, of, first, last).swapaxes(1, 2))
    return arranged(total.reshape(weight.shape).astype(weight.dtype, copy=False), weight.like().order)


# --- depthwise -------------------------------------------------------------------------------------------------------


class _Planes:
    """A block of images × channels of a depthwise convolution, and the plane under each tap of the kernel.

    With stride 1 a plane is one run of memory: it starts as many elements further as the tap lies, and takes the
    padding between two rows along (what it computes there is thrown away).
    """

    def __init__(self, of: _Shape, wide: np.ndarray):
        self.of, self.wide, self.flat = of, wide, of.stride == (1, 1)
        self.many = of.o // of.groups
        self.pitch = of.padded[1]
        self.run = (of.size[0] - 1) * self.pitch + of.size[1]

    def under(self, r: int, q: int) -> np.ndarray:
        """(n, c, 1, run) or (n, c, 1, OH, OW)."""
        (dh, dw), (sh, sw), (oh, ow) = self.of.dilation, self.of.stride, self.of.size
        if self.flat:
            start = r * dh * self.pitch + q * dw
            return self.wide.reshape(*self.wide.shape[:2], 1, -1)[..., start : start + self.run]
        rows, columns = slice(r * dh, r * dh + sh * (oh - 1) + 1, sh), slice(q * dw, q * dw + sw * (ow - 1) + 1, sw)
        return self.wide[:, :, None, rows, columns]

    def spread(self, dy: np.ndarray) -> np.ndarray:
        """dy (n, c · many, OH, OW) as ``under`` lies, zero in the padding between rows: (n, c, many, …)."""
        shape = (len(dy), dy.shape[1] // self.many, self.many, *self.of.size)
        if not self.flat:
            return dy.reshape(shape).astype(self.of.kind, copy=False)
        wide = np.zeros((*shape[:-1], self.pitch), self.of.kind)
        wide[..., : self.of.size[1]] = dy.reshape(shape)
        return wide.reshape(*shape[:3], -1)[..., : self.run]

    def empty(self) -> np.ndarray:
        """For what ``crop`` takes apart: (n, c, many, …)."""
        shape = (*self.wide.shape[:2], self.many)
        return np.empty((*shape, self.of.size[0] * self.pitch) if self.flat else (*shape, *self.of.size), self.of.kind)

    def crop(self, full: np.ndarray) -> np.ndarray:
        """(n, c · many, OH, OW) without the padding between rows."""
        full = full.reshape(len(full), -1, self.of.size[0], self.pitch if self.flat else self.of.size[1])
        return full[..., : self.of.size[1]]


def _over_planes(of: _Shape, work: Any) -> list:
    """[work(images, channels) for each block that fits the cache], in order, on several threads."""
    plane = max(of.padded[0] * of.padded[1], of.o // of.groups * of.size[0] * of.padded[1]) * of.kind.itemsize
    channels = max(1, min(of.c, _blocks.BYTES // plane))
    images = max(1, min(of.n, _blocks.BYTES // (plane * channels)))
    starts = [(i, c) for i in range(0, of.n, images) for c in range(0, of.c, channels)]

    def block(lo: int, hi: int) -> Any:
        i, c = starts[lo]
        return work(slice(i, min(i + images, of.n)), slice(c, min(c + channels, of.c)))

    return _blocks.over(len(starts), 1, block, of.n * of.o * of.size[0] * of.size[1])


def _depthwise(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, of: _Shape, y: np.ndarray) -> None:
    """y = x * weight + bias."""
    many = of.o // of.groups
    taps = weight.astype(of.kind, copy=False).reshape(of.c, many, *of.kernel, *([1] if of.stride == (1, 1) else [1, 1]))

    def work(images: slice, channels: slice) -> None:
        planes = _Planes(of, _padded(x[images, channels], of))
        total = planes.empty()
        part = total[..., : planes.run] if planes.flat else total
        product = np.empty_like(part)
        for r in range(of.kernel[0]):
            for q in range(of.kernel[1]):
                w = taps[channels, :, r, q]
                np.multiply(planes.under(r, q), w, out=product if r + q else part)
                if r + q:
                    part += product
        outs = slice(channels.start * many, channels.stop * many)
        if bias is None:
            y[images, outs] = planes.crop(total)
        else:
            np.add(planes.crop(total), bias[outs, None, None], out=y[images, outs], casting="same_kind")

    _over_planes(of, work)


def _depthwise_gradients(
    dy: np.ndarray, x: np.ndarray | None, weight: np.ndarray | None, specs: tuple[Spec, Spec], of: _Shape
) -> tuple:
    """(dx where weight is given, dweight where x is given)."""
    many, (kh, kw), ((top, _), (left, _)) = of.o // of.groups, of.kernel, of.padding
    dx = None if weight is None else empty_numpy(specs[0].like())
    if weight is not None:
        taps = weight.astype(of.kind, copy=False).reshape(of.c, many, kh, kw, *([1] if of.stride == (1, 1) else [1, 1]))

    def work(images: slice, channels: slice) -> tuple[slice, np.ndarray | None]:
        outs = slice(channels.start * many, channels.stop * many)
        shape = (images.stop - images.start, channels.stop - channels.start, *of.padded)
        back = _Planes(of, np.zeros(shape, of.kind) if dx is not None else np.empty((*shape[:2], 0, 0), of.kind))
        g = back.spread(dy[images, outs])
        if dx is not None:
            product = np.empty_like(g)
            for r in range(kh):
                for q in range(kw):
                    np.multiply(g, taps[channels, :, r, q], out=product)
                    under = back.under(r, q)
                    under += product if many == 1 else product.sum(2, keepdims=True)
            dx[images, channels] = back.wide[:, :, top : top + of.h, left : left + of.w]
        if x is None:
            return channels, None
        planes = _Planes(of, _padded(x[images, channels], of))
        sums = np.empty((shape[1], many, kh, kw), of.kind)
        for r in range(kh):
            for q in range(kw):
                under = planes.under(r, q)
                each = np.vecdot(g, under) if planes.flat else np.einsum("ncmhw,nclhw->ncm", g, under)
                sums[..., r, q] = each.sum(0)
        return channels, sums

    parts = _over_planes(of, work)
    if x is None:
        return dx, None
    total = np.zeros((of.c, many, kh, kw), of.kind)
    for channels, sums in parts:
        total[channels] += sums
    return dx, arranged(total.reshape(specs[1].shape).astype(specs[1].dtype, copy=False), specs[1].like().order)


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
    if of.groups == of.c > 1:
        dx, dweight = _depthwise_gradients(dy, saved.get("x"), saved.get("weight"), (x, weight), of)
    else:
        dx = _input_gradient(dy, saved["weight"], x, of) if "x" in needs else None
        dweight = _weight_gradient(dy, saved["x"], weight, of) if "weight" in needs else None
    dbias = dy.sum((0, 2, 3), dtype=of.kind).astype(bias.dtype, copy=False) if "bias" in needs else None
    return dx, dweight, dbias


def conv2d_refuses(x: Spec, weight: Spec, bias: Spec | None, *, needs: tuple, **options: Any) -> str | None:
    return REFUSALS["float64"] if x.dtype == float64 else None
