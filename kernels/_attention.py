"""Which keys a query of attention sees, for kernels on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np


def spans(rows: int, keys: int, window: tuple, corner: str, cu_q: Any, cu_k: Any) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), both (rows,): query i sees the keys low[i] … high[i] − 1; none where high ≤ low."""
    (left, right), i = window, np.arange(rows)
    if cu_q is None:
        diagonal, low, high = i, np.zeros_like(i), np.full_like(i, keys)
        shift: Any = keys - rows
    else:
        at = np.clip(np.searchsorted(cu_q, i, side="right") - 1, 0, len(cu_q) - 2)
        (q0, q1), (low, high) = ([cu[at + end].astype(np.int64) for end in (0, 1)] for cu in (cu_q, cu_k))
        inside = (i >= q0) & (i < q1)
        diagonal, shift = i - q0 + low, (high - low) - (q1 - q0)
        high = np.where(inside, high, low)
    if corner == "bottom_right":
        diagonal = diagonal + shift
    if left >= 0:
        low = np.maximum(low, diagonal - left)
    if right >= 0:
        high = np.minimum(high, diagonal + right + 1)
    return low, np.maximum(high, low)
