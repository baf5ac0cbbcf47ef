"""Indices as rows that are 1 in one place, bound by memory: each number is written once."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._tile import rows_tile

# An index a row; rows of a length that 16 does not divide.
BUDGETS = {
    "_one_hot_kernel": Budget(registers=64, blocks=7, narrow=lambda c: "loads stores" if "C" in c["odd"] else "loads")
}


@triton.jit
def _one_hot_kernel(indices, y, M, C, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    C = C * UNIT
    m, c, mask = rows_tile(M, C, ROWS, BLOCK)
    index = tl.load(indices + m, m < M, other=-1).to(tl.int64)
    tl.store(y + m * C + c, (index == c).to(tl.int64), mask)


ROWS = _configs.rows("one_hot")


def one_hot_forward(indices: Any, *, needs: tuple = (), num_classes: int, empty: Any) -> tuple[tuple, dict]:
    y, m = empty((*indices.shape, num_classes), "int64"), indices.numel()
    tile = _tile.flat_tile(ROWS(_tile.device(indices), num_classes), num_classes)
    unit, columns = _tile.in_units(num_classes)
    grid = (_tile.cdiv(m, tile["ROWS"]) * _tile.cdiv(num_classes, tile["BLOCK"]),)
    _tile.launch(_one_hot_kernel, grid, _tile.dense(indices, empty), y, m, columns, UNIT=unit, **tile)
    return (y,), {}
