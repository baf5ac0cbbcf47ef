"""Activations in blocks that fit the cache, each a chain of in-place ufuncs that NumPy vectorises.

What costs in NumPy is not what costs elsewhere (ns an element, one core): ``np.where`` 1.2 and a maximum with a scalar
0.4, against 0.1 for arithmetic and bit operations and 0.4–0.6 for exp and tanh. So selections work on bits, and the
error function is a tanh of a polynomial.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _blocks

FROM_Y = ("relu", "sigmoid", "tanh")
"""Activations whose gradient is computed from y; the others' from x."""
NUMBERS = {"leaky_relu": (0.01,), "elu": (1.0,), "softplus": (1.0, 20.0)}
"""Defaults of the numbers that some have."""
REFUSALS = {"float64": "float64 is left to the definition"}
_ZEROS = np.zeros(_blocks.CHAIN, np.float32)
_LIMIT = np.full(_blocks.CHAIN, 20.0, np.float32)
_NO_CORRECTION = 17.0
"""Above this z, log1p(exp(−z)) is under half an ulp of z in float32, and σ(z) rounds to 1."""


def _choose(where: np.ndarray, a: np.ndarray, o: np.ndarray) -> None:
    """o = a where ``where``, else o; exact for NaN and Inf."""
    bits, out = a.view(np.int32), o.view(np.int32)
    t = np.bitwise_xor(bits, out)
    np.multiply(t, where, out=t)
    np.bitwise_xor(out, t, out=out)


def _keep(where: np.ndarray, a: np.ndarray, o: np.ndarray) -> None:
    """o = a where ``where``, else 0; exact for NaN and Inf."""
    np.multiply(a.view(np.int32), where, out=o.view(np.int32))


# --- values: (x, o) are float32 blocks; o may be x --------------------------------------------------------------------


def _relu(x: np.ndarray, o: np.ndarray) -> None:
    np.maximum(x, _ZEROS[: x.size], out=o)


def _leaky_relu(x: np.ndarray, o: np.ndarray, slope: float) -> None:
    t = x * slope
    if slope == 0:  # 0 · Inf
        o[...] = np.where(x > 0, x, t)
    else:
        (np.maximum if slope <= 1 else np.minimum)(x, t, out=o)


# tanh(x p(x²)) = erf(x/√2) to 2e-7: p is a weighted minimax fit of artanh(erf(x/√2))/x on [0, 5.5], by x², highest
# power first.
_ERF = (
    *(1.8093629927662391e-09, -1.3364685003125487e-07, 3.973113052779809e-06, -5.5277942010434344e-05),
    *(-3.295476199127734e-05, 0.03633391112089157, 0.797884464263916),
)


def _twice_normal_distribution(x: np.ndarray) -> np.ndarray:
    """1 + erf(x/√2), which is 2 Φ(x)."""
    t = x * x
    np.clip(t, 0, 30.25, out=t)
    p = t * _ERF[0]
    for c in _ERF[1:-1]:
        p += c
        p *= t
    p += _ERF[-1]
    p *= x
    np.tanh(p, out=p)
    p += 1
    return p


def _gelu(x: np.ndarray, o: np.ndarray) -> None:
    t = _twice_normal_distribution(x)
    t *= 0.5
    np.multiply(x, t, out=o)


_K = math.sqrt(2 / math.pi)
_KC = _K * 0.044715


def _inner_tanh(x: np.ndarray, square: np.ndarray) -> np.ndarray:
    t = square * _KC
    t += _K
    t *= x
    return np.tanh(t, out=t)


def _gelu_tanh(x: np.ndarray, o: np.ndarray) -> None:
    t = _inner_tanh(x, x * x)
    t += 1
    t *= 0.5
    np.multiply(x, t, out=o)


def _one_plus_exp(x: np.ndarray, o: np.ndarray) -> None:
    """o = 1 + exp(−x): the denominator of σ."""
    np.negative(x, out=o)
    np.exp(o, out=o)
    np.add(o, 1, out=o)


def _sigmoid(x: np.ndarray, o: np.ndarray) -> None:
    _one_plus_exp(x, o)
    np.divide(1, o, out=o)


def _silu(x: np.ndarray, o: np.ndarray) -> None:
    t = np.empty_like(x)
    _one_plus_exp(x, t)
    np.divide(x, t, out=o)


def _tanh(x: np.ndarray, o: np.ndarray) -> None:
    np.tanh(x, out=o)


def _softplus(x: np.ndarray, o: np.ndarray, beta: float, threshold: float) -> None:
    z = x * beta
    linear = None if threshold >= _NO_CORRECTION else z > threshold
    t = np.abs(z)
    np.negative(t, out=t)
    np.exp(t, out=t)
    np.log1p(t, out=t)
    np.maximum(z, _ZEROS[: z.size], out=z)
    z += t
    z /= beta
    if linear is not None:
        _choose(linear, x, z)
    o[...] = z


def _elu(x: np.ndarray, o: np.ndarray, alpha: float) -> None:
    t = np.minimum(x, _ZEROS[: x.size])
    np.expm1(t, out=t)
    t *= alpha
    np.maximum(x, _ZEROS[: x.size], out=o)
    o += t  # one of the two is 0


def _hardswish(x: np.ndarray, o: np.ndarray) -> None:
    t = x + 3
    np.clip(t, 0, 6, out=t)
    t *= x
    np.divide(t, 6, out=o)


def _mish_parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(e, n) = (exp(x), e (e + 2)): tanh(log(1 + e)) = n / (n + 2). Past 20 it is 1."""
    e = np.minimum(x, _LIMIT[: x.size])
    np.exp(e, out=e)
    n = e + 2
    n *= e
    return e, n


def _mish(x: np.ndarray, o: np.ndarray) -> None:
    t, n = _mish_parts(x)
    np.add(n, 2, out=t)
    n /= t
    np.multiply(x, n, out=o)


# --- gradients: (dy, s, o), s what the forward kept; o is neither -----------------------------------------------------


def _relu_gradient(dy: np.ndarray, y: np.ndarray, o: np.ndarray) -> None:
    lost = y <= 0
    _keep(np.logical_not(lost, out=lost), dy, o)  # NaN lets dy through


def _leaky_relu_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray, slope: float) -> None:
    np.multiply(dy, slope, out=o)
    _choose(x > 0, dy, o)


def _gelu_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    np.multiply(x, x, out=o)
    o *= -0.5
    np.exp(o, out=o)
    o *= 1 / math.sqrt(2 * math.pi)
    o *= x
    t = _twice_normal_distribution(x)
    t *= 0.5
    o += t
    o *= dy


def _gelu_tanh_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    square = x * x
    t = _inner_tanh(x, square)
    square *= 3 * _KC
    square += _K
    square *= x  # x u'(x)
    np.multiply(t, t, out=o)
    np.subtract(1, o, out=o)
    o *= square
    o += t
    o += 1
    o *= 0.5
    o *= dy


def _sigmoid_gradient(dy: np.ndarray, y: np.ndarray, o: np.ndarray) -> None:
    np.subtract(1, y, out=o)
    o *= y
    o *= dy


def _silu_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    s = np.empty_like(x)
    _sigmoid(x, s)
    np.subtract(1, s, out=o)
    o *= x
    o += 1
    o *= s
    o *= dy


def _tanh_gradient(dy: np.ndarray, y: np.ndarray, o: np.ndarray) -> None:
    np.multiply(y, y, out=o)
    np.subtract(1, o, out=o)
    o *= dy


def _softplus_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray, beta: float, threshold: float) -> None:
    z = x * beta
    _one_plus_exp(z, o)
    np.divide(dy, o, out=o)
    if threshold < _NO_CORRECTION:
        _choose(z > threshold, dy, o)


def _elu_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray, alpha: float) -> None:
    np.minimum(x, _ZEROS[: x.size], out=o)
    np.exp(o, out=o)
    o *= dy
    if alpha != 1:
        o *= alpha
        _choose(x > 0, dy, o)


def _hardswish_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    np.divide(x, 3, out=o)
    o += 0.5
    o *= dy
    _choose(x >= 3, dy, o)
    none = x <= -3
    _keep(np.logical_not(none, out=none), o, o)


def _mish_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    e, t = _mish_parts(x)
    np.add(t, 2, out=o)
    t /= o
    np.multiply(t, t, out=o)
    np.subtract(1, o, out=o)
    o *= x
    o *= e
    e += 1
    o /= e
    o += t
    o *= dy


_FUNCTIONS: dict[str, tuple[Callable, Callable]] = {
    "relu": (_relu, _relu_gradient),
    "leaky_relu": (_leaky_relu, _leaky_relu_gradient),
    "gelu": (_gelu, _gelu_gradient),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_gradient),
    "silu": (_silu, _silu_gradient),
    "sigmoid": (_sigmoid, _sigmoid_gradient),
    "tanh": (_tanh, _tanh_gradient),
    "softplus": (_softplus, _softplus_gradient),
    "elu": (_elu, _elu_gradient),
    "hardswish": (_hardswish, _hardswish_gradient),
    "mish": (_mish, _mish_gradient),
}

# --- whole arrays ----------------------------------------------------------------------------------------------------


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
    _in_float32(_FUNCTIONS[name][0], (x,), out, numbers)


def gradient(name: str, dy: np.ndarray, kept: np.ndarray, out: np.ndarray, numbers: tuple[float, ...] = ()) -> None:
    """out = dy f'(x), from what the forward kept. Flat arrays; ``out`` is neither of the others."""
    _in_float32(_FUNCTIONS[name][1], (dy, kept), out, numbers)


def _forward(name: str, x: np.ndarray, needs: tuple, *numbers: float) -> tuple[tuple, dict]:
    y = _blocks.empty_like(x)
    value(name, _blocks.flat_like(x, x), y.reshape(-1) if y.flags.c_contiguous else _blocks.flat_like(y, y), numbers)
    if not needs:
        return (y,), {}
    return (y,), {"y": y} if name in FROM_Y else {"x": x}


def _backward(name: str, dys: tuple, saved: dict, *numbers: float) -> tuple:
    (dy,), kept = dys, saved["y" if name in FROM_Y else "x"]
    dx = _blocks.empty_like(kept)
    gradient(name, _blocks.flat_like(dy, dx), _blocks.flat_like(kept, dx), _blocks.flat_like(dx, dx), numbers)
    return (dx,)


def _refuses(x: Any) -> str | None:
    return REFUSALS["float64"] if x.dtype == np.float64 else None


def _gelu_name(approximate: str) -> str:
    return "gelu" if approximate == "none" else "gelu_tanh"


def relu_refuses(x: Any, *, needs: tuple = ()) -> str | None:
    return _refuses(x)


def relu_forward(x: np.ndarray, *, needs: tuple = ()) -> tuple[tuple, dict]:
    return _forward("relu", x, needs)


def relu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    return _backward("relu", dys, saved)


def leaky_relu_refuses(x: Any, *, needs: tuple = (), negative_slope: float = 0.01) -> str | None:
    return _refuses(x)


def leaky_relu_forward(x: np.ndarray, *, needs: tuple = (), negative_slope: float = 0.01) -> tuple[tuple, dict]:
    return _forward("leaky_relu", x, needs, negative_slope)


def leaky_relu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, negative_slope: float = 0.01) -> tuple:
    return _backward("leaky_relu", dys, saved, negative_slope)


def gelu_refuses(x: Any, *, needs: tuple = (), approximate: str = "none") -> str | None:
    return _refuses(x)


def gelu_forward(x: np.ndarray, *, needs: tuple = (), approximate: str = "none") -> tuple[tuple, dict]:
    return _forward(_gelu_name(approximate), x, needs)


def gelu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, approximate: str = "none") -> tuple:
    return _backward(_gelu_name(approximate), dys, saved)


def silu_refuses(x: Any, *, needs: tuple = ()) -> str | None:
    return _refuses(x)


def silu_forward(x: np.ndarray, *, needs: tuple = ()) -> tuple[tuple, dict]:
    return _forward("silu", x, needs)


def silu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    return _backward("silu", dys, saved)


def sigmoid_refuses(x: Any, *, needs: tuple = ()) -> str | None:
    return _refuses(x)


def sigmoid_forward(x: np.ndarray, *, needs: tuple = ()) -> tuple[tuple, dict]:
    return _forward("sigmoid", x, needs)


def sigmoid_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    return _backward("sigmoid", dys, saved)


def tanh_refuses(x: Any, *, needs: tuple = ()) -> str | None:
    return _refuses(x)


def tanh_forward(x: np.ndarray, *, needs: tuple = ()) -> tuple[tuple, dict]:
    return _forward("tanh", x, needs)


def tanh_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    return _backward("tanh", dys, saved)


def softplus_refuses(x: Any, *, needs: tuple = (), beta: float = 1.0, threshold: float = 20.0) -> str | None:
    return _refuses(x)


def softplus_forward(
    x: np.ndarray, *, needs: tuple = (), beta: float = 1.0, threshold: float = 20.0
) -> tuple[tuple, dict]:
    return _forward("softplus", x, needs, beta, threshold)


def softplus_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, beta: float = 1.0, threshold: float = 20.0
) -> tuple:
    return _backward("softplus", dys, saved, beta, threshold)


def elu_refuses(x: Any, *, needs: tuple = (), alpha: float = 1.0) -> str | None:
    return _refuses(x)


def elu_forward(x: np.ndarray, *, needs: tuple = (), alpha: float = 1.0) -> tuple[tuple, dict]:
    return _forward("elu", x, needs, alpha)


def elu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, alpha: float = 1.0) -> tuple:
    return _backward("elu", dys, saved, alpha)


def hardswish_refuses(x: Any, *, needs: tuple = ()) -> str | None:
    return _refuses(x)


def hardswish_forward(x: np.ndarray, *, needs: tuple = ()) -> tuple[tuple, dict]:
    return _forward("hardswish", x, needs)


def hardswish_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    return _backward("hardswish", dys, saved)


def mish_refuses(x: Any, *, needs: tuple = ()) -> str | None:
    return _refuses(x)


def mish_forward(x: np.ndarray, *, needs: tuple = ()) -> tuple[tuple, dict]:
    return _forward("mish", x, needs)


def mish_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    return _backward("mish", dys, saved)
