"""Dropout's masks. A backward finds the one that its forward drew, which costs ten times the rest."""

from __future__ import annotations

import collections
import threading

import numpy as np

from .._dropout import draws
from . import _blocks, _random

MASKS = 1 << 26
"""Bytes of masks that wait for their backward; the oldest go."""
_masks: collections.OrderedDict[tuple, np.ndarray] = collections.OrderedDict()
_lock = threading.Lock()


def mask(seed: np.ndarray, p: float, size: int, first: bool, alpha: bool = False) -> np.ndarray:
    """m / (1 − p), or m a (alpha), for the elements of an array, row-major: float32, (size,).

    first: it will be wanted once more.
    """
    name = (*_random.halves(seed), *draws(p, alpha)[:2], size)
    with _lock:
        known = None if first else _masks.pop(name, None)
    if known is not None:
        return known
    found = np.empty(size, np.float32)
    _blocks.each(size, 4 * _random.COUNTERS, lambda lo, hi: _draw(name, found, lo, hi))
    if first:
        _keep(name, found)
    return found


def _draw(name: tuple, found: np.ndarray, lo: int, hi: int) -> None:
    key, offset, threshold, scale, _ = name
    stays = np.empty((-(-(hi - lo) // 4), 4), bool)
    for j, word in enumerate(_random.words(key, offset, lo, hi)):
        np.greater_equal(word, np.uint64(threshold), out=stays[:, j])
    np.multiply(stays.reshape(-1)[: hi - lo], np.float32(scale), out=found[lo:hi])


def _keep(name: tuple, found: np.ndarray) -> None:
    with _lock:
        _masks[name] = found
        while sum(m.nbytes for m in _masks.values()) > MASKS:
            _masks.popitem(last=False)
