"""The norm of all gradients, and by how much to multiply them so that it is no longer than a limit."""

from __future__ import annotations

import math
from typing import Any

from gpulayers.arrays import Spec, compute_dtype, namespace
from gpulayers.definition import ArgumentError, Rule, ShapeError
from gpulayers.ops._lists import check_lists
from gpulayers.ops._op import Op


def grad_norm_rule(grads: list, *, needs: tuple = ()) -> Rule:
    check_lists(grads=grads)
    if not grads:
        raise ShapeError("grads", "at least one array", 0)
    one = Spec((1,), _widest(grads))
    return Rule({"norm": one, "factor": one})


def _widest(grads: list) -> Any:
    """The dtype that the sum over all gradients is in."""
    return max((compute_dtype(g.dtype) for g in grads), key=lambda d: d.itemsize)


def _guard(grads: Any, *, max_norm: float = math.inf, **_: Any) -> None:
    if not max_norm > 0:
        raise ArgumentError("max_norm", "max_norm > 0", max_norm)


def grad_norm_forward(
    grads: list, *, needs: tuple = (), max_norm: float = math.inf, grad_scale: float = 1.0
) -> tuple[tuple, dict]:
    """(norm, factor), shape [1] each, float32 (float64 if a gradient is): norm = |grad_scale| √ Σ g² over all gradients,
    factor = min(1, max_norm / (norm + 1e-6)), or 1 where the norm is not finite. Nothing waits for a GPU.

    Raises RuntimeError for an empty list, ValueError for a max_norm that is not positive.
    """
    xp, wide = namespace(grads[0]), _widest(grads)
    total = xp.zeros((1,), wide)
    for g in grads:
        g = g.astype(wide)
        total = total + (g * g).sum()
    norm = xp.sqrt(total) * abs(grad_scale)
    factor = xp.where(xp.isfinite(norm), xp.minimum(max_norm / (norm + 1e-6), 1.0), xp.ones((1,), wide))
    return (norm.astype(wide), factor.astype(wide)), {}


grad_norm = Op(grad_norm_rule, grad_norm_forward, dynamic=("max_norm", "grad_scale"), guard=_guard, family="optim")
