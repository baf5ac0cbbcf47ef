"""Rows of a table, gathered: each as its neighbours lie. How gradients come back stands in ``_scatter.py``."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._embedding_bag import embedding_bag_backward as embedding_bag_backward
from ._embedding_bag import embedding_bag_forward as embedding_bag_forward
from ._one_hot import one_hot_forward as one_hot_forward
from ._scatter import scattered
from ._sort import REFUSALS as REFUSALS
from ._sort import refuses
from ._tile import rows_tile

BUDGETS = {
    # Indices are four or eight bytes each; a table may lie in any strides.
    "_embedding_forward_kernel": Budget(registers=64, blocks=8, narrow="loads"),
}


@triton.jit
def _embedding_forward_kernel(
    weight, indices, y, M, D, V, w_v, w_d, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """y[m] = weight[indices[m]]; NaN for what no row has."""
    D, w_v = D * UNIT, w_v * UNIT
    m, d, mask = rows_tile(M, D, ROWS, BLOCK)
    index = tl.load(indices + m, m < M, other=0).to(tl.int64)
    inside = (index >= 0) & (index < V)
    found = tl.load(weight + index * w_v + d * w_d, mask & inside, other=float("nan"))
    tl.store(y + m * D + d, found, mask)


FORWARD = _configs.rows("embedding_forward")
embedding_refuses = embedding_bag_refuses = refuses


def embedding_forward(
    weight: Any, indices: Any, *, needs: tuple = (), padding_idx: int | None, scale_grad_by_freq: bool, empty: Any
) -> tuple[tuple, dict]:
    (rows, width), n = weight.shape, indices.numel()
    y = empty((*indices.shape, width), weight.dtype)
    entry = FORWARD(_tile.device(weight), n * width)
    steps = weight.stride()
    unit, columns, step = _tile.in_units(width, steps[0]) if steps[1] == 1 else (1, width, steps[0])
    tile = _tile.flat_tile(entry, width)
    grid = (_tile.cdiv(n, tile["ROWS"]) * _tile.cdiv(width, tile["BLOCK"]),)
    _tile.launch(
        _embedding_forward_kernel, grid, weight, _tile.dense(indices, empty), y, n, columns, rows, step, steps[1],
        UNIT=unit, **tile,
    )  # fmt: skip
    return (y,), {"indices": indices} if needs else {}


def embedding_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
    empty: Any,
) -> tuple:
    return scattered(dys[0], saved["indices"], inputs[0], padding_idx, scale_grad_by_freq, empty), None
