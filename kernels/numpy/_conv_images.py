"""Convolution as matrix products: the pixels under the kernel are gathered for a few images at a time (im2col).

What is gathered stays in the cache, so the product dominates; for 3×3 kernels Winograd's algorithm takes fewer of them.
16-bit arrays become float32 while they are gathered.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpulayers.arrays import Spec, guests

from . import _blocks, _conv, _depthwise, _winograd
from ._conv import Back, Options, Shape, by_channels, planes_of, runs_of, shape_of, taps_by_phase
from ._epilogue import Epilogue


def _padded(x: np.ndarray, of: Shape) -> np.ndarray:
    """These images, row-major in the dtype of sums, with zeros around them; x itself where it is so already."""
    (top, _), (left, _) = of.padding
    if of.padded == x.shape[2:] and x.dtype == of.kind and x.flags.c_contiguous:
        return x
    wide = np.zeros((*x.shape[:2], *of.padded), of.kind)
    wide[:, :, top : top + of.h, left : left + of.w] = x
    return wide


def _under(wide: np.ndarray, of: Shape, first: int, last: int) -> np.ndarray:
    """A view (C, kh, kw, n, rows, OW): the pixels under each tap for these rows of output."""
    n, c, y, x = wide.strides
    (sh, sw), (dh, dw) = of.stride, of.dilation
    shape = (wide.shape[1], *of.kernel, wide.shape[0], last - first, of.size[1])
    return as_strided(wide[:, :, first * sh :], shape, (c, dh * y, dw * x, n, sh * y, sw * x))


class _Pixels:
    """Some images, ready to be gathered: the pixels under each tap, as a matrix for each group.

    A strided kernel's taps step over pixels, which is slow to copy: then images are split by the stride, and a tap's
    pixels are runs of ``pitch`` a row, of which the first OW count.
    """

    def __init__(self, x: np.ndarray, of: Shape):
        self.n, self.of = len(x), of
        self.split = of.strided and of.kernel != (1, 1)
        self.wide = planes_of(x, of) if self.split else _padded(x, of)
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
            for t in taps_by_phase(of):
                plane, start = self.wide[t.phase][:, lo:hi], (t.start[0] + first, t.start[1])
                columns[lo:hi, *t.at] = runs_of(plane, start, t.step, t.taps, columns.shape[-1]).transpose(
                    1, 2, 3, 0, 4
                )

        by_channels(of.c, copy, columns.size)
        return columns.reshape(shape)

    def products(self, dy: np.ndarray, first: int, last: int) -> np.ndarray:
        """Σ dy · pixel for these rows of output and each tap: (groups, O / groups, depth)."""
        rows, columns = self.rows(dy, first, last), self.columns(first, last)
        found = guests.matmul(rows, columns.swapaxes(1, 2))
        if self.split and not np.isfinite(found).all():  # what lies between two rows met zeros of dy, and was infinite
            columns.reshape(-1, self.pitch)[:, self.of.size[1] :] = 0
            guests.matmul(rows, columns.swapaxes(1, 2), out=found)
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


def _rows(y: np.ndarray, of: Shape, first: int, last: int) -> np.ndarray:
    """These rows of (n, O, OH, OW) as a matrix for each group: (groups, O / groups, n · rows · OW)."""
    part = y[:, :, first:last].astype(of.kind, copy=False)
    return part.swapaxes(0, 1).reshape(of.groups, part.shape[1] // of.groups, -1)


def _taps(weight: np.ndarray, of: Shape) -> np.ndarray:
    """weight as a matrix for each group: (groups, O / groups, depth)."""
    return np.ascontiguousarray(weight, of.kind).reshape(of.groups, of.o // of.groups, of.depth)


def _convolve(x: np.ndarray, weight: np.ndarray, end: Epilogue, of: Shape, y: np.ndarray) -> None:
    """y = x * weight and its epilogue, by blocks of images."""
    if of.winograd and _winograd.convolve(x, weight, end, of.padding, y):
        return
    taps = _taps(weight, of)
    direct = y.flags.c_contiguous and y.dtype == of.kind and end.affine

    def work(block: tuple) -> None:
        images, rows = block
        pixels = _Pixels(x[images], of)
        for first, last in rows:
            out = _rows(y[images], of, first, last) if direct and pixels.n == 1 and not pixels.split else None
            part = guests.matmul(taps, pixels.columns(first, last), out=out)
            end.scaled(part.reshape(of.o, -1))
            if out is None:
                end.put(pixels.images(part), y, (images, slice(None), slice(first, last)), part)

    _blocks.apart(of.blocks(), work)


def _dense_input_gradient(dy: np.ndarray, weight: np.ndarray, dx: np.ndarray, of: Shape) -> None:
    back = of.back
    few = 2 * of.c <= of.o or (not of.strided and of.n * math.prod(of.size) < of.o)  # or turning the kernel costs more
    if few or (not of.strided and min(map(min, back)) < 0):
        _scattered_gradient(dy, weight, dx, of)
    elif of.strided:
        _gathered_gradient(dy, weight, dx, of)
    elif not (of.winograd and _winograd.convolve(dy, weight, Epilogue(), back, dx, turned=True)):
        # A convolution too: of dy, with the kernel turned around.
        turned = weight.reshape(of.groups, -1, *weight.shape[1:]).swapaxes(1, 2)[..., ::-1, ::-1]
        turned = turned.reshape(of.c, of.o // of.groups, *of.kernel)
        there = of._replace(c=of.o, h=of.size[0], w=of.size[1], o=of.c, size=(of.h, of.w), padding=back)
        _convolve(dy, turned, Epilogue(), there, dx)


def _scattered_gradient(dy: np.ndarray, weight: np.ndarray, dx: np.ndarray, of: Shape) -> None:
    """dx by blocks of images: what each tap gives is added where its pixels are."""
    taps = _taps(weight, of).swapaxes(1, 2)
    (top, _), (left, _) = of.padding

    def work(block: tuple) -> None:
        images, rows = block
        wide = np.zeros((images.stop - images.start, of.c, *of.padded), of.kind)
        for first, last in rows:
            under = _under(wide, of, first, last)
            columns = guests.matmul(taps, _rows(dy[images], of, first, last)).reshape(under.shape)

            def add(lo: int, hi: int) -> None:
                for r in range(of.kernel[0]):
                    for q in range(of.kernel[1]):
                        under[lo:hi, r, q] += columns[lo:hi, r, q]  # noqa: B023

            by_channels(of.c, add, columns.size)
        dx[images] = wide[:, :, top : top + of.h, left : left + of.w]

    _blocks.apart(of.blocks(), work)


def _gathered_gradient(dy: np.ndarray, weight: np.ndarray, dx: np.ndarray, of: Shape) -> None:
    """dx of a strided kernel by blocks of images: each phase of dx is a convolution of dy."""
    back = Back(of)
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
        step = max(1, _conv.COLUMN_BYTES // (n * of.o * most * back.full[1] * of.kind.itemsize))
        if len(back.phases) < math.prod(of.stride):
            out[...] = 0
        for t, taps in zip(back.phases, kernels):
            for first in range(0, back.size[0], step):
                rows = min(step, back.size[0] - first)
                columns = np.empty((of.o, *t.taps, n, rows * back.full[1]), of.kind)

                def copy(lo: int, hi: int) -> None:
                    columns[lo:hi] = back.runs(wide[:, lo:hi], t, first, rows).transpose(1, 2, 3, 0, 4)  # noqa: B023

                by_channels(of.o, copy, columns.size)
                total = guests.matmul(taps, columns.reshape(of.groups, taps.shape[2], -1))
                back.put(total.reshape(of.c, n, rows, back.full[1]).swapaxes(0, 1), out, t, first)

    _blocks.apart(of.blocks(), work)


def _dense_weight_gradient(dy: np.ndarray, x: np.ndarray, weight: Spec, of: Shape) -> np.ndarray:
    def work(block: tuple) -> np.ndarray:
        images, rows = block
        pixels = _Pixels(x[images], of)
        found = np.zeros((of.groups, of.o // of.groups, of.depth), of.kind)
        for first, last in rows:
            found += pixels.products(dy[images], first, last)
        return found

    total = _winograd.weight_gradient(dy, x, of.padding) if of.winograd else None
    if of.n == 0:
        total = np.zeros(weight.shape, of.kind)
    elif total is None:
        total = _blocks.total(of.blocks(), work).reshape(weight.shape)
    return total


# --- the three roles, dense, grouped or depthwise --------------------------------------------------------------------


def forward(x: np.ndarray, weight: np.ndarray, end: Epilogue, y: np.ndarray, how: Options) -> None:
    """y = x * weight and its epilogue, of images."""
    of = shape_of(x, weight, y.shape[2:], how)
    (_depthwise.convolve if of.depthwise else _convolve)(x, weight, end, of, y)


def input_gradient(dy: np.ndarray, weight: np.ndarray, dx: np.ndarray, how: Options) -> None:
    of = shape_of(dx, weight, dy.shape[2:], how)
    (_depthwise.input_gradient if of.depthwise else _dense_input_gradient)(dy, weight, dx, of)


def weight_gradient(dy: np.ndarray, x: np.ndarray, weight: Spec, how: Options) -> np.ndarray:
    """In the dtype of sums."""
    of = shape_of(x, weight, dy.shape[2:], how)
    return (_depthwise.weight_gradient if of.depthwise else _dense_weight_gradient)(dy, x, weight, of)
