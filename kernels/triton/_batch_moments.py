"""The moments of each channel of a batch: batch norm's first pass, and one launch that merges what its programs found."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _tile
from ._batch_norm import FORWARD, _batch_norm_moments_kernel, _merged_moments, _Walk, channels_last, in_order

BUDGETS = {"_merge_moments_kernel": Budget(registers=96, blocks=5, narrow="loads, stores")}  # a number a channel
CHANNELS = 32
"""That a program merges."""


@triton.jit
def _merge_moments_kernel(counts, means, squares, mean, var, C, shares, MERGE: tl.constexpr, COLS: tl.constexpr):
    channel = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]  # (1, COLS)
    n, m, spread = _merged_moments(counts, means, squares, channel, C, shares, MERGE)
    tl.store(mean + channel, m, channel < C)
    tl.store(var + channel, spread / tl.maximum(n, 1.0), channel < C)


def batch_moments_forward(x: Any, *, needs: tuple = (), empty: Any) -> tuple[tuple, dict]:
    order = channels_last(x)
    x, walk = in_order(x, order, empty), _Walk(FORWARD, x, order)
    partials, channels = walk.partials(3, empty), x.shape[1]
    mean, var = (empty((channels,), "float32") for _ in range(2))
    _tile.launch(_batch_norm_moments_kernel, walk.grid, x, *partials, *walk.sizes, **walk.tile)
    grid, merge = (_tile.cdiv(channels, CHANNELS),), _tile.next_power_of_2(walk.shares, 16)
    sizes = (channels, walk.shares)
    _tile.launch(_merge_moments_kernel, grid, *partials, mean, var, *sizes, MERGE=merge, COLS=CHANNELS, num_warps=4)
    return (mean, var), {}
