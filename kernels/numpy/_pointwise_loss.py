"""Losses of one formula an element, in blocks that stay in the cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._pointwise_loss import LOSSES, Numbers, divisor
from . import _blocks
from ._linear_cross_entropy import REFUSED


def pointwise_loss_refuses(x: Any, *others: Any, needs: tuple, **options: Any) -> str | None:
    return REFUSED if x.dtype == np.float64 or x.size == 0 else None


def _flat(given: list, like: np.ndarray) -> list:
    """Each as one row in the memory order of ``like``."""
    whole = [a if a is None or a.shape == like.shape else np.broadcast_to(a, like.shape) for a in given]
    return [None if a is None else _blocks.flat_like(a, like) for a in whole]


def _block(flat: list, lo: int, hi: int) -> list:
    return [None if a is None else a[lo:hi].astype(np.float32, copy=False) for a in flat]


def pointwise_loss_forward(
    x: np.ndarray,
    target: np.ndarray,
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
) -> tuple[tuple, dict]:
    how, numbers = LOSSES[loss], Numbers(number, log, full)
    y = _blocks.empty_like(x) if reduction == "none" else None
    like = x if y is None else y
    flat = _flat([x, target, other if how.third == "other" else pos_weight, weight], like)
    out = None if y is None else _blocks.flat_like(y, y)

    def work(lo: int, hi: int) -> float:
        v, t, o, w = _block(flat, lo, hi)
        with np.errstate(all="ignore"):
            f = how.value(np, v, t, o, numbers)
            f = f if w is None else f * w
            if out is None:
                return float(f.sum(dtype=np.float64))
            out[lo:hi] = f
        return 0.0

    total = sum(_blocks.over(x.size, _blocks.CHAIN, work, elements=x.size))
    if y is None:
        y = np.asarray(total / divisor(x.shape, reduction), x.dtype)
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
) -> tuple:
    (dy,), x, how, numbers = dys, saved["x"], LOSSES[loss], Numbers(number, log, full)
    grads = [_blocks.empty_like(x) if name in needs else None for name in ("x", "target", "other")]
    like = next(g for g in grads if g is not None)
    third = saved.get("other", saved.get("pos_weight"))
    flat = _flat([x, saved["target"], third, saved.get("weight"), dy if reduction == "none" else None], like)
    outs = _flat(grads, like)
    scale = np.float32(1 / divisor(x.shape, reduction) * (1 if reduction == "none" else float(dy)))

    def work(lo: int, hi: int) -> None:
        v, t, o, w, g = _block(flat, lo, hi)
        with np.errstate(all="ignore"):
            g = scale if g is None else g
            g = g if w is None else g * w
            for out, slope in zip(outs, how.slopes(np, v, t, o, numbers)):
                if out is not None:
                    out[lo:hi] = slope * g

    _blocks.over(x.size, _blocks.CHAIN, work, elements=x.size)
    return (*grads, None, None)
