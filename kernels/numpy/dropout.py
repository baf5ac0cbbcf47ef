"""Dropout in blocks: Philox in place on a few uint64 arrays that stay in the cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _blocks

REFUSALS = {"float64": "float64 is left to the definition"}
COUNTERS = 1 << 13
"""A block: six uint64 arrays of this size stay near a core's L2, and four elements come of each counter."""
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_MASK = 0xFFFFFFFF


def _philox(key: int, counter: np.ndarray, offset: int) -> tuple[np.ndarray, ...]:
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


def _masked(x: np.ndarray, out: np.ndarray, seed: np.ndarray, p: float) -> np.ndarray:
    """out = x m / (1 − p)."""
    key, offset = (int(s) & (2**64 - 1) for s in seed)
    threshold, scale = np.uint64(min(round(p * 2**32), 2**32 - 1)), np.float32(1 / (1 - p) if p < 1 else 0.0)
    flat = np.ascontiguousarray(x).reshape(-1)
    y = out.reshape(-1) if out.flags.c_contiguous else np.empty(x.size, x.dtype)

    def work(lo: int, hi: int) -> None:
        words = _philox(key, np.arange(lo // 4, -(-hi // 4), dtype=np.uint64), offset)
        keep = np.empty((len(words[0]), 4), bool)
        for j, word in enumerate(words):
            np.greater_equal(word, threshold, out=keep[:, j])
        block = flat[lo:hi].astype(np.float32, copy=False)
        with np.errstate(invalid="ignore", over="ignore"):
            t = np.multiply(block, keep.reshape(-1)[: hi - lo])
            y[lo:hi] = np.multiply(t, scale, out=t)

    _blocks.each(flat.size, 4 * COUNTERS, work)
    if not out.flags.c_contiguous:
        out[...] = y.reshape(x.shape)
    return out


def dropout_refuses(x: Any, seed: Any, *, needs: tuple = (), p: float = 0.5) -> str | None:
    return REFUSALS["float64"] if x.dtype == np.float64 else None


def dropout_forward(x: np.ndarray, seed: np.ndarray, *, needs: tuple = (), p: float = 0.5) -> tuple[tuple, dict]:
    return (_masked(x, _blocks.empty_like(x), seed, p),), {"seed": seed} if needs else {}


def dropout_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 0.5) -> tuple:
    (dy,), order = dys, inputs[0].order if inputs[0].contiguous else None
    axes = range(dy.ndim) if order is None else order
    dx = np.empty([dy.shape[a] for a in axes], dy.dtype).transpose(sorted(range(dy.ndim), key=list(axes).__getitem__))
    return _masked(dy, dx, saved["seed"], p), None
