"""Distances, cosine similarity and rows of length 1 along the last axis, in blocks of rows that stay in the cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _blocks

REFUSALS = {
    "dtype": "only float32 is faster than the definition",
    "axis": "the axis is the last, and not empty, or the definition computes it",
    "norm": "the definition computes norms of another p than 2",
}


def _refuses(x: Any, axis: int, p: float = 2.0) -> str | None:
    if x.dtype != np.float32:
        return REFUSALS["dtype"]
    if axis != x.ndim - 1 or 0 in x.shape:
        return REFUSALS["axis"]
    return None if p == 2 else REFUSALS["norm"]


def pairwise_distance_refuses(x1: Any, x2: Any, *, needs: tuple, p: float, eps: float) -> str | None:
    return _refuses(x1, x1.ndim - 1, p)


def cosine_similarity_refuses(x1: Any, x2: Any, *, needs: tuple, axis: int, eps: float) -> str | None:
    return _refuses(x1, axis)


def normalize_refuses(x: Any, *, needs: tuple, p: float, axis: int, eps: float) -> str | None:
    return _refuses(x, axis, p)


def _over(work: Any, shape: tuple, wide: tuple, narrow: tuple) -> None:
    """work(*blocks of rows of arrays of ``shape``, *blocks of columns of what has a number for each row)."""
    n = shape[-1]
    rows = [np.ascontiguousarray(a).reshape(-1, n) if a.shape == shape else a for a in wide]
    columns = [a.reshape(-1, 1) for a in narrow]

    def block(lo: int, hi: int) -> None:
        with np.errstate(all="ignore"):
            work(*(a[lo:hi] for a in rows), *(a[lo:hi] for a in columns))

    _blocks.over(len(rows[0]), _blocks.block_rows(n), block, elements=rows[0].size)


def _ratio(v: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """v / norm, 0 where either is."""
    ratio = v / norm
    if (norm == 0).any():
        ratio[(norm == 0)[:, 0]] = 0
    return ratio


def pairwise_distance_forward(
    x1: np.ndarray, x2: np.ndarray, *, needs: tuple = (), p: float = 2.0, eps: float = 1e-6
) -> tuple[tuple, dict]:
    y = np.empty(x1.shape[:-1], np.float32)

    def work(a: np.ndarray, b: np.ndarray, y: np.ndarray) -> None:
        d = a - b
        d += np.float32(eps)
        np.sqrt(_blocks.dots(d, d), out=y[:, 0])

    _over(work, x1.shape, (x1, x2), (y,))
    return (y,), {"x1": x1, "x2": x2, "norm": y.copy()} if needs else {}


def pairwise_distance_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 2.0, eps: float = 1e-6
) -> tuple:
    x1, x2 = saved["x1"], saved["x2"]
    one, two = (np.empty(x1.shape, np.float32) if name in needs else None for name in ("x1", "x2"))
    out = one if two is None else two

    def work(a: np.ndarray, b: np.ndarray, o: np.ndarray, dy: np.ndarray, norm: np.ndarray) -> None:
        d = a - b
        d += np.float32(eps)
        np.multiply(_ratio(d, norm), dy if two is None else -dy, out=o)

    _over(work, x1.shape, (x1, x2, out), (np.ascontiguousarray(dys[0]), saved["norm"]))
    if one is not None and two is not None:
        np.negative(two, out=one)
    return one, two


def cosine_similarity_forward(
    x1: np.ndarray, x2: np.ndarray, *, needs: tuple = (), axis: int = 1, eps: float = 1e-8
) -> tuple[tuple, dict]:
    y, one, two = (np.empty(x1.shape[:-1], np.float32) for _ in range(3))

    def work(a: np.ndarray, b: np.ndarray, y: np.ndarray, one: np.ndarray, two: np.ndarray) -> None:
        for v, norm in ((a, one), (b, two)):
            np.sqrt(_blocks.dots(v, v), out=norm[:, 0])
        least = np.float32(eps)
        y[:, 0] = _blocks.dots(a, b) / np.maximum(one, least)[:, 0] / np.maximum(two, least)[:, 0]

    _over(work, x1.shape, (x1, x2), (y, one, two))
    return (y,), {"x1": x1, "x2": x2, "norm1": one, "norm2": two, "cosine": y.copy()} if needs else {}


def cosine_similarity_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, axis: int = 1, eps: float = 1e-8
) -> tuple:
    x1, x2 = saved["x1"], saved["x2"]
    dxs = [np.empty(x1.shape, np.float32) if name in needs else None for name in ("x1", "x2")]
    wanted = [dx for dx in dxs if dx is not None]
    least = np.float32(eps)

    def work(a: np.ndarray, b: np.ndarray, *rest: np.ndarray) -> None:
        *outs, dy, y, one, two = rest
        n1, n2 = np.maximum(one, least), np.maximum(two, least)
        pairs = [(a, b, one, n1, n2), (b, a, two, n2, n1)]
        for out, (v, other, norm, n, m) in zip(outs, (q for q, dx in zip(pairs, dxs) if dx is not None)):
            np.multiply(other, dy / (n * m), out=out)
            out -= _ratio(v, norm) * (dy * y / n)

    narrow = np.ascontiguousarray(dys[0]), saved["cosine"], saved["norm1"], saved["norm2"]
    _over(work, x1.shape, (x1, x2, *wanted), narrow)
    return tuple(dxs)


def normalize_forward(
    x: np.ndarray, *, needs: tuple = (), p: float = 2.0, axis: int = 1, eps: float = 1e-12
) -> tuple[tuple, dict]:
    y, norm = np.empty(x.shape, np.float32), np.empty(x.shape[:-1], np.float32)

    def work(v: np.ndarray, y: np.ndarray, norm: np.ndarray) -> None:
        np.sqrt(_blocks.dots(v, v), out=norm[:, 0])
        np.divide(v, np.maximum(norm, np.float32(eps)), out=y)

    _over(work, x.shape, (x, y), (norm,))
    return (y,), {"x": x, "norm": norm} if needs else {}


def normalize_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 2.0, axis: int = 1, eps: float = 1e-12
) -> tuple:
    x, dx, least = saved["x"], np.empty(saved["x"].shape, np.float32), np.float32(eps)

    def work(dy: np.ndarray, v: np.ndarray, out: np.ndarray, norm: np.ndarray) -> None:
        n = np.maximum(norm, least)
        dot = np.where(norm >= least, _blocks.dots(dy, v)[:, None] / n / n, np.float32(0))
        np.divide(dy, n, out=out)
        out -= dot * _ratio(v, norm)

    _over(work, x.shape, (dys[0], x, dx), (saved["norm"],))
    return (dx,)
