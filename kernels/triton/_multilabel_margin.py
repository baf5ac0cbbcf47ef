"""The margins between a sample's classes and all others: how often each class is listed is counted first, so that both
passes go over pairs of classes without a scatter."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._classes import reduced

BUDGETS = {
    # Each looks at one class after the other, against a tile of classes.
    "_multilabel_hits_kernel": Budget(registers=64, blocks=4, narrow="loads, stores"),
    "_multilabel_margin_forward_kernel": Budget(registers=96, blocks=4, narrow="loads, stores"),
    "_multilabel_margin_backward_kernel": Budget(registers=96, blocks=4, narrow="loads, stores"),
}


@triton.jit
def _multilabel_hits_kernel(target, hits, C, BLOCK: tl.constexpr):
    """hits[c]: how often c is listed before the first −1; NaN where a label is out of range."""
    blocks = tl.cdiv(C, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    target += row * C
    found = tl.zeros((BLOCK,), tl.float32)
    listed = 1.0
    for j in range(0, C):
        label = tl.load(target + j).to(tl.int64)
        listed = tl.where(label < 0, 0.0, listed)
        one = tl.where(label >= C, float("nan"), 1.0)
        found += tl.where((listed > 0) & ((label == c) | (label >= C)), one, 0.0)
    tl.store(hits + row * C + c, found, c < C)


@triton.jit
def _multilabel_margin_forward_kernel(x, hits, y, losses, C, x_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row
    hits += row * C
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        mask = c < C
        v = tl.load(x + c, mask, other=0.0).to(tl.float32)
        free = mask & (tl.load(hits + c, mask, other=0.0) == 0)
        for i in range(0, C):
            h = tl.load(hits + i)
            z = 1 - tl.load(x + i).to(tl.float32) + v
            total += tl.where(h == 0, 0.0, h * tl.where(free & (z > 0), z, 0.0))
    loss = tl.sum(total, 0) / C
    if y is not None:
        tl.store(y + row, loss.to(y.dtype.element_ty))
    else:
        tl.store(losses + row, loss)


@triton.jit
def _multilabel_margin_backward_kernel(dy, x, hits, dx, C, x_row, dy_step, scale, BLOCK: tl.constexpr):
    blocks = tl.cdiv(C, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    x += row * x_row
    hits += row * C
    v = tl.load(x + c, mask, other=0.0).to(tl.float32)
    own = tl.load(hits + c, mask, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, C):
        h = tl.load(hits + i)
        u = tl.load(x + i).to(tl.float32)
        pushed = tl.where((own == 0) & (1 - u + v > 0), h, 0.0)
        pulled = tl.where((h == 0) & (1 - v + u > 0), own, 0.0)
        total += pushed - pulled
    g = tl.load(dy + row * dy_step).to(tl.float32) * scale / C
    tl.store(dx + row * C + c, tl.where(own != own, own, total * g).to(dx.dtype.element_ty), mask)


MULTILABEL_MARGIN = _configs.rows("multilabel_margin")


def _tiles(x: Any) -> tuple[int, int, dict]:
    """(samples, classes, the tile of a launch)"""
    m, c = (x.shape[0] if x.ndim == 2 else 1), x.shape[-1]
    entry = MULTILABEL_MARGIN(_tile.device(x), c)
    return m, c, {"BLOCK": _tile.next_power_of_2(c, entry.elements), "num_warps": entry.warps}


def multilabel_margin_forward(
    x: Any, target: Any, *, needs: tuple = (), reduction: str = "mean", empty: Any
) -> tuple[tuple, dict]:
    m, c, tile = _tiles(x)
    hits = empty(x.shape, "float32")
    blocks = _tile.cdiv(c, tile["BLOCK"])
    _tile.launch(_multilabel_hits_kernel, (m * blocks,), _tile.dense(target, empty), hits, c, **tile)
    y = empty(tuple(x.shape[:-1]) if reduction == "none" else (), x.dtype)
    losses = None if reduction == "none" else empty((m,), "float32")
    rows, step = _tile.rows(x, c, empty)
    own = y if losses is None else None
    _tile.launch(_multilabel_margin_forward_kernel, (m,), rows, hits, own, losses, c, step, **tile)
    if losses is not None:
        reduced(losses, None, y, None, m if reduction == "mean" else 1)
    return (y,), {"x": x, "target": target, "hits": hits} if needs else {}


def multilabel_margin_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, reduction: str = "mean", empty: Any
) -> tuple:
    x = saved["x"]
    m, c, tile = _tiles(x)
    dx = empty(x.shape, x.dtype)
    rows, step = _tile.rows(x, c, empty)
    _tile.launch(
        _multilabel_margin_backward_kernel,
        (m * _tile.cdiv(c, tile["BLOCK"]),),
        *(_tile.dense(dys[0], empty), rows, saved["hits"], dx, c, step),
        *(1 if reduction == "none" else 0, 1 / max(m, 1) if reduction == "mean" else 1.0),
        **tile,
    )
    return dx, None
