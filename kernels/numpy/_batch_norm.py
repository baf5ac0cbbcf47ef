"""Batch norm in blocks that stay in the cache, and what may follow it in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .._activation import numbers_of
from .._norm import batch_norm_saved
from . import activation as activations
from ._channels import Channels


class _Combined:
    """z = x̂ · weight + bias + residual, block by block."""

    def __init__(self, c: Channels, x: np.ndarray, mu: np.ndarray, rstd: Any, weight: Any, bias: Any, residual: Any):
        self.c, self.x, self.mu = c, c.view(x), mu
        self.scale = c.spread(rstd if weight is None else rstd * weight)
        self.bias = None if bias is None else c.spread(bias)
        self.residual = None if residual is None else c.view(residual)

    def into(self, o: np.ndarray, lo: int, hi: int) -> None:
        np.subtract(self.x[lo:hi], self.c.of(self.mu, o), out=o)
        o *= self.c.of(self.scale, o)
        if self.bias is not None:
            o += self.c.of(self.bias, o)
        if self.residual is not None:
            o += self.residual[lo:hi]


def _moments(c: Channels, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, the biased variance) of each channel."""
    mean = (c.total_of(lambda lo, hi: c.sum(rows[lo:hi])) / c.count).astype(np.float32)
    mu = c.spread(mean)

    def squares(lo: int, hi: int) -> np.ndarray:
        d = rows[lo:hi] - c.of(mu, rows[lo:hi])
        return c.dot(d, d)

    return mean, c.total_of(squares) / c.count


def batch_moments_forward(x: np.ndarray, *, needs: tuple = ()) -> tuple[tuple, dict]:
    c = Channels(x)
    mean, var = _moments(c, c.view(x))
    return (mean, var.astype(np.float32)), {}


def batch_norm_forward(
    x: np.ndarray,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    residual: Any = None,
    *,
    needs: tuple = (),
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple[tuple, dict]:
    c = Channels(x)
    y = np.empty_like(x)  # in x's memory order
    rows, out = c.view(x), c.view(y)
    if training or running_mean is None:
        mean, var = _moments(c, rows)
        if running_mean is not None:
            unbiased = var * (c.count / max(c.count - 1, 1))
            for running, batch in ((running_mean, mean), (running_var, unbiased)):  # no difference: Inf − Inf is NaN
                running[...] = (1 - momentum) * running + momentum * batch
    else:
        mean, var = running_mean.copy(), running_var
    mu = c.spread(mean)
    rstd = (1 / np.sqrt(var + eps)).astype(np.float32)
    z, numbers = _Combined(c, x, mu, rstd, weight, bias, residual), numbers_of(activation)

    def work(lo: int, hi: int) -> None:
        o = out[lo:hi]
        z.into(o, lo, hi)
        if activation is not None:
            activations.value(activation, o.reshape(-1), o.reshape(-1), numbers)

    c.over(work)
    return (y,), batch_norm_saved(activation, y, mean, rstd, x, weight, bias, residual) if needs else {}


def _slopes(
    c: Channels, dy: np.ndarray, saved: dict, mu: np.ndarray, activation: str | None, out: np.ndarray
) -> Callable[[int, int], None]:
    """What puts dz = dy f'(z) in a block of ``out``: from y where that does, else from z computed again."""
    if activation is None:
        return lambda lo, hi: np.copyto(out[lo:hi], dy[lo:hi])
    numbers, y = numbers_of(activation), saved.get("y")
    kept = None if y is None else c.view(y)
    others = (saved.get(k) for k in ("weight", "bias", "residual"))
    z = None if kept is not None else _Combined(c, saved["x"], mu, saved["rstd"], *others)

    def work(lo: int, hi: int) -> None:
        o = out[lo:hi]
        s = np.empty_like(o) if kept is None else kept[lo:hi]
        if z is not None:
            z.into(s, lo, hi)
        activations.gradient(activation, dy[lo:hi].reshape(-1), s.reshape(-1), o.reshape(-1), numbers)

    return work


def batch_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple:
    x, mean, rstd, weight = saved["x"], saved["mean"], saved["rstd"], saved.get("weight")
    c = Channels(x)
    rows, mu, batch = c.view(x), c.spread(mean), training or inputs[3] is None
    dy = dz = c.view(dys[0])
    dx, dresidual = (np.empty_like(x) if name in needs else None for name in ("x", "residual"))
    slopes = None
    if activation is not None or dresidual is not None:
        dz = c.view(dresidual if dresidual is not None else np.empty_like(x) if dx is None else dx)
        slopes = _slopes(c, dy, saved, mu, activation, dz)
    wanted = (batch and dx is not None) or "weight" in needs or "bias" in needs

    def first(lo: int, hi: int) -> tuple:
        if slopes is not None:
            slopes(lo, hi)
        if not wanted:
            return 0, 0
        g, d = dz[lo:hi], rows[lo:hi] - c.of(mu, rows[lo:hi])
        return c.sum(g), c.dot(g, d)

    sums = c.total_of(first) if wanted or slopes is not None else (np.float64(0), np.float64(0))
    total, dot = sums[0].astype(np.float32), (sums[1] * rstd).astype(np.float32)
    if dx is not None:
        out = c.view(dx)
        scale = c.spread(rstd if weight is None else rstd * weight)
        means, slope = (c.spread(s / c.count) if batch else None for s in (total, rstd * dot))

        def second(lo: int, hi: int) -> None:
            g, v, o = dz[lo:hi], rows[lo:hi], out[lo:hi]
            if batch:
                t = np.subtract(v, c.of(mu, v), out=None if np.may_share_memory(g, o) else o)
                t *= c.of(slope, v)
                np.subtract(g, t, out=o)
                o -= c.of(means, v)
                o *= c.of(scale, v)
            else:
                np.multiply(g, c.of(scale, v), out=o)

        c.over(second)
    weights = (dot if "weight" in needs else None, total if "bias" in needs else None)
    return dx, *weights, None, None, dresidual
