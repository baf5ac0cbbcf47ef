"""Dropout in blocks that stay in the cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _blocks, _random

REFUSALS = {"float64": "float64 is left to the definition"}


def _masked(x: np.ndarray, out: np.ndarray, seed: np.ndarray, p: float) -> np.ndarray:
    """out = x m / (1 − p)."""
    key, offset = _random.halves(seed)
    threshold, scale = np.uint64(min(round(p * 2**32), 2**32 - 1)), np.float32(1 / (1 - p) if p < 1 else 0.0)
    flat = np.ascontiguousarray(x).reshape(-1)
    y = out.reshape(-1) if out.flags.c_contiguous else np.empty(x.size, x.dtype)

    def work(lo: int, hi: int) -> None:
        words = _random.words(key, offset, lo, hi)
        keep = np.empty((len(words[0]), 4), bool)
        for j, word in enumerate(words):
            np.greater_equal(word, threshold, out=keep[:, j])
        block = flat[lo:hi].astype(np.float32, copy=False)
        with np.errstate(invalid="ignore", over="ignore"):
            t = np.multiply(block, keep.reshape(-1)[: hi - lo])
            y[lo:hi] = np.multiply(t, scale, out=t)

    _blocks.each(flat.size, 4 * _random.COUNTERS, work)
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
