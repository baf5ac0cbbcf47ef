"""One step of an optimizer whose rate is each parameter's own, by the norms of the parameter and of its update."""

from __future__ import annotations

import math
from typing import Any

from gpulayers.arrays import compute_dtype, float32, float64, namespace
from gpulayers.definition import ArgumentError, Rule, ShapeError, UnsupportedTypeError
from gpulayers.kernels._updates import LAYERWISE, bound
from gpulayers.ops._lists import check_lists
from gpulayers.ops._op import Op


def layerwise_update_rule(
    params: list,
    grads: list,
    first: list,
    second: list | None = None,
    masters: list | None = None,
    scale: Any = None,
    *,
    needs: tuple = (),
    rule: str = "lars",
) -> Rule:
    if rule not in LAYERWISE:
        raise ArgumentError("rule", f"one of {', '.join(LAYERWISE)}", repr(rule))
    if (second is None) != (LAYERWISE[rule].states < 2):
        wanted, came = ("a list", "None") if second is None else ("None", "a list")
        raise ShapeError("second", f"{wanted} for {rule}", came)
    given = {"second": second, "masters": masters}
    check_lists(params=params, grads=grads, first=first, **{name: x for name, x in given.items() if x is not None})
    for i, x in enumerate(masters or ()):
        if x.dtype != float32:
            raise UnsupportedTypeError(f"masters[{i}]", "dtype = float32", x.dtype)
    if scale is not None and (scale.dtype not in (float32, float64) or math.prod(scale.shape) != 1):
        raise ShapeError("scale", "one float32 or float64 number", f"{scale.dtype}{list(scale.shape)}")
    return Rule({})


def _guard(
    *lists: Any, rule: str = "lars", numbers: tuple = (0.9,), trust: tuple = (1e-3, math.inf, 0.0, 0.0), **_: Any
) -> None:
    if rule in LAYERWISE and len(numbers) != LAYERWISE[rule].numbers:
        raise ArgumentError("numbers", f"{LAYERWISE[rule].numbers} numbers for {rule}", len(numbers))
    if len(trust) != 4:
        raise ArgumentError("trust", "4 numbers", len(trust))


def _trust_ratio(w: Any, direction: Any, trust: tuple) -> Any:
    xp, (coefficient, most, decay, eps) = namespace(w), trust
    length, other = (xp.sqrt((x * x).sum()) for x in (w, direction))
    fits, one = (length > 0) & (other > 0), xp.ones_like(length)
    ratio = coefficient * xp.minimum(length, most) / xp.where(fits, other + decay * length + eps, one)
    return xp.where(fits, ratio, one)


def layerwise_update_forward(
    params: list,
    grads: list,
    first: list,
    second: list | None = None,
    masters: list | None = None,
    scale: Any = None,
    *,
    needs: tuple = (),
    rule: str = "lars",
    numbers: tuple = (0.9,),
    trust: tuple = (1e-3, math.inf, 0.0, 0.0),
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
) -> tuple[tuple, dict]:
    """One step of LARS (You et al., 2017) or LAMB (You et al., 2020), each array p of the lists by itself.

    g ← grad_scale · scale · grad; trust = (coefficient, most, decay, eps);
    ratio = coefficient min(‖p‖, most) / (‖d‖ + decay ‖p‖ + eps), 1 where ‖p‖ or ‖d‖ is 0; norms are Euclidean.
    lars, numbers (momentum): d = g;  m ← momentum m + lr ratio (g + weight_decay p);  p ← p − m.
    lamb, numbers (bias, root, eps, β₁, 1 − β₁, β₂, 1 − β₂) with bias = 1 − β₁ᵗ, root = √(1 − β₂ᵗ) in step t:
    m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²;  d = m / bias / (√v / root + eps) + weight_decay p;
    p ← p − lr ratio d.  first is m, second v.
    masters: float32 copies of the parameters, which are updated in their place; the parameters are them, rounded.
    scale: one float32 on the device; where it is not finite, nothing is written.

    Raises RuntimeError for lists that do not fit, ValueError for another number of numbers or an unknown rule.
    """
    states = [x for x in (first, second) if x is not None]
    numbers, trust = tuple(map(float, numbers)), tuple(map(float, trust))
    for i, (p, grad) in enumerate(zip(params, grads)):
        work, xp = compute_dtype(p.dtype), namespace(p)
        factor = grad_scale if scale is None else grad_scale * scale.reshape(()).astype(work)
        w, g = (p if masters is None else masters[i]).astype(work), grad.astype(work) * factor
        formula, state = bound(rule, xp), [s[i].astype(work) for s in states]
        direction = formula(w, g, *state, 1.0, weight_decay, *numbers)[0] if rule == "lamb" else g
        rate = lr * _trust_ratio(w, direction, trust)
        shift, *new = formula(w, g, *state, rate, weight_decay, *numbers)
        written = [(s[i], x) for s, x in zip(states, new)] + [(p, w - shift)]
        if masters is not None:
            written.append((masters[i], w - shift))
        for old, x in written:
            x = x if scale is None else xp.where(xp.isfinite(factor), x, old.astype(x.dtype))
            old[...] = x.astype(old.dtype)
    return (), {}


layerwise_update = Op(
    layerwise_update_rule,
    layerwise_update_forward,
    updates=("params", "first", "second", "masters"),
    dynamic=("numbers", "trust", "lr", "weight_decay", "grad_scale"),
    guard=_guard,
    family="optim",
)
