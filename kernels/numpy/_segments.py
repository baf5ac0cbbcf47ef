"""Sums over runs of rows, of any length."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _invariance
from . import _blocks


def order(keys: np.ndarray, high: int) -> np.ndarray:
    """Where keys from 0 to ``high`` lie in ascending order, equal ones as they came."""
    found = np.argsort(keys.astype(np.uint16), kind="stable")  # of 16 bits NumPy sorts by digits
    for shift in range(16, max(high, 1).bit_length(), 16):
        found = found[np.argsort((keys >> shift).astype(np.uint16)[found], kind="stable")]
    return found


_SHORT = 64
"""Rows of a run that BLAS adds up, one after the other; of more the rounding errors would add up, too."""


def add_up(
    source: np.ndarray, rows: np.ndarray, factors: Any, counts: np.ndarray, out: np.ndarray, to: np.ndarray
) -> None:
    """out[to[s]] = Σ factors · source[rows] over the s-th run; runs of ``counts`` ≥ 1 rows follow each other in ``rows``."""
    work = np.dtype(np.float32) if source.dtype.itemsize == 2 else source.dtype
    factors = None if factors is None else factors.astype(work, copy=False)
    first, short = np.cumsum(counts) - counts, counts <= (1 if _invariance.on() else _SHORT)
    for length in np.unique(counts[short]):
        some = np.flatnonzero(counts == length)
        _add_short(source, rows, factors, first[some], int(length), out, to[some])
    if not short.all():
        long = np.flatnonzero(~short)
        _add_long(source, rows, factors, first[long], counts[long], out, to[long])


def _add_short(
    source: np.ndarray, rows: np.ndarray, factors: Any, first: np.ndarray, length: int, out: np.ndarray, to: np.ndarray
) -> None:
    """Of runs that are equally long: to each a product of matrices, (1, length) (length, width)."""
    width, work = source.shape[1], np.dtype(np.float32) if source.dtype.itemsize == 2 else source.dtype
    ones, nth = np.ones((1, 1, length), work), np.arange(length)

    def block(lo: int, hi: int) -> None:
        at = first[lo:hi, None] + nth
        by = ones if factors is None else factors[at][:, None]
        found = np.take(source, rows[at], 0, mode="clip").astype(work, copy=False)
        out[to[lo:hi]] = (np.matmul(by, found) if length > 1 else found if factors is None else by * found)[:, 0]

    size = _blocks.block_rows(length * width, work.itemsize)
    _blocks.each(len(first), size, block, len(first) * length * width // 32)  # copies are done sooner than sums


def _add_long(
    source: np.ndarray,
    rows: np.ndarray,
    factors: Any,
    first: np.ndarray,
    counts: np.ndarray,
    out: np.ndarray,
    to: np.ndarray,
) -> None:
    """Neighbours are added pair by pair, all runs at once, until each is one row."""
    work = np.float32 if source.dtype.itemsize == 2 else source.dtype
    terms, index = source, rows

    def taken(at: np.ndarray) -> np.ndarray:
        where = at if index is None else index[at]
        found = np.take(terms, where, 0).astype(work, copy=False)
        return found if factors is None else found * factors[at][:, None]

    while len(counts):
        done = counts == 1
        if done.any():
            out[to[done]] = taken(first[done])
            first, counts, to = (a[~done] for a in (first, counts, to))
        half = (counts + 1) // 2
        nth = np.arange(half.sum()) - np.repeat(np.cumsum(half) - half, half)
        left = np.repeat(first, half) + 2 * nth
        new = taken(left)
        pairs = np.flatnonzero(2 * nth + 1 < np.repeat(counts, half))
        new[pairs] += taken(left[pairs] + 1)
        terms, index, factors, counts = new, None, None, half
        first = np.cumsum(counts) - counts
