"""Activations: y = f(x), element by element. Those with a weight, with chance or with a gate are in ``_gates.py``.

An op is made of two plain functions, its value and its gradient: see ``_activation.py``. All take x of any shape,
float, and return y with x's dtype and (where x is dense) memory order; its shape is x's, but for glu. They raise
NotImplementedError for x that is not floating-point, and TypeError for a number that is none.

Where x is NaN, dx is what torch's CUDA kernels give: no comparison with NaN holds, so what the text calls "else" is taken,
and dy passes relu, relu6, hardtanh, hardshrink, softshrink, threshold, hardswish, elu, celu and (times s) selu. So it
does in torch's scalar code on the CPU; its vectors there have 0 or NaN in eight of these.
"""

from __future__ import annotations

import math
from typing import Any

from gpulayers.arrays import Spec, namespace
from gpulayers.definition import ArgumentError, Rule, ShapeError
from gpulayers.ops import _special
from gpulayers.ops._activation import ACTIVATIONS as ACTIVATIONS
from gpulayers.ops._activation import activation, backward_of, elementwise, forward_of, rule_of
from gpulayers.ops._gated import gated as gated
from gpulayers.ops._gates import glu as glu
from gpulayers.ops._gates import prelu as prelu
from gpulayers.ops._gates import rrelu as rrelu
from gpulayers.ops._op import Op, require_float

# --- piecewise linear ------------------------------------------------------------------------------------------------


def _relu(x: Any) -> Any:
    """y = max(x, 0); NaN stays NaN."""
    return namespace(x).maximum(x, 0)


def _relu_gradient(dy: Any, y: Any) -> Any:
    """dx = dy where y > 0, else 0."""
    return namespace(y).where(y <= 0, 0, dy)  # NaN lets dy through, as in torch


relu = elementwise(_relu, _relu_gradient)


def _leaky_relu(x: Any, negative_slope: float = 0.01) -> Any:
    """y = x where x > 0, else negative_slope x."""
    return namespace(x).where(x > 0, x, x * negative_slope)


def _leaky_relu_gradient(dy: Any, x: Any, negative_slope: float) -> Any:
    """dx = dy where x > 0, else negative_slope dy."""
    return namespace(x).where(x > 0, dy, dy * negative_slope)


leaky_relu = elementwise(_leaky_relu, _leaky_relu_gradient)


def _relu6(x: Any) -> Any:
    """y = min(max(x, 0), 6); NaN stays NaN (Krizhevsky, "Convolutional Deep Belief Networks on CIFAR-10", 2010)."""
    return namespace(x).clip(x, 0, 6)


def _relu6_gradient(dy: Any, y: Any) -> Any:
    """dx = 0 where y ≤ 0 or y ≥ 6, else dy."""
    return namespace(y).where((y <= 0) | (y >= 6), 0, dy)


relu6 = elementwise(_relu6, _relu6_gradient)


def _relu_squared(x: Any) -> Any:
    """y = max(x, 0)² (So et al., "Primer: Searching for Efficient Transformers", 2021)."""
    y = namespace(x).maximum(x, 0)
    return y * y


def _relu_squared_gradient(dy: Any, x: Any) -> Any:
    """dx = 0 where x ≤ 0, else 2 x dy."""
    return namespace(x).where(x <= 0, 0, 2 * x * dy)


relu_squared = elementwise(_relu_squared, _relu_squared_gradient)


def _hardtanh(x: Any, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    """y = min(max(x, min_val), max_val); NaN stays NaN. Raises ValueError for min_val > max_val."""
    return namespace(x).clip(x, min_val, max_val)


def _hardtanh_gradient(dy: Any, x: Any, min_val: float, max_val: float) -> Any:
    """dx = 0 where x ≤ min_val or x ≥ max_val, else dy."""
    return namespace(x).where((x <= min_val) | (x >= max_val), 0, dy)


def _hardtanh_check(min_val: float, max_val: float) -> None:
    if min_val > max_val:
        raise ArgumentError("min_val", "min_val ≤ max_val", f"min_val {min_val}, max_val {max_val}")


hardtanh = elementwise(_hardtanh, _hardtanh_gradient, _hardtanh_check)


def _hardsigmoid(x: Any) -> Any:
    """y = min(max(x + 3, 0), 6) / 6 (Howard et al., "Searching for MobileNetV3", 2019)."""
    return namespace(x).clip(x + 3, 0, 6) / 6


def _hardsigmoid_gradient(dy: Any, x: Any) -> Any:
    """dx = dy / 6 where −3 < x < 3, else 0."""
    return namespace(x).where((x > -3) & (x < 3), dy / 6, 0)


hardsigmoid = elementwise(_hardsigmoid, _hardsigmoid_gradient)


def _hardswish(x: Any) -> Any:
    """y = x min(max(x + 3, 0), 6) / 6 (Howard et al., "Searching for MobileNetV3", 2019)."""
    return x * namespace(x).clip(x + 3, 0, 6) / 6


def _hardswish_gradient(dy: Any, x: Any) -> Any:
    """dx = 0 where x ≤ −3, dy (x/3 + 1/2) where −3 < x < 3, else dy."""
    xp = namespace(x)
    return xp.where(x <= -3, 0, xp.where(x < 3, dy * (x / 3 + 0.5), dy))


hardswish = elementwise(_hardswish, _hardswish_gradient)


def _hardshrink(x: Any, lambd: float = 0.5) -> Any:
    """y = 0 where −lambd ≤ x ≤ lambd, else x: hard thresholding (Donoho and Johnstone, 1994)."""
    return namespace(x).where((x >= -lambd) & (x <= lambd), 0, x)


def _shrink_gradient(dy: Any, x: Any, lambd: float) -> Any:
    """dx = 0 where −lambd ≤ x ≤ lambd, else dy."""
    return namespace(x).where((x >= -lambd) & (x <= lambd), 0, dy)


hardshrink = elementwise(_hardshrink, _shrink_gradient)


def _softshrink(x: Any, lambd: float = 0.5) -> Any:
    """y = x − lambd where x > lambd, x + lambd where x < −lambd, else 0: soft thresholding (Donoho, 1995).

    Raises RuntimeError for lambd < 0.
    """
    xp = namespace(x)
    return xp.where(x > lambd, x - lambd, xp.where(x < -lambd, x + lambd, x * 0))  # x * 0: NaN stays


def _softshrink_check(lambd: float) -> None:
    if not 0 <= lambd < math.inf:
        raise ShapeError("lambd", "0 ≤ lambd < ∞", lambd)


softshrink = elementwise(_softshrink, _shrink_gradient, _softshrink_check)


def _threshold(x: Any, threshold: float, value: float) -> Any:
    """y = x where x > threshold, else value; NaN stays NaN. Both numbers must be given."""
    return namespace(x).where(x <= threshold, value, x)


def _threshold_gradient(dy: Any, x: Any, threshold: float, value: float) -> Any:
    """dx = dy where x > threshold, else 0."""
    return namespace(x).where(x <= threshold, 0, dy)


threshold = elementwise(_threshold, _threshold_gradient)

# --- smooth ----------------------------------------------------------------------------------------------------------


def _gelu(x: Any) -> Any:
    return 0.5 * x * (1 + _special.erf(x * math.sqrt(0.5)))


def _gelu_gradient(dy: Any, x: Any) -> Any:
    density = namespace(x).exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return dy * (0.5 * (1 + _special.erf(x * math.sqrt(0.5))) + x * density)


_K, _C = math.sqrt(2 / math.pi), 0.044715


def _gelu_tanh(x: Any) -> Any:
    return 0.5 * x * (1 + namespace(x).tanh(_K * (x + _C * x * x * x)))


def _gelu_tanh_gradient(dy: Any, x: Any) -> Any:
    t = namespace(x).tanh(_K * (x + _C * x * x * x))
    return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _K * (1 + 3 * _C * x * x))


_GELUS = {"none": activation(_gelu, _gelu_gradient), "tanh": activation(_gelu_tanh, _gelu_tanh_gradient)}


def gelu_rule(x: Spec, *, needs: tuple = (), approximate: str = "none") -> Rule:
    require_float("x", x)
    if approximate not in _GELUS:
        raise ShapeError("approximate", 'approximate ∈ {"none", "tanh"}', repr(approximate))
    return rule_of(_GELUS[approximate], x, needs, {})


def gelu_forward(x: Any, *, needs: tuple = (), approximate: str = "none") -> tuple[tuple, dict]:
    """y = x Φ(x), Φ the normal distribution function: x/2 (1 + erf(x/√2)).

    approximate: "tanh" computes x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))) instead. Other values raise RuntimeError.
    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016).
    """
    return forward_of(_GELUS[approximate], x, needs)


def gelu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, approximate: str = "none") -> tuple:
    """dx = dy (Φ(x) + x φ(x)), φ the normal density; of "tanh", that formula's own derivative."""
    return backward_of(_GELUS[approximate], dys, saved, inputs)


gelu = Op(gelu_rule, gelu_forward, gelu_backward)


def _sigmoid(x: Any) -> Any:
    """y = 1 / (1 + exp(−x))."""
    return _special.sigmoid(x)


def _sigmoid_gradient(dy: Any, y: Any) -> Any:
    """dx = dy y (1 − y)."""
    return dy * (1 - y) * y


sigmoid = elementwise(_sigmoid, _sigmoid_gradient)


def _logsigmoid(x: Any) -> Any:
    """y = log σ(x) = min(x, 0) − log(1 + exp(−|x|))."""
    xp = namespace(x)
    return xp.minimum(x, 0) - xp.log1p(xp.exp(-xp.abs(x)))


def _logsigmoid_gradient(dy: Any, x: Any) -> Any:
    """dx = dy σ(−x)."""
    return dy * _sigmoid(-x)


logsigmoid = elementwise(_logsigmoid, _logsigmoid_gradient)


def _silu(x: Any) -> Any:
    """y = x σ(x), also called Swish (Ramachandran, Zoph and Le, 2017)."""
    return x * _sigmoid(x)


def _silu_gradient(dy: Any, x: Any) -> Any:
    """dx = dy σ(x) (1 + x (1 − σ(x)))."""
    s = _sigmoid(x)
    return dy * s * (1 + x * (1 - s))


silu = elementwise(_silu, _silu_gradient)


def _quick_gelu(x: Any) -> Any:
    """y = x σ(1.702 x), near GELU (Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016)."""
    return x * _sigmoid(1.702 * x)


def _quick_gelu_gradient(dy: Any, x: Any) -> Any:
    """dx = dy σ(z) (1 + z (1 − σ(z))) for z = 1.702 x."""
    return _silu_gradient(dy, 1.702 * x)


quick_gelu = elementwise(_quick_gelu, _quick_gelu_gradient)


def _tanh(x: Any) -> Any:
    """y = tanh(x)."""
    return namespace(x).tanh(x)


def _tanh_gradient(dy: Any, y: Any) -> Any:
    """dx = dy (1 − y²)."""
    return dy * (1 - y * y)


tanh = elementwise(_tanh, _tanh_gradient)


def _tanhshrink(x: Any) -> Any:
    """y = x − tanh(x)."""
    return x - namespace(x).tanh(x)


def _tanhshrink_gradient(dy: Any, x: Any) -> Any:
    """dx = dy tanh(x)²."""
    t = namespace(x).tanh(x)
    return dy * t * t


tanhshrink = elementwise(_tanhshrink, _tanhshrink_gradient)


def _softsign(x: Any) -> Any:
    """y = x / (1 + |x|); NaN for ±Inf (Turian, Bergstra and Bengio, 2009)."""
    return x / (1 + namespace(x).abs(x))


def _softsign_gradient(dy: Any, x: Any) -> Any:
    """dx = dy / (1 + |x|)²; NaN for ±Inf."""
    xp = namespace(x)
    d = 1 + xp.abs(x)
    return xp.where(xp.isinf(x), math.nan, dy / d / d)


softsign = elementwise(_softsign, _softsign_gradient)


def _softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """y = log(1 + exp(beta x)) / beta; x itself where beta x > threshold."""
    xp = namespace(x)
    z = x * beta
    return xp.where(z > threshold, x, (xp.maximum(z, 0) + xp.log1p(xp.exp(-xp.abs(z)))) / beta)


def _softplus_gradient(dy: Any, x: Any, beta: float, threshold: float) -> Any:
    """dx = dy σ(beta x); dy itself where beta x > threshold."""
    z = x * beta
    return namespace(x).where(z > threshold, dy, dy * _sigmoid(z))


softplus = elementwise(_softplus, _softplus_gradient)


def _elu(x: Any, alpha: float = 1.0) -> Any:
    """y = x where x > 0, else alpha (exp(x) − 1) (Clevert, Unterthiner and Hochreiter, 2015)."""
    xp = namespace(x)
    return xp.where(x > 0, x, alpha * xp.expm1(xp.minimum(x, 0)))


def _elu_gradient(dy: Any, x: Any, alpha: float) -> Any:
    """dx = dy alpha exp(x) where x ≤ 0, else dy."""
    xp = namespace(x)
    return xp.where(x <= 0, dy * alpha * xp.exp(xp.minimum(x, 0)), dy)


elu = elementwise(_elu, _elu_gradient)


def _celu(x: Any, alpha: float = 1.0) -> Any:
    """y = x where x > 0, else alpha (exp(x / alpha) − 1) (Barron, 2017). Raises RuntimeError for alpha = 0."""
    xp = namespace(x)
    return xp.where(x > 0, x, alpha * xp.expm1(xp.minimum(x, 0) / alpha))


def _celu_gradient(dy: Any, x: Any, alpha: float) -> Any:
    """dx = dy exp(x / alpha) where x ≤ 0, else dy."""
    xp = namespace(x)
    return xp.where(x <= 0, dy * xp.exp(xp.minimum(x, 0) / alpha), dy)


def _celu_check(alpha: float) -> None:
    if alpha == 0:
        raise ShapeError("alpha", "alpha ≠ 0", alpha)


celu = elementwise(_celu, _celu_gradient, _celu_check)

_SCALE, _SCALE_ALPHA = 1.0507009873554804934193349852946, 1.7580993408473768599402175208123


def _selu(x: Any) -> Any:
    """y = s x where x > 0, else s α (exp(x) − 1), with s = 1.0507… and α = 1.6732… (Klambauer et al., 2017)."""
    xp = namespace(x)
    return xp.where(x > 0, _SCALE * x, _SCALE_ALPHA * xp.expm1(xp.minimum(x, 0)))


def _selu_gradient(dy: Any, x: Any) -> Any:
    """dx = dy s α exp(x) where x ≤ 0, else s dy."""
    xp = namespace(x)
    return xp.where(x <= 0, dy * _SCALE_ALPHA * xp.exp(xp.minimum(x, 0)), _SCALE * dy)


selu = elementwise(_selu, _selu_gradient)


def _mish(x: Any) -> Any:
    """y = x tanh(log(1 + exp(x))) (Misra, 2019)."""
    return x * namespace(x).tanh(_softplus(x))


def _mish_gradient(dy: Any, x: Any) -> Any:
    """dx = dy (t + x σ(x) (1 − t²)), t = tanh(log(1 + exp(x)))."""
    t = namespace(x).tanh(_softplus(x))
    return dy * (t + x * _sigmoid(x) * (1 - t * t))


mish = elementwise(_mish, _mish_gradient)
