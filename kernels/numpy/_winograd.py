"""Winograd's F(2×2, 3×3): four outputs of a 3×3 convolution with 16 products a channel, not 36.

Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015. y = Aᵀ ((G w Gᵀ) ⊙ (Bᵀ d B)) A for each tile d
of 4×4 pixels, which lie 2 apart. Sums over channels are 16 matrix products. The transforms add and subtract whole
planes: pixels are split into rows and columns of even and odd number, and images are the innermost axis, so that the
planes are long runs of memory.

An infinite pixel meets itself with the other sign in the transforms: where they find one, the caller is told to convolve
in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from gpulayers.arrays import guests

from . import _blocks
from ._epilogue import Epilogue

BYTES = 1 << 23
"""Of transformed pixels at a time."""
RUN = 224
"""Elements of a row of tiles with its images: shorter runs cost more than their sums."""
KERNELS = 1 << 10
"""Transformed at a time: few enough for BLAS to call no threads, which would spin on through what follows."""
_HALF = 0.5
_G = np.array([[1, 0, 0], [_HALF, _HALF, _HALF], [_HALF, -_HALF, _HALF], [0, 0, 1]])
TAPS = np.kron(_G, _G).astype(np.float32)
"""The transform of a kernel, (16, 9): exact."""


class _Block(NamedTuple):
    """Some images and rows of tiles."""

    images: slice
    first: int
    """Row of tiles."""
    shape: tuple[int, int, int]
    """(rows, columns, images)."""


def _blocks_of(n: int, size: tuple[int, int], channels: int) -> list[_Block]:
    """An even number of blocks for each run of images, so that two threads end together."""
    rows, columns = (-(-s // 2) for s in size)
    images = max(1, min(n, -(-RUN // columns)))
    step = max(1, BYTES // (64 * channels * columns * images))
    count = min(rows, 2 * -(-rows // (2 * step)))
    bounds = [rows * i // count for i in range(count + 1)]
    return [
        _Block(slice(i, min(i + images, n)), lo, (hi - lo, columns, min(images, n - i)))
        for i in range(0, n, images)
        for lo, hi in pairwise(bounds)
    ]


def _phases(size: tuple[int, int], start: tuple[int, int], room: tuple[int, int]) -> Iterator[tuple]:
    """(a, b, where, pixels) for each parity: plane (a, b) holds at ``where`` the image's ``pixels``.

    start: the image's row and column that element (0, 0) of plane (0, 0) stands for.
    """

    def axis(n: int, start: int, room: int) -> Iterator[tuple[slice, slice]]:
        for parity in (0, 1):
            skip = max(0, -(-(-start - parity) // 2))
            pixel = start + parity + 2 * skip
            count = max(0, min(room - skip, -(-(n - pixel) // 2)))
            yield slice(skip, skip + count), slice(pixel, pixel + 2 * count, 2)

    for a, (i, y) in enumerate(axis(size[0], start[0], room[0])):
        for b, (j, x) in enumerate(axis(size[1], start[1], room[1])):
            yield a, b, (i, j), (y, x)


class _Watch:
    """Whether all numbers of a call were finite. Threads set it; the sums of blocks in the cache cost little."""

    def __init__(self) -> None:
        self.finite = True

    def see(self, x: np.ndarray) -> None:
        with np.errstate(all="ignore"):
            self.finite &= bool(np.isfinite(x.sum()))


def _split(x: np.ndarray, block: _Block, start: tuple[int, int], more: int, watch: _Watch) -> np.ndarray:
    """The four planes of these images: (2, 2, channels, rows + more, columns + more, images)."""
    rows, columns, n = block.shape
    planes = np.zeros((2, 2, x.shape[1], rows + more, columns + more, n), np.float32)
    for a, b, (i, j), (y, q) in _phases(x.shape[2:], start, (rows + more, columns + more)):  # type: ignore[arg-type]
        planes[a, b][:, i, j] = x[block.images, :, y, q].transpose(1, 2, 3, 0)
    watch.see(planes)
    return planes


def _over(channels: int, work: Callable[[int, int], None], size: int) -> None:
    """work(lo, hi) for slabs of channels on several threads; size: elements of a transformed channel."""
    share = -(-channels // _blocks.threads())
    _blocks.over(channels, max(1, min(share, _blocks.BYTES // size)), work, channels * size)


def _combined(even: np.ndarray, odd: np.ndarray, axis: int) -> Iterator[tuple[np.ufunc, np.ndarray, np.ndarray]]:
    """The four rows of Bᵀ d: what is added or subtracted, of every other row or column along an axis."""
    before, after = (slice(None),) * axis + (slice(-1),), (slice(None),) * axis + (slice(1, None),)
    yield np.subtract, even[before], even[after]
    yield np.add, odd[before], even[after]
    yield np.subtract, even[after], odd[before]
    yield np.subtract, odd[after], odd[before]


def _inputs(x: np.ndarray, block: _Block, padding: tuple, watch: _Watch) -> np.ndarray:
    """Bᵀ d B of every tile: (16, C, tiles)."""
    (top, _), (left, _) = padding
    out = np.empty((4, 4, x.shape[1], *block.shape), np.float32)

    def work(lo: int, hi: int) -> None:
        even, odd = _split(x[:, lo:hi], block, (2 * block.first - top, -left), 1, watch)
        row = np.empty((2, hi - lo, block.shape[0], *even.shape[-2:]), np.float32)  # stays in the cache
        for k, (combine, a, b) in enumerate(_combined(even, odd, 2)):
            combine(a, b, out=row)
            for j, (combine, a, b) in enumerate(_combined(*row, 2)):
                combine(a, b, out=out[k, j, lo:hi])

    _over(x.shape[1], work, out[:, :, 0].size)
    return out.reshape(16, x.shape[1], -1)


def _outputs(products: np.ndarray, end: Epilogue, block: _Block, y: np.ndarray) -> None:
    """y's tiles = Aᵀ products A, and their epilogue."""
    products = products.reshape(4, 4, y.shape[1], *block.shape)
    phases = list(_phases(y.shape[2:], (2 * block.first, 0), block.shape[:2]))  # type: ignore[arg-type]

    def work(lo: int, hi: int) -> None:
        m = products[:, :, lo:hi]
        above = np.empty((2, *m.shape[1:]), np.float32)
        np.add(m[1], m[2], out=above[0])
        np.subtract(m[1], m[2], out=above[1])
        above[0] += m[0]
        above[1] += m[3]
        out = np.empty((2, 2, *m.shape[2:]), np.float32)
        np.add(above[:, 1], above[:, 2], out=out[:, 0])
        np.subtract(above[:, 1], above[:, 2], out=out[:, 1])
        out[:, 0] += above[:, 0]
        out[:, 1] += above[:, 3]
        end.scaled(np.moveaxis(out, 2, 0), slice(lo, hi))
        if not end.affine:
            for a, b, (i, j), pixels in phases:
                end.added(out[a, b][:, i, j].transpose(3, 0, 1, 2), (block.images, slice(lo, hi), *pixels))
            end.activated(out)
        for a, b, (i, j), (r, q) in phases:
            y[block.images, lo:hi, r, q] = out[a, b][:, i, j].transpose(3, 0, 1, 2)

    _over(y.shape[1], work, products[:, :, 0].size)


def _gradients(dy: np.ndarray, block: _Block, watch: _Watch) -> np.ndarray:
    """A dy Aᵀ of every tile: (16, O, tiles)."""
    out = np.empty((4, 4, dy.shape[1], *block.shape), np.float32)

    def work(lo: int, hi: int) -> None:
        even, odd = _split(dy[:, lo:hi], block, (2 * block.first, 0), 0, watch)
        to = out[:, :, lo:hi]
        for k, row in enumerate((even, even + odd, even - odd, odd)):
            to[k, 0] = row[0]
            np.add(row[0], row[1], out=to[k, 1])
            np.subtract(row[0], row[1], out=to[k, 2])
            to[k, 3] = row[1]

    _over(dy.shape[1], work, out[:, :, 0].size)
    return out.reshape(16, dy.shape[1], -1)


def convolve(
    x: np.ndarray, weight: np.ndarray, end: Epilogue, padding: tuple, y: np.ndarray, turned: bool = False
) -> bool:
    """y = x * weight and its epilogue; whether it is: all of x was finite. turned: with the kernel turned around, from
    its outputs to its inputs."""
    o, c = weight.shape[:2]
    taps = TAPS[:, ::-1] if turned else TAPS
    flat, kernels = np.empty((16, o * c), np.float32), weight.reshape(-1, 9).astype(np.float32, copy=False)

    def transform(lo: int, hi: int) -> None:
        guests.matmul(taps, kernels[lo:hi].T, out=flat[:, lo:hi])

    _blocks.over(o * c, KERNELS, transform)
    spread = flat.reshape(16, o, c).swapaxes(1, 2) if turned else flat.reshape(16, o, c)
    watch = _Watch()

    def work(block: _Block) -> None:
        _outputs(guests.matmul(spread, _inputs(x, block, padding, watch)), end, block, y)

    _blocks.apart(_blocks_of(len(x), y.shape[2:], max(o, c)), work)  # type: ignore[arg-type]
    return watch.finite


def weight_gradient(dy: np.ndarray, x: np.ndarray, padding: tuple) -> np.ndarray | None:
    """(O, C, 3, 3); None where not all of dy and x is finite."""
    o, c, watch = dy.shape[1], x.shape[1], _Watch()

    def work(block: _Block) -> np.ndarray:
        return guests.matmul(_gradients(dy, block, watch), _inputs(x, block, padding, watch).swapaxes(1, 2))

    total = _blocks.total(_blocks_of(len(x), dy.shape[2:], max(o, c)), work)  # type: ignore[arg-type]
    flat, dweight = total.reshape(16, -1), np.empty((o * c, 9), np.float32)

    def back(lo: int, hi: int) -> None:
        guests.matmul(flat[:, lo:hi].T, TAPS, out=dweight[lo:hi])

    _blocks.over(o * c, KERNELS, back)
    return dweight.reshape(o, c, 3, 3) if watch.finite else None
