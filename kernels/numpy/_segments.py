"""Sums over runs of rows, of any length: neighbours are added pair by pair, all runs at once, until each is one row."""

from __future__ import annotations

from typing import Any

import numpy as np


def order(keys: np.ndarray, high: int) -> np.ndarray:
    """Where keys from 0 to ``high`` lie in ascending order, equal ones as they came."""
    found = np.argsort(keys.astype(np.uint16), kind="stable")  # of 16 bits NumPy sorts by digits
    for shift in range(16, max(high, 1).bit_length(), 16):
        found = found[np.argsort((keys >> shift).astype(np.uint16)[found], kind="stable")]
    return found


def add_up(
    source: np.ndarray, rows: np.ndarray, factors: Any, counts: np.ndarray, out: np.ndarray, to: np.ndarray
) -> None:
    """out[to[s]] = Σ factors · source[rows] over the s-th run; runs of ``counts`` ≥ 1 rows follow each other in ``rows``."""
    terms, index, work = source, rows, np.float32 if source.dtype.itemsize == 2 else source.dtype
    factors = None if factors is None else factors.astype(work, copy=False)

    def taken(at: np.ndarray) -> np.ndarray:
        where = at if index is None else index[at]
        found = np.take(terms, where, 0).astype(work, copy=False)
        return found if factors is None else found * factors[at][:, None]

    while len(counts):
        first = np.cumsum(counts) - counts
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
