"""Dropout in blocks that stay in the cache. A backward finds the mask that its forward drew, which costs ten times the rest."""

from __future__ import annotations

import collections
import threading
from typing import Any

import numpy as np

from . import _blocks, _random

REFUSALS = {"float64": "float64 is left to the definition"}


MASKS = 1 << 26
"""Bytes of masks that wait for their backward; the oldest go."""
_masks: collections.OrderedDict[tuple, np.ndarray] = collections.OrderedDict()
_lock = threading.Lock()


def _kept(key: tuple, mask: np.ndarray) -> None:
    with _lock:
        _masks[key] = mask
        while sum(m.nbytes for m in _masks.values()) > MASKS:
            _masks.popitem(last=False)


def _drawn(name: tuple, mask: np.ndarray, lo: int, hi: int) -> None:
    """mask[lo:hi] = m / (1 − p)."""
    key, offset, threshold, scale, _ = name
    keep = np.empty((-(-(hi - lo) // 4), 4), bool)
    for j, word in enumerate(_random.words(key, offset, lo, hi)):
        np.greater_equal(word, np.uint64(threshold), out=keep[:, j])
    np.multiply(keep.reshape(-1)[: hi - lo], np.float32(scale), out=mask[lo:hi])


def _masked(x: np.ndarray, out: np.ndarray, seed: np.ndarray, p: float, first: bool) -> np.ndarray:
    """out = x m / (1 − p). first: the mask will be wanted once more."""
    name = (*_random.halves(seed), min(round(p * 2**32), 2**32 - 1), 1 / (1 - p) if p < 1 else 0.0, x.size)
    with _lock:
        known = None if first else _masks.pop(name, None)
    mask = np.empty(x.size, np.float32) if known is None else known
    flat = np.ascontiguousarray(x).reshape(-1)
    y = out.reshape(-1) if out.flags.c_contiguous else np.empty(x.size, x.dtype)

    def work(lo: int, hi: int) -> None:
        if known is None:
            _drawn(name, mask, lo, hi)
        with np.errstate(invalid="ignore", over="ignore"):
            if y.dtype == np.float32:
                np.multiply(flat[lo:hi], mask[lo:hi], out=y[lo:hi])
            else:
                y[lo:hi] = flat[lo:hi].astype(np.float32) * mask[lo:hi]

    _blocks.each(flat.size, 4 * _random.COUNTERS, work)
    if first:
        _kept(name, mask)
    if not out.flags.c_contiguous:
        out[...] = y.reshape(x.shape)
    return out


def dropout_refuses(x: Any, seed: Any, *, needs: tuple = (), p: float = 0.5) -> str | None:
    return REFUSALS["float64"] if x.dtype == np.float64 else None


def dropout_forward(x: np.ndarray, seed: np.ndarray, *, needs: tuple = (), p: float = 0.5) -> tuple[tuple, dict]:
    return (_masked(x, _blocks.empty_like(x), seed, p, bool(needs)),), {"seed": seed} if needs else {}


def dropout_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 0.5) -> tuple:
    (dy,), order = dys, inputs[0].order if inputs[0].contiguous else None
    axes = range(dy.ndim) if order is None else order
    dx = np.empty([dy.shape[a] for a in axes], dy.dtype).transpose(sorted(range(dy.ndim), key=list(axes).__getitem__))
    return _masked(dy, dx, saved["seed"], p, False), None
