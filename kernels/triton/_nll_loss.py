"""The negative log-likelihood: a number a sample is read, and its gradient written."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._classes import class_tile, class_tiles, in_units, label_of, reduced, samples_of, walk_over

BUDGETS = {
    "_nll_loss_forward_kernel": Budget(registers=96, blocks=5),
    # A few numbers a sample.
    "_nll_loss_backward_kernel": Budget(registers=96, blocks=5, narrow="loads"),
}


@triton.jit
def _nll_loss_forward_kernel(
    x, target, weight, y, losses, shares, M, S, C, x_outer, x_s, x_c, ignore_index, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label, counts, valid, share = label_of(target + at, weight, at < M, C, ignore_index)
    v = tl.load(x + at // S * x_outer + at % S * x_s + label * x_c, valid, other=0.0).to(tl.float32)
    loss = tl.where(counts, -share * v, 0.0)
    if y is not None:
        tl.store(y + at, loss.to(y.dtype.element_ty), at < M)
    else:
        tl.store(losses + tl.program_id(0), tl.sum(loss, 0))
        if shares is not None:
            tl.store(shares + tl.program_id(0), tl.sum(share, 0))


@triton.jit
def _nll_loss_backward_kernel(
    dy, target, weight, total, dx, S, C, dx_outer, dx_s, dx_c, dy_step, blocks, ignore_index,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    C, dx_s = C * UNIT, dx_s * UNIT
    outer, s, block = samples_of(S, ROWS, blocks)
    inside = s < S
    at = outer * S + s
    c = block * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    scale = tl.load(dy + at * dy_step, inside, other=0.0).to(tl.float32)
    if total is not None:
        scale /= tl.load(total)
    label, counts, valid, share = label_of(target + at, weight, inside, C, ignore_index)
    wrong = counts & (valid == 0)
    g = tl.where(counts & ((c == label) | wrong), -scale * share, 0.0)
    tl.store(dx + outer * dx_outer + s * dx_s + c * dx_c, g.to(dx.dtype.element_ty), inside & (c < C))


NLL_LOSS_FORWARD = _configs.rows("nll_loss_forward")
NLL_LOSS_BACKWARD = class_tiles("nll_loss_backward")


def nll_loss_forward(
    x: Any,
    target: Any,
    weight: Any = None,
    *,
    needs: tuple = (),
    ignore_index: int = -100,
    reduction: str = "mean",
    empty: Any,
) -> tuple[tuple, dict]:
    walk = walk_over(x, empty=empty)
    size = walk.outer * walk.S
    entry = NLL_LOSS_FORWARD(_tile.device(x), size)
    programs = _tile.cdiv(size, entry.elements)
    y = empty(tuple(target.shape) if reduction == "none" else (), x.dtype)
    losses = None if reduction == "none" else empty((programs,), "float32")
    shares = empty((programs,), "float32") if reduction == "mean" else None
    total = empty((), "float32") if reduction == "mean" and needs else None
    _tile.launch(
        _nll_loss_forward_kernel,
        (programs,),
        *(walk.arrays[0], _tile.dense(target, empty), None if weight is None else _tile.dense(weight, empty)),
        *(None if losses is not None else y, losses, shares, size, walk.S, walk.C, *walk.steps[0], ignore_index),
        BLOCK=entry.elements,
        num_warps=entry.warps,
    )
    if losses is not None:
        reduced(losses, shares, y, total, 1)
    saved = {"target": target} | ({} if weight is None else {"weight": weight})
    return (y,), (saved | ({} if total is None else {"total": total}) if needs else {})


def nll_loss_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    ignore_index: int = -100,
    reduction: str = "mean",
    empty: Any,
) -> tuple:
    (x, *_), weight = inputs, saved.get("weight")
    order = x.order if x.contiguous and x.order == (0, *range(2, x.ndim), 1) and x.ndim > 2 else None
    dx = empty(x.shape, x.dtype, order)
    walk = walk_over(dx, empty=empty)
    rows, block, warps = class_tile(NLL_LOSS_BACKWARD, walk)
    blocks = _tile.cdiv(walk.C, block)
    unit, classes, steps = in_units(walk, walk.steps[0])
    _tile.launch(
        _nll_loss_backward_kernel,
        (walk.outer * _tile.cdiv(walk.S, rows) * blocks,),
        *(
            _tile.dense(dys[0], empty),
            _tile.dense(saved["target"], empty),
            None if weight is None else _tile.dense(weight, empty),
        ),
        *(saved.get("total"), dx, walk.S, classes, *steps[0], 1 if reduction == "none" else 0, blocks, ignore_index),
        UNIT=unit,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return dx, None, None
