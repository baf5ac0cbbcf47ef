"""Attention's scale and memory orders, and which keys a query sees, for kernels on the CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

HEADS_LAST = (0, 2, 1, 3)
"""Of (N, H, L, D): all heads of a token are neighbours, as a projection gives them."""


def scale_of(q: Any, scale: float | None) -> float:
    """Of the products of q (N, H, L, D) and k: what is asked for, or 1 / √D."""
    return 1 / math.sqrt(max(q.shape[3], 1)) if scale is None else scale


def order_of_y(order: tuple[int, ...] | None, dense: bool) -> tuple[int, ...] | None:
    """The memory order of y for q's: that, where D is its fastest axis and nothing is between; else heads last."""
    return order if dense and (order is None or order[-1] == 3) else HEADS_LAST


def order_of_gradient(spec: Any) -> tuple[int, ...] | None:
    """That of the gradient of q, k or v: its own, where D is the fastest axis and nothing is between; else row-major."""
    return spec.order if spec.contiguous and (spec.order is None or spec.order[-1] == 3) else None


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
