"""Dropout: elements set to 0 at random, the others scaled up so that the expectation stays."""

from __future__ import annotations

import math
from typing import Any

from gpulayers.arrays import Spec, arranged, int64, namespace, spec, up
from gpulayers.definition import ArgumentError, KindError, Rule, ShapeError
from gpulayers.kernels._dropout import threshold_and_scale
from gpulayers.ops._op import Op, require_float
from gpulayers.ops._random import random_bits


def dropout_rule(x: Spec, seed: Spec, *, needs: tuple = ()) -> Rule:
    require_float("x", x)
    if seed.dtype != int64:
        raise KindError("seed", "dtype = int64", seed.dtype)
    if seed.shape != (2,):
        raise ShapeError("seed", "seed = [seed, offset], shape [2]", list(seed.shape))
    return Rule({"y": x.like()}, {"seed": seed} if needs else {})


def _guard(*inputs: Any, p: float = 0.5, **_: Any) -> None:
    if isinstance(p, bool) or not isinstance(p, int | float):
        raise KindError("p", "a number", repr(p))
    if not 0 <= p <= 1:
        raise ArgumentError("p", "0 ≤ p ≤ 1", p)


def _masked(x: Any, like: Spec, seed: Any, p: float) -> Any:
    threshold, scale = threshold_and_scale(p)
    xp = namespace(x)
    keep = (random_bits(seed, math.prod(x.shape)) >= threshold).reshape(x.shape)
    v = up(x)
    return arranged(xp.asarray(v * (keep.astype(v.dtype) * scale), like.dtype), like.like().order)


def dropout_forward(x: Any, seed: Any, *, needs: tuple = (), p: float = 0.5) -> tuple[tuple, dict]:
    """y = x m / (1 − p), m = 1 with probability 1 − p, else 0 (Srivastava et al., 2014). With p = 1, y = 0 x.

    x: any shape, float. seed: int64 [seed, offset], which names the draw (see ``_random.py``); equal seeds give equal
    masks on every backend. Returns y with x's shape, dtype and, where x is dense, memory order.

    Raises ValueError for p outside [0, 1].
    """
    return (_masked(x, spec(x), seed, p),), {"seed": seed} if needs else {}


def dropout_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 0.5) -> tuple:
    """dx = dy m / (1 − p): the mask is drawn again."""
    return _masked(dys[0], inputs[0], saved["seed"], p), None


dropout = Op(dropout_rule, dropout_forward, dropout_backward, differentiable=("x",), dynamic=("p",), guard=_guard)
