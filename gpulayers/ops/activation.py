"""Activations: y = f(x), element by element.

Each is two plain functions in ``ACTIVATIONS``, its value and its gradient; the ops below and linear's epilogue use
them. All take x of any shape, float, and return y with x's shape, dtype and (where x is dense) memory order. They
raise NotImplementedError for x that is not floating-point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from gpulayers.arrays import Spec, arranged, namespace, spec, up
from gpulayers.ops._op import KindError, Op, Rule, ShapeError, require_float
from gpulayers.ops._special import erf


class Activation(NamedTuple):
    value: Callable[..., Any]
    """y from x and the activation's numbers."""
    gradient: Callable[..., Any]
    """dx from dy, what is kept, and the numbers."""
    keeps: str = "x"
    """What the gradient is computed from: "x", or "y" where that is as cheap and as exact."""
    numbers: tuple[float, ...] = ()
    """The defaults of its numbers, which are torch's."""


# --- values and gradients --------------------------------------------------------------------------------------------


def _relu(x: Any) -> Any:
    return namespace(x).maximum(x, 0)


def _relu_gradient(dy: Any, y: Any) -> Any:
    return namespace(y).where(y <= 0, 0, dy)  # NaN lets dy through, as in torch


def _leaky_relu(x: Any, slope: float) -> Any:
    return namespace(x).where(x > 0, x, x * slope)


def _leaky_relu_gradient(dy: Any, x: Any, slope: float) -> Any:
    return namespace(x).where(x > 0, dy, dy * slope)


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


def _sigmoid(x: Any) -> Any:
    xp = namespace(x)
    e = xp.exp(-xp.abs(x))  # never overflows
    return xp.where(x < 0, e, 1) / (1 + e)


def _sigmoid_gradient(dy: Any, y: Any) -> Any:
    return dy * (1 - y) * y


def _silu(x: Any) -> Any:
    return x * _sigmoid(x)


def _silu_gradient(dy: Any, x: Any) -> Any:
    s = _sigmoid(x)
    return dy * s * (1 + x * (1 - s))


def _tanh(x: Any) -> Any:
    return namespace(x).tanh(x)


def _tanh_gradient(dy: Any, y: Any) -> Any:
    return dy * (1 - y * y)


def _softplus(x: Any, beta: float, threshold: float) -> Any:
    xp = namespace(x)
    z = x * beta
    return xp.where(z > threshold, x, (xp.maximum(z, 0) + xp.log1p(xp.exp(-xp.abs(z)))) / beta)


def _softplus_gradient(dy: Any, x: Any, beta: float, threshold: float) -> Any:
    z = x * beta
    return namespace(x).where(z > threshold, dy, dy * _sigmoid(z))


def _elu(x: Any, alpha: float) -> Any:
    xp = namespace(x)
    return xp.where(x > 0, x, alpha * xp.expm1(xp.minimum(x, 0)))


def _elu_gradient(dy: Any, x: Any, alpha: float) -> Any:
    xp = namespace(x)
    return xp.where(x > 0, dy, dy * alpha * xp.exp(xp.minimum(x, 0)))


def _hardswish(x: Any) -> Any:
    return x * namespace(x).clip(x + 3, 0, 6) / 6


def _hardswish_gradient(dy: Any, x: Any) -> Any:
    xp = namespace(x)
    return xp.where(x <= -3, 0, xp.where(x >= 3, dy, dy * (x / 3 + 0.5)))


def _mish(x: Any) -> Any:
    return x * namespace(x).tanh(_softplus(x, 1.0, 20.0))


def _mish_gradient(dy: Any, x: Any) -> Any:
    t = namespace(x).tanh(_softplus(x, 1.0, 20.0))
    return dy * (t + x * _sigmoid(x) * (1 - t * t))


ACTIVATIONS = {
    "relu": Activation(_relu, _relu_gradient, "y"),
    "leaky_relu": Activation(_leaky_relu, _leaky_relu_gradient, numbers=(0.01,)),
    "gelu": Activation(_gelu, _gelu_gradient),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_gradient),
    "silu": Activation(_silu, _silu_gradient),
    "sigmoid": Activation(_sigmoid, _sigmoid_gradient, "y"),
    "tanh": Activation(_tanh, _tanh_gradient, "y"),
    "softplus": Activation(_softplus, _softplus_gradient, numbers=(1.0, 20.0)),
    "elu": Activation(_elu, _elu_gradient, numbers=(1.0,)),
    "hardswish": Activation(_hardswish, _hardswish_gradient),
    "mish": Activation(_mish, _mish_gradient),
}

# --- what the ops share ----------------------------------------------------------------------------------------------


def _rule(name: str, x: Spec, needs: tuple, **numbers: float) -> Rule:
    require_float("x", x)
    for argument, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise KindError(argument, "a number", repr(value))
    y, keeps = x.like(), ACTIVATIONS[name].keeps
    saved = {keeps: x if keeps == "x" else y} if needs else {}
    return Rule({"y": y}, saved, {k: float(v) for k, v in numbers.items()} if numbers else None)


def _dense(x: Any, like: Spec) -> Any:
    """``x`` rounded to the spec's dtype, in its memory order."""
    return arranged(namespace(x).asarray(x, like.dtype), like.like().order)


def _forward(name: str, x: Any, needs: tuple, *numbers: float) -> tuple[tuple, dict]:
    f = ACTIVATIONS[name]
    y = _dense(f.value(up(x), *numbers), spec(x))
    return (y,), {f.keeps: x if f.keeps == "x" else y} if needs else {}


def _backward(name: str, dys: tuple, saved: dict, inputs: tuple, *numbers: float) -> tuple:
    f = ACTIVATIONS[name]
    return (_dense(f.gradient(up(dys[0]), up(saved[f.keeps]), *numbers), inputs[0]),)


# --- the ops ---------------------------------------------------------------------------------------------------------


def relu_rule(x: Spec, *, needs: tuple = ()) -> Rule:
    return _rule("relu", x, needs)


def relu_forward(x: Any, *, needs: tuple = ()) -> tuple[tuple, dict]:
    """y = max(x, 0); NaN stays NaN."""
    return _forward("relu", x, needs)


def relu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    """dx = dy where y > 0, else 0."""
    return _backward("relu", dys, saved, inputs)


relu = Op(relu_rule, relu_forward, relu_backward)


def leaky_relu_rule(x: Spec, *, needs: tuple = (), negative_slope: float = 0.01) -> Rule:
    return _rule("leaky_relu", x, needs, negative_slope=negative_slope)


def leaky_relu_forward(x: Any, *, needs: tuple = (), negative_slope: float = 0.01) -> tuple[tuple, dict]:
    """y = x where x > 0, else negative_slope x."""
    return _forward("leaky_relu", x, needs, negative_slope)


def leaky_relu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, negative_slope: float = 0.01) -> tuple:
    """dx = dy where x > 0, else negative_slope dy."""
    return _backward("leaky_relu", dys, saved, inputs, negative_slope)


leaky_relu = Op(leaky_relu_rule, leaky_relu_forward, leaky_relu_backward)


def gelu_name(approximate: str) -> str:
    """Which of the two GELUs in ``ACTIVATIONS``."""
    return "gelu" if approximate == "none" else "gelu_tanh"


def gelu_rule(x: Spec, *, needs: tuple = (), approximate: str = "none") -> Rule:
    if approximate not in ("none", "tanh"):
        raise ShapeError("approximate", 'approximate ∈ {"none", "tanh"}', repr(approximate))
    return _rule(gelu_name(approximate), x, needs)


def gelu_forward(x: Any, *, needs: tuple = (), approximate: str = "none") -> tuple[tuple, dict]:
    """y = x Φ(x), Φ the normal distribution function: x/2 (1 + erf(x/√2)).

    approximate: "tanh" computes x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))) instead. Other values raise RuntimeError.
    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016).
    """
    return _forward(gelu_name(approximate), x, needs)


def gelu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, approximate: str = "none") -> tuple:
    """dx = dy (Φ(x) + x φ(x)), φ the normal density; of "tanh", that formula's own derivative."""
    return _backward(gelu_name(approximate), dys, saved, inputs)


gelu = Op(gelu_rule, gelu_forward, gelu_backward)


def silu_rule(x: Spec, *, needs: tuple = ()) -> Rule:
    return _rule("silu", x, needs)


def silu_forward(x: Any, *, needs: tuple = ()) -> tuple[tuple, dict]:
    """y = x σ(x), also called Swish (Ramachandran, Zoph and Le, 2017)."""
    return _forward("silu", x, needs)


def silu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    """dx = dy σ(x) (1 + x (1 − σ(x)))."""
    return _backward("silu", dys, saved, inputs)


silu = Op(silu_rule, silu_forward, silu_backward)


def sigmoid_rule(x: Spec, *, needs: tuple = ()) -> Rule:
    return _rule("sigmoid", x, needs)


def sigmoid_forward(x: Any, *, needs: tuple = ()) -> tuple[tuple, dict]:
    """y = 1 / (1 + exp(−x))."""
    return _forward("sigmoid", x, needs)


def sigmoid_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    """dx = dy y (1 − y)."""
    return _backward("sigmoid", dys, saved, inputs)


sigmoid = Op(sigmoid_rule, sigmoid_forward, sigmoid_backward)


def tanh_rule(x: Spec, *, needs: tuple = ()) -> Rule:
    return _rule("tanh", x, needs)


def tanh_forward(x: Any, *, needs: tuple = ()) -> tuple[tuple, dict]:
    """y = tanh(x)."""
    return _forward("tanh", x, needs)


def tanh_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    """dx = dy (1 − y²)."""
    return _backward("tanh", dys, saved, inputs)


tanh = Op(tanh_rule, tanh_forward, tanh_backward)


def softplus_rule(x: Spec, *, needs: tuple = (), beta: float = 1.0, threshold: float = 20.0) -> Rule:
    return _rule("softplus", x, needs, beta=beta, threshold=threshold)


def softplus_forward(x: Any, *, needs: tuple = (), beta: float = 1.0, threshold: float = 20.0) -> tuple[tuple, dict]:
    """y = log(1 + exp(beta x)) / beta; x itself where beta x > threshold."""
    return _forward("softplus", x, needs, beta, threshold)


def softplus_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, beta: float = 1.0, threshold: float = 20.0
) -> tuple:
    """dx = dy σ(beta x); dy itself where beta x > threshold."""
    return _backward("softplus", dys, saved, inputs, beta, threshold)


softplus = Op(softplus_rule, softplus_forward, softplus_backward)


def elu_rule(x: Spec, *, needs: tuple = (), alpha: float = 1.0) -> Rule:
    return _rule("elu", x, needs, alpha=alpha)


def elu_forward(x: Any, *, needs: tuple = (), alpha: float = 1.0) -> tuple[tuple, dict]:
    """y = x where x > 0, else alpha (exp(x) − 1) (Clevert, Unterthiner and Hochreiter, 2015)."""
    return _forward("elu", x, needs, alpha)


def elu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, alpha: float = 1.0) -> tuple:
    """dx = dy where x > 0, else dy alpha exp(x)."""
    return _backward("elu", dys, saved, inputs, alpha)


elu = Op(elu_rule, elu_forward, elu_backward)


def hardswish_rule(x: Spec, *, needs: tuple = ()) -> Rule:
    return _rule("hardswish", x, needs)


def hardswish_forward(x: Any, *, needs: tuple = ()) -> tuple[tuple, dict]:
    """y = x min(max(x + 3, 0), 6) / 6 (Howard et al., "Searching for MobileNetV3", 2019)."""
    return _forward("hardswish", x, needs)


def hardswish_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    """dx = 0 where x ≤ −3, dy where x ≥ 3, else dy (x/3 + 1/2)."""
    return _backward("hardswish", dys, saved, inputs)


hardswish = Op(hardswish_rule, hardswish_forward, hardswish_backward)


def mish_rule(x: Spec, *, needs: tuple = ()) -> Rule:
    return _rule("mish", x, needs)


def mish_forward(x: Any, *, needs: tuple = ()) -> tuple[tuple, dict]:
    """y = x tanh(log(1 + exp(x))) (Misra, 2019)."""
    return _forward("mish", x, needs)


def mish_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    """dx = dy (t + x σ(x) (1 − t²)), t = tanh(log(1 + exp(x)))."""
    return _backward("mish", dys, saved, inputs)


mish = Op(mish_rule, mish_forward, mish_backward)
