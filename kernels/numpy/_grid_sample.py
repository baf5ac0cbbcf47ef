"""Images looked up at any places, an image at a time, with a border of zeros for neighbours that are not there. Row-major ones
are read channel by channel; channels-last ones, and gradients, as rows of channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gpulayers._lookups import Tap, neighbours
from gpulayers.arrays import Spec, compute_dtype, empty_numpy

from .._window import output_order
from . import _blocks, _segments

BYTES = 1 << 19
"""Of what is gathered at once."""
TOGETHER = 8
"""Channels that are taken at a time: more rows of an image fall into the same sets of a cache."""
MANY = 64
"""Terms of a pixel that is summed up by itself."""


class _Places(NamedTuple):
    """The K neighbours of every place of some images."""

    at: np.ndarray
    """(images, K, P): their pixels, of images that have one more along each axis: of zeros, for those that are not there."""
    weight: np.ndarray
    axes: list[list[Tap]]


def _places(x: Any, grid: np.ndarray, how: tuple) -> _Places:
    axes, at, weight = neighbours(x, grid, *how), None, None
    for taps, size in zip(axes, x.shape[2:]):
        index = np.stack([np.where(tap.inside, tap.index, size) for tap in taps], 1)
        by = taps[0].weight[:, None] if len(taps) == 1 else np.stack([tap.weight for tap in taps], 1)
        flat = len(grid), len(taps) * (1 if at is None else at.shape[1]), index.shape[2]
        at = index if at is None else (at[:, :, None] * (size + 1) + index[:, None]).reshape(flat)
        weight = by if weight is None else (weight[:, :, None] * by[:, None]).reshape(flat)
    return _Places(at, weight, axes)


def _over(x: Any, grid: np.ndarray, how: tuple, elements: int, work: Callable[[int, int, _Places], None]) -> None:
    """work(image, which of these places, these) for all images; a thread's many small steps would wait for the others'."""
    some = max(_blocks.threads(), _blocks.CHAIN // max(1, math.prod(grid.shape[1:-1])))
    for first in range(0, len(grid), some):
        places = _places(x, grid[first : first + some], how)

        def images(lo: int, hi: int, first: int = first, places: _Places = places) -> None:
            for i in range(lo, hi):
                work(first + i, i, places)

        _blocks.over(len(places.at), 1, images, elements)


def _extended(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size + 1 for size in sizes)


def _border(image: np.ndarray, axes: range, value: Any) -> np.ndarray:
    """``image`` with its last places along these axes at a value."""
    for a in axes:
        image[(slice(None),) * a + (-1,)] = value
    return image


def _rows(x: np.ndarray, n: int, kind: np.dtype, more: int) -> np.ndarray:
    """(pixels, channels) of an image; 1 more along each axis: with its border."""
    own, sizes = x[n], x.shape[2:]
    rows = np.empty((*(size + more for size in sizes), len(own)), kind)
    inner = rows[tuple(slice(size) for size in sizes)]
    step = len(own) if own.strides[0] == own.itemsize else TOGETHER
    for c in range(0, len(own), step):
        inner[..., c : c + step] = np.moveaxis(own[c : c + step], 0, -1)
    if more:
        _border(rows, range(len(sizes)), 0)
    return rows.reshape(-1, len(own))


def _gathered(rows: np.ndarray, at: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(which places, their rows (K, places, C)), block by block; at: (K, P)."""
    count, total = at.shape
    step = min(max(1, total), _blocks.block_rows(count * rows.shape[1], rows.itemsize, BYTES))
    memory = np.empty((count * step, rows.shape[1]), rows.dtype)
    for lo in range(0, total, step):
        some = slice(lo, min(lo + step, total))
        index = at[:, some]
        yield some, np.take(rows, index, 0, memory[: index.size].reshape(*index.shape, -1), "clip")


def _by_rows(x: np.ndarray, n: int, at: np.ndarray, weight: np.ndarray, kind: np.dtype, out: np.ndarray) -> None:
    """out[c, p] = Σ_k weight[k, p] · x[c, at[k, p]], from rows of channels."""
    for some, found in _gathered(_rows(x, n, kind, 1), at):
        out[:, some] = np.einsum("kp,kpc->pc", weight[:, some], found).T


def _by_channels(x: np.ndarray, n: int, at: np.ndarray, weight: np.ndarray, kind: np.dtype, out: np.ndarray) -> None:
    """The same from a few channels at a time."""
    (count, total), sizes = at.shape, x.shape[2:]
    image = np.empty((min(TOGETHER, len(out)), *_extended(sizes)), kind)
    _border(image, range(1, image.ndim), 0)
    step = min(max(1, total), _blocks.block_rows(count * len(image), image.itemsize, BYTES))
    memory = np.empty(len(image) * count * step, kind)
    for c in range(0, len(out), TOGETHER):
        own = x[n, c : c + TOGETHER]
        image[(slice(len(own)), *(slice(size) for size in sizes))] = own
        flat = image[: len(own)].reshape(len(own), -1)
        for lo in range(0, total, step):
            index, by = at[:, lo : lo + step], weight[:, lo : lo + step]
            found = np.take(flat, index, 1, memory[: len(own) * index.size].reshape(len(own), *index.shape), "clip")
            out[c : c + TOGETHER, lo : lo + step] = found[:, 0] if count == 1 else np.einsum("kp,ckp->cp", by, found)


def grid_sample_forward(
    x: np.ndarray, grid: np.ndarray, *, needs: tuple = (), mode: str, padding_mode: str, align_corners: bool
) -> tuple[tuple, dict]:
    order, kind, how = output_order(x), compute_dtype(x.dtype), (mode, padding_mode, align_corners)
    y = empty_numpy(Spec((*x.shape[:2], *grid.shape[1:-1]), x.dtype, order))
    taken = _by_channels if order is None else _by_rows

    def work(n: int, i: int, places: _Places) -> None:
        taken(x, n, places.at[i], places.weight[i], kind, y[n].reshape(y.shape[1], -1))

    _over(x, grid, how, y.size, work)
    return (y,), {"x": x, "grid": grid} if needs else {}


def _scattered(g: np.ndarray, at: np.ndarray, weight: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Σ weight[k, p] · g[p] over at[k, p] = pixel, (C, *sizes with the border).

    The terms are sorted by their pixels, and these by how many they have: the k-th terms of all that have one are added at
    once. Pixels of very many have their own sums.
    """
    pixels, weighted, at = _extended(sizes), len(at) > 1, at.reshape(-1)
    order = _segments.order(at, math.prod(pixels))
    counts = np.bincount(at, minlength=math.prod(pixels))
    first = np.cumsum(counts) - counts
    _border(counts.reshape(pixels), range(len(pixels)), 0)
    of, weight = order % max(1, len(g)), weight.reshape(-1)[order]
    total = np.zeros((len(counts), g.shape[1]), g.dtype)
    for pixel in np.flatnonzero(counts > MANY):
        own = slice(first[pixel], first[pixel] + counts[pixel])
        total[pixel] = np.einsum("k,kc->c", weight[own], np.take(g, of[own], 0))
    counts[counts > MANY] = 0
    fullest = _segments.order(MANY - counts, MANY)
    step = _blocks.block_rows(g.shape[1], g.itemsize, BYTES)
    memory, sums = (np.empty((min(step, len(total)), g.shape[1]), g.dtype) for _ in range(2))
    for lo in range(0, np.count_nonzero(counts), step):
        some = fullest[lo : lo + step]
        begin, many = first[some], counts[some]
        for k in range(many[0]):
            term = begin[: np.count_nonzero(many > k)] + k
            part = np.take(g, of[term], 0, memory[: len(term)], "clip")
            if weighted:
                part *= weight[term][:, None]
            if k:
                sums[: len(term)] += part
            else:
                sums[: len(term)] = part
                known = len(term)
        total[some[:known]] = sums[:known]
    return np.moveaxis(total.reshape(*pixels, -1), -1, 0)


def _added(dy: np.ndarray, at: np.ndarray, sizes: tuple[int, ...], kind: np.dtype) -> np.ndarray:
    """The same of places with one neighbour each, in their order."""
    total = np.zeros((len(dy), *_extended(sizes)), kind)
    for one, own in zip(total.reshape(len(dy), -1), dy):
        np.add.at(one, at, own.reshape(-1).astype(kind, copy=False))
    return total


def _slopes(x: np.ndarray, n: int, i: int, places: _Places, g: np.ndarray) -> np.ndarray:
    """(P, axes): Σ_k (Σ_c x · g) · the slope along the axis · the other axes' weights; the last axis first."""
    at = places.at[i]
    along = np.empty(at.shape, g.dtype)
    for some, found in _gathered(_rows(x, n, g.dtype, 1), at):
        along[:, some] = np.einsum("kpc,pc->kp", found, g[some])
    pixels = _extended(x.shape[2:])
    along[_border(np.zeros(pixels, bool), range(len(pixels)), True).reshape(-1)[at]] = 0
    total = []
    for a in reversed(range(len(pixels))):
        rate, ones = 1, (1,) * len(pixels)
        for b, taps in enumerate(places.axes):
            own = np.stack([tap.slope[i] if a == b else tap.weight[i] for tap in taps])
            rate = rate * own.reshape(*ones[:b], len(taps), *ones[b + 1 :], -1)
        total.append((along.reshape(rate.shape) * rate).sum(tuple(range(len(pixels)))))
    return np.stack(total, -1)


def grid_sample_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, mode: str, padding_mode: str, align_corners: bool
) -> tuple:
    (dy,), x, grid, how = dys, saved["x"], saved["grid"], (mode, padding_mode, align_corners)
    kind, sizes = compute_dtype(x.dtype), x.shape[2:]
    dx, dgrid = (empty_numpy(s.like()) if name in needs else None for name, s in zip(("x", "grid"), inputs))

    def work(n: int, i: int, places: _Places) -> None:
        at = places.at[i]
        g = None if len(at) == 1 else _rows(dy, n, kind, 0)
        if dgrid is not None:
            dgrid[n] = 0 if g is None else _slopes(x, n, i, places, g).reshape(dgrid.shape[1:])
        if dx is not None:
            found = _added(dy[n], at[0], sizes, kind) if g is None else _scattered(g, at, places.weight[i], sizes)
            dx[n] = found[(slice(None), *(slice(size) for size in sizes))]

    _over(x, grid, how, dy.size, work)
    return dx, dgrid
