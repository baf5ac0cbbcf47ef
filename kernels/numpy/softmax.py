"""Softmax, softmin and log-softmax over the last axis, in blocks of rows that stay in the cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _blocks

REFUSALS = {
    "dtype": "only float32 is faster than the definition",
    "axis": "the axis is the last, and not empty, or the definition computes it",
}


def _refuses(x: Any, axis: int) -> str | None:
    if x.dtype != np.float32:
        return REFUSALS["dtype"]
    if axis != x.ndim - 1 or 0 in x.shape:
        return REFUSALS["axis"]
    return None


def softmax_refuses(x: Any, *, needs: tuple, axis: int) -> str | None:
    return _refuses(x, axis)


def softmin_refuses(x: Any, *, needs: tuple, axis: int) -> str | None:
    return _refuses(x, axis)


def log_softmax_refuses(x: Any, *, needs: tuple, axis: int) -> str | None:
    return _refuses(x, axis)


def _over_rows(work: Any, *xs: np.ndarray) -> np.ndarray:
    """work(*blocks of rows of xs, block of the result) over all rows; the result."""
    shape, n = xs[0].shape, xs[0].shape[-1]
    out = np.empty(shape, np.float32)
    rows = [x.reshape(-1, n) for x in (*xs, out)]
    _blocks.over(
        len(rows[0]),
        _blocks.block_rows(n),
        lambda lo, hi: work(*(r[lo:hi] for r in rows)),
        elements=out.size,
    )
    return out


def softmax_forward(x: np.ndarray, *, needs: tuple = (), axis: int = -1) -> tuple[tuple, dict]:
    def work(x: np.ndarray, o: np.ndarray) -> None:
        np.subtract(x, x.max(1, keepdims=True), out=o)
        np.exp(o, out=o)
        o *= 1 / o.sum(1, keepdims=True)

    y = _over_rows(work, x)
    return (y,), {"y": y} if needs else {}


def softmax_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, axis: int = -1) -> tuple:
    def work(dy: np.ndarray, y: np.ndarray, o: np.ndarray) -> None:
        np.subtract(dy, _blocks.dots(dy, y)[:, None], out=o)
        o *= y

    return (_over_rows(work, dys[0], saved["y"]),)


def softmin_forward(x: np.ndarray, *, needs: tuple = (), axis: int = -1) -> tuple[tuple, dict]:
    def work(x: np.ndarray, o: np.ndarray) -> None:
        np.subtract(x.min(1, keepdims=True), x, out=o)
        np.exp(o, out=o)
        o *= 1 / o.sum(1, keepdims=True)

    y = _over_rows(work, x)
    return (y,), {"y": y} if needs else {}


def softmin_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, axis: int = -1) -> tuple:
    def work(dy: np.ndarray, y: np.ndarray, o: np.ndarray) -> None:
        np.subtract(_blocks.dots(dy, y)[:, None], dy, out=o)
        o *= y

    return (_over_rows(work, dys[0], saved["y"]),)


def log_softmax_forward(x: np.ndarray, *, needs: tuple = (), axis: int = -1) -> tuple[tuple, dict]:
    def work(x: np.ndarray, o: np.ndarray) -> None:
        np.subtract(x, x.max(1, keepdims=True), out=o)
        o -= np.log(np.exp(o).sum(1, keepdims=True))

    y = _over_rows(work, x)
    return (y,), {"y": y} if needs else {}


def log_softmax_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, axis: int = -1) -> tuple:
    def work(dy: np.ndarray, y: np.ndarray, o: np.ndarray) -> None:
        np.exp(y, out=o)
        o *= dy.sum(1, keepdims=True)
        np.subtract(dy, o, out=o)

    return (_over_rows(work, dys[0], saved["y"]),)
