"""Losses of one formula an element: one pass forward and one backward for all of them, bound by memory. Sums go through one
partial sum a program and a second kernel, in a fixed order."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from .._pointwise_loss import LOSSES, divisor
from . import _configs, _tile
from ._classes import reduced
from ._special import log1p, sigmoid
from ._tile import rows_tile

BUDGETS = {
    "_pointwise_loss_forward_kernel": Budget(registers=104, blocks=4),
    "_pointwise_loss_backward_kernel": Budget(registers=128, blocks=4),
}


@triton.jit
def _softplus(x):
    return tl.where(x < 0, 0.0, x) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sign(d):
    return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))


@triton.jit
def _least(x, low):
    """max(x, low); NaN stays."""
    return tl.where(x < low, low, x)


@triton.jit
def _variance(o, least):
    """max(o, least); NaN where it is negative."""
    return tl.where(o < 0, float("nan"), _least(o, least))


@triton.jit
def _value(x, t, o, number, LOSS: tl.constexpr, LOG: tl.constexpr, FULL: tl.constexpr):
    """f(x, t), o the third array or None."""
    if LOSS == "bce":
        y = (t - 1) * _least(log1p(-x), -100.0) - t * _least(tl.log(x), -100.0)
    elif LOSS == "bce_with_logits":
        y = _softplus(-x)
        if o is not None:
            y *= 1 + (o - 1) * t
        y += (1 - t) * x
    elif LOSS == "kl_div":
        if LOG:
            y = tl.exp(t) * (t - x)
        else:
            y = tl.where(t == 0, 0.0, t * tl.log(t)) - t * x
    elif LOSS == "l1":
        y = tl.abs(x - t)
    elif LOSS == "smooth_l1":
        a = tl.abs(x - t)
        y = tl.where(a < number, 0.5 * a * a / number, a - 0.5 * number)
    elif LOSS == "huber":
        a = tl.abs(x - t)
        y = tl.where(a < number, 0.5 * a * a, number * (a - 0.5 * number))
    elif LOSS == "poisson_nll":
        if LOG:
            y = tl.exp(x) - t * x
        else:
            y = x - t * tl.log(x + number)
        if FULL:
            y += tl.where(t > 1, t * tl.log(t) - t + 0.5 * tl.log(6.283185307179586 * t), 0.0)
    elif LOSS == "gaussian_nll":
        v, d = _variance(o, number), x - t
        y = 0.5 * (tl.log(v) + d * d / v)
        if FULL:
            y += 0.9189385332046727
    elif LOSS == "hinge_embedding":
        y = tl.where(t != 1, _least(number - x, 0.0), 0.0) + tl.where(t != -1, x, 0.0)
    elif LOSS == "margin_ranking":
        y = _least(number - t * (x - o), 0.0)
    else:
        tl.static_assert(LOSS == "soft_margin", "unknown loss")
        y = _softplus(-t * x)
    return y


@triton.jit
def _slopes(x, t, o, number, LOSS: tl.constexpr, LOG: tl.constexpr, FULL: tl.constexpr):
    """The derivatives of f by x, t and o."""
    by_o = x
    if LOSS == "bce":
        by_x = (x - t) / _least((1 - x) * x, 1e-12)
        by_t = log1p(-x) - tl.log(x)
    elif LOSS == "bce_with_logits":
        by_x = sigmoid(-x)
        by_t = -x
        if o is not None:
            by_x *= 1 + (o - 1) * t
            by_t += (o - 1) * _softplus(-x)
        by_x = (1 - t) - by_x
    elif LOSS == "kl_div":
        if LOG:
            by_x = -tl.exp(t)
            by_t = tl.exp(t) * (t - x + 1)
        else:
            by_x = -t
            by_t = tl.log(t) + t / t - x
    elif LOSS == "l1":
        by_x = _sign(x - t)
        by_t = -by_x
    elif LOSS == "smooth_l1":
        d = x - t
        by_x = tl.where(tl.abs(d) >= number, _sign(d), d / number)
        by_t = -by_x
    elif LOSS == "huber":
        d = x - t
        by_x = tl.where(tl.abs(d) >= number, number * _sign(d), d)
        by_t = -by_x
    elif LOSS == "poisson_nll":
        if LOG:
            by_x = tl.exp(x) - t
            by_t = -x
        else:
            by_x = 1 - t / (x + number)
            by_t = -tl.log(x + number)
        if FULL:
            log = tl.log(t)
            by_t += tl.where(t > 1, log + 0.5 / t, 0 * log)
    elif LOSS == "gaussian_nll":
        v = _variance(o, number)
        by_x = (x - t) / v
        by_t = -by_x
        by_o = 0.5 * (1 / v - by_x * by_x)
    elif LOSS == "hinge_embedding":
        by_x = tl.where(t != -1, 1.0, 0.0) - tl.where((number - x >= 0) & (t != 1), 1.0, 0.0)
        by_t = tl.zeros_like(x)
    elif LOSS == "margin_ranking":
        violated = number - t * (x - o) >= 0
        by_o = tl.where(violated, t, 0.0)
        by_x = -by_o
        by_t = tl.where(violated, o - x, 0.0)
    else:
        tl.static_assert(LOSS == "soft_margin", "unknown loss")
        s = sigmoid(-t * x)
        by_x = -t * s
        by_t = -x * s
    return by_x, by_t, by_o


@triton.jit
def _pointwise_loss_forward_kernel(
    x, target, third, weight, y, losses, M, N, x_row, t_row, o_row, w_row, y_row, number, each,
    LOSS: tl.constexpr, LOG: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The elements, of one tile a program; or the sum of ``each`` tiles."""
    columns = (N - 1) // BLOCK + 1  # tl.cdiv would overflow for N just below 2^31
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(each):
        tile = (i * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        row = tile // columns * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
        n = tile % columns * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
        mask = (row < M) & (n < N)
        v = tl.load(x + row * x_row + n, mask, other=0.0).to(tl.float32)
        t = tl.load(target + row * t_row + n, mask, other=0).to(tl.float32)
        if third is not None:
            o = tl.load(third + row * o_row + n, mask, other=0.0).to(tl.float32)
        else:
            o = None
        f = _value(v, t, o, number, LOSS, LOG, FULL)
        if weight is not None:
            f *= tl.load(weight + row * w_row + n, mask, other=0.0).to(tl.float32)
        if y is not None:
            tl.store(y + row * y_row + n, f.to(y.dtype.element_ty), mask)
        else:
            total += tl.where(mask, f, 0.0)
    if losses is not None:
        tl.store(losses + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit
def _pointwise_loss_backward_kernel(
    dy, x, target, third, weight, dx, dt, do, M, N, dy_row, x_row, t_row, o_row, w_row, d_row, number, scale,
    LOSS: tl.constexpr, LOG: tl.constexpr, FULL: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, n, mask = rows_tile(M, N, ROWS, BLOCK)
    v = tl.load(x + row * x_row + n, mask, other=0.0).to(tl.float32)
    t = tl.load(target + row * t_row + n, mask, other=0).to(tl.float32)
    if third is not None:
        o = tl.load(third + row * o_row + n, mask, other=0.0).to(tl.float32)
    else:
        o = None
    if EACH:
        g = tl.load(dy + row * dy_row + n, mask, other=0.0).to(tl.float32) * scale
    else:
        g = tl.load(dy).to(tl.float32) * scale
    if weight is not None:
        g *= tl.load(weight + row * w_row + n, mask, other=0.0).to(tl.float32)
    by_x, by_t, by_o = _slopes(v, t, o, number, LOSS, LOG, FULL)
    if dx is not None:
        tl.store(dx + row * d_row + n, (g * by_x).to(dx.dtype.element_ty), mask)
    if dt is not None:
        tl.store(dt + row * d_row + n, (g * by_t).to(dt.dtype.element_ty), mask)
    if do is not None:
        tl.store(do + row * d_row + n, (g * by_o).to(do.dtype.element_ty), mask)


POINTWISE_LOSS_FORWARD = _configs.rows("pointwise_loss_forward")
POINTWISE_LOSS_SUM = _configs.rows("pointwise_loss_forward.sum")
POINTWISE_LOSS_BACKWARD = _configs.rows("pointwise_loss_backward")


def _walk(choice: Any, *given: Any, like: Any, empty: Any) -> tuple[_tile.Pointwise, list, list]:
    """(the walk, the arrays, their steps from row to row), with None for those that are None."""
    there = [a if a.shape == like.shape else a.expand(like.shape) for a in given if a is not None]
    walk = _tile.pointwise(choice, _tile.order(like), *there, empty=empty)
    found = iter(zip(walk.arrays, walk.steps))
    pairs = [(None, 0) if a is None else next(found) for a in given]
    return walk, [a for a, _ in pairs], [step for _, step in pairs]


def _formula(loss: str, log: bool, full: bool, number: float) -> tuple[float, dict]:
    """(the number, what a kernel is made for)"""
    if loss == "smooth_l1" and not number:
        loss = "l1"
    return number, {"LOSS": loss, "LOG": log, "FULL": full}


def pointwise_loss_forward(
    x: Any,
    target: Any,
    other: Any = None,
    weight: Any = None,
    pos_weight: Any = None,
    *,
    needs: tuple = (),
    loss: str,
    number: float = 1.0,
    log: bool = False,
    full: bool = False,
    reduction: str = "mean",
    empty: Any,
) -> tuple[tuple, dict]:
    third = other if LOSSES[loss].third == "other" else pos_weight
    y = empty(x.shape, x.dtype, _tile.order(x)) if reduction == "none" else empty((), x.dtype)
    choice, elements = (POINTWISE_LOSS_FORWARD, y) if reduction == "none" else (POINTWISE_LOSS_SUM, None)
    walk, arrays, steps = _walk(choice, x, target, third, weight, elements, like=x, empty=empty)
    programs, each, losses = walk.grid[0], 1, None
    if reduction != "none":
        programs, each = _tile.split(walk.grid[0], 8 * _tile.device(x).sms)
        losses = empty((programs,), "float32")
    number, formula = _formula(loss, log, full, number)
    _tile.launch(
        _pointwise_loss_forward_kernel,
        (programs,),
        *(*arrays, losses, walk.M, walk.N, *steps, number, each),
        **formula,
        **walk.tile,
    )
    if losses is not None:
        reduced(losses, None, y, None, divisor(x.shape, reduction))
    given = {"x": x, "target": target, "other": other, "weight": weight, "pos_weight": pos_weight}
    return (y,), {name: a for name, a in given.items() if a is not None} if needs else {}


def pointwise_loss_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    loss: str,
    number: float = 1.0,
    log: bool = False,
    full: bool = False,
    reduction: str = "mean",
    empty: Any,
) -> tuple:
    (dy,), x = dys, saved["x"]
    each = reduction == "none"
    grads = [empty(x.shape, x.dtype, _tile.order(x)) if n in needs else None for n in ("x", "target", "other")]
    first = next(g for g in grads if g is not None)
    third = saved.get("other", saved.get("pos_weight"))
    given = (dy if each else None, x, saved["target"], third, saved.get("weight"), first)
    walk, arrays, steps = _walk(POINTWISE_LOSS_BACKWARD, *given, like=x, empty=empty)
    number, formula = _formula(loss, log, full, number)
    _tile.launch(
        _pointwise_loss_backward_kernel,
        walk.grid,
        *(arrays[0] if each else dy, *arrays[1:5], *grads, walk.M, walk.N, *steps),
        *(number, 1 / max(divisor(x.shape, reduction), 1)),
        **formula,
        EACH=each,
        **walk.tile,
    )
    return (*grads, None, None)
