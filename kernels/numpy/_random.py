"""Random words: Philox in place on a few uint64 arrays that stay in the cache."""

from __future__ import annotations

import numpy as np

COUNTERS = 1 << 15
"""A block, of four elements for each counter: with a quarter the threads wait for the interpreter's lock as long as they
work."""
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_MASK = 0xFFFFFFFF


def philox(key: int, counter: np.ndarray, offset: int) -> tuple[np.ndarray, ...]:
    """Philox4x32-10 as in ops/_random.py: four arrays of words for the counters [counter, offset] (uint64, kept)."""
    c0, c1 = counter & _LOW, counter >> _HALF
    c2, c3 = np.full_like(c0, offset & _MASK), np.full_like(c0, offset >> 32)
    p = np.empty_like(c0)
    k0, k1 = key & _MASK, key >> 32
    for _ in range(10):
        np.multiply(c0, _MULTIPLIERS[0], out=p)
        np.multiply(c2, _MULTIPLIERS[1], out=c0)
        np.right_shift(c0, _HALF, out=c2)
        c2 ^= c1
        c2 ^= np.uint64(k0)  # the next c0
        np.bitwise_and(c0, _LOW, out=c1)
        np.right_shift(p, _HALF, out=c0)
        c0 ^= c3
        c0 ^= np.uint64(k1)  # the next c2
        np.bitwise_and(p, _LOW, out=c3)
        c0, c2 = c2, c0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def halves(seed: np.ndarray) -> tuple[int, int]:
    """(key, offset) of [seed, offset], as unsigned numbers."""
    key, offset = (int(s) & (2**64 - 1) for s in seed)
    return key, offset


def words(key: int, offset: int, lo: int, hi: int) -> tuple[np.ndarray, ...]:
    """Four arrays: the j-th has the words (in uint64) of the elements lo + j, lo + j + 4, …; 4 divides lo."""
    return philox(key, np.arange(lo // 4, -(-hi // 4), dtype=np.uint64), offset)
