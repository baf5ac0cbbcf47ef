"""Optimizers' updates: parameters and state, lists of arrays, written in place.

Each list has one array for each parameter, of its shape. Computed in float32 for 16-bit parameters (whose state may be
float32 or 16-bit), in the parameter's dtype otherwise. ``grad_scale`` multiplies every gradient first (to undo a loss
scale, to clip); ``maximize`` turns its sign.
"""

from __future__ import annotations

import math
from typing import Any

from gpulayers.arrays import compute_dtype, namespace
from gpulayers.definition import ArgumentError, Rule, ShapeError
from gpulayers.ops._grad_norm import grad_norm as grad_norm
from gpulayers.ops._layerwise_update import layerwise_update as layerwise_update
from gpulayers.ops._lists import check_lists
from gpulayers.ops._op import Op
from gpulayers.ops._optimizer_update import optimizer_update as optimizer_update


def _check_at_least(least: float, **values: float) -> None:
    for name, value in values.items():
        if not value >= least:
            raise ArgumentError(name, f"{name} ≥ {least:g}", value)


def sgd_update_rule(
    params: list,
    grads: list,
    momentums: list | None = None,
    *,
    needs: tuple = (),
    nesterov: bool = False,
    maximize: bool = False,
) -> Rule:
    check_lists(params=params, grads=grads, **({} if momentums is None else {"momentums": momentums}))
    return Rule({})


def _sgd_guard(
    *lists: Any,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    **_: Any,
) -> None:
    _check_at_least(0.0, momentum=momentum, weight_decay=weight_decay)
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ArgumentError("nesterov", "nesterov needs momentum > 0 and dampening = 0", (momentum, dampening))
    momentums = lists[2] if len(lists) > 2 else None
    if (momentum != 0) != (momentums is not None):
        came = "None" if momentums is None else "a list"
        raise ShapeError(
            "momentums", "a list where momentum ≠ 0, None where it is 0", f"{came} with momentum {momentum}"
        )


def _gradient(g: Any, work: Any, grad_scale: float, maximize: bool) -> Any:
    return g.astype(work) * (-grad_scale if maximize else grad_scale)


def sgd_update_forward(
    params: list,
    grads: list,
    momentums: list | None = None,
    *,
    needs: tuple = (),
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    first: bool = False,
    grad_scale: float = 1.0,
) -> tuple[tuple, dict]:
    """p ← p − lr u, with g ← grad + weight_decay p and torch.optim.SGD's formulas.

    Without momentum u = g. With it, m ← momentum m + (1 − dampening) g (m ← g in the ``first`` step; m starts as zeros) and u = m,
    or g + momentum m with ``nesterov`` (Sutskever et al., 2013).

    Raises RuntimeError for shapes that do not fit, ValueError for options outside their range.
    """
    keep, take = (0.0, 1.0) if first else (momentum, 1 - dampening)
    for i, (p, g) in enumerate(zip(params, grads)):
        work = compute_dtype(p.dtype)
        w = p.astype(work)
        u = _gradient(g, work, grad_scale, maximize) + weight_decay * w
        if momentums is not None:
            m = keep * momentums[i].astype(work) + take * u
            momentums[i][...] = m.astype(momentums[i].dtype)
            u = u + momentum * m if nesterov else m
        p[...] = (w - lr * u).astype(p.dtype)
    return (), {}


sgd_update = Op(
    sgd_update_rule,
    sgd_update_forward,
    updates=("params", "momentums"),
    dynamic=("lr", "momentum", "dampening", "weight_decay", "first", "grad_scale"),
    guard=_sgd_guard,
)


def adamw_update_rule(
    params: list,
    grads: list,
    exp_avgs: list,
    exp_avg_sqs: list,
    *,
    needs: tuple = (),
    maximize: bool = False,
) -> Rule:
    check_lists(params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    return Rule({})


def _adamw_guard(
    *lists: Any, betas: tuple = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2, **_: Any
) -> None:
    _check_at_least(0.0, eps=eps, weight_decay=weight_decay)
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ArgumentError("betas", "two numbers, 0 ≤ beta < 1", betas)


def adamw_update_forward(
    params: list,
    grads: list,
    exp_avgs: list,
    exp_avg_sqs: list,
    *,
    needs: tuple = (),
    lr: float = 1e-3,
    betas: tuple = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    step: int = 1,
    grad_scale: float = 1.0,
) -> tuple[tuple, dict]:
    """torch.optim.AdamW's step (Loshchilov and Hutter, 2019); step t counts from 1.

    p ← p (1 − lr weight_decay);  m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²;
    p ← p − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps).

    Raises RuntimeError for shapes that do not fit, ValueError for options outside their range.
    """
    b1, b2 = betas
    step_size, root = lr / (1 - b1**step), math.sqrt(1 - b2**step)
    for p, grad, m, v in zip(params, grads, exp_avgs, exp_avg_sqs):
        work = compute_dtype(p.dtype)
        g = _gradient(grad, work, grad_scale, maximize)
        first = b1 * m.astype(work) + (1 - b1) * g
        second = b2 * v.astype(work) + (1 - b2) * g * g
        w = p.astype(work) * (1 - lr * weight_decay)
        w = w - step_size * first / (namespace(p).sqrt(second) / root + eps)
        p[...], m[...], v[...] = w.astype(p.dtype), first.astype(m.dtype), second.astype(v.dtype)
    return (), {}


adamw_update = Op(
    adamw_update_rule,
    adamw_update_forward,
    updates=("params", "exp_avgs", "exp_avg_sqs"),
    dynamic=("lr", "betas", "eps", "weight_decay", "step", "grad_scale"),
    guard=_adamw_guard,
)
