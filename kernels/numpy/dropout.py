"""Dropout: an array times its mask, in blocks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .._dropout import draws
from . import _blocks, _masks

REFUSALS = {"float64": "float64 is left to the definition"}


def _masked(
    x: np.ndarray, out: np.ndarray, seed: np.ndarray, p: float, first: bool, alpha: bool, features: int, shifted: bool
) -> np.ndarray:
    """out = x m / (1 − p), or as alpha and features say. first: the mask will be wanted once more."""
    rows, size = (math.prod(x.shape[:features]), math.prod(x.shape[features:])) if features else (1, x.size)
    columns = 1 if features else size
    mask = _masks.mask(seed, p, rows * columns, first, alpha).reshape(rows, columns)
    flat = np.ascontiguousarray(x).reshape(rows, size)
    y = out.reshape(rows, size) if out.flags.c_contiguous else np.empty((rows, size), x.dtype)
    _, _, kept, dropped = draws(p, alpha)

    def work(lo: int, hi: int) -> None:
        part = np.s_[lo:hi] if features else np.s_[:, lo:hi]
        m = mask[part]
        with np.errstate(invalid="ignore", over="ignore"):
            if alpha and shifted:
                y[part] = flat[part].astype(np.float32, copy=False) * m + np.where(
                    m, np.float32(kept), np.float32(dropped)
                )
            elif y.dtype == np.float32:
                np.multiply(flat[part], m, out=y[part])
            else:
                y[part] = flat[part].astype(np.float32) * m

    _blocks.each(
        *((rows, max(_blocks.BYTES // 4 // max(size, 1), 1)) if features else (size, _blocks.BYTES // 4)), work
    )
    if not out.flags.c_contiguous:
        out[...] = y.reshape(x.shape)
    return out


def dropout_refuses(
    x: Any, seed: Any, *, needs: tuple = (), p: float = 0.5, alpha: bool = False, features: int = 0
) -> str | None:
    return REFUSALS["float64"] if x.dtype == np.float64 else None


def dropout_forward(
    x: np.ndarray, seed: np.ndarray, *, needs: tuple = (), p: float = 0.5, alpha: bool = False, features: int = 0
) -> tuple[tuple, dict]:
    y = _masked(x, _blocks.empty_like(x), seed, p, bool(needs), alpha, features, True)
    return (y,), {"seed": seed} if needs else {}


def dropout_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 0.5, alpha: bool = False, features: int = 0
) -> tuple:
    (dy,), order = dys, inputs[0].order if inputs[0].contiguous else None
    axes = range(dy.ndim) if order is None else order
    dx = np.empty([dy.shape[a] for a in axes], dy.dtype).transpose(sorted(range(dy.ndim), key=list(axes).__getitem__))
    return _masked(dy, dx, saved["seed"], p, False, alpha, features, False), None
