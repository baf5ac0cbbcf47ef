"""Activations in blocks that fit the cache, each a chain of in-place ufuncs that NumPy vectorises.

What costs in NumPy is not what costs elsewhere (ns an element, one core): ``np.where`` 1.2 and a maximum with a scalar
0.4, against 0.1 for arithmetic and bit operations and 0.4–0.6 for exp and tanh. So selections work on bits, and the
error function is a tanh of a polynomial. The chains are in _piecewise.py and _smooth.py; prelu, rrelu and glu in _gates.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .._activation import FROM_Y, OPTIONS, launchers, numbers_of
from . import _blocks, _piecewise, _smooth
from ._gates import REFUSALS, _flat, _over_halves
from ._gates import glu_backward as glu_backward
from ._gates import glu_forward as glu_forward
from ._gates import glu_refuses as glu_refuses
from ._gates import prelu_backward as prelu_backward
from ._gates import prelu_forward as prelu_forward
from ._gates import prelu_refuses as prelu_refuses
from ._gates import rrelu_backward as rrelu_backward
from ._gates import rrelu_forward as rrelu_forward
from ._gates import rrelu_refuses as rrelu_refuses

_CHAINS = vars(_piecewise) | vars(_smooth)


def _in_float32(body: Callable, inputs: tuple[np.ndarray, ...], out: np.ndarray, numbers: tuple[float, ...]) -> None:
    """body(*inputs, out, *numbers) on float32 blocks of flat arrays; 16-bit blocks are cast there and back."""

    def work(lo: int, hi: int) -> None:
        o = out[lo:hi]
        t = o if o.dtype == np.float32 else np.empty(hi - lo, np.float32)
        with np.errstate(all="ignore"):  # exp(88.8) is Inf, as it should be
            body(*(a[lo:hi].astype(np.float32, copy=False) for a in inputs), t, *numbers)
            if t is not o:
                o[...] = t

    _blocks.each(out.size, _blocks.CHAIN, work)


def value(name: str, x: np.ndarray, out: np.ndarray, numbers: tuple[float, ...] = ()) -> None:
    """out = f(x). Flat arrays; ``out`` may be ``x``."""
    _in_float32(_CHAINS[name], (x,), out, numbers)


def gradient(name: str, dy: np.ndarray, kept: np.ndarray, out: np.ndarray, numbers: tuple[float, ...] = ()) -> None:
    """out = dy f'(x), from what the forward kept. Flat arrays; ``out`` is neither of the others."""
    _in_float32(_CHAINS[f"{name}_gradient"], (dy, kept), out, numbers)


def _forward(name: str, x: np.ndarray, _: None, *numbers: float) -> np.ndarray:
    y = _blocks.empty_like(x)
    value(name, _blocks.flat_like(x, x), y.reshape(-1) if y.flags.c_contiguous else _blocks.flat_like(y, y), numbers)
    return y


def _backward(name: str, dy: np.ndarray, kept: np.ndarray, _: None, *numbers: float) -> np.ndarray:
    dx = _blocks.empty_like(kept)
    gradient(name, _blocks.flat_like(dy, dx), _blocks.flat_like(kept, dx), _blocks.flat_like(dx, dx), numbers)
    return dx


def _refuses(x: Any, *, needs: tuple = (), **options: Any) -> str | None:
    return REFUSALS["float64"] if x.dtype == np.float64 else None


globals().update(launchers(_forward, _backward))  # relu_forward, relu_backward and so on
globals().update(dict.fromkeys([f"{name}_refuses" for name in OPTIONS], _refuses))


# --- gated units: f(a) b, of two arrays or of the halves of one, which are read where they lie ------------------------


def _rows(x: np.ndarray, gain: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) as matrices: one row of two arrays, or the halves of x's rows."""
    if gain is not None:
        return _flat(x, None)[None], _flat(gain, None)[None]
    halves = np.ascontiguousarray(x).reshape(math.prod(x.shape[:-1]), 2, x.shape[-1] // 2)
    return halves[:, 0], halves[:, 1]


def _block(x: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """A copy in float32."""
    return x[rows, columns].astype(np.float32)


def gated_refuses(x: Any, gain: Any = None, *, needs: tuple = (), activation: str = "silu") -> str | None:
    return _refuses(x)


def gated_forward(
    x: np.ndarray, gain: np.ndarray | None = None, *, needs: tuple = (), activation: str = "silu"
) -> tuple[tuple, dict]:
    a, b = _rows(x, gain)
    f, numbers = _CHAINS[activation], numbers_of(activation)
    y = np.empty(a.shape, x.dtype)

    def work(rows: slice, columns: slice) -> None:
        t = _block(a, rows, columns)
        f(t.reshape(-1), t.reshape(-1), *numbers)
        y[rows, columns] = np.multiply(t, b[rows, columns], out=t)

    _over_halves(*a.shape, work)
    shape = x.shape if gain is not None else (*x.shape[:-1], a.shape[1])
    return (y.reshape(shape),), ({"x": x} | ({} if gain is None else {"gain": gain})) if needs else {}


def gated_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, activation: str = "silu"
) -> tuple[np.ndarray | None, ...]:
    x, gain = saved["x"], saved.get("gain")
    a, b = _rows(x, gain)
    dy = _flat(dys[0], None).reshape(a.shape)
    f, slope, numbers = _CHAINS[activation], _CHAINS[f"{activation}_gradient"], numbers_of(activation)
    grads = [np.empty(x.shape, x.dtype) if n in needs else None for n in ("x", "gain")]
    if gain is None:
        da, db = _rows(grads[0], None)
    else:
        da, db = (None if g is None else g.reshape(a.shape) for g in grads)

    def work(rows: slice, columns: slice) -> None:
        v, g = _block(a, rows, columns), _block(dy, rows, columns)
        y = np.empty_like(v)
        f(v.reshape(-1), y.reshape(-1), *numbers)
        if db is not None:
            db[rows, columns] = g * y
        if da is not None:
            g *= b[rows, columns]
            t = np.empty_like(v)
            slope(g.reshape(-1), (y if activation in FROM_Y else v).reshape(-1), t.reshape(-1), *numbers)
            da[rows, columns] = t

    _over_halves(*a.shape, work)
    return tuple(grads)
