"""Maxima under windows of random steps, some images at a time: what lies under one tap of all windows after the other."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from gpulayers.arrays import compute_dtype

from . import _blocks, _random
from ._won import back, outputs, returned, rows_of


def _drawn(seed: np.ndarray, count: int) -> np.ndarray:
    """Philox's numbers in [0, 1), of 24 bits."""
    words = np.stack(_random.words(*_random.halves(seed), 0, count), 1).reshape(-1)[:count]
    return (words >> 8).astype(np.float32) * np.float32(2**-24)


def _starts(u: np.ndarray, n: int, k: int, o: int) -> np.ndarray:
    """Where a channel's windows begin along an axis: (…, O)."""
    alpha = np.float32(n - k) / np.float32(max(o - 1, 1))
    u = u[..., None]
    steps = ((np.arange(o, dtype=np.float32) + u) * alpha).astype(np.int64) - (u * alpha).astype(np.int64)
    steps[..., -1] = n - k
    return steps


def _greatest(flat: np.ndarray, at: np.ndarray, offsets: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(maxima of flat[at + offset] over the offsets, the offset of each)."""
    best, under = np.empty(at.shape, flat.dtype), np.empty(at.shape, flat.dtype)
    won, better, number = np.zeros(at.shape, np.int32), np.empty(at.shape, bool), np.empty(at.shape, np.int32)
    np.take(flat, at + offsets[0], out=best, mode="clip")
    for tap, offset in enumerate(offsets[1:], 1):
        np.take(flat, at + offset, out=under, mode="clip")
        np.greater(under, best, out=better)
        np.maximum(best, under, out=best)
        np.multiply(better, np.int32(tap), out=number)
        np.maximum(won, number, out=won)  # taps come in rising order
    if np.isnan(best.sum()):  # some NaN: the last one in its window wins
        for tap, offset in enumerate(offsets):
            np.copyto(won, tap, where=np.isnan(flat.take(at + offset)))
    return best, np.asarray(offsets)[won]


def fractional_max_pool_forward(
    x: np.ndarray,
    seed: Any = None,
    samples: Any = None,
    *,
    needs: tuple = (),
    kernel_size: tuple,
    output_size: tuple,
    return_indices: bool,
) -> tuple[tuple, dict]:
    count, (n, c, *sizes) = len(kernel_size), x.shape
    found, last = outputs(x, output_size, needs, return_indices)
    if seed is not None:
        u = _drawn(seed, n * c * count).reshape(n, c, count)
    else:
        u = np.broadcast_to(np.float32(0.5), (n, c, count)) if samples is None else samples.astype(np.float32)
    each = [
        _starts(u[..., a if count == 3 else count - 1 - a], *s)
        for a, s in enumerate(zip(sizes, kernel_size, output_size))
    ]
    of_axes = [s.transpose(0, 2, 1) if last else s.reshape(n * c, s.shape[2], 1) for s in each]
    given, (y, index, indices) = rows_of(x, last), [a if a is None else rows_of(a, last) for a in found]
    step = c if last else 1
    steps = [step * math.prod(sizes[a + 1 :]) for a in range(count)]
    offsets = [sum(map(int.__mul__, tap, steps)) for tap in itertools.product(*map(range, kernel_size))]

    def work(lo: int, hi: int) -> None:
        flat = given[lo:hi].astype(compute_dtype(x.dtype)).reshape(-1)
        at = np.arange(hi - lo).reshape(-1, *(1,) * (count + 1)) * (flat.size // (hi - lo)) + np.arange(step)
        first = at
        for a, s in enumerate(of_axes):
            at = at + s[lo:hi].reshape(hi - lo, *(1,) * a, s.shape[1], *(1,) * (count - 1 - a), -1) * steps[a]
        y[lo:hi], won = _greatest(flat, at, offsets)
        if index is not None or indices is not None:
            won += at - first
            for a in (index, indices):
                if a is not None:
                    np.floor_divide(won, step, out=a[lo:hi], casting="same_kind")

    _blocks.over(len(given), _blocks.block_rows(given[:1].size), work, given.size)
    return returned(*found)


def fractional_max_pool_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    kernel_size: tuple,
    output_size: tuple,
    return_indices: bool,
) -> tuple:
    return back(dys[0], saved["index"], inputs[0]), None, None
