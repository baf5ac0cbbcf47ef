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

from gpulayers._named import named

from . import _blocks
from ._gates import REFUSALS
from ._gates import glu_backward as glu_backward
from ._gates import glu_forward as glu_forward
from ._gates import glu_refuses as glu_refuses
from ._gates import prelu_backward as prelu_backward
from ._gates import prelu_forward as prelu_forward
from ._gates import prelu_refuses as prelu_refuses
from ._gates import rrelu_backward as rrelu_backward
from ._gates import rrelu_forward as rrelu_forward
from ._gates import rrelu_refuses as rrelu_refuses
from ._select import choose as _choose
from ._select import keep as _keep

FROM_Y = ("relu", "relu6", "sigmoid", "tanh")
"""Activations whose gradient is computed from y; the others' from x."""
NUMBERS: dict[str, tuple[float, ...]] = {}
"""Defaults of the numbers that some have."""
_ZEROS = np.zeros(_blocks.CHAIN, np.float32)
_LIMIT = np.full(_blocks.CHAIN, 20.0, np.float32)
_NO_CORRECTION = 17.0
"""Above this z, log1p(exp(−z)) is under half an ulp of z in float32, and σ(z) rounds to 1."""


# --- values: (x, o) are float32 blocks; o may be x --------------------------------------------------------------------


def _relu(x: np.ndarray, o: np.ndarray) -> None:
    np.maximum(x, _ZEROS[: x.size], out=o)


def _leaky_relu(x: np.ndarray, o: np.ndarray, slope: float) -> None:
    t = x * slope
    if slope == 0:  # 0 · Inf
        o[...] = np.where(x > 0, x, t)
    else:
        (np.maximum if slope <= 1 else np.minimum)(x, t, out=o)


def _relu6(x: np.ndarray, o: np.ndarray) -> None:
    np.clip(x, 0, 6, out=o)


def _hardtanh(x: np.ndarray, o: np.ndarray, min_val: float, max_val: float) -> None:
    np.clip(x, min_val, max_val, out=o)


def _hardsigmoid(x: np.ndarray, o: np.ndarray) -> None:
    np.add(x, 3, out=o)
    np.clip(o, 0, 6, out=o)
    np.divide(o, 6, out=o)


def _hardshrink(x: np.ndarray, o: np.ndarray, lambd: float) -> None:
    inside = x >= -lambd
    inside &= x <= lambd
    _keep(np.logical_not(inside, out=inside), x, o)


def _softshrink(x: np.ndarray, o: np.ndarray, lambd: float) -> None:
    np.subtract(x, np.clip(x, -lambd, lambd), out=o)


def _threshold(x: np.ndarray, o: np.ndarray, threshold: float, value: float) -> None:
    low = x <= threshold
    o[...] = x
    _choose(low, np.full_like(x, value), o)


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


def _logsigmoid(x: np.ndarray, o: np.ndarray) -> None:
    t = np.abs(x)
    np.negative(t, out=t)
    np.exp(t, out=t)
    np.log1p(t, out=t)
    np.minimum(x, _ZEROS[: x.size], out=o)
    o -= t


def _tanhshrink(x: np.ndarray, o: np.ndarray) -> None:
    np.subtract(x, np.tanh(x), out=o)


def _softsign(x: np.ndarray, o: np.ndarray) -> None:
    t = np.abs(x)
    t += 1
    np.divide(x, t, out=o)


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


def _celu(x: np.ndarray, o: np.ndarray, alpha: float) -> None:
    t = np.minimum(x, _ZEROS[: x.size])
    t /= alpha
    np.expm1(t, out=t)
    t *= alpha
    np.maximum(x, _ZEROS[: x.size], out=o)
    o += t  # one of the two is 0


_SCALE, _SCALE_ALPHA = 1.0507009873554805, 1.7580993408473766


def _selu(x: np.ndarray, o: np.ndarray) -> None:
    t = np.minimum(x, _ZEROS[: x.size])
    np.expm1(t, out=t)
    t *= _SCALE_ALPHA
    np.maximum(x, _ZEROS[: x.size], out=o)
    o *= _SCALE
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


def _relu6_gradient(dy: np.ndarray, y: np.ndarray, o: np.ndarray) -> None:
    _hardtanh_gradient(dy, y, o, 0.0, 6.0)


def _hardtanh_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray, min_val: float, max_val: float) -> None:
    inside = x > min_val
    inside &= x < max_val
    _keep(inside, dy, o)


def _hardsigmoid_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    _hardtanh_gradient(dy, x, o, -3.0, 3.0)
    np.divide(o, 6, out=o)


def _shrink_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray, lambd: float) -> None:
    outside = x > lambd
    outside |= x < -lambd
    _keep(outside, dy, o)


def _threshold_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray, threshold: float, value: float) -> None:
    low = x <= threshold
    _keep(np.logical_not(low, out=low), dy, o)


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
    square += _K  # u'(x)
    np.multiply(t, t, out=o)
    np.subtract(1, o, out=o)
    o *= x  # before u': x u'(x) overflows where 1 − t² is 0
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


def _logsigmoid_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    np.exp(x, out=o)
    o += 1
    np.divide(dy, o, out=o)


def _tanhshrink_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    np.tanh(x, out=o)
    o *= o
    o *= dy


def _softsign_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    d = np.abs(x)
    d += 1
    np.divide(dy, d, out=o)
    o /= d
    d -= d
    o += d  # NaN for Inf, as y is


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


def _celu_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray, alpha: float) -> None:
    np.minimum(x, _ZEROS[: x.size], out=o)
    o /= alpha
    np.exp(o, out=o)
    o *= dy


def _selu_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    np.minimum(x, _ZEROS[: x.size], out=o)
    np.exp(o, out=o)
    o *= _SCALE_ALPHA
    o *= dy
    _choose(x > 0, dy * _SCALE, o)


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
    "gelu": (_gelu, _gelu_gradient),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_gradient),
}
"""By name; the launchers below add theirs."""

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


def _trio(value: Callable, gradient: Callable, /, **numbers: float) -> tuple[Any, Any, Any]:
    """The launchers of one activation, with its op's options; they are called with every option."""
    name = value.__name__.removeprefix("_")

    def forward(x: np.ndarray, *, needs: tuple = (), **given: float) -> tuple[tuple, dict]:
        return _forward(name, x, needs, *(numbers | given).values())

    def backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, **given: float) -> tuple:
        return _backward(name, dys, saved, *(numbers | given).values())

    def refuses(x: Any, *, needs: tuple = (), **given: float) -> str | None:
        return _refuses(x)

    _FUNCTIONS[name], NUMBERS[name] = (value, gradient), tuple(numbers.values())
    made = (forward, "forward"), (backward, "backward"), (refuses, "refuses")
    return tuple(named(function, f"{name}_{which}", numbers) for function, which in made)  # type: ignore[return-value]


relu_forward, relu_backward, relu_refuses = _trio(_relu, _relu_gradient)
leaky_relu_forward, leaky_relu_backward, leaky_relu_refuses = _trio(
    _leaky_relu, _leaky_relu_gradient, negative_slope=0.01
)
relu6_forward, relu6_backward, relu6_refuses = _trio(_relu6, _relu6_gradient)
hardtanh_forward, hardtanh_backward, hardtanh_refuses = _trio(_hardtanh, _hardtanh_gradient, min_val=-1.0, max_val=1.0)
hardsigmoid_forward, hardsigmoid_backward, hardsigmoid_refuses = _trio(_hardsigmoid, _hardsigmoid_gradient)
hardswish_forward, hardswish_backward, hardswish_refuses = _trio(_hardswish, _hardswish_gradient)
hardshrink_forward, hardshrink_backward, hardshrink_refuses = _trio(_hardshrink, _shrink_gradient, lambd=0.5)
softshrink_forward, softshrink_backward, softshrink_refuses = _trio(_softshrink, _shrink_gradient, lambd=0.5)
threshold_forward, threshold_backward, threshold_refuses = _trio(
    _threshold, _threshold_gradient, threshold=0.0, value=0.0
)
silu_forward, silu_backward, silu_refuses = _trio(_silu, _silu_gradient)
sigmoid_forward, sigmoid_backward, sigmoid_refuses = _trio(_sigmoid, _sigmoid_gradient)
logsigmoid_forward, logsigmoid_backward, logsigmoid_refuses = _trio(_logsigmoid, _logsigmoid_gradient)
tanh_forward, tanh_backward, tanh_refuses = _trio(_tanh, _tanh_gradient)
tanhshrink_forward, tanhshrink_backward, tanhshrink_refuses = _trio(_tanhshrink, _tanhshrink_gradient)
softsign_forward, softsign_backward, softsign_refuses = _trio(_softsign, _softsign_gradient)
softplus_forward, softplus_backward, softplus_refuses = _trio(_softplus, _softplus_gradient, beta=1.0, threshold=20.0)
elu_forward, elu_backward, elu_refuses = _trio(_elu, _elu_gradient, alpha=1.0)
celu_forward, celu_backward, celu_refuses = _trio(_celu, _celu_gradient, alpha=1.0)
selu_forward, selu_backward, selu_refuses = _trio(_selu, _selu_gradient)
mish_forward, mish_backward, mish_refuses = _trio(_mish, _mish_gradient)


def _gelu_name(approximate: str) -> str:
    return "gelu" if approximate == "none" else "gelu_tanh"


def gelu_refuses(x: Any, *, needs: tuple = (), approximate: str = "none") -> str | None:
    return _refuses(x)


def gelu_forward(x: np.ndarray, *, needs: tuple = (), approximate: str = "none") -> tuple[tuple, dict]:
    return _forward(_gelu_name(approximate), x, needs)


def gelu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, approximate: str = "none") -> tuple:
    return _backward(_gelu_name(approximate), dys, saved)
