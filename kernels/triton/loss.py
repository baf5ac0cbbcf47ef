"""Cross entropy, and the family's other losses from their files. Bound by memory: it reads the logits forward, and reads
and writes them backward.

Forward walks the classes once, in blocks, with a running maximum and sum (a short row is one block). Backward needs no
sum: it is one elementwise pass over the logits, from their log Σ exp. Sums over samples go through one partial sum a
program and a second kernel, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .. import _invariance
from .._budget import Budget
from . import _tile
from ._classes import class_tile, class_tiles, in_units, kept, label_of, reduced, samples_of, walk_over
from ._ctc_loss import REFUSALS as REFUSALS
from ._ctc_loss import ctc_loss_backward as ctc_loss_backward
from ._ctc_loss import ctc_loss_forward as ctc_loss_forward
from ._ctc_loss import ctc_loss_refuses as ctc_loss_refuses
from ._linear_cross_entropy import linear_cross_entropy_backward as linear_cross_entropy_backward
from ._linear_cross_entropy import linear_cross_entropy_forward as linear_cross_entropy_forward
from ._mse import mse_backward as mse_backward
from ._mse import mse_forward as mse_forward
from ._multilabel_margin import multilabel_margin_backward as multilabel_margin_backward
from ._multilabel_margin import multilabel_margin_forward as multilabel_margin_forward
from ._nll_loss import nll_loss_backward as nll_loss_backward
from ._nll_loss import nll_loss_forward as nll_loss_forward
from ._pointwise_loss import pointwise_loss_backward as pointwise_loss_backward
from ._pointwise_loss import pointwise_loss_forward as pointwise_loss_forward
from ._row_loss import row_loss_backward as row_loss_backward
from ._row_loss import row_loss_forward as row_loss_forward

BUDGETS = {
    # A few numbers a sample; on sm_100 one register is put aside.
    "_cross_entropy_forward_kernel": Budget(registers=168, blocks=3, narrow="stores", spills=2),
    "_cross_entropy_backward_kernel": Budget(registers=160, blocks=3),
}


@triton.jit
def _wanted(target, weight, c, t_c, mask, smooth, keep, SOFT: tl.constexpr):
    """weight · ((1 − ε) p + ε / C) for a tile of classes; the part with ε alone where the target is an index."""
    if SOFT:
        q = tl.load(target + c * t_c, mask, other=0.0).to(tl.float32) * keep + smooth
    else:
        q = smooth + tl.zeros(mask.shape, tl.float32)
    if weight is not None:
        w = tl.load(weight + c + tl.zeros(mask.shape, tl.int64), mask, other=0.0).to(tl.float32)
        if SOFT:
            q *= w
        else:
            q = tl.where(q == 0, 0.0, q * w)  # weights of other classes may be infinite
    return tl.where(mask, q, 0.0)


@triton.jit
def _cross_entropy_forward_kernel(
    x,
    target,
    weight,
    y,
    lse,
    mass,
    losses,
    shares,
    S,
    C,
    x_outer,
    x_s,
    x_c,
    t_outer,
    t_s,
    t_c,
    ignore_index,
    keep,
    smooth,
    UNIT: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    C, x_s, t_s = C * UNIT, x_s * UNIT, t_s * UNIT
    outer, s, _ = samples_of(S, ROWS, 1)
    inside = s < S
    at = outer * S + s
    x += outer * x_outer + s * x_s  # (ROWS, 1)
    if SOFT:
        target += outer * t_outer + s * t_s
    top = tl.full((ROWS, 1), float("-inf"), tl.float32)
    shift = tl.zeros((ROWS, 1), tl.float32)
    total = tl.zeros((ROWS, 1), tl.float32)
    seen = tl.zeros((ROWS, 1), tl.float32)  # Σ q
    dot = tl.zeros((ROWS, 1), tl.float32)  # Σ q (x − shift)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :].to(tl.int64)  # (1, BLOCK)
        mask = inside & (c < C)
        v = tl.load(x + c * x_c, mask, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(v, 1, keep_dims=True))
        # While a row is all −∞ so far its sum stays 0: exp(−∞ − (−∞)) would make it NaN too early.
        to = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - to) + tl.sum(tl.exp(v - to), 1, keep_dims=True)
        if SOFT or SMOOTH:
            q = _wanted(target, weight, c, t_c, mask, smooth, keep, SOFT)
            d = tl.where(mask, v - to, 0.0)
            dot += (shift - to) * seen + tl.sum(q * d, 1, keep_dims=True)
            seen += tl.sum(q, 1, keep_dims=True)
        top, shift = new, to
    log_total = tl.where(top == float("-inf"), float("nan"), tl.log(total))
    loss = log_total * seen - dot
    share = tl.where(inside, 1.0, 0.0)
    if not SOFT:
        label, counts, valid, share = label_of(target + at, weight, inside, C, ignore_index)
        hit = tl.load(x + label * x_c, valid, other=0.0).to(tl.float32)
        nll = share * (log_total - (hit - shift))
        loss = tl.where(counts, keep * nll + loss if SMOOTH else nll, 0.0)
        seen = tl.where(counts, keep * share + seen if SMOOTH else share, 0.0)
    if lse is not None:
        tl.store(lse + at, log_total + shift, inside)
        tl.store(mass + at, seen, inside)
    if y is not None:
        tl.store(y + at, loss.to(y.dtype.element_ty), inside)
    else:
        one = tl.program_id(0) + tl.zeros((1, 1), tl.int32)
        loss = tl.where(inside, loss, 0.0)
        tl.store(losses + one, tl.sum(loss, 0, keep_dims=True))
        if shares is not None:
            tl.store(shares + one, tl.sum(share, 0, keep_dims=True))


@triton.jit
def _cross_entropy_backward_kernel(
    dy,
    x,
    target,
    weight,
    lse,
    mass,
    total,
    dx,
    dp,
    S,
    C,
    x_outer,
    x_s,
    x_c,
    t_outer,
    t_s,
    t_c,
    dx_outer,
    dx_s,
    dx_c,
    dp_outer,
    dp_s,
    dp_c,
    dy_step,
    blocks,
    count,
    ignore_index,
    keep,
    smooth,
    UNIT: tl.constexpr,
    SOFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    C, x_s, t_s, dx_s, dp_s = C * UNIT, x_s * UNIT, t_s * UNIT, dx_s * UNIT, dp_s * UNIT
    outer, s, block = samples_of(S, ROWS, blocks)
    inside = s < S
    at = outer * S + s
    c = block * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    mask = inside & (c < C)
    scale = tl.load(dy + at * dy_step, inside, other=0.0).to(tl.float32)
    if total is not None:
        scale /= tl.load(total)
    else:
        scale /= count
    v = tl.load(x + outer * x_outer + s * x_s + c * x_c, mask, other=0.0).to(tl.float32)
    log_y = v - tl.load(lse + at, inside, other=0.0)
    if SOFT:
        target += outer * t_outer + s * t_s
    if dx is not None:
        q = _wanted(target, weight, c, t_c, mask, smooth, keep, SOFT)
        if not SOFT:
            label, counts, _, share = label_of(target + at, weight, inside, C, ignore_index)
            q = tl.where(counts, q + tl.where(c == label, keep * share, 0.0), 0.0)
            scale = tl.where(counts, scale, 0.0)
        g = scale * (tl.exp(log_y) * tl.load(mass + at, inside, other=0.0) - q)
        tl.store(dx + outer * dx_outer + s * dx_s + c * dx_c, g.to(dx.dtype.element_ty), mask)
    if dp is not None:
        g = -scale * keep * log_y
        if weight is not None:
            g *= tl.load(weight + c + tl.zeros(mask.shape, tl.int64), mask, other=0.0).to(tl.float32)
        tl.store(dp + outer * dp_outer + s * dp_s + c * dp_c, g.to(dp.dtype.element_ty), mask)


CROSS_ENTROPY_FORWARD = class_tiles("cross_entropy_forward")
CROSS_ENTROPY_BACKWARD = class_tiles("cross_entropy_backward")


def _smoothing(label_smoothing: float, classes: int) -> tuple[float, float]:
    """(1 − ε, ε / C)"""
    return 1 - label_smoothing, label_smoothing / max(classes, 1)


def cross_entropy_forward(
    x: Any,
    target: Any,
    weight: Any = None,
    *,
    needs: tuple = (),
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    empty: Any,
) -> tuple[tuple, dict]:
    soft = target.is_floating_point()
    samples = () if x.ndim == 1 else (x.shape[0], *x.shape[2:])
    given = (x, target) if soft else (x,)
    if _invariance.on():  # where samples are neighbours, their number decides how classes are summed
        given = tuple(_tile.dense(each, empty) for each in given)
    walk = walk_over(*given, empty=empty)
    rows, block, warps = class_tile(CROSS_ENTROPY_FORWARD, walk)
    programs = walk.outer * _tile.cdiv(walk.S, rows)
    y = empty(samples if reduction == "none" else (), x.dtype)
    lse, mass = (empty(samples, "float32") if needs else None for _ in range(2))
    losses = None if reduction == "none" else empty((programs,), "float32")
    weighted = reduction == "mean" and not soft
    shares = empty((programs,), "float32") if weighted else None
    total = empty((), "float32") if weighted and needs else None
    unit, classes, (x_steps, t_steps) = in_units(walk, walk.steps[0], walk.steps[1] if soft else (0, 0, 0))
    _tile.launch(
        _cross_entropy_forward_kernel,
        (programs,),
        *(
            walk.arrays[0],
            walk.arrays[1] if soft else _tile.dense(target, empty),
            None if weight is None else _tile.dense(weight, empty),
        ),
        *(y if reduction == "none" else None, lse, mass, losses, shares, walk.S, classes),
        *(*x_steps, *t_steps),
        *(ignore_index, *_smoothing(label_smoothing, walk.C)),
        UNIT=unit,
        SOFT=soft,
        SMOOTH=label_smoothing > 0,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    if losses is not None:
        reduced(losses, shares, y, total, walk.outer * walk.S if reduction == "mean" else 1)
    if not needs:
        return (y,), {}
    saved = {"x": x, "target": target} | ({} if weight is None else {"weight": weight}) | {"lse": lse, "mass": mass}
    return (y,), saved | ({"total": total} if weighted else {})


def cross_entropy_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    empty: Any,
) -> tuple:
    x, target, weight = saved["x"], saved["target"], saved.get("weight")
    soft = target.is_floating_point()
    dx = empty(x.shape, x.dtype, kept(x)) if "x" in needs else None
    dp = empty(x.shape, x.dtype, kept(target)) if soft and "target" in needs else None
    if dx is None and dp is None:
        return None, None, None
    given = [a for a in (x, target if soft else None, dx, dp) if a is not None]
    walk = walk_over(*given, empty=empty)
    seen = {id(a): (b, s) for a, b, s in zip(given, walk.arrays, walk.steps)}
    (x, x_steps), (dx, dx_steps), (dp, dp_steps) = (seen.get(id(a), (None, (0, 0, 0))) for a in (x, dx, dp))
    labels, t_steps = seen[id(target)] if soft else (_tile.dense(target, empty), (0, 0, 0))
    rows, block, warps = class_tile(CROSS_ENTROPY_BACKWARD, walk)
    blocks = _tile.cdiv(walk.C, block)
    unit, classes, steps = in_units(walk, x_steps, t_steps, dx_steps, dp_steps)
    _tile.launch(
        _cross_entropy_backward_kernel,
        (walk.outer * _tile.cdiv(walk.S, rows) * blocks,),
        *(_tile.dense(dys[0], empty), x, labels, None if weight is None else _tile.dense(weight, empty)),
        *(saved["lse"], saved["mass"], saved.get("total"), dx, dp, walk.S, classes),
        *(step for each in steps for step in each),
        *(1 if reduction == "none" else 0, blocks),
        *(walk.outer * walk.S if reduction == "mean" else 1, ignore_index),
        *_smoothing(label_smoothing, walk.C),
        UNIT=unit,
        SOFT=soft,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return dx, dp, None
