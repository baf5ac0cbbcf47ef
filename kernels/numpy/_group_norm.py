"""Group norm, what may follow it in the same pass, and instance norm as group norm with a group for each channel, in blocks
that stay in the cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._activation import FROM_Y, numbers_of
from .._norm import group_norm_saved
from . import _blocks
from . import activation as activations
from ._channels import Channels, block_of


class _Groups:
    """x as rows that are a group each, (N · G, D, S), or channels-last as samples, (N, S, C)."""

    def __init__(self, x: np.ndarray, groups: int):
        self.samples, self.channels = x.shape[:2]
        self.groups, self.depth = groups, self.channels // groups
        self.across = Channels(x)
        self.last = self.across.last and x.ndim > 2
        rows = self.view(x)
        self.total, self.count, self.elements = len(rows), np.float32(x.size // (self.samples * groups)), x.size
        self.size = 1 if self.last else block_of(rows[0].size, self.total)

    def view(self, x: np.ndarray) -> np.ndarray:
        if self.last:
            return np.moveaxis(x, 1, -1).reshape(self.samples, -1, self.channels)
        return x.reshape(self.samples * self.groups, self.depth, -1)

    def over(self, work: Any) -> None:
        _blocks.over(self.total, self.size, work, elements=self.elements)

    def of_groups(self, p: np.ndarray, lo: int, hi: int) -> np.ndarray:
        """(N, G) numbers of a block's groups against the block."""
        return np.repeat(p[lo], self.depth) if self.last else p.reshape(-1, 1, 1)[lo:hi]

    def of_channels(self, p: np.ndarray, lo: int, hi: int) -> np.ndarray:
        """A channel vector against a block."""
        return p if self.last else p.reshape(self.groups, self.depth, 1)[np.arange(lo, hi) % self.groups]

    def sums(self, a: np.ndarray) -> np.ndarray:
        """A block's sums over each channel: (rows, D), or (1, C)."""
        return self.across.sum(a)[None] if self.last else a.sum(-1)

    def dots(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return self.across.sum(a * b)[None] if self.last else _blocks.dots(a, b)

    def means(self, sums: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
        """The block's groups' means of what has these sums over its channels, each times its weight."""
        return (sums if weight is None else sums * weight).reshape(-1, self.depth).sum(1) / self.count


def normalise(
    x: np.ndarray, weight: Any, bias: Any, residual: Any, groups: int, eps: float, activation: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(y, mean, the biased variance and rstd of each group: (N, G))"""
    c, y = _Groups(x, groups), np.empty_like(x)  # in x's memory order
    rows, out, added = c.view(x), c.view(y), None if residual is None else c.view(residual)
    mean, var, rstd = (np.empty((c.samples, groups), np.float32) for _ in range(3))
    flat = [a if c.last else a.reshape(-1) for a in (mean, var, rstd)]
    numbers = numbers_of(activation)

    def work(lo: int, hi: int) -> None:
        v, o = (rows[lo], out[lo]) if c.last else (rows[lo:hi], out[lo:hi])
        at = lo if c.last else slice(lo, hi)
        flat[0][at] = c.means(c.sums(v))
        np.subtract(v, c.of_groups(mean, lo, hi), out=o)
        flat[1][at] = c.means(c.dots(o, o))
        flat[2][at] = 1 / np.sqrt(flat[1][at] + np.float32(eps))
        scale = c.of_groups(rstd, lo, hi)
        o *= scale if weight is None else scale * c.of_channels(weight, lo, hi)
        if bias is not None:
            o += c.of_channels(bias, lo, hi)
        if added is not None:
            o += added[lo] if c.last else added[lo:hi]
        if activation is not None:
            activations.value(activation, o.reshape(-1), o.reshape(-1), numbers)

    c.over(work)
    return y, mean, var, rstd


def _slope(activation: str, g: np.ndarray, z: np.ndarray) -> np.ndarray:
    """dz = g f'(z), over z."""
    numbers, flat = numbers_of(activation), z.reshape(-1)
    if activation in FROM_Y:
        activations.value(activation, flat, flat, numbers)
    dz = np.empty_like(z)
    activations.gradient(activation, g.reshape(-1), flat, dz.reshape(-1), numbers)
    return dz


def gradients(
    dy: np.ndarray, saved: dict, inputs: tuple, needs: tuple, groups: int, activation: str | None = None
) -> tuple:
    """(dx, dweight, dbias, dresidual)"""
    x, mean, rstd, weight, bias = saved["x"], saved["mean"], saved["rstd"], saved.get("weight"), saved.get("bias")
    c = _Groups(x, groups)
    rows, dys, added = c.view(x), c.view(dy), c.view(saved["residual"]) if "residual" in saved else None
    dx, dresidual = (np.empty_like(x) if k in needs else None for k in ("x", "residual"))
    out, of_residual = (None if d is None else c.view(d) for d in (dx, dresidual))
    sums, dots = (np.empty((c.samples * groups, c.depth), np.float32) for _ in range(2))
    per = c.groups if c.last else 1

    def work(lo: int, hi: int) -> None:
        v, g = (rows[lo], dys[lo]) if c.last else (rows[lo:hi], dys[lo:hi])
        r = c.of_groups(rstd, lo, hi)
        xhat = v - c.of_groups(mean, lo, hi)
        if activation is not None:
            z = xhat * (r if weight is None else r * c.of_channels(weight, lo, hi))
            if bias is not None:
                z += c.of_channels(bias, lo, hi)
            if added is not None:
                z += added[lo] if c.last else added[lo:hi]
            g = _slope(activation, g, z)
        if of_residual is not None:
            of_residual[lo if c.last else slice(lo, hi)] = g
        xhat *= r
        at = slice(lo * per, hi * per)
        sums[at], dots[at] = (a.reshape(-1, c.depth) for a in (c.sums(g), c.dots(g, xhat)))
        if out is None:
            return
        o = out[lo] if c.last else out[lo:hi]
        w = None if weight is None else c.of_channels(weight, lo, hi)
        flat = None if w is None else w.reshape(-1, c.depth)
        means, slopes = (c.means(a[at], flat) for a in (sums, dots))
        if c.last:
            means, slopes = (np.repeat(a, c.depth) for a in (means, slopes))
        else:
            means, slopes = means[:, None, None], slopes[:, None, None]
        np.multiply(g, 1 if w is None else w, out=o)
        o -= means
        xhat *= slopes
        o -= xhat
        o *= r

    c.over(work)
    dweight, dbias = (
        a.reshape(-1, c.channels).sum(0, dtype=np.float64).astype(np.float32) if name in needs else None
        for name, a in (("weight", dots), ("bias", sums))
    )
    return dx, dweight, dbias, dresidual


def group_norm_forward(
    x: np.ndarray,
    weight: Any = None,
    bias: Any = None,
    residual: Any = None,
    *,
    needs: tuple = (),
    num_groups: int,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple[tuple, dict]:
    y, mean, _, rstd = normalise(x, weight, bias, residual, num_groups, eps, activation)
    return (y,), group_norm_saved(activation, x, mean, rstd, weight, bias, residual) if needs else {}


def group_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    num_groups: int,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple:
    return gradients(dys[0], saved, inputs, needs, num_groups, activation)
