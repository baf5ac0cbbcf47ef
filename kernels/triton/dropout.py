"""Dropout, bound by memory: 2 elements moved for each of x, forward and backward; the mask is drawn, never stored."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from .._dropout import threshold_and_scale
from . import _random, _tile
from ._random import words

BUDGETS = {
    "_dropout_kernel": Budget(registers=56, blocks=10),
}


@triton.jit
def _dropout_kernel(
    x, seed, y, size, n1, n2, step0, step1, step2, threshold, scale, PERMUTED: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    bits = words(seed, start, n1, n2, step0, step1, step2, PERMUTED, BLOCK)
    i = start + tl.arange(0, BLOCK)
    v = tl.load(x + i, i < size, other=0.0).to(tl.float32)
    v *= tl.where(bits >= threshold, scale, 0.0)
    tl.store(y + i, v.to(y.dtype.element_ty), i < size)


CHOICES = _random.choices("dropout")


def _masked(x: Any, order: tuple | None, seed: Any, p: float, empty: Any) -> Any:
    threshold, scale = threshold_and_scale(p)
    y = empty(x.shape, x.dtype, order)
    size, walk = x.numel(), _random.walk(CHOICES, x, order)
    if walk is None:
        _tile.copy(_masked(x, None, seed, p, empty), y)
        return y
    arrays = _tile.arranged(x, order, empty), _tile.dense(seed, empty), y
    _tile.launch(_dropout_kernel, walk.grid(size), *arrays, size, *walk.sizes, threshold, scale, **walk.tile)
    return y


def dropout_forward(x: Any, seed: Any, *, needs: tuple = (), p: float = 0.5, empty: Any) -> tuple[tuple, dict]:
    return (_masked(x, _tile.order(x), seed, p, empty),), {"seed": seed} if needs else {}


def dropout_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 0.5, empty: Any) -> tuple:
    order = inputs[0].order if inputs[0].contiguous else None
    return _masked(dys[0], order, saved["seed"], p, empty), None
