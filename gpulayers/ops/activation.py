"""Activations: y = f(x), element by element; prelu has a weight beside x, rrelu chance, and glu gates one half of x by
the other.

An op is made of two plain functions, its value and its gradient: see ``_activation.py``. All take x of any shape,
float, and return y with x's dtype and (where x is dense) memory order; its shape is x's, but for glu. They raise
NotImplementedError for x that is not floating-point, and TypeError for a number that is none.

Where x is NaN, dx is what torch's vectors give on the CPU, in every dtype: 0, NaN or dy, op by op. Its scalar code (less
than a vector, strided tensors) lets dy through where the vectors give 0 (relu6, hardtanh, hardshrink, softshrink) or NaN
(elu, celu, selu, hardswish).
"""

from __future__ import annotations

import math
from typing import Any

from gpulayers.arrays import Spec, int64, namespace, spec, up
from gpulayers.ops._activation import ACTIVATIONS as ACTIVATIONS
from gpulayers.ops._activation import (
    activation,
    backward_of,
    dense,
    elementwise,
    forward_of,
    require_numbers,
    rule_of,
)
from gpulayers.ops._op import (
    ArgumentError,
    KindError,
    Op,
    Rule,
    ShapeError,
    normal_axis,
    require_float,
    require_same_dtype,
)
from gpulayers.ops._random import random_bits
from gpulayers.ops._special import erf

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
    """dx = dy where 0 < y < 6, else 0."""
    return namespace(y).where((y > 0) & (y < 6), dy, 0)


relu6 = elementwise(_relu6, _relu6_gradient)


def _hardtanh(x: Any, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    """y = min(max(x, min_val), max_val); NaN stays NaN. Raises ValueError for min_val > max_val."""
    return namespace(x).clip(x, min_val, max_val)


def _hardtanh_gradient(dy: Any, x: Any, min_val: float, max_val: float) -> Any:
    """dx = dy where min_val < x < max_val, else 0."""
    return namespace(x).where((x > min_val) & (x < max_val), dy, 0)


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
    """dx = 0 where x ≤ −3, dy where x ≥ 3, else dy (x/3 + 1/2)."""
    xp = namespace(x)
    return xp.where(x <= -3, 0, xp.where(x >= 3, dy, dy * (x / 3 + 0.5)))


hardswish = elementwise(_hardswish, _hardswish_gradient)


def _hardshrink(x: Any, lambd: float = 0.5) -> Any:
    """y = 0 where −lambd ≤ x ≤ lambd, else x: hard thresholding (Donoho and Johnstone, 1994)."""
    return namespace(x).where((x >= -lambd) & (x <= lambd), 0, x)


def _shrink_gradient(dy: Any, x: Any, lambd: float) -> Any:
    """dx = dy where x > lambd or x < −lambd, else 0."""
    return namespace(x).where((x > lambd) | (x < -lambd), dy, 0)


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
    return 0.5 * x * (1 + erf(x * math.sqrt(0.5)))


def _gelu_gradient(dy: Any, x: Any) -> Any:
    density = namespace(x).exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return dy * (0.5 * (1 + erf(x * math.sqrt(0.5))) + x * density)


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
    xp = namespace(x)
    e = xp.exp(-xp.abs(x))  # never overflows
    return xp.where(x < 0, e, 1) / (1 + e)


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
    """dx = dy where x > 0, else dy alpha exp(x)."""
    xp = namespace(x)
    return xp.where(x > 0, dy, dy * alpha * xp.exp(xp.minimum(x, 0)))


elu = elementwise(_elu, _elu_gradient)


def _celu(x: Any, alpha: float = 1.0) -> Any:
    """y = x where x > 0, else alpha (exp(x / alpha) − 1) (Barron, 2017). Raises RuntimeError for alpha = 0."""
    xp = namespace(x)
    return xp.where(x > 0, x, alpha * xp.expm1(xp.minimum(x, 0) / alpha))


def _celu_gradient(dy: Any, x: Any, alpha: float) -> Any:
    """dx = dy where x > 0, else dy exp(x / alpha)."""
    xp = namespace(x)
    return xp.where(x > 0, dy, dy * xp.exp(xp.minimum(x, 0) / alpha))


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
    """dx = s dy where x > 0, else dy s α exp(x)."""
    xp = namespace(x)
    return xp.where(x > 0, _SCALE * dy, dy * _SCALE_ALPHA * xp.exp(xp.minimum(x, 0)))


selu = elementwise(_selu, _selu_gradient)


def _mish(x: Any) -> Any:
    """y = x tanh(log(1 + exp(x))) (Misra, 2019)."""
    return x * namespace(x).tanh(_softplus(x))


def _mish_gradient(dy: Any, x: Any) -> Any:
    """dx = dy (t + x σ(x) (1 − t²)), t = tanh(log(1 + exp(x)))."""
    t = namespace(x).tanh(_softplus(x))
    return dy * (t + x * _sigmoid(x) * (1 - t * t))


mish = elementwise(_mish, _mish_gradient)

# --- with a weight, with chance, with a gate -------------------------------------------------------------------------


def prelu_rule(x: Spec, weight: Spec, *, needs: tuple = ()) -> Rule:
    require_float("x", x)
    require_same_dtype(x, weight=weight)
    channels = x.shape[1] if x.ndim > 1 else 1
    one = weight.size == 1
    if weight.ndim > 1 or not (one or (x.ndim and (channels is None or weight.size == channels))):
        raise ShapeError("weight", f"weight.shape = [1] or [x.shape[1]] = [{channels}]", list(weight.shape))
    return Rule({"y": x.like()}, {"x": x, "weight": weight} if needs else {})


def _across(x: Any, weight: Any) -> Any:
    """``weight`` in the dtype that x is computed in, with one axis for each of x's."""
    return up(weight).reshape(() if weight.size == 1 else (1, -1, *[1] * (x.ndim - 2)))


def prelu_forward(x: Any, weight: Any, *, needs: tuple = ()) -> tuple[tuple, dict]:
    """y = x where x > 0, else weight x (He, Zhang, Ren and Sun, "Delving Deep into Rectifiers", 2015).

    x: any shape, float. weight: one value, or one for each channel, which are x's axis 1; of x's dtype.
    Raises RuntimeError for a weight that does not fit.
    """
    v = up(x)
    y = dense(namespace(x).where(v > 0, v, v * _across(x, weight)), spec(x))
    return (y,), {"x": x, "weight": weight} if needs else {}


def prelu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    """dx = dy where x > 0, else weight dy; dweight = Σ x dy over the x ≤ 0 that it multiplies."""
    (dy,), x, weight = dys, saved["x"], saved["weight"]
    xp = namespace(x)
    v, g = up(x), up(dy)
    dx = dweight = None
    if "x" in needs:
        dx = dense(xp.where(v > 0, g, g * _across(x, weight)), inputs[0])
    if "weight" in needs:
        axes = None if weight.size == 1 else (0, *range(2, x.ndim))
        lost = xp.where(v > 0, 0, v * g).sum(axes)
        dweight = xp.asarray(lost, weight.dtype).reshape(weight.shape)
    return dx, dweight


prelu = Op(prelu_rule, prelu_forward, prelu_backward)


def rrelu_rule(
    x: Spec,
    seed: Spec | None = None,
    *,
    needs: tuple = (),
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
) -> Rule:
    require_float("x", x)
    require_numbers(lower=lower, upper=upper)
    if not -math.inf < lower <= upper < math.inf:
        raise ShapeError("lower, upper", "−∞ < lower ≤ upper < ∞", f"lower {lower}, upper {upper}")
    saved = {"x": x}
    if training:
        if seed is None or seed.dtype != int64:
            raise KindError("seed", "dtype = int64 in training", seed and seed.dtype)
        if seed.shape != (2,):
            raise ShapeError("seed", "seed = [seed, offset], shape [2]", list(seed.shape))
        saved["seed"] = seed
    options = {"lower": float(lower), "upper": float(upper), "training": bool(training)}
    return Rule({"y": x.like()}, saved if needs else {}, options)


def _rrelu(v: Any, x: Any, seed: Any, like: Spec, lower: float, upper: float, training: bool) -> Any:
    """``v`` times the slope at x, dense as ``like``."""
    xp, x = namespace(x), up(x)
    if training:  # 24 bits make a float32 in [0, 1) without rounding
        share = (random_bits(seed, math.prod(x.shape)) >> 8).astype(v.dtype) * 2.0**-24
        slope = (lower + (upper - lower) * share).reshape(x.shape)
        return dense(xp.where(x <= 0, v * slope, v), like)
    return dense(xp.where(x > 0, v, v * ((lower + upper) / 2)), like)


def rrelu_forward(
    x: Any,
    seed: Any = None,
    *,
    needs: tuple = (),
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
) -> tuple[tuple, dict]:
    """y = x where x > 0, else a x; a is drawn from [lower, upper) for each element in training, else their mean.

    x: any shape, float. seed: int64 [seed, offset], which names the draw (see ``_random.py``); equal seeds give equal
    slopes on every backend. Evaluation needs none. Source: Xu, Wang, Chen and Li, "Empirical Evaluation of Rectified
    Activations in Convolutional Network" (2015).

    Raises RuntimeError for lower > upper, or for one that is not finite.
    """
    y = _rrelu(up(x), x, seed, spec(x), lower, upper, training)
    return (y,), ({"x": x} | ({"seed": seed} if training else {})) if needs else {}


def rrelu_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
) -> tuple:
    """dx = dy where x > 0, else a dy: the slopes are drawn again."""
    return _rrelu(up(dys[0]), saved["x"], saved.get("seed"), inputs[0], lower, upper, training), None


rrelu = Op(rrelu_rule, rrelu_forward, rrelu_backward, differentiable=("x",))


def glu_rule(x: Spec, *, needs: tuple = (), axis: int = -1) -> Rule:
    require_float("x", x)
    if not x.ndim:
        raise ShapeError("x", "at least one axis, to be halved", list(x.shape))
    axis = normal_axis(axis, x.ndim)
    size = x.shape[axis]
    if size is not None and size % 2:
        raise ShapeError("x", f"x.shape[{axis}] even: x is two halves, a and b", list(x.shape))
    half = (*x.shape[:axis], None if size is None else size // 2, *x.shape[axis + 1 :])
    return Rule({"y": x.like()._replace(shape=half)}, {"x": x} if needs else {}, {"axis": axis})


def glu_forward(x: Any, *, needs: tuple = (), axis: int = -1) -> tuple[tuple, dict]:
    """y = a σ(b), where a and b are the halves of x along ``axis``.

    x: float, even along ``axis``. Returns y with half of x there. Source: Dauphin, Fan, Auli and Grangier, "Language
    Modeling with Gated Convolutional Networks" (2016). Raises RuntimeError for an odd size, IndexError for no such axis.
    """
    a, b = namespace(x).split(up(x), 2, axis)
    return (dense(a * _sigmoid(b), spec(x)),), {"x": x} if needs else {}


def glu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, axis: int = -1) -> tuple:
    """da = dy σ(b),  db = dy a σ(b) (1 − σ(b))."""
    xp, dy = namespace(saved["x"]), up(dys[0])
    a, b = xp.split(up(saved["x"]), 2, axis)
    s = _sigmoid(b)
    return (dense(xp.concatenate([dy * s, dy * a * s * (1 - s)], axis), inputs[0]),)


glu = Op(glu_rule, glu_forward, glu_backward)
