"""Attention of a few queries to a cache: for each sequence the tokens that it has, through BLAS over its heads."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import guests, layout

from .._attention import order_of_y, scale_of
from .._layout import empty_of
from . import _blocks

REFUSALS = {"float64": "float64 is left to the definition"}


def attention_decode_refuses(q: Any, *others: Any, needs: tuple = (), **options: Any) -> str | None:
    return REFUSALS["float64"] if q.dtype == np.float64 else None


def attention_decode_forward(
    q: Any, k: Any, v: Any, lengths: Any = None, table: Any = None, sinks: Any = None,
    *, needs: tuple = (), causal: bool = True, window: tuple = (-1, -1), scale: float | None = None, softcap: float = 0.0,
) -> tuple[tuple, dict]:  # fmt: skip
    n, heads, rows, _ = q.shape
    order, dense = layout(q.shape, tuple(s // q.itemsize for s in q.strides))
    y = empty_of((n, heads, rows, v.shape[3]), q.dtype, order_of_y(order, dense))
    lse = np.empty((n, heads, rows), np.float32)
    factor = np.float32(scale_of(q, scale))
    column = None if sinks is None else sinks.astype(np.float32)[:, None, None]
    capacity = k.shape[2] * (1 if table is None else table.shape[1])
    ends = [capacity] * n if lengths is None else [int(x) for x in lengths]

    def work(items: list) -> None:
        with np.errstate(all="ignore"):
            for at in items:
                end = ends[at]
                low = max(0, end - rows - window[0]) if window[0] >= 0 else 0
                its_k, its_v = (_tokens(x, None if table is None else table[at], at, low, end) for x in (k, v))
                queries = q[at].astype(np.float32) * factor
                y[at], lse[at] = _attended(queries, its_k, its_v, low, end, window, softcap, column)

    count = max(1, min(_blocks.threads(), n))
    _blocks.apart([list(range(i, n, count)) for i in range(count)], work)
    return (y, lse), {}


def _tokens(x: Any, pages: Any, at: int, low: int, end: int) -> np.ndarray:
    """(Hk, end − low, width) float32: a sequence's tokens from ``low`` on."""
    if pages is None:
        return x[at, :, low:end].astype(np.float32, copy=False)
    size = x.shape[2]
    first, last = low // size, -(-end // size)
    found = x[pages[first:last]].transpose(1, 0, 2, 3).reshape(x.shape[1], (last - first) * size, x.shape[3])
    return found[:, low - first * size : end - first * size].astype(np.float32, copy=False)


def _attended(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, low: int, end: int, window: tuple, softcap: float, sinks: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(y (Hq, Lq, Dv), lse (Hq, Lq)) of a sequence whose tokens low … end − 1 are k and v."""
    (heads, rows, width), (groups, keys, _) = q.shape, k.shape
    joint = q.reshape(groups, heads // max(groups, 1) * rows, width)
    s = guests.matmul(joint, k.swapaxes(1, 2)).reshape(heads, rows, keys)
    if softcap:
        s *= np.float32(1 / softcap)
        np.tanh(s, out=s)
        s *= np.float32(softcap)
    j, own = np.arange(low, end), (end - rows + np.arange(rows))[:, None]
    hidden = np.zeros((rows, keys), bool)
    if window[0] >= 0:
        hidden |= j < own - window[0]
    if window[1] >= 0:
        hidden |= j > own + window[1]
    if hidden.any():
        np.copyto(s, -np.inf, where=hidden)
    top = s.max(2, keepdims=True, initial=-np.inf)
    if sinks is not None:
        top = np.maximum(top, sinks)
    top[top == -np.inf] = 0
    s -= top
    np.exp(s, out=s)
    total = s.sum(2, keepdims=True)
    if sinks is not None:
        total += np.exp(sinks - top)
    y = guests.matmul(s.reshape(groups, heads // max(groups, 1) * rows, keys), v).reshape(heads, rows, v.shape[2])
    lse = np.log(total) + top
    total[total == 0] = 1
    return y / total, lse[:, :, 0]
