"""prelu, rrelu and glu in blocks that fit the cache, each a chain of in-place ufuncs that NumPy vectorises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpulayers.arrays import Spec, empty_numpy, spec

from .._gates import rrelu
from .._layout import around, halved, own_memory
from . import _blocks, _random
from ._select import choose, keep

REFUSALS = {"float64": "float64 is left to the definition"}


def _refuses(x: Any) -> str | None:
    return REFUSALS["float64"] if x.dtype == np.float64 else None


def _flat(x: np.ndarray, order: Sequence[int] | None) -> np.ndarray:
    """``x`` as one row in this memory order; copies only if it must."""
    return np.ascontiguousarray(x if order is None else x.transpose(order)).reshape(-1)


def _single(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32, copy=False)


# --- prelu -----------------------------------------------------------------------------------------------------------


class _Walk:
    """x as rows in memory: of one channel each, or of all channels where they are neighbours, or with one weight."""

    def __init__(self, x: np.ndarray, weight: np.ndarray):
        self.order, w = spec(x).like().order, _single(weight).reshape(-1)
        self.a, self.c, b = around(x.shape, self.order, 1) if w.size != 1 else (x.size, 1, 1)
        self.by_row = b != 1
        self.shape = (self.a * self.c, b) if self.by_row else (self.a, self.c)
        self.size = _blocks.block_rows(self.shape[1], budget=4 * _blocks.CHAIN)
        rows = min(self.size, self.shape[0])
        # Broadcast along rows, NumPy would fall out of its fast loops: the weights are laid out as a block once.
        self.weights = np.tile(w, self.a)[:, None] if self.by_row else w if w.size == 1 else np.tile(w, (rows, 1))

    def rows(self, x: np.ndarray) -> np.ndarray:
        return _flat(x, self.order).reshape(self.shape)

    def weight(self, lo: int, hi: int) -> np.ndarray:
        return self.weights[lo:hi] if self.by_row else self.weights[: hi - lo]

    def over(self, work: Callable[[int, int], Any]) -> list:
        def quiet(lo: int, hi: int) -> Any:
            with np.errstate(all="ignore"):
                return work(lo, hi)

        return _blocks.over(self.shape[0], self.size, quiet, elements=self.shape[0] * self.shape[1])

    def sum(self, parts: list, dtype: np.dtype, shape: tuple) -> np.ndarray:
        """The weight's gradient from each block's sums, over its rows or along each."""
        if self.by_row:
            total = np.concatenate(parts or [np.zeros(0, np.float32)]).reshape(self.a, self.c).sum(0)
        else:
            total = np.sum(parts, 0) if parts else np.zeros(self.c, np.float32)
        return total.astype(dtype).reshape(shape)


def prelu_refuses(x: Any, weight: Any, *, needs: tuple = ()) -> str | None:
    return _refuses(x)


def prelu_forward(x: np.ndarray, weight: np.ndarray, *, needs: tuple = ()) -> tuple[tuple, dict]:
    walk, y = _Walk(x, weight), _blocks.empty_like(x)
    rows, out = walk.rows(x), walk.rows(y)

    def work(lo: int, hi: int) -> None:
        v = _single(rows[lo:hi])
        t = v * walk.weight(lo, hi)
        choose(v > 0, v, t)
        out[lo:hi] = t

    walk.over(work)
    return (y,), {"x": x, "weight": weight} if needs else {}


def prelu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    x, weight = saved["x"], saved["weight"]
    walk, dx = _Walk(x, weight), _blocks.empty_like(x)
    rows, dy, out = walk.rows(x), walk.rows(dys[0]), walk.rows(dx)

    def work(lo: int, hi: int) -> Any:
        v, g = _single(rows[lo:hi]), _single(dy[lo:hi])
        passes = v > 0
        if "x" in needs:
            t = g * walk.weight(lo, hi)
            choose(passes, g, t)
            out[lo:hi] = t
        if "weight" in needs:
            t = v * g
            keep(np.logical_not(passes, out=passes), t, t)
            return t.sum(1 if walk.by_row else 0)

    parts = walk.over(work)
    dweight = walk.sum(parts, weight.dtype, weight.shape) if "weight" in needs else None
    return dx if "x" in needs else None, dweight


# --- rrelu -----------------------------------------------------------------------------------------------------------


def _rrelu(dy: np.ndarray | None, x: np.ndarray, seed: Any, lower: float, upper: float, _: Any) -> np.ndarray:
    out = _blocks.empty_like(x)
    v, g = np.ascontiguousarray(x).reshape(-1), np.ascontiguousarray(x if dy is None else dy).reshape(-1)
    y = out.reshape(-1) if out.flags.c_contiguous else np.empty(x.size, x.dtype)
    key, offset = (0, 0) if seed is None else _random.halves(seed)

    def slopes(lo: int, hi: int) -> np.ndarray:
        words = _random.words(key, offset, lo, hi)
        t = np.empty((len(words[0]), 4), np.float32)
        for j, word in enumerate(words):
            word >>= np.uint64(8)
            t[:, j] = word
        t *= np.float32((upper - lower) * 2.0**-24)
        t += np.float32(lower)
        return t.reshape(-1)[: hi - lo]

    def work(lo: int, hi: int) -> None:
        s, d = _single(v[lo:hi]), _single(g[lo:hi])
        with np.errstate(all="ignore"):
            t = d * (np.float32((lower + upper) / 2) if seed is None else slopes(lo, hi))
            passes = s > 0 if seed is None else ~(s <= 0)
            choose(passes, d, t)
            y[lo:hi] = t

    _blocks.each(x.size, 4 * _random.COUNTERS, work)
    if not out.flags.c_contiguous:
        out[...] = y.reshape(x.shape)
    return out


def rrelu_refuses(x: Any, seed: Any, *, needs: tuple = (), **options: Any) -> str | None:
    return _refuses(x)


rrelu_forward, rrelu_backward = map(own_memory, rrelu(_rrelu))


# --- glu -------------------------------------------------------------------------------------------------------------


def _over_halves(m: int, n: int, work: Callable[[slice, slice], None]) -> None:
    """work(rows, columns) on blocks of an (m, n) matrix: of several rows, or of part of a long one."""
    rows = _blocks.block_rows(n, budget=4 * _blocks.CHAIN)
    pieces = -(-n // _blocks.CHAIN) if rows == 1 else 1
    columns = -(-n // max(pieces, 1))

    def block(t: int, _: int) -> None:
        row, piece = t // pieces * rows, t % pieces * columns
        with np.errstate(all="ignore"):
            work(slice(row, row + rows), slice(piece, piece + columns))

    _blocks.over(-(-m // rows) * pieces if n else 0, 1, block, elements=m * n)


def glu_refuses(x: Any, *, needs: tuple = (), axis: int = -1) -> str | None:
    return _refuses(x)


def glu_forward(x: np.ndarray, *, needs: tuple = (), axis: int = -1) -> tuple[tuple, dict]:
    order, axis = spec(x).like().order, axis % x.ndim
    m, c, b = around(x.shape, order, axis)
    y = empty_numpy(Spec(halved(x.shape, axis), x.dtype, order))
    v, out = _flat(x, order).reshape(m, 2, c // 2 * b), _flat(y, order).reshape(m, c // 2 * b)

    def work(rows: slice, columns: slice) -> None:
        t = np.negative(_single(v[rows, 1, columns]))
        np.exp(t, out=t)
        t += 1
        np.divide(_single(v[rows, 0, columns]), t, out=t)
        out[rows, columns] = t

    _over_halves(m, c // 2 * b, work)
    return (y,), {"x": x} if needs else {}


def glu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, axis: int = -1) -> tuple:
    x = saved["x"]
    order = spec(x).like().order
    m, c, b = around(x.shape, order, axis % x.ndim)
    dx = empty_numpy(Spec(x.shape, x.dtype, order))
    v, out = (_flat(a, order).reshape(m, 2, c // 2 * b) for a in (x, dx))
    dy = _flat(dys[0], order).reshape(m, c // 2 * b)

    def work(rows: slice, columns: slice) -> None:
        s = np.negative(_single(v[rows, 1, columns]))
        np.exp(s, out=s)
        s += 1
        np.divide(1, s, out=s)
        t = _single(dy[rows, columns]) * s
        out[rows, 0, columns] = t
        t *= _single(v[rows, 0, columns])
        np.subtract(1, s, out=s)
        t *= s
        out[rows, 1, columns] = t

    _over_halves(m, c // 2 * b, work)
    return (dx,)
