"""New keys and values into their cache, by one assignment each."""

from __future__ import annotations

from typing import Any

import numpy as np


def kv_append_forward(
    k_cache: Any, v_cache: Any, k: Any, v: Any, positions: Any, table: Any = None, *, needs: tuple = ()
) -> tuple[tuple, dict]:
    size, blocks = k_cache.shape[2], 1 if table is None else table.shape[1]
    at = positions if positions.ndim == 2 else positions[:, None] + np.arange(k.shape[2])
    row, token = np.nonzero((at >= 0) & (at < size * blocks))
    place = at[row, token]
    to = row if table is None else table[row, place // size]
    for cache, x in ((k_cache, k), (v_cache, v)):
        cache[to, :, place % max(size, 1)] = x[row, :, token]
    return (), {}
