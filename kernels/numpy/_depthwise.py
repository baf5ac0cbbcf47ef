"""Depthwise convolution: a product of one row a channel, over images split by the stride."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpulayers.arrays import Spec, guests

from . import _blocks, _conv
from ._conv import Back, Shape, planes_of, runs_of, taps_by_phase
from ._epilogue import Epilogue

ALONE = 9000
"""Elements of a matrix below which BLAS multiplies it with a row in one thread."""


def _pieces(columns: np.ndarray, rows: int) -> np.ndarray:
    """(n, c, taps, rows · pitch) as (n, c, pieces, taps, run): BLAS calls no threads of its own for a short run."""
    n, c, taps, length = columns.shape
    most = max(1, ALONE // (taps * (length // rows)))
    each = max(d for d in range(1, min(rows, most) + 1) if rows % d == 0)
    return columns.reshape(n, c, taps, rows // each, -1).swapaxes(2, 3)


def _gathered(x: np.ndarray, of: Shape) -> np.ndarray:
    """The pixels under each tap, (n, c, pieces, taps, run), rows of output with the pitch of a phase."""
    planes = planes_of(x, of)
    columns = np.empty((*x.shape[:2], *of.kernel, of.size[0] * planes.shape[-1]), of.kind)
    for t in taps_by_phase(of):
        columns[:, :, *t.at] = runs_of(planes[t.phase], t.start, t.step, t.taps, columns.shape[-1])
    return _pieces(columns.reshape(*x.shape[:2], -1, columns.shape[-1]), of.size[0])


def _over_planes(of: Shape, work: Any) -> list:
    """[work(images, channels) for each block that fits the cache], in order, on several threads."""
    pixels = of.size[0] * -(-of.padded[1] // of.stride[1])
    plane = pixels * of.kernel[0] * of.kernel[1] * (of.o // of.groups) * of.kind.itemsize
    channels = max(1, min(of.c, _conv.COLUMN_BYTES // plane))
    images = max(1, min(of.n, _conv.COLUMN_BYTES // (plane * channels)))
    starts = [(i, c) for i in range(0, of.n, images) for c in range(0, of.c, channels)]

    def block(lo: int, hi: int) -> Any:
        i, c = starts[lo]
        return work(slice(i, min(i + images, of.n)), slice(c, min(c + channels, of.c)))

    return _blocks.over(len(starts), 1, block, of.n * of.o * of.size[0] * of.size[1])


def convolve(x: np.ndarray, weight: np.ndarray, end: Epilogue, of: Shape, y: np.ndarray) -> None:
    """y = x * weight and its epilogue."""
    many, (oh, ow) = of.o // of.groups, of.size
    taps = weight.astype(of.kind, copy=False).reshape(of.c, 1, many, -1)

    def work(images: slice, channels: slice) -> None:
        total = guests.matmul(taps[channels], _gathered(x[images, channels], of))  # (n, c, pieces, many, run)
        total = total.swapaxes(2, 3).reshape(len(total), -1, oh, total.shape[2] * total.shape[4] // oh)[..., :ow]
        outs = slice(channels.start * many, channels.stop * many)
        if not end.affine:
            total = np.ascontiguousarray(total)
        end.scaled(total.swapaxes(0, 1), outs)
        end.put(total, y, (images, outs), total)

    _over_planes(of, work)


def input_gradient(dy: np.ndarray, weight: np.ndarray, dx: np.ndarray, of: Shape) -> None:
    """Each phase of dx is a convolution of dy with the taps that fall on it, turned around; of single steps, as forward is."""
    back, many = Back(of), of.o // of.groups
    if not of.strided and many == 1 and min(map(min, of.back)) >= 0:
        (h, w), size = of.size, (of.h, of.w)
        convolve(
            dy,
            np.ascontiguousarray(weight[..., ::-1, ::-1]),
            Epilogue(),
            of._replace(h=h, w=w, size=size, padding=of.back),
            dx,
        )
        return
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
            total = guests.matmul(taps, _pieces(columns, back.size[0])).reshape(
                *out.shape[:2], back.size[0], back.full[1]
            )
            back.put(total, out, t, 0)

    _over_planes(of, work)


def weight_gradient(dy: np.ndarray, x: np.ndarray, weight: Spec, of: Shape) -> np.ndarray:
    many, (oh, ow) = of.o // of.groups, of.size

    def work(images: slice, channels: slice) -> tuple[slice, np.ndarray]:
        under = _gathered(x[images, channels], of)
        n, c, pieces, _, run = under.shape
        pitch = pieces * run // oh
        g = np.zeros((n, c, many, oh, pitch), of.kind)
        g[..., :ow] = dy[images, channels.start * many : channels.stop * many].reshape(*g.shape[:4], ow)
        g = g.reshape(n, c, many, pieces, run).swapaxes(2, 3)
        found = guests.matmul(g, under.swapaxes(3, 4)).sum((0, 2))
        if not np.isfinite(found).all():  # what lies between two rows met zeros of dy, and was infinite
            under.reshape(*under.shape[:4], -1, pitch)[..., ow:] = 0
            found = guests.matmul(g, under.swapaxes(3, 4)).sum((0, 2))
        return channels, found

    total = np.zeros((of.c, many, of.kernel[0] * of.kernel[1]), of.kind)
    for channels, sums in _over_planes(of, work):
        total[channels] += sums
    return total.reshape(weight.shape)
