"""Linear through BLAS, with bias and activation in place while the rows are in the cache."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpulayers.arrays import guests

from .._activation import FROM_Y, numbers_of
from .._linears import BIASES, WEIGHTS, added_up, kept, named
from . import _blocks
from . import activation as activations

REFUSALS = {"float64": "float64 is left to the definition"}


def _in_float32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32, copy=False)  # BLAS has no 16-bit product; NumPy's own is 300 times slower


def _matrix(x: np.ndarray, columns: int) -> np.ndarray:
    return _in_float32(x).reshape(math.prod(x.shape[:-1]), columns)


def _rounded(x: np.ndarray, like: np.dtype, shape: tuple) -> np.ndarray:
    return x.astype(like, copy=False).reshape(shape)


def linear_refuses(
    x: Any, weight: Any, bias: Any = None, *, needs: tuple = (), activation: str | None = None
) -> str | None:
    return REFUSALS["float64"] if x.dtype == np.float64 else None


def linear_forward(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    needs: tuple = (),
    activation: str | None = None,
) -> tuple[tuple, dict]:
    out, features = weight.shape
    z = _blocks.product(_matrix(x, features), _in_float32(weight).T)
    if bias is not None:
        b = _in_float32(bias)

        def add(lo: int, hi: int) -> None:
            z[lo:hi] += b

        _blocks.each(len(z), _blocks.block_rows(out), add, z.size)
    shape = (*x.shape[:-1], out)
    saved = {"x": x} if "weight" in needs else {}
    if "x" in needs:
        saved["weight"] = weight
    if activation is None:
        return (_rounded(z, x.dtype, shape),), saved
    by_y = activation in FROM_Y
    y = z if by_y or not needs else np.empty_like(z)
    activations.value(activation, z.reshape(-1), y.reshape(-1), numbers_of(activation))
    rounded = _rounded(y, x.dtype, shape)
    if needs and by_y:
        saved["y"] = rounded
    elif needs:
        saved |= {"z": _rounded(z, x.dtype, shape), "weight": weight} | ({} if bias is None else {"bias": bias})
    return (rounded,), saved


def linear_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, activation: str | None = None) -> tuple:
    (dy,), (x, weight, _) = dys, inputs
    out, features = weight.shape
    dz = _matrix(dy, out)
    if activation is not None:
        kept = saved["y" if activation in FROM_Y else "z"]
        flat, dz = np.ascontiguousarray(dz).reshape(-1), np.empty(dz.shape, np.float32)
        numbers = numbers_of(activation)
        activations.gradient(activation, flat, kept.reshape(-1), dz.reshape(-1), numbers)
    dx = dw = db = None
    if "x" in needs:
        dx = _rounded(_blocks.product(dz, _in_float32(saved["weight"])), x.dtype, x.shape)
    if "weight" in needs:
        dw = _rounded(guests.matmul(dz.T, _matrix(saved["x"], features)), x.dtype, weight.shape)
    if "bias" in needs:
        db = _rounded(dz.sum(0), x.dtype, (out,))
    return dx, dw, db


# --- several weights of one x ----------------------------------------------------------------------------------------


def linears_refuses(x: Any, *_: Any, needs: tuple = ()) -> str | None:
    return REFUSALS["float64"] if x.dtype == np.float64 else None


def linears_forward(
    x: np.ndarray, weight: Any, weight_2: Any, weight_3: Any = None, bias: Any = None, bias_2: Any = None,
    bias_3: Any = None, *, needs: tuple = (),
) -> tuple[tuple, dict]:  # fmt: skip
    pairs = zip((weight, weight_2, weight_3), (bias, bias_2, bias_3))
    outputs = tuple(linear_forward(x, w, b)[0][0] for w, b in pairs if w is not None)
    given = named((weight, weight_2, weight_3))
    return outputs, kept(x, given, needs)


def linears_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    """dx is added up in float32, in place."""
    x, features, dx = inputs[0], inputs[0].shape[-1], None
    rows = _matrix(saved["x"], features) if "x" in saved else None
    grads: dict[str, np.ndarray] = {}
    for dy, w, name, bias in zip(dys, inputs[1:4], WEIGHTS, BIASES):
        if dy is None:
            grads |= {n: np.zeros(s, x.dtype) for n, s in ((name, w.shape), (bias, w.shape[:1])) if n in needs}
            continue
        flat = _matrix(dy, w.shape[0])
        if "x" in needs:
            part = _blocks.product(flat, _in_float32(saved[name]))
            dx = part if dx is None else np.add(dx, part, out=dx)
        if name in needs:
            assert rows is not None, "x is saved for weights' gradients"
            grads[name] = _rounded(guests.matmul(flat.T, rows), x.dtype, w.shape)
        if bias in needs:
            grads[bias] = _rounded(flat.sum(0), x.dtype, w.shape[:1])
    return None if dx is None else _rounded(dx, x.dtype, x.shape), *(grads.get(n) for n in WEIGHTS + BIASES)


# --- products in batches ---------------------------------------------------------------------------------------------


def matmul_refuses(a: Any, b: Any, c: Any = None, *, needs: tuple = (), alpha: float = 1.0) -> str | None:
    return REFUSALS["float64"] if a.dtype == np.float64 else None


def matmul_forward(
    a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None, *, needs: tuple = (), alpha: float = 1.0
) -> tuple[tuple, dict]:
    y = np.ascontiguousarray(guests.matmul(_in_float32(a), _in_float32(b)))
    if alpha != 1:
        y *= np.float32(alpha)
    if c is not None:
        y += _in_float32(c)
    saved = {name: x for name, x, of in (("a", a, "b"), ("b", b, "a")) if of in needs}
    return (_rounded(y, a.dtype, y.shape),), saved


def matmul_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, alpha: float = 1.0) -> tuple:
    dy, dtype = _in_float32(dys[0]), dys[0].dtype
    scaled = dy if alpha == 1 else dy * np.float32(alpha)
    da = db = None
    if "a" in needs:
        found = guests.matmul(scaled, _in_float32(saved["b"]).swapaxes(-1, -2))
        da = np.ascontiguousarray(added_up(found, inputs[0].shape).astype(dtype, copy=False))
    if "b" in needs:
        a, shape = _in_float32(saved["a"]), inputs[1].shape
        if len(shape) == 2 and a.shape[:-1] == dy.shape[:-1]:
            found = guests.matmul(a.reshape(-1, a.shape[-1]).T, scaled.reshape(-1, dy.shape[-1]))
        else:
            found = added_up(guests.matmul(a.swapaxes(-1, -2), scaled), shape)
        db = np.ascontiguousarray(found.astype(dtype, copy=False))
    return da, db, dys[0].copy(order="C") if "c" in needs else None
