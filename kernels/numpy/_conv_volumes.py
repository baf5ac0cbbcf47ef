"""Convolution of volumes, by images: a slice of the output (one depth) is an image's convolution of the slices under the
kernel, which stand beside each other as channels, (C · kd, H, W)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpulayers.arrays import Spec

from . import _conv, _conv_images
from ._conv import Options
from ._epilogue import Epilogue

BYTES = 1 << 25
"""Of gathered slices at a time."""


class _Slices:
    """Some slices of the output of one volume, and where they lie in x."""

    def __init__(self, shape: tuple, weight: Spec | np.ndarray, depth: int, how: Options, kind: np.dtype):
        self.c, self.d, *self.size = shape
        self.depth, self.kind = depth, kind
        self.kd = weight.shape[2]
        self.stride, self.dilation, (self.before, self.after) = how.stride[0], how.dilation[0], how.padding[0]
        self.how = Options(how.stride[1:], how.padding[1:], how.dilation[1:], how.groups)
        each = self.c * self.kd * self.size[0] * self.size[1] * kind.itemsize
        self.step = max(1, BYTES // max(each, 1))

    def blocks(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self.depth, self.step):
            yield first, min(first + self.step, self.depth)

    def wide(self) -> np.ndarray:
        return np.zeros((self.c, self.d + self.before + self.after, *self.size), self.kind)

    def inside(self, wide: np.ndarray) -> np.ndarray:
        return wide[:, self.before : self.before + self.d]

    def under(self, wide: np.ndarray, first: int, last: int) -> np.ndarray:
        """A view (slices, C, kd, H, W): what lies under the kernel's depth."""
        c, z, y, x = wide.strides
        shape = (last - first, self.c, self.kd, *self.size)
        return as_strided(wide[:, first * self.stride :], shape, (self.stride * z, c, self.dilation * z, y, x))

    def gathered(self, wide: np.ndarray, first: int, last: int) -> np.ndarray:
        return np.ascontiguousarray(self.under(wide, first, last)).reshape(last - first, -1, *self.size)


def _flat(weight: np.ndarray) -> np.ndarray:
    """(O, C / groups · kd, kh, kw)."""
    return np.ascontiguousarray(weight).reshape(len(weight), -1, *weight.shape[3:])


def _volume(x: np.ndarray, of: _Slices) -> np.ndarray:
    wide = of.wide()
    of.inside(wide)[...] = x
    return wide


def forward(x: np.ndarray, weight: np.ndarray, end: Epilogue, y: np.ndarray, how: Options) -> None:
    kind, taps = _conv.compute_dtype(x.dtype), _flat(weight)
    for i, volume in enumerate(x):
        of = _Slices(volume.shape, weight, y.shape[2], how, kind)
        wide = _volume(volume, of)
        for first, last in of.blocks():

            def images(a: np.ndarray) -> np.ndarray:
                return a[i, :, first:last].swapaxes(0, 1)  # noqa: B023

            _conv_images.forward(of.gathered(wide, first, last), taps, end.viewed(images), images(y), of.how)


def input_gradient(dy: np.ndarray, weight: np.ndarray, dx: np.ndarray, how: Options) -> None:
    kind, taps = _conv.compute_dtype(dy.dtype), _flat(weight)
    for g, out in zip(dy, dx):
        of = _Slices(out.shape, weight, g.shape[1], how, kind)
        wide = of.wide()
        for first, last in of.blocks():
            part = np.empty((last - first, of.c * of.kd, *of.size), kind)
            _conv_images.input_gradient(g[:, first:last].swapaxes(0, 1), taps, part, of.how)
            under, part = of.under(wide, first, last), part.reshape(last - first, of.c, of.kd, *of.size)
            for tap in range(of.kd):
                under[:, :, tap] += part[:, :, tap]
        out[...] = of.inside(wide)


def weight_gradient(dy: np.ndarray, x: np.ndarray, weight: Spec, how: Options) -> np.ndarray:
    kind = _conv.compute_dtype(x.dtype)
    flat = Spec((weight.shape[0], weight.shape[1] * weight.shape[2], *weight.shape[3:]), kind)
    total = np.zeros(flat.shape, kind)
    for g, volume in zip(dy, x):
        of = _Slices(volume.shape, weight, g.shape[1], how, kind)
        wide = _volume(volume, of)
        for first, last in of.blocks():
            part = g[:, first:last].swapaxes(0, 1)
            total += _conv_images.weight_gradient(part, of.gathered(wide, first, last), flat, of.how)
    return total.reshape(weight.shape)
