"""The margins between a sample's classes and all others, of every pair one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpulayers.arrays import Spec, arranged, compute_dtype, namespace, up
from gpulayers.definition import Rule, ShapeError, UnsupportedTypeError
from gpulayers.ops._loss import require_reduction
from gpulayers.ops._op import Op, require_float, require_shape


def multilabel_margin_rule(x: Spec, target: Spec, *, needs: tuple = (), reduction: str = "mean") -> Rule:
    require_float("x", x)
    require_reduction(reduction)
    if x.ndim not in (1, 2):
        raise ShapeError("x", "x.shape = (N, C) or (C,)", list(x.shape))
    if target.dtype.kind not in "iu":
        raise UnsupportedTypeError("target", "class indices (an integer dtype)", target.dtype)
    require_shape("target", target, x.shape, "target.shape = x.shape")
    saved = {"x": x, "target": target, "hits": Spec(x.shape, compute_dtype(x.dtype))}
    y = Spec(x.shape[:-1] if reduction == "none" else (), x.dtype)
    return Rule({"y": y}, saved if needs else {}, None, {"x": Spec(x.shape, x.dtype)})


def _check(x: np.ndarray, target: Any, **_: Any) -> None:
    if (wrong := (target < -1) | (target >= x.shape[-1])).any():
        raise ShapeError("target", f"−1 ≤ target < C = {x.shape[-1]}", np.asarray(target)[wrong][0])


def _hits(xp: Any, target: Any, dtype: Any) -> Any:
    """How often each class is listed before the first −1; NaN in a row with a label out of range."""
    classes = target.shape[-1]
    listed = xp.cumsum(target < 0, -1) == 0
    wrong = (listed & (target >= classes)).any(-1, keepdims=True)
    same = xp.expand_dims(target, -1) == xp.arange(classes)
    hits = (same & xp.expand_dims(listed, -1)).astype(dtype).sum(-2)
    return xp.where(wrong, xp.nan, hits).astype(dtype, copy=False)


def _pairs(xp: Any, v: Any, hits: Any) -> tuple[Any, Any]:
    """(1 − x[i] + x[j], how often a pair counts), i a class of the sample and j another: (…, i, j)"""
    other = xp.expand_dims((hits == 0).astype(v.dtype), -2)
    return 1 - xp.expand_dims(v, -1) + xp.expand_dims(v, -2), xp.expand_dims(hits, -1) * other


def multilabel_margin_forward(x: Any, target: Any, *, needs: tuple = (), reduction: str = "mean") -> tuple[tuple, dict]:
    """Σ max(1 − x[i] + x[j], 0) / C over a sample's classes i and all others j: their "mean", "sum", or "none" for each.

    x: (N, C) or (C,), float. target: x's shape, integers: each sample's classes, up to the first −1. Returns y in x's
    dtype. A label out of range raises RuntimeError on the CPU, and makes NaN on a GPU. The mean of nothing is NaN.
    """
    xp, v = namespace(x), up(x)
    hits = _hits(xp, target, v.dtype)
    with np.errstate(invalid="ignore"):
        z, count = _pairs(xp, v, hits)
        y = xp.where(count == 0, 0, count * xp.where(z > 0, z, 0)).sum((-2, -1)) / max(x.shape[-1], 1)
    if reduction != "none":
        total = y.sum()
        y = total if reduction == "sum" else total / y.size if y.size else xp.nan
    return (xp.asarray(y).astype(x.dtype, copy=False),), {"x": x, "target": target, "hits": hits} if needs else {}


def multilabel_margin_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, reduction: str = "mean"
) -> tuple:
    """Of each pair whose margin is not kept, dy / C for j and −dy / C for i, divided by the samples for a mean."""
    (dy,), x = dys, saved["x"]
    xp, v = namespace(x), up(x)
    with np.errstate(invalid="ignore"):
        z, count = _pairs(xp, v, saved["hits"])
        broken = count * (z > 0).astype(v.dtype)
        g = up(dy) / (max(math.prod(x.shape[:-1]), 1) if reduction == "mean" else 1) / max(x.shape[-1], 1)
        dx = (broken.sum(-2) - broken.sum(-1)) * (xp.expand_dims(g, -1) if reduction == "none" else g)
    return arranged(dx.astype(x.dtype, copy=False), None), None


multilabel_margin = Op(
    multilabel_margin_rule,
    multilabel_margin_forward,
    multilabel_margin_backward,
    differentiable=("x",),
    check=_check,
    family="loss",
)
