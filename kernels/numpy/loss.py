"""Losses in blocks of rows that stay in the cache; nothing as large as the logits is written forward."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import arranged, float64

from . import _blocks
from ._linear_cross_entropy import REFUSED
from ._linear_cross_entropy import linear_cross_entropy_backward as linear_cross_entropy_backward
from ._linear_cross_entropy import linear_cross_entropy_forward as linear_cross_entropy_forward
from ._linear_cross_entropy import linear_cross_entropy_refuses as linear_cross_entropy_refuses
from ._pointwise_loss import pointwise_loss_backward as pointwise_loss_backward
from ._pointwise_loss import pointwise_loss_forward as pointwise_loss_forward
from ._pointwise_loss import pointwise_loss_refuses as pointwise_loss_refuses

REFUSALS = {
    "dtype": "only float32 is faster than the definition",
    "shape": "x is (N, C), not empty, or the definition computes it",
    "soft": "probabilities are left to the definition",
    "nll": REFUSED,
    "mse": "only float32, not empty, is faster than the definition",
    "order": "x and target lie in one dense memory order, or the definition computes it",
}

# --- cross entropy of rows of logits and class indices ----------------------------------------------------------------


def cross_entropy_refuses(x: Any, target: Any, weight: Any, *, needs: tuple, **options: Any) -> str | None:
    if x.dtype != np.float32:
        return REFUSALS["dtype"]
    if x.ndim != 2 or 0 in x.shape:
        return REFUSALS["shape"]
    return REFUSALS["soft"] if target.dtype.kind == "f" else None


def _labels(target: np.ndarray, ignore_index: int) -> tuple[np.ndarray, np.ndarray]:
    """(labels, 0 for those that are ignored; which are not)"""
    counts = target != ignore_index
    return np.where(counts, target, 0), counts


def _shares(counts: np.ndarray, labels: np.ndarray, weight: Any) -> np.ndarray:
    """The weight of each label, 0 for those that are ignored."""
    return np.asarray(counts if weight is None else np.where(counts, weight[labels], 0), np.float32)


def _divided(a: Any, total: np.ndarray) -> Any:
    return a / total if total else a * np.float32(np.nan)  # a mean over nothing


def cross_entropy_forward(
    x: np.ndarray,
    target: np.ndarray,
    weight: Any = None,
    *,
    needs: tuple = (),
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[tuple, dict]:
    m, classes = x.shape
    labels, counts = _labels(target, ignore_index)
    share = _shares(counts, labels, weight)
    loss, lse = np.empty(m, np.float32), np.empty(m, np.float32)
    keep, smooth = np.float32(1 - label_smoothing), np.float32(label_smoothing / classes)
    spread = None if not smooth else np.full(classes, smooth) if weight is None else smooth * weight

    def work(lo: int, hi: int) -> None:
        v, t = x[lo:hi], labels[lo:hi]
        top = v.max(1)
        d = v - top[:, None]
        hit = d[np.arange(hi - lo), t]
        total = None if spread is None else _blocks.dots(d, spread)
        log_total = np.log(np.exp(d, out=d).sum(1))
        np.add(log_total, top, out=lse[lo:hi])
        nll = share[lo:hi] * (log_total - hit)
        if spread is not None:
            nll = keep * nll + (log_total * spread.sum() - total)
        loss[lo:hi] = np.where(counts[lo:hi], nll, np.float32(0))

    _blocks.over(m, _blocks.block_rows(classes), work, elements=x.size)
    saved = {"x": x, "target": target} | ({} if weight is None else {"weight": weight}) | {"lse": lse}
    saved["mass"] = share if spread is None else keep * share + spread.sum() * counts.astype(np.float32)
    y = loss
    if reduction != "none":
        y = np.asarray(loss.sum(dtype=np.float64), np.float32)
    if reduction == "mean":
        saved["total"] = np.asarray(share.sum(dtype=np.float64), np.float32)
        y = np.asarray(_divided(y, saved["total"]))
    return (y,), saved if needs else {}


def cross_entropy_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple:
    if "x" not in needs:
        return None, None, None
    x, target, weight = saved["x"], saved["target"], saved.get("weight")
    m, classes = x.shape
    labels, counts = _labels(target, ignore_index)
    scale = np.broadcast_to(dys[0], (m,))
    if reduction == "mean":
        scale = _divided(scale, saved["total"])
    scale = np.where(counts, scale, np.float32(0))
    hit = scale * np.float32(1 - label_smoothing) * _shares(counts, labels, weight)
    smooth = np.float32(label_smoothing / classes)
    spread = None if not smooth else np.broadcast_to(smooth, classes) if weight is None else smooth * weight
    mass, lse = (scale * saved["mass"])[:, None], saved["lse"][:, None]
    dx = np.empty((m, classes), np.float32)

    def work(lo: int, hi: int) -> None:
        o = np.subtract(x[lo:hi], lse[lo:hi], out=dx[lo:hi])
        np.exp(o, out=o)
        o *= mass[lo:hi]
        if spread is not None:
            o -= scale[lo:hi, None] * spread
        o[np.arange(hi - lo), labels[lo:hi]] -= hit[lo:hi]

    _blocks.over(m, _blocks.block_rows(classes), work, elements=x.size)
    return dx, None, None


# --- negative log-likelihood -----------------------------------------------------------------------------------------


def nll_loss_refuses(x: Any, target: Any, weight: Any, *, needs: tuple, **options: Any) -> str | None:
    return REFUSALS["nll"] if x.dtype == float64 or x.size == 0 else None


def nll_loss_forward(
    x: np.ndarray,
    target: np.ndarray,
    weight: Any = None,
    *,
    needs: tuple = (),
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[tuple, dict]:
    labels, counts = _labels(target, ignore_index)
    share = _shares(counts, labels, weight)
    hit = np.take_along_axis(np.moveaxis(x, min(1, x.ndim - 1), -1), labels[..., None], -1)[..., 0]
    loss = np.where(counts, -share * hit, np.float32(0))
    saved = {"target": target} | ({} if weight is None else {"weight": weight})
    y = arranged(loss, None) if reduction == "none" else loss.sum(dtype=np.float64)
    if reduction == "mean":
        saved["total"] = np.asarray(share.sum(dtype=np.float64), np.float32)
        y = _divided(y, saved["total"])
    return (np.asarray(y, x.dtype),), saved if needs else {}


def nll_loss_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, ignore_index: int = -100, reduction: str = "mean"
) -> tuple:
    (dy,), (x, *_), target = dys, inputs, saved["target"]
    labels, counts = _labels(target, ignore_index)
    scale = -_shares(counts, labels, saved.get("weight")) * dy
    if reduction == "mean":
        scale = _divided(scale, saved["total"])
    axis = min(1, x.ndim - 1)
    if x.ndim > 2 and x.contiguous and x.order == (0, *range(2, x.ndim), 1):
        dx = np.zeros((*target.shape, x.shape[1]), x.dtype)
    else:
        dx = np.moveaxis(np.zeros(x.shape, x.dtype), axis, -1)
    np.put_along_axis(dx, labels[..., None], np.where(counts, scale, 0)[..., None], -1)
    return np.moveaxis(dx, -1, axis), None, None


# --- mean squared error ----------------------------------------------------------------------------------------------

BLOCK = _blocks.BYTES // 4


def mse_refuses(x: Any, target: Any, *, needs: tuple, reduction: str) -> str | None:
    if x.dtype != np.float32 or x.size == 0:
        return REFUSALS["mse"]
    return None if x.contiguous and target.contiguous and x.order == target.order else REFUSALS["order"]


def mse_forward(x: np.ndarray, target: np.ndarray, *, needs: tuple = (), reduction: str = "mean") -> tuple[tuple, dict]:
    a, b = _blocks.flat(x), _blocks.flat(target)
    saved = {"x": x, "target": target} if needs else {}
    if reduction == "none":
        y = np.empty_like(x)
        flat = _blocks.flat(y)

        def squares(lo: int, hi: int) -> None:
            d = np.subtract(a[lo:hi], b[lo:hi], out=flat[lo:hi])
            np.multiply(d, d, out=d)

        _blocks.over(x.size, BLOCK, squares, elements=x.size)
        return (y,), saved

    def work(lo: int, hi: int) -> np.float32:
        d = a[lo:hi] - b[lo:hi]
        return np.dot(d, d)

    total = sum(map(float, _blocks.over(x.size, BLOCK, work, elements=x.size)))
    return (np.asarray(total / x.size if reduction == "mean" else total, np.float32),), saved


def mse_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, reduction: str = "mean") -> tuple:
    (dy,), x, target = dys, saved["x"], saved["target"]
    a, b = _blocks.flat(x), _blocks.flat(target)
    scale = np.float32(2 / x.size if reduction == "mean" else 2)
    first = np.empty_like(x)
    out = _blocks.flat(first)
    each = None
    if reduction == "none":
        each = dy if dy.strides == x.strides else np.empty_like(x)
        if each is not dy:
            each[...] = dy
        each = _blocks.flat(each)
    sign = np.float32(1 if "x" in needs else -1)
    both = np.empty_like(x) if len(needs) == 2 else None
    other = None if both is None else _blocks.flat(both)

    def work(lo: int, hi: int) -> None:
        o = np.subtract(a[lo:hi], b[lo:hi], out=out[lo:hi])
        o *= sign * scale * (dy if each is None else 1)
        if each is not None:
            o *= each[lo:hi]
        if other is not None:
            np.negative(o, out=other[lo:hi])

    _blocks.over(x.size, BLOCK, work, elements=x.size)
    return (first if "x" in needs else None), (both if both is not None else None if "x" in needs else first)
