"""Activations that are more than a function of x: with a weight (prelu), with chance (rrelu), with a gate (glu)."""

from __future__ import annotations

import math
from typing import Any

from gpulayers.arrays import Spec, int64, namespace, spec, up
from gpulayers.definition import KindError, Rule, ShapeError
from gpulayers.ops._activation import dense, require_numbers
from gpulayers.ops._op import Op, normal_axis, require_float, require_same_dtype
from gpulayers.ops._random import random_bits, shares
from gpulayers.ops._special import sigmoid


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


prelu = Op(prelu_rule, prelu_forward, prelu_backward, family="activation")


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
    if training:
        slope = lower + (upper - lower) * shares(random_bits(seed, math.prod(x.shape)), v.dtype)
        slope = slope.reshape(x.shape)
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


rrelu = Op(rrelu_rule, rrelu_forward, rrelu_backward, differentiable=("x",), family="activation")


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
    return (dense(a * sigmoid(b), spec(x)),), {"x": x} if needs else {}


def glu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, axis: int = -1) -> tuple:
    """da = dy σ(b),  db = dy a σ(b) (1 − σ(b))."""
    xp, dy = namespace(saved["x"]), up(dys[0])
    a, b = xp.split(up(saved["x"]), 2, axis)
    s = sigmoid(b)
    return (dense(xp.concatenate([dy * s, dy * a * s * (1 - s)], axis), inputs[0]),)


glu = Op(glu_rule, glu_forward, glu_backward, family="activation")
