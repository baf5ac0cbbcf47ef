"""Smooth activations, as chains of in-place ufuncs.

A value takes float32 blocks (x, o, *numbers); o may be x. A gradient takes (dy, s, o, *numbers), s what the forward
kept; o is neither.
"""

from __future__ import annotations

import math

import numpy as np

from . import _blocks
from ._select import choose

_ZEROS = np.zeros(_blocks.CHAIN, np.float32)
_LIMIT = np.full(_blocks.CHAIN, 20.0, np.float32)
_NO_CORRECTION = 17.0
"""Above this z, log1p(exp(−z)) is under half an ulp of z in float32, and σ(z) rounds to 1."""


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


def gelu(x: np.ndarray, o: np.ndarray) -> None:
    t = _twice_normal_distribution(x)
    t *= 0.5
    np.multiply(x, t, out=o)


def gelu_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    np.multiply(x, x, out=o)
    o *= -0.5
    np.exp(o, out=o)
    o *= 1 / math.sqrt(2 * math.pi)
    o *= x
    t = _twice_normal_distribution(x)
    t *= 0.5
    o += t
    o *= dy


_K = math.sqrt(2 / math.pi)
_KC = _K * 0.044715


def _gate(x: np.ndarray, square: np.ndarray, o: np.ndarray) -> np.ndarray:
    """o = 1 + exp(−2u): (1 + tanh u) / 2 = 1 / o, by an exponential that is quicker than tanh and cancels nowhere."""
    np.multiply(square, -2 * _KC, out=o)
    o -= 2 * _K
    o *= x
    np.exp(o, out=o)
    o += 1
    return o


def gelu_tanh(x: np.ndarray, o: np.ndarray) -> None:
    t = x * x
    np.divide(x, _gate(x, t, t), out=o)


def gelu_tanh_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    square = x * x
    s = np.divide(1, _gate(x, square, o))
    square *= 6 * _KC
    square += 2 * _K  # 2 u'(x)
    np.subtract(1, s, out=o)
    o *= s
    o *= x  # before u': x u'(x) overflows where s (1 − s) is 0
    o *= square
    o += s
    o *= dy


def _one_plus_exp(x: np.ndarray, o: np.ndarray) -> None:
    """o = 1 + exp(−x): the denominator of σ."""
    np.negative(x, out=o)
    np.exp(o, out=o)
    np.add(o, 1, out=o)


def sigmoid(x: np.ndarray, o: np.ndarray) -> None:
    _one_plus_exp(x, o)
    np.divide(1, o, out=o)


def sigmoid_gradient(dy: np.ndarray, y: np.ndarray, o: np.ndarray) -> None:
    np.subtract(1, y, out=o)
    o *= y
    o *= dy


def logsigmoid(x: np.ndarray, o: np.ndarray) -> None:
    t = np.abs(x)
    np.negative(t, out=t)
    np.exp(t, out=t)
    np.log1p(t, out=t)
    np.minimum(x, _ZEROS[: x.size], out=o)
    o -= t


def logsigmoid_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    np.exp(x, out=o)
    o += 1
    np.divide(dy, o, out=o)


def silu(x: np.ndarray, o: np.ndarray) -> None:
    t = np.empty_like(x)
    _one_plus_exp(x, t)
    np.divide(x, t, out=o)


def silu_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    s = np.empty_like(x)
    sigmoid(x, s)
    np.subtract(1, s, out=o)
    o *= x
    o += 1
    o *= s
    o *= dy


def quick_gelu(x: np.ndarray, o: np.ndarray) -> None:
    t = x * 1.702
    _one_plus_exp(t, t)
    np.divide(x, t, out=o)


def quick_gelu_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    silu_gradient(dy, x * 1.702, o)


def tanh(x: np.ndarray, o: np.ndarray) -> None:
    np.tanh(x, out=o)


def tanh_gradient(dy: np.ndarray, y: np.ndarray, o: np.ndarray) -> None:
    np.multiply(y, y, out=o)
    np.subtract(1, o, out=o)
    o *= dy


def tanhshrink(x: np.ndarray, o: np.ndarray) -> None:
    np.subtract(x, np.tanh(x), out=o)


def tanhshrink_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    np.tanh(x, out=o)
    o *= o
    o *= dy


def softsign(x: np.ndarray, o: np.ndarray) -> None:
    t = np.abs(x)
    t += 1
    np.divide(x, t, out=o)


def softsign_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    d = np.abs(x)
    d += 1
    np.divide(dy, d, out=o)
    o /= d
    d -= d
    o += d  # NaN for Inf, as y is


def softplus(x: np.ndarray, o: np.ndarray, beta: float, threshold: float) -> None:
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
        choose(linear, x, z)
    o[...] = z


def softplus_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray, beta: float, threshold: float) -> None:
    z = x * beta
    _one_plus_exp(z, o)
    np.divide(dy, o, out=o)
    if threshold < _NO_CORRECTION:
        choose(z > threshold, dy, o)


def elu(x: np.ndarray, o: np.ndarray, alpha: float) -> None:
    t = np.minimum(x, _ZEROS[: x.size])
    np.expm1(t, out=t)
    t *= alpha
    np.maximum(x, _ZEROS[: x.size], out=o)
    o += t  # one of the two is 0


def elu_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray, alpha: float) -> None:
    np.fmin(x, _ZEROS[: x.size], out=o)  # 0 for NaN: dy passes it, as in torch
    np.exp(o, out=o)
    o *= dy
    if alpha != 1:
        o *= alpha
        curved = x <= 0
        choose(np.logical_not(curved, out=curved), dy, o)


def celu(x: np.ndarray, o: np.ndarray, alpha: float) -> None:
    t = np.minimum(x, _ZEROS[: x.size])
    t /= alpha
    np.expm1(t, out=t)
    t *= alpha
    np.maximum(x, _ZEROS[: x.size], out=o)
    o += t  # one of the two is 0


def celu_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray, alpha: float) -> None:
    np.fmin(x, _ZEROS[: x.size], out=o)  # 0 for NaN: dy passes it, as in torch
    o /= alpha
    np.exp(o, out=o)
    o *= dy


_SCALE, _SCALE_ALPHA = 1.0507009873554805, 1.7580993408473766


def selu(x: np.ndarray, o: np.ndarray) -> None:
    t = np.minimum(x, _ZEROS[: x.size])
    np.expm1(t, out=t)
    t *= _SCALE_ALPHA
    np.maximum(x, _ZEROS[: x.size], out=o)
    o *= _SCALE
    o += t  # one of the two is 0


def selu_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    np.fmin(x, _ZEROS[: x.size], out=o)  # 0 for NaN: dy passes it, as in torch
    np.exp(o, out=o)
    o *= _SCALE_ALPHA
    o *= dy
    curved = x <= 0
    choose(np.logical_not(curved, out=curved), dy * _SCALE, o)


def _mish_parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(e, n) = (exp(x), e (e + 2)): tanh(log(1 + e)) = n / (n + 2). Past 20 it is 1."""
    e = np.minimum(x, _LIMIT[: x.size])
    np.exp(e, out=e)
    n = e + 2
    n *= e
    return e, n


def mish(x: np.ndarray, o: np.ndarray) -> None:
    t, n = _mish_parts(x)
    np.add(n, 2, out=t)
    n /= t
    np.multiply(x, n, out=o)


def mish_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
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
