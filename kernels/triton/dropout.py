"""Dropout, bound by memory: 2 elements moved for each of x, forward and backward; the mask is drawn, never stored."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._budget import Budget
from .._dropout import draws
from . import _random, _tile
from ._random import word_of, words

BUDGETS = {
    "_dropout_kernel": Budget(registers=56, blocks=10),
    "_feature_dropout_kernel": Budget(registers=112, blocks=4),
}


@triton.jit
def _kept(v, bits, threshold, scale, kept, dropped, SHIFTED: tl.constexpr):
    """float32 ``v`` where its bits let it stay, scaled, else 0 · v; SHIFTED: and a number for each of both added."""
    stays = bits >= threshold
    v *= tl.where(stays, scale, 0.0)
    if SHIFTED:
        v += tl.where(stays, kept, dropped)
    return v


@triton.jit
def _dropout_kernel(
    x, seed, y, size, n1, n2, step0, step1, step2, threshold, scale, kept, dropped,
    SHIFTED: tl.constexpr, PERMUTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    bits = words(seed, start, n1, n2, step0, step1, step2, PERMUTED, BLOCK)
    i = start + tl.arange(0, BLOCK)
    v = tl.load(x + i, i < size, other=0.0).to(tl.float32)
    v = _kept(v, bits, threshold, scale, kept, dropped, SHIFTED)
    tl.store(y + i, v.to(y.dtype.element_ty), i < size)


@triton.jit
def _feature_dropout_kernel(
    x, seed, y, M, N, threshold, scale, kept, dropped,
    SHIFTED: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Planes of M rows of N neighbours: a draw for each row of the one plane, or (LAST) for each plane and column."""
    across, down = (N - 1) // BLOCK + 1, (M - 1) // ROWS + 1
    pid = tl.program_id(0).to(tl.int64)
    plane = pid // across // down
    row = pid // across % down * ROWS + tl.arange(0, ROWS)[:, None]
    n = pid % across * BLOCK + tl.arange(0, BLOCK)[None, :]
    bits = word_of(seed, plane * N + n if LAST else row).to(tl.int64)  # (1, BLOCK) or (ROWS, 1)
    mask = (row < M) & (n < N)
    at = (plane * M + row) * N + n
    v = tl.load(x + at, mask, other=0.0).to(tl.float32)
    v = _kept(v, bits, threshold, scale, kept, dropped, SHIFTED)
    tl.store(y + at, v.to(y.dtype.element_ty), mask)


CHOICES = _random.choices("dropout")
COLUMNS, COLUMN_ROWS = 64, 128
"""A program's tile where channels are last: a column's draw serves all its rows."""


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int]
    sizes: tuple[int, ...]
    tile: dict


def _by_element(x: Any, order: tuple | None) -> Launch | None:
    walk, size = _random.walk(CHOICES, x, order), x.numel()
    return walk and Launch(_dropout_kernel, walk.grid(size), (size, *walk.sizes), walk.tile)


def _by_feature(x: Any, order: tuple | None, axes: int) -> Launch | None:
    outer, features, inner = math.prod(x.shape[: axes - 1]), x.shape[axes - 1], math.prod(x.shape[axes:])
    if order is None or order[:axes] == (*range(axes),):
        planes, m, n = 1, outer * features, inner
        tile = _tile.flat_tile(CHOICES[0](_tile.device(x), x.numel()), n) | {"LAST": False}
    elif order == (*range(axes - 1), *range(axes, x.ndim), axes - 1):
        planes, m, n = outer, inner, features
        tile = {"ROWS": COLUMN_ROWS, "BLOCK": _tile.next_power_of_2(n, COLUMNS), "num_warps": 4, "LAST": True}
    else:
        return None
    grid = (planes * _tile.cdiv(m, tile["ROWS"]) * _tile.cdiv(n, tile["BLOCK"]),)
    return Launch(_feature_dropout_kernel, grid, (m, n), tile)


def _masked(
    x: Any, order: tuple | None, seed: Any, p: float, alpha: bool, features: int, shifted: bool, empty: Any
) -> Any:
    y = empty(x.shape, x.dtype, order)
    how = _by_feature(x, order, features) if 0 < features < x.ndim else _by_element(x, order)
    if how is None:
        _tile.copy(_masked(x, None, seed, p, alpha, features, shifted, empty), y)
        return y
    arrays = _tile.arranged(x, order, empty), _tile.dense(seed, empty), y
    drawn = {"SHIFTED": alpha and shifted, **how.tile}
    _tile.launch(how.kernel, how.grid, *arrays, *how.sizes, *draws(p, alpha), **drawn)
    return y


def dropout_forward(
    x: Any, seed: Any, *, needs: tuple = (), p: float = 0.5, alpha: bool = False, features: int = 0, empty: Any
) -> tuple[tuple, dict]:
    return (_masked(x, _tile.order(x), seed, p, alpha, features, True, empty),), {"seed": seed} if needs else {}


def dropout_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 0.5, alpha: bool = False, features: int = 0,
    empty: Any,
) -> tuple:  # fmt: skip
    order = inputs[0].order if inputs[0].contiguous else None
    return _masked(dys[0], order, saved["seed"], p, alpha, features, False, empty), None
