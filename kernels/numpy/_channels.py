"""Arrays of channels, row-major or channels-last, as blocks that stay in the cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import _blocks


def block_of(n: int, m: int) -> int:
    """Rows of n elements in a block, of m."""
    return max(1, min(_blocks.block_rows(n), m))


FEW = 256
"""Rows that are summed in one go."""


class Channels:
    """x as blocks of (images, C, S), or of (rows, C) where channels come last, and sums over all but the channels."""

    def __init__(self, x: np.ndarray):
        self.last = x.ndim == 2 or not x.flags.c_contiguous
        self.channels = x.shape[1]
        self.count = x.size // self.channels
        rows = self.view(x)
        self.total, self.size = len(rows), block_of(rows[0].size, len(rows))
        self.elements = x.size
        self.ones = np.ones(FEW, np.float32)

    def view(self, x: np.ndarray) -> np.ndarray:
        if self.last:
            turned = np.moveaxis(x, 1, -1)
            return turned.reshape(-1, x.shape[1])
        return x.reshape(x.shape[0], x.shape[1], -1)

    def spread(self, p: np.ndarray) -> np.ndarray:
        """A channel vector to combine with a block."""
        if not self.last:
            return p[:, None]
        tile = np.empty((self.size, p.size), np.float32)
        tile[...] = p
        return tile

    def of(self, p: np.ndarray, block: np.ndarray) -> np.ndarray:
        return p[: len(block)] if self.last else p

    def sum(self, a: np.ndarray) -> np.ndarray:
        """Over all but the channels; few at a time, since sums run from one end to the other."""
        if not self.last:
            return a.sum(-1).sum(0)
        head = len(a) - len(a) % FEW
        parts = self.ones[:FEW] @ a[:head].reshape(-1, FEW, self.channels) if head else np.zeros((1, self.channels))
        return parts.sum(0, dtype=np.float32) + self.ones[: len(a) - head] @ a[head:]

    def dot(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return self.sum(a * b) if self.last else _blocks.dots(a, b).sum(0)

    def over(self, work: Callable) -> list:
        return _blocks.over(self.total, self.size, work, elements=self.elements)

    def total_of(self, work: Callable) -> np.ndarray:
        """The sum of what work gives for each block, in float64: there are few."""
        return np.sum(self.over(work), 0, dtype=np.float64)
