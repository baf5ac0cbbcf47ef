"""Losses of one formula an element: the formulas and their slopes, in float32 or float64 and in names that NumPy and CuPy
both have. The definition and the NumPy kernel compute them; Triton's kernels say them again.

A formula takes the namespace, x, the target t, the third array o or None, and the numbers of ``Numbers``. Slopes are the
derivatives by x, t and o. All arrays have one shape and dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Numbers(NamedTuple):
    """What a formula takes besides arrays."""

    number: float = 1.0
    log: bool = False
    full: bool = False


class Loss(NamedTuple):
    value: Callable
    slopes: Callable
    third: str = ""
    """The input that is the third array: "other" or "pos_weight"."""
    integers: bool = False
    """Whether the target may be integers: labels of ±1, or counts."""
    least: tuple[float, bool] | None = None
    """The bound of ``number`` from below, and whether it may be equal to that."""


def _softplus(xp: Any, x: Any) -> Any:
    return xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.abs(x)))


def _sigmoid(xp: Any, x: Any) -> Any:
    e = xp.exp(-xp.abs(x))
    return xp.where(x < 0, e, 1) / (1 + e)


def _sign(xp: Any, d: Any) -> Any:
    """0 for NaN, as in torch."""
    return (d > 0).astype(d.dtype) - (d < 0).astype(d.dtype)


def _bce(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> Any:
    return (t - 1) * xp.maximum(xp.log1p(-x), -100) - t * xp.maximum(xp.log(x), -100)


def _bce_slopes(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> tuple:
    return (x - t) / xp.maximum((1 - x) * x, 1e-12), xp.log1p(-x) - xp.log(x), None


def _bce_with_logits(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> Any:
    return (1 - t) * x + (1 if o is None else 1 + (o - 1) * t) * _softplus(xp, -x)


def _bce_with_logits_slopes(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> tuple:
    w = 1 if o is None else 1 + (o - 1) * t
    return (1 - t) - w * _sigmoid(xp, -x), -x if o is None else (o - 1) * _softplus(xp, -x) - x, None


def _kl_div(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> Any:
    if n.log:
        return xp.exp(t) * (t - x)
    return xp.where(t == 0, 0, t * xp.log(t)) - t * x


def _kl_div_slopes(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> tuple:
    if n.log:
        return -xp.exp(t), xp.exp(t) * (t - x + 1), None
    return -t, xp.log(t) + t / t - x, None  # NaN at 0, as in torch


def _l1(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> Any:
    return xp.abs(x - t)


def _l1_slopes(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> tuple:
    s = _sign(xp, x - t)
    return s, -s, None


def _smooth_l1(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> Any:
    a, beta = xp.abs(x - t), n.number
    return xp.where(a < beta, 0.5 * a * a / (beta or 1), a - 0.5 * beta)


def _smooth_l1_slopes(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> tuple:
    d, beta = x - t, n.number
    s = xp.where(xp.abs(d) >= beta, _sign(xp, d), d / (beta or 1))
    return s, -s, None


def _huber(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> Any:
    a, delta = xp.abs(x - t), n.number
    return xp.where(a < delta, 0.5 * a * a, delta * (a - 0.5 * delta))


def _huber_slopes(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> tuple:
    d, delta = x - t, n.number
    s = xp.where(xp.abs(d) >= delta, delta * _sign(xp, d), d)
    return s, -s, None


def _poisson_nll(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> Any:
    y = xp.exp(x) - t * x if n.log else x - t * xp.log(x + n.number)
    if n.full:  # Stirling's approximation of log t!
        y = y + xp.where(t > 1, t * xp.log(t) - t + 0.5 * xp.log(2 * math.pi * t), 0)
    return y


def _poisson_nll_slopes(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> tuple:
    by_t = -x if n.log else -xp.log(x + n.number)
    if n.full:
        log = xp.log(t)
        by_t = by_t + xp.where(t > 1, log + 0.5 / t, 0 * log)  # NaN for t ≤ 0, as in torch
    return xp.exp(x) - t if n.log else 1 - t / (x + n.number), by_t, None


def _variance(xp: Any, o: Any, n: Numbers) -> Any:
    """max(o, number); NaN where it is negative."""
    return xp.where(o < 0, math.nan, xp.maximum(o, n.number))


def _gaussian_nll(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> Any:
    d, v = x - t, _variance(xp, o, n)
    return 0.5 * (xp.log(v) + d * d / v) + (0.5 * math.log(2 * math.pi) if n.full else 0)


def _gaussian_nll_slopes(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> tuple:
    v = _variance(xp, o, n)
    s = (x - t) / v
    return s, -s, 0.5 * (1 / v - s * s)


def _hinge_embedding(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> Any:
    return xp.where(t != 1, xp.maximum(n.number - x, 0), 0) + xp.where(t != -1, x, 0)


def _hinge_embedding_slopes(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> tuple:
    within = (n.number - x >= 0) & (t != 1)
    return (t != -1).astype(x.dtype) - within.astype(x.dtype), xp.zeros_like(x), None


def _margin_ranking(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> Any:
    return xp.maximum(-t * (x - o) + n.number, 0)


def _margin_ranking_slopes(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> tuple:
    violated = (-t * (x - o) + n.number >= 0).astype(x.dtype)
    return -t * violated, (o - x) * violated, t * violated


def _soft_margin(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> Any:
    return _softplus(xp, -t * x)


def _soft_margin_slopes(xp: Any, x: Any, t: Any, o: Any, n: Numbers) -> tuple:
    s = _sigmoid(xp, -t * x)
    return -t * s, -x * s, None


LOSSES = {
    "bce": Loss(_bce, _bce_slopes),
    "bce_with_logits": Loss(_bce_with_logits, _bce_with_logits_slopes, "pos_weight"),
    "kl_div": Loss(_kl_div, _kl_div_slopes),
    "l1": Loss(_l1, _l1_slopes),
    "smooth_l1": Loss(_smooth_l1, _smooth_l1_slopes, least=(0.0, True)),
    "huber": Loss(_huber, _huber_slopes, least=(0.0, False)),
    "poisson_nll": Loss(_poisson_nll, _poisson_nll_slopes, integers=True),
    "gaussian_nll": Loss(_gaussian_nll, _gaussian_nll_slopes, "other"),
    "hinge_embedding": Loss(_hinge_embedding, _hinge_embedding_slopes, integers=True),
    "margin_ranking": Loss(_margin_ranking, _margin_ranking_slopes, "other", integers=True),
    "soft_margin": Loss(_soft_margin, _soft_margin_slopes, integers=True),
}


def divisor(shape: Sequence[int], reduction: str) -> int:
    """What the sum over an x of this shape is divided by."""
    if reduction == "batchmean":
        return shape[0] if shape else 1
    return math.prod(shape) if reduction == "mean" else 1
