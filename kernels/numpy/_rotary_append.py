"""Rotary positions of new tokens, which go into their cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import compute_dtype, float64, spec

from ._kv_append import kv_append_forward
from .rotary import turned

REFUSALS = {"float64": "float64 is left to the definition"}


def rotary_append_refuses(q: Any, *others: Any, needs: tuple = (), **options: Any) -> str | None:
    return REFUSALS["float64"] if q.dtype == float64 else None


def _rows(table: np.ndarray, at: np.ndarray, alone: float, kind: Any) -> np.ndarray:
    if table.ndim == 3:
        return table[:, None].astype(kind, copy=False)
    rows = np.take(table, at, 0, mode="clip").astype(kind, copy=False) if table.shape[0] else None
    if rows is None:  # of no tokens, or of such as are left out
        rows = np.empty((*at.shape, table.shape[1]), kind)
    rows[at < 0] = alone
    return rows[:, None]


def rotary_append_forward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    positions: np.ndarray,
    table: Any = None,
    *,
    needs: tuple = (),
    interleaved: bool = False,
) -> tuple[tuple, dict]:
    at = positions if positions.ndim == 2 else positions[:, None] + np.arange(k.shape[2])
    kind = compute_dtype(q.dtype)
    c, s = _rows(cos, at, 1.0, kind), _rows(sin, at, 0.0, kind)
    y, z = (turned(x, spec(x), c, s, interleaved) for x in (q, k))
    kv_append_forward(k_cache, v_cache, z, v, positions, table)
    return (y,), {}
