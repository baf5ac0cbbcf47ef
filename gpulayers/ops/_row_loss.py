"""Losses of one number a sample, made of sums over its features: triplets, cosines, margins between classes. One op for all
of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpulayers.arrays import Spec, arranged, compute_dtype, namespace, up
from gpulayers.definition import ArgumentError, Rule, ShapeError, UnsupportedTypeError
from gpulayers.ops import _special
from gpulayers.ops._loss import require_reduction
from gpulayers.ops._op import Op, require_float, require_same_dtype, require_shape

TAKES = {
    "triplet_margin": ("second", "third"),
    "cosine_embedding": ("second", "target"),
    "multi_margin": ("target",),
    "multilabel_soft_margin": ("second",),
}
"""The inputs besides x of each loss; those of classes may have weights."""
_EPS = 1e-12
"""torch adds it to the squares of both lengths of a cosine."""


def row_loss_rule(
    x: Spec,
    second: Spec | None = None,
    third: Spec | None = None,
    target: Spec | None = None,
    weight: Spec | None = None,
    *,
    needs: tuple = (),
    loss: str,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: str = "mean",
) -> Rule:
    require_float("x", x)
    require_reduction(reduction)
    if loss not in TAKES:
        raise ArgumentError("loss", f"one of {', '.join(TAKES)}", repr(loss))
    if not x.ndim or (loss in ("cosine_embedding", "multi_margin") and x.ndim > 2):
        raise ShapeError("x", "x.shape = (N, D) or (D,)", list(x.shape))
    given = {"x": x, "second": second, "third": third, "target": target, "weight": weight}
    for name in ("second", "third", "target"):
        if (given[name] is not None) != (name in TAKES[loss]):
            raise ArgumentError(name, f"{name} where loss takes it, and only there", f"loss {loss!r}")
    require_same_dtype(x, second=second, third=third, weight=weight)
    for name in ("second", "third"):
        if (each := given[name]) is not None:
            require_shape(name, each, x.shape, f"{name}.shape = x.shape")
    if target is not None:
        require_shape("target", target, x.shape[:-1], "target.shape = (N,), () for x (D,)")
        if loss == "multi_margin" and target.dtype.kind not in "iu":
            raise UnsupportedTypeError("target", "class indices (an integer dtype)", target.dtype)
        if target.dtype.kind not in "iu":
            require_same_dtype(x, target=target)
    if weight is not None:
        if not loss.startswith("multi"):
            raise ArgumentError("weight", "weight for losses of classes alone", f"loss {loss!r}")
        require_shape("weight", weight, x.shape[-1:], "weight.shape = (C,)")
    if not (p in (1, 2) if loss == "multi_margin" else 1 <= p < math.inf):
        raise ArgumentError("p", "p ∈ {1, 2}" if loss == "multi_margin" else "1 ≤ p < ∞", p)
    samples = x.shape[:-1]
    y = Spec(samples if reduction == "none" else (), x.dtype)
    saved = {name: each for name, each in given.items() if each is not None}
    saved["slopes"] = Spec((3, *samples), compute_dtype(x.dtype))
    dense = Spec(x.shape, x.dtype)
    return Rule({"y": y}, saved if needs else {}, None, dict.fromkeys(("x", "second", "third"), dense))


def _check(
    x: np.ndarray, second: Any = None, third: Any = None, target: Any = None, *_: Any, loss: str, **options: Any
) -> None:
    if loss == "multi_margin" and (wrong := (target < 0) | (target >= x.shape[-1])).any():
        raise ShapeError("target", f"0 ≤ target < C = {x.shape[-1]}", np.asarray(target)[wrong][0])


def _at(xp: Any, target: Any, classes: int) -> Any:
    """Where each sample's class is, (N, C)."""
    return xp.expand_dims(target, -1) == xp.arange(classes)


def _slope_of(xp: Any, distance: Any, p: float) -> Any:
    """What the slope of Σ |d|^p / p is multiplied by for that of the distance; 0 where that is 0."""
    return xp.where(distance == 0, 0, xp.where(distance == 0, 1, distance) ** (1 - p))


def _triplet(xp: Any, x: Any, second: Any, third: Any, margin: float, p: float, eps: float, swap: bool) -> tuple:
    near, far, between = ((xp.abs(d + eps) ** p).sum(-1) ** (1 / p) for d in (x - second, x - third, second - third))
    swapped = between < far if swap else xp.zeros_like(far, dtype=bool)
    loss = margin + near - xp.where(swapped, between, far)
    counts = (loss >= 0).astype(loss.dtype)
    slopes = [counts * _slope_of(xp, d, p) for d in (near, far, between)]  # NaN stays
    return xp.maximum(loss, 0), (slopes[0], xp.where(swapped, 0, -slopes[1]), xp.where(swapped, -slopes[2], 0))


def _cosine(xp: Any, x: Any, second: Any, target: Any, margin: float) -> tuple:
    a, b = (x * x).sum(-1) + _EPS, (second * second).sum(-1) + _EPS
    length = xp.sqrt(a * b)
    cos = (x * second).sum(-1) / length
    loss = xp.where(target == 1, 1 - cos, 0) + xp.where(target == -1, xp.maximum(cos - margin, 0), 0)
    violated = (target == -1) & (cos - margin >= 0)
    slope = violated.astype(cos.dtype) - (target == 1).astype(cos.dtype)
    return loss, (slope / length, -slope * cos / a, -slope * cos / b)


def _multi_margin(xp: Any, x: Any, target: Any, weight: Any, margin: float, p: float) -> tuple:
    here, n = _at(xp, target, x.shape[-1]), max(x.shape[-1], 1)
    hit = xp.where(here, x, 0).sum(-1)
    factor = xp.ones_like(hit) if weight is None else xp.where(here, weight, 0).sum(-1)
    factor = xp.where(here.any(-1), factor, xp.nan) / n
    z = margin - xp.expand_dims(hit, -1) + x
    z = xp.where((z > 0) & ~here, z, 0)  # NaN is passed over, as in torch
    steps = p * z if p == 2 else (z > 0).astype(z.dtype)
    return factor * (z**p).sum(-1), (factor, -factor * steps.sum(-1), hit)


def _soft(xp: Any, x: Any, t: Any, weight: Any) -> tuple:
    near = xp.log1p(xp.exp(-xp.abs(x)))
    f = t * (xp.maximum(-x, 0) + near) + (1 - t) * (xp.maximum(x, 0) + near)
    f = f if weight is None else f * weight
    loss = f.sum(-1) / max(x.shape[-1], 1)
    return loss, (xp.full_like(loss, 1 / max(x.shape[-1], 1)), xp.zeros_like(loss), xp.zeros_like(loss))


def _losses(
    xp: Any, given: dict, loss: str, margin: float, p: float, eps: float, swap: bool
) -> tuple[Any, tuple[Any, Any, Any]]:
    """(each sample's loss, three numbers of each sample that its gradients are made of)"""
    x, second, third, target, weight = (given[n] for n in ("x", "second", "third", "target", "weight"))
    if loss == "triplet_margin":
        return _triplet(xp, x, second, third, margin, p, eps, swap)
    if loss == "cosine_embedding":
        return _cosine(xp, x, second, target, margin)
    if loss == "multi_margin":
        return _multi_margin(xp, x, target, weight, margin, p)
    return _soft(xp, x, second, weight)


def _lifted(given: dict) -> dict:
    """Floating-point arrays in the dtype that is computed in."""
    return {n: a if a is None or a.dtype.kind in "iu" else up(a) for n, a in given.items()}


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
) -> tuple[tuple, dict]:
    """A loss for each sample, their "mean" or their "sum".

    x, second, third: one shape (…, D) and dtype, float; the last axis is a sample's features, or classes. By ``loss``:

    - triplet_margin: max(margin + d(x, second) − d(x, third), 0), d(a, b) = (Σ |a − b + eps|^p)^(1 / p), 1 ≤ p < ∞. swap:
      d(second, third) in the place of d(x, third) where it is smaller (Balntas et al., 2016). Up to any number of axes.
    - cosine_embedding: 1 − cos(x, second) where target (N,) is 1, max(cos(x, second) − margin, 0) where it is −1
    - multi_margin: weight[t] Σ max(margin − x[t] + x[c], 0)^p / C over the other classes c; target (N,): classes t. p: 1, 2
    - multilabel_soft_margin: Σ weight (t log(1 + exp(−x)) + (1 − t) log(1 + exp(x))) / C, second: the labels t

    weight: (C,), a factor for each class; it has no gradient. A label out of range raises RuntimeError on the CPU, and makes
    NaN on a GPU. Returns y in x's dtype: 0-dim, or (…). The mean of nothing is NaN.
    """
    xp = namespace(x)
    given = {"x": x, "second": second, "third": third, "target": target, "weight": weight}
    with np.errstate(all="ignore"):
        losses, slopes = _losses(xp, _lifted(given), loss, margin, p, eps, swap)
        y = losses
        if reduction != "none":
            y = losses.sum()
            y = y if reduction == "sum" else y / losses.size if losses.size else xp.nan
    y = xp.asarray(y).astype(x.dtype, copy=False)
    if not needs:
        return (y,), {}
    kept = {name: each for name, each in given.items() if each is not None}
    return (y,), kept | {"slopes": xp.stack(slopes).astype(compute_dtype(x.dtype), copy=False)}


def _powers(xp: Any, d: Any, p: float) -> Any:
    """The derivative of |d|^p / p."""
    sign = (d > 0).astype(d.dtype) - (d < 0).astype(d.dtype)  # 0 for NaN, as in torch
    return d if p == 2 else sign if p == 1 else sign * xp.abs(d) ** (p - 1)


def _gradients(xp: Any, given: dict, c: Any, loss: str, margin: float, p: float, eps: float) -> tuple:
    """The derivatives of each sample's loss by x, second and third, from its three numbers c."""
    x: Any = given["x"]
    second: Any = given.get("second")
    third: Any = given.get("third")
    weight = given.get("weight")
    if loss == "triplet_margin":
        a, b, s = (k * _powers(xp, d + eps, p) for k, d in zip(c, (x - second, x - third, second - third)))
        return a + b, s - a, -b - s
    if loss == "cosine_embedding":
        return c[0] * second + c[1] * x, c[0] * x + c[2] * second, None
    if loss == "multi_margin":
        z = margin - c[2] + x
        return (
            xp.where(
                _at(xp, given["target"], x.shape[-1]), c[1], xp.where(z > 0, c[0] * (p * z) if p == 2 else c[0], 0)
            ),
            None,
            None,
        )
    w = c[0] if weight is None else c[0] * weight
    return w * ((1 - second) - _special.sigmoid(-x)), -w * x, None


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
) -> tuple:
    """dy, divided by the number of samples for a mean, times each sample's derivatives."""
    (dy,), x = dys, saved["x"]
    xp, count = namespace(x), max(math.prod(x.shape[:-1]), 1)
    with np.errstate(all="ignore"):
        g = up(dy) / count if reduction == "mean" else up(dy)
        g = xp.expand_dims(g, -1) if reduction == "none" else g
        found = _gradients(xp, _lifted(saved), xp.expand_dims(saved["slopes"], -1), loss, margin, p, eps)
        grads = [
            arranged((f * g).astype(x.dtype, copy=False), None) if name in needs else None
            for name, f in zip(("x", "second", "third"), found)
        ]
    return (*grads, None, None)


row_loss = Op(
    row_loss_rule,
    row_loss_forward,
    row_loss_backward,
    differentiable=("x", "second", "third"),
    check=_check,
    family="loss",
)
