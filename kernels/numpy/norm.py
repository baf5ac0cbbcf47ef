"""Norms in blocks that stay in the cache. Sums of squares are dot products, sums over rows products with ones.

Where an operand would be broadcast along rows, NumPy falls out of its fast loops (0.2 against 0.1 ns an element), so
the weights are laid out once as a block of equal rows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .._norm import for_both, group_norm_saved, norms_own
from . import _blocks
from ._batch_norm import batch_moments_forward as batch_moments_forward
from ._batch_norm import batch_norm_backward as batch_norm_backward
from ._batch_norm import batch_norm_forward as batch_norm_forward
from ._channels import block_of
from ._conv_norm import conv_batch_norm_backward as conv_batch_norm_backward
from ._conv_norm import conv_batch_norm_forward as conv_batch_norm_forward
from ._group_norm import gradients, normalise
from ._group_norm import group_norm_backward as group_norm_backward
from ._group_norm import group_norm_forward as group_norm_forward
from ._local_response_norm import local_response_norm_backward as local_response_norm_backward
from ._local_response_norm import local_response_norm_forward as local_response_norm_forward

REFUSALS = {
    "dtype": "only float32 is faster than the definition",
    "float64": "float64 is left to the definition",
    "empty": "nothing to compute: the definition does as well",
    "order": "x is row-major or channels-last in memory, or the definition computes it",
}


HALVES = "float16", "bfloat16"


def _refuses(x: Any) -> str | None:
    if x.dtype != np.float32:
        return REFUSALS["dtype"]
    return REFUSALS["empty"] if 0 in x.shape else None


def layer_norm_refuses(x: Any, weight: Any, bias: Any, *, needs: tuple, **options: Any) -> str | None:
    return _refuses(x)


def rms_norm_refuses(x: Any, weight: Any, *, needs: tuple, **options: Any) -> str | None:
    return _refuses(x)


def add_layer_norm_refuses(
    x: Any, residual: Any, *weights: Any, needs: tuple, dtype: str | None = None, **options: Any
) -> str | None:
    return _refuses(x) or (REFUSALS["dtype"] if residual.dtype != x.dtype or dtype in HALVES else None)


def add_rms_norm_refuses(x: Any, residual: Any, *weights: Any, needs: tuple, **options: Any) -> str | None:
    return add_layer_norm_refuses(x, residual, needs=needs, **options)


def batch_norm_refuses(x: Any, *parameters: Any, needs: tuple, **options: Any) -> str | None:
    if (reason := _refuses(x)) is not None:
        return reason
    last = tuple([0, *range(2, x.ndim), 1])
    return None if x.contiguous and (x.order is None or x.order == last) else REFUSALS["order"]


def batch_moments_refuses(x: Any, *, needs: tuple) -> str | None:
    return batch_norm_refuses(x, needs=needs)


def conv_batch_norm_refuses(x: Any, weight: Any, *others: Any, needs: tuple, **options: Any) -> str | None:
    if x.dtype == np.float64:
        return REFUSALS["float64"]
    return REFUSALS["empty"] if 0 in x.shape else None


def group_norm_refuses(x: Any, *parameters: Any, needs: tuple, **options: Any) -> str | None:
    return batch_norm_refuses(x, needs=needs)


def instance_norm_refuses(x: Any, *parameters: Any, needs: tuple, **options: Any) -> str | None:
    return batch_norm_refuses(x, needs=needs)


def local_response_norm_refuses(x: Any, *, needs: tuple, **options: Any) -> str | None:
    return batch_norm_refuses(x, needs=needs)


# --- layer norm and RMS norm -----------------------------------------------------------------------------------------


def _tiled(p: np.ndarray | None, rows: int) -> np.ndarray | None:
    """A weight as a block of equal rows."""
    if p is None:
        return None
    tile = np.empty((rows, p.size), np.float32)
    tile[...] = p.reshape(-1)
    return tile


def _forward(
    x: np.ndarray, weight: Any, bias: Any, shape: tuple, eps: float | None, rms: bool, residual: Any = None
) -> tuple:
    """(y, x + residual where there is one, mean, rstd)"""
    lead, n = x.shape[: x.ndim - len(shape)], math.prod(shape)
    m, y = math.prod(lead), np.empty(x.shape, np.float32)
    rows, out = x.reshape(m, n), y.reshape(m, n)
    total = None if residual is None else np.empty(x.shape, np.float32)
    terms = None if residual is None else (rows, residual.reshape(m, n))
    rows = rows if total is None else total.reshape(m, n)
    mean, rstd = np.empty(lead, np.float32), np.empty(lead, np.float32)
    means, rstds = mean.reshape(m, 1), rstd.reshape(m, 1)
    size = block_of(n, m)
    w, b, count = _tiled(weight, size), _tiled(bias, size), np.float32(n)

    def work(lo: int, hi: int) -> None:
        v, o, r = rows[lo:hi], out[lo:hi], rstds[lo:hi]
        if terms is not None:
            np.add(terms[0][lo:hi], terms[1][lo:hi], out=v)
        if not rms:
            mu = means[lo:hi]
            np.divide(v.sum(1, keepdims=True), count, out=mu)
            v = np.subtract(v, mu, out=o)
        np.divide(1, np.sqrt(_blocks.dots(v, v)[:, None] / count + np.float32(eps)), out=r)
        np.multiply(v, r, out=o)
        if w is not None:
            o *= w[: hi - lo]
        if b is not None:
            o += b[: hi - lo]

    _blocks.over(m, size, work, elements=y.size)
    return y, total, mean, rstd


def _backward(
    dy: np.ndarray, saved: dict, inputs: tuple, needs: tuple, shape: tuple, dsum: np.ndarray | None = None
) -> tuple:
    """(dx, dweight, dbias); dsum: what is added to dx."""
    x, mean, weight = saved["x"], saved.get("mean"), saved.get("weight")
    n = math.prod(shape)
    rows, dys = x.reshape(-1, n), dy.reshape(-1, n)
    m = len(rows)
    rstds, means = saved["rstd"].reshape(m, 1), None if mean is None else mean.reshape(m, 1)
    dx = np.empty(x.shape, np.float32) if "x" in needs else None
    added = None if dsum is None else dsum.reshape(m, n)
    size = block_of(n, m)
    w, ones, count = _tiled(weight, size), np.ones(size, np.float32), np.float32(n)

    def work(lo: int, hi: int) -> tuple:
        g, r = dys[lo:hi], rstds[lo:hi]
        xhat = rows[lo:hi] * r if means is None else rows[lo:hi] - means[lo:hi]
        if means is not None:
            xhat *= r
        dw = np.einsum("ij,ij->j", g, xhat) if "weight" in needs else None
        db = ones[: hi - lo] @ g if "bias" in needs else None
        if dx is not None:
            o = dx.reshape(m, n)[lo:hi]
            g = g if w is None else np.multiply(g, w[: hi - lo], out=o)
            dot = _blocks.dots(g, xhat)[:, None] / count
            if means is not None:
                g = np.subtract(g, g.sum(1, keepdims=True) / count, out=o)
            xhat *= dot
            np.subtract(g, xhat, out=o)
            o *= r
            if added is not None:
                o += added[lo:hi]
        return dw, db

    sums = zip(*_blocks.over(m, size, work, elements=x.size))
    dweight, dbias = (None if s[0] is None else np.sum(s, 0).reshape(shape) for s in sums)
    return dx, dweight, dbias


def layer_norm_forward(
    x: np.ndarray,
    weight: Any = None,
    bias: Any = None,
    *,
    needs: tuple = (),
    normalized_shape: tuple,
    eps: float = 1e-5,
) -> tuple[tuple, dict]:
    y, _, mean, rstd = _forward(x, weight, bias, normalized_shape, eps, rms=False)
    saved = {"x": x, "mean": mean, "rstd": rstd} | ({} if weight is None else {"weight": weight})
    return (y,), saved if needs else {}


def layer_norm_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, normalized_shape: tuple, eps: float = 1e-5
) -> tuple:
    return _backward(dys[0], saved, inputs, needs, normalized_shape)


def rms_norm_forward(
    x: np.ndarray, weight: Any = None, *, needs: tuple = (), normalized_shape: tuple, eps: float | None = None
) -> tuple[tuple, dict]:
    y, _, _, rstd = _forward(x, weight, None, normalized_shape, eps, rms=True)
    return (y,), {"x": x, "rstd": rstd} | ({} if weight is None else {"weight": weight}) if needs else {}


def rms_norm_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, normalized_shape: tuple, eps: float | None = None
) -> tuple:
    return _backward(dys[0], saved, inputs, needs, normalized_shape)[:2]


def _backward_of_sum(dys: tuple, saved: dict, inputs: tuple, needs: tuple, shape: tuple) -> tuple:
    """(dx, dresidual, dweight, dbias)"""
    dy, dsum = dys
    if dy is None:
        weights = (np.zeros(shape, np.float32) if name in needs else None for name in ("weight", "bias"))
        return for_both((np.array(dsum, order="C"), *weights), needs)
    return for_both(_backward(dy, *norms_own(saved, inputs, needs), shape, dsum), needs)


def add_layer_norm_forward(
    x: np.ndarray,
    residual: np.ndarray,
    weight: Any = None,
    bias: Any = None,
    *,
    needs: tuple = (),
    normalized_shape: tuple,
    eps: float = 1e-5,
    dtype: None = None,
) -> tuple[tuple, dict]:
    y, total, mean, rstd = _forward(x, weight, bias, normalized_shape, eps, rms=False, residual=residual)
    saved = {"sum": total, "mean": mean, "rstd": rstd} | ({} if weight is None else {"weight": weight})
    return (y, total), saved if needs else {}


def add_layer_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    normalized_shape: tuple,
    eps: float = 1e-5,
    dtype: None = None,
) -> tuple:
    return _backward_of_sum(dys, saved, inputs, needs, normalized_shape)


def add_rms_norm_forward(
    x: np.ndarray,
    residual: np.ndarray,
    weight: Any = None,
    *,
    needs: tuple = (),
    normalized_shape: tuple,
    eps: float | None = None,
    dtype: None = None,
) -> tuple[tuple, dict]:
    y, total, _, rstd = _forward(x, weight, None, normalized_shape, eps, rms=True, residual=residual)
    saved = {"sum": total, "rstd": rstd} | ({} if weight is None else {"weight": weight})
    return (y, total), saved if needs else {}


def add_rms_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    normalized_shape: tuple,
    eps: float | None = None,
    dtype: None = None,
) -> tuple:
    return _backward_of_sum(dys, saved, inputs, needs, normalized_shape)[:3]


# --- instance norm: group norm with a group for each channel, or batch norm by running statistics --------------------


def instance_norm_forward(
    x: np.ndarray,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    residual: Any = None,
    *,
    needs: tuple = (),
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple[tuple, dict]:
    if not use_input_stats:
        options: dict[str, Any] = dict(needs=needs, eps=eps, activation=activation)
        return batch_norm_forward(x, weight, bias, running_mean, running_var, residual, **options)
    y, mean, var, rstd = normalise(x, weight, bias, residual, x.shape[1], eps, activation)
    if running_mean is not None:
        count = math.prod(x.shape[2:])
        unbiased = var * np.float32(count / max(count - 1, 1))
        for running, found in ((running_mean, mean), (running_var, unbiased)):
            running[...] = (1 - momentum) * running + momentum * found.mean(0)
    return (y,), group_norm_saved(activation, x, mean, rstd, weight, bias, residual) if needs else {}


def instance_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple:
    if not use_input_stats:
        return batch_norm_backward(dys, saved, inputs=inputs, needs=needs, eps=eps, activation=activation)
    *grads, dresidual = gradients(dys[0], saved, inputs, needs, saved["x"].shape[1], activation)
    return *grads, None, None, dresidual
