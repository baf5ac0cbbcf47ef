"""Losses of one number a sample, made of sums over its features: one pass over the rows forward, and one backward, for which
forward keeps three numbers a sample."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._classes import reduced
from ._special import log1p, sigmoid
from ._tile import rows_tile

BUDGETS = {
    "_row_loss_forward_kernel": Budget(registers=168, blocks=2, narrow="stores"),
    "_row_loss_backward_kernel": Budget(registers=128, blocks=3),
}


@triton.jit
def _power(d, p, P: tl.constexpr):
    """|d|^p; P: p where it is 1 or 2, else 0."""
    a = tl.abs(d)
    if P == 1:
        y = a
    elif P == 2:
        y = a * a
    else:
        y = tl.exp2(p * tl.log2(a))
    return y


@triton.jit
def _slope(d, p, P: tl.constexpr):
    """The derivative of |d|^p / p."""
    s = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    if P == 1:
        y = s
    elif P == 2:
        y = d
    else:
        y = s * tl.exp2((p - 1) * tl.log2(tl.abs(d)))
    return y


@triton.jit
def _root(s, p, P: tl.constexpr):
    """(the distance s^(1/p), its power 1 − p, 0 where it is 0)"""
    if P == 1:
        root = s
        slope = tl.where(s == 0, 0.0, 1.0)
    elif P == 2:
        root = tl.sqrt(s)
        slope = tl.where(s == 0, 0.0, 1 / root)
    else:
        root = tl.exp2(tl.log2(s) / p)
        slope = tl.where(s == 0, 0.0, tl.exp2((1 - p) * tl.log2(root)))
    return root, slope


@triton.jit
def _row_loss_forward_kernel(
    x, second, third, target, weight, y, slopes, losses, M, N, x_row, s_row, t_row, margin, p, eps,
    LOSS: tl.constexpr, P: tl.constexpr, SWAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    inside = row < M
    first = tl.zeros((ROWS, BLOCK), tl.float32)
    other = tl.zeros((ROWS, BLOCK), tl.float32)
    last = tl.zeros((ROWS, BLOCK), tl.float32)
    if LOSS == "multi_margin":
        label = tl.load(target + row, inside, other=0).to(tl.int64)
        known = inside & (label >= 0) & (label < N)
        hit = tl.load(x + row * x_row + label, known, other=0.0).to(tl.float32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)[None, :].to(tl.int64)  # (1, BLOCK)
        mask = inside & (n < N)
        a = tl.load(x + row * x_row + n, mask, other=0.0).to(tl.float32)
        if second is not None:
            b = tl.load(second + row * s_row + n, mask, other=0.0).to(tl.float32)
        if LOSS == "triplet_margin":
            c = tl.load(third + row * t_row + n, mask, other=0.0).to(tl.float32)
            first += tl.where(mask, _power(a - b + eps, p, P), 0.0)
            other += tl.where(mask, _power(a - c + eps, p, P), 0.0)
            if SWAP:
                last += tl.where(mask, _power(b - c + eps, p, P), 0.0)
        elif LOSS == "cosine_embedding":
            first += a * b
            other += a * a
            last += b * b
        elif LOSS == "multi_margin":
            z = margin - hit + a
            z = tl.where(mask & (n != label) & (z > 0), z, 0.0)
            first += _power(z, p, P)
            other += tl.where(z > 0, 2 * z if P == 2 else 1.0, 0.0)
        else:
            tl.static_assert(LOSS == "multilabel_soft_margin", "unknown loss")
            near = log1p(tl.exp(-tl.abs(a)))
            f = b * (tl.where(a < 0, -a, 0.0) + near) + (1 - b) * (tl.where(a < 0, 0.0, a) + near)
            if weight is not None:
                f *= tl.load(weight + n, n < N, other=0.0).to(tl.float32)
            first += tl.where(mask, f, 0.0)
    u = tl.sum(first, 1, keep_dims=True)
    v = tl.sum(other, 1, keep_dims=True)
    w = tl.sum(last, 1, keep_dims=True)
    if LOSS == "triplet_margin":
        near, by_near = _root(u, p, P)
        far, by_far = _root(v, p, P)
        by_between = tl.zeros((ROWS, 1), tl.float32)
        if SWAP:
            between, slope = _root(w, p, P)
            by_between = tl.where(between < far, -slope, 0.0)
            by_far = tl.where(between < far, 0.0, by_far)
            far = tl.where(between < far, between, far)
        loss = margin + near - far
        counts = tl.where(loss >= 0, 1.0, 0.0)  # NaN stays
        one = counts * by_near
        two = -counts * by_far
        three = counts * by_between
        loss = tl.where(loss < 0, 0.0, loss)
    elif LOSS == "cosine_embedding":
        v += 1e-12
        w += 1e-12
        length = tl.sqrt(v) * tl.sqrt(w)
        cos = u / length
        t = tl.load(target + row, inside, other=0).to(tl.float32)
        over = cos - margin
        loss = tl.where(t == 1, 1 - cos, tl.where(t == -1, tl.where(over < 0, 0.0, over), 0.0))
        s = tl.where(t == 1, -1.0, tl.where((t == -1) & (over >= 0), 1.0, 0.0))
        one = s / length
        two = -s * cos / v
        three = -s * cos / w
    elif LOSS == "multi_margin":
        one = tl.where(known, 1.0, float("nan"))
        if weight is not None:
            one *= tl.load(weight + label, known, other=0.0).to(tl.float32)
        one /= N
        loss = one * u
        two = -one * v
        three = hit
    else:
        one = tl.zeros((ROWS, 1), tl.float32) + 1.0 / N
        loss = u / N
        two = tl.zeros((ROWS, 1), tl.float32)
        three = two
    if slopes is not None:
        tl.store(slopes + row, one, inside)
        tl.store(slopes + (row + M), two, inside)
        tl.store(slopes + (row + M + M), three, inside)
    if y is not None:
        tl.store(y + row, loss.to(y.dtype.element_ty), inside)
    else:
        at = tl.program_id(0) + tl.zeros((1, 1), tl.int32)
        tl.store(losses + at, tl.sum(tl.where(inside, loss, 0.0), 0, keep_dims=True))


@triton.jit
def _row_loss_backward_kernel(
    dy, x, second, third, target, weight, slopes, dx, ds, dt, M, N, x_row, s_row, t_row, dy_step, scale, margin, p, eps,
    LOSS: tl.constexpr, P: tl.constexpr, SWAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, n, mask = rows_tile(M, N, ROWS, BLOCK)
    inside = row < M
    g = tl.load(dy + row * dy_step, inside, other=0.0).to(tl.float32) * scale  # (ROWS, 1)
    one = g * tl.load(slopes + row, inside, other=0.0)
    two = g * tl.load(slopes + (row + M), inside, other=0.0)
    a = tl.load(x + row * x_row + n, mask, other=0.0).to(tl.float32)
    if second is not None:
        b = tl.load(second + row * s_row + n, mask, other=0.0).to(tl.float32)
    by_x = tl.zeros((ROWS, BLOCK), tl.float32)
    by_second = by_x
    by_third = by_x
    if LOSS == "triplet_margin":
        c = tl.load(third + row * t_row + n, mask, other=0.0).to(tl.float32)
        near = one * _slope(a - b + eps, p, P)
        far = two * _slope(a - c + eps, p, P)
        by_x = near + far
        by_second = -near
        by_third = -far
        if SWAP:
            between = g * tl.load(slopes + (row + M + M), inside, other=0.0) * _slope(b - c + eps, p, P)
            by_second += between
            by_third -= between
    elif LOSS == "cosine_embedding":
        three = g * tl.load(slopes + (row + M + M), inside, other=0.0)
        by_x = one * b + two * a
        by_second = one * a + three * b
    elif LOSS == "multi_margin":
        label = tl.load(target + row, inside, other=0).to(tl.int64)
        z = margin - tl.load(slopes + (row + M + M), inside, other=0.0) + a
        if P == 2:
            one = one * 2 * z
        by_x = tl.where(n == label, two, tl.where(z > 0, one, 0.0))
    else:
        if weight is not None:
            one = one * tl.load(weight + n, n < N, other=0.0).to(tl.float32)
        by_x = one * ((1 - b) - sigmoid(-a))
        by_second = -one * a
    if dx is not None:
        tl.store(dx + row * N + n, by_x.to(dx.dtype.element_ty), mask)
    if ds is not None:
        tl.store(ds + row * N + n, by_second.to(ds.dtype.element_ty), mask)
    if dt is not None:
        tl.store(dt + row * N + n, by_third.to(dt.dtype.element_ty), mask)


ROW_LOSS_FORWARD = _configs.rows("row_loss_forward")
ROW_LOSS_BACKWARD = _configs.rows("row_loss_backward")


def _sizes(x: Any) -> tuple[int, int]:
    n = x.shape[-1]
    m = 1
    for size in x.shape[:-1]:
        m *= size
    return m, n


def _rows(n: int, empty: Any, *given: Any) -> tuple[list, list]:
    """(arrays whose rows of n are contiguous, their steps from row to row); None stays."""
    pairs = [(None, 0) if a is None else _tile.rows(a, n, empty) for a in given]
    return [a for a, _ in pairs], [step for _, step in pairs]


def _formula(loss: str, p: float, swap: bool) -> dict:
    return {"LOSS": loss, "P": int(p) if p in (1, 2) else 0, "SWAP": swap}


def row_loss_forward(
    x: Any,
    second: Any = None,
    third: Any = None,
    target: Any = None,
    weight: Any = None,
    *,
    needs: tuple = (),
    loss: str,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: str = "mean",
    empty: Any,
) -> tuple[tuple, dict]:
    m, n = _sizes(x)
    samples = tuple(x.shape[:-1])
    arrays, steps = _rows(n, empty, x, second, third)
    tile = _tile.flat_tile(ROW_LOSS_FORWARD(_tile.device(x), n), n)
    programs = _tile.cdiv(m, tile["ROWS"])
    y = empty(samples if reduction == "none" else (), x.dtype)
    losses = None if reduction == "none" else empty((programs,), "float32")
    slopes = empty((3, *samples), "float32") if needs else None
    labels = None if target is None else _tile.dense(target, empty)
    factors = None if weight is None else _tile.dense(weight, empty)
    _tile.launch(
        _row_loss_forward_kernel,
        (programs,),
        *(*arrays, labels, factors, y if losses is None else None, slopes, losses, m, n, *steps, margin, p, eps),
        **_formula(loss, p, swap),
        **tile,
    )
    if losses is not None:
        reduced(losses, None, y, None, m if reduction == "mean" else 1)
    given = {"x": x, "second": second, "third": third, "target": target, "weight": weight, "slopes": slopes}
    return (y,), {name: a for name, a in given.items() if a is not None} if needs else {}


def row_loss_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    loss: str,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: str = "mean",
    empty: Any,
) -> tuple:
    x, target, weight = saved["x"], saved.get("target"), saved.get("weight")
    m, n = _sizes(x)
    arrays, steps = _rows(n, empty, x, saved.get("second"), saved.get("third"))
    grads = [empty(x.shape, x.dtype) if name in needs else None for name in ("x", "second", "third")]
    tile = _tile.flat_tile(ROW_LOSS_BACKWARD(_tile.device(x), n), n)
    labels = None if target is None else _tile.dense(target, empty)
    factors = None if weight is None else _tile.dense(weight, empty)
    _tile.launch(
        _row_loss_backward_kernel,
        (_tile.cdiv(m, tile["ROWS"]) * _tile.cdiv(n, tile["BLOCK"]),),
        *(_tile.dense(dys[0], empty), *arrays, labels, factors, saved["slopes"], *grads, m, n, *steps),
        *(1 if reduction == "none" else 0, 1 / max(m, 1) if reduction == "mean" else 1.0, margin, p, eps),
        **_formula(loss, p, swap),
        **tile,
    )
    return (*grads, None, None)
