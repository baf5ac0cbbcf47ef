"""Selections that work on the bits of float32 arrays: ``np.where`` costs ten times as much as a bit operation."""

from __future__ import annotations

import numpy as np


def choose(where: np.ndarray, a: np.ndarray, o: np.ndarray) -> None:
    """o = a where ``where``, else o; exact for NaN and Inf."""
    bits, out = a.view(np.int32), o.view(np.int32)
    t = np.bitwise_xor(bits, out)
    np.multiply(t, where, out=t)
    np.bitwise_xor(out, t, out=out)


def keep(where: np.ndarray, a: np.ndarray, o: np.ndarray) -> None:
    """o = a where ``where``, else 0; exact for NaN and Inf."""
    np.multiply(a.view(np.int32), where, out=o.view(np.int32))
