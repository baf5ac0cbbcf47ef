"""Local response norm, some samples at a time; the usual beta takes roots, which cost a fraction of a power."""

from __future__ import annotations

import numpy as np

from . import _blocks


def _as_rows(x: np.ndarray) -> tuple[np.ndarray, int]:
    """(x as (N, C, S), or channels-last as (N, S, C); the axis of its channels)"""
    last = not x.flags.c_contiguous
    turned = np.moveaxis(x, 1, -1) if last else x
    shape = (len(x), -1, x.shape[1]) if last else (*x.shape[:2], -1)
    return turned.reshape(shape), 2 if last else 1


def _summed(v: np.ndarray, axis: int, before: int, after: int) -> np.ndarray:
    """Σ v over the channels c − before … c + after, of those that there are."""
    total, v = (np.moveaxis(a, axis, 0) for a in (v.copy(), v))
    channels = len(v)
    for d in range(-before, after + 1):
        if d and abs(d) < channels:
            here = slice(max(0, -d), channels - max(0, d))
            total[here] += v[here.start + d : here.stop + d]
    return np.moveaxis(total, 0, axis)


def _power(s: np.ndarray, beta: float) -> np.ndarray:
    """s^(−beta)"""
    if beta != 0.75:
        return np.power(s, np.float32(-beta))
    root = np.sqrt(s)
    return 1 / (root * np.sqrt(root))


def _over(x: np.ndarray, work: object) -> None:
    size = max(1, min(_blocks.block_rows(x[0].size), len(x)))
    _blocks.over(len(x), size, work, elements=x.size)  # type: ignore[arg-type]


def local_response_norm_forward(
    x: np.ndarray, *, needs: tuple = (), size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> tuple[tuple, dict]:
    y, scale = np.empty_like(x), np.empty_like(x)  # in x's memory order
    (rows, axis), (out, _), (scales, _) = map(_as_rows, (x, y, scale))

    def work(lo: int, hi: int) -> None:
        v, s = rows[lo:hi], scales[lo:hi]
        np.multiply(_summed(v * v, axis, size // 2, (size - 1) // 2), np.float32(alpha / size), out=s)
        s += np.float32(k)
        np.multiply(v, _power(s, beta), out=out[lo:hi])

    _over(x, work)
    return (y,), {"x": x, "scale": scale} if needs else {}


def local_response_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
) -> tuple:
    x = saved["x"]
    dy, dx = np.empty_like(x), np.empty_like(x)
    dy[...] = dys[0]
    (rows, axis), (scales, _), (given, _), (out, _) = map(_as_rows, (x, saved["scale"], dy, dx))

    def work(lo: int, hi: int) -> None:
        v, s, g, o = (a[lo:hi] for a in (rows, scales, given, out))
        p = _power(s, beta)
        near = _summed(g * v * (p / s), axis, (size - 1) // 2, size // 2)
        near *= v
        near *= np.float32(2 * alpha * beta / size)
        np.multiply(g, p, out=o)
        o -= near

    _over(x, work)
    return (dx,)
