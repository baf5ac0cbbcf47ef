"""Dropout: an array times its mask, in blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _blocks, _masks

REFUSALS = {"float64": "float64 is left to the definition"}


def _masked(x: np.ndarray, out: np.ndarray, seed: np.ndarray, p: float, first: bool) -> np.ndarray:
    """out = x m / (1 − p). first: the mask will be wanted once more."""
    mask = _masks.mask(seed, p, x.size, first)
    flat = np.ascontiguousarray(x).reshape(-1)
    y = out.reshape(-1) if out.flags.c_contiguous else np.empty(x.size, x.dtype)

    def work(lo: int, hi: int) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            if y.dtype == np.float32:
                np.multiply(flat[lo:hi], mask[lo:hi], out=y[lo:hi])
            else:
                y[lo:hi] = flat[lo:hi].astype(np.float32) * mask[lo:hi]

    _blocks.each(flat.size, _blocks.BYTES // 4, work)
    if not out.flags.c_contiguous:
        out[...] = y.reshape(x.shape)
    return out


def dropout_refuses(x: Any, seed: Any, *, needs: tuple = (), p: float = 0.5) -> str | None:
    return REFUSALS["float64"] if x.dtype == np.float64 else None


def dropout_forward(x: np.ndarray, seed: np.ndarray, *, needs: tuple = (), p: float = 0.5) -> tuple[tuple, dict]:
    return (_masked(x, _blocks.empty_like(x), seed, p, bool(needs)),), {"seed": seed} if needs else {}


def dropout_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 0.5) -> tuple:
    (dy,), order = dys, inputs[0].order if inputs[0].contiguous else None
    axes = range(dy.ndim) if order is None else order
    dx = np.empty([dy.shape[a] for a in axes], dy.dtype).transpose(sorted(range(dy.ndim), key=list(axes).__getitem__))
    return _masked(dy, dx, saved["seed"], p, False), None
