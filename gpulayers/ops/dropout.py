"""Dropout: elements set to 0 at random, the others scaled up so that the expectation stays."""

from __future__ import annotations

import math
from typing import Any

from gpulayers.arrays import Spec, arranged, int64, namespace, spec, up
from gpulayers.definition import ArgumentError, KindError, Rule, ShapeError
from gpulayers.kernels._dropout import draws
from gpulayers.ops._op import Op, require_float
from gpulayers.ops._random import random_bits


def dropout_rule(x: Spec, seed: Spec, *, needs: tuple = (), alpha: bool = False, features: int = 0) -> Rule:
    require_float("x", x)
    if seed.dtype != int64:
        raise KindError("seed", "dtype = int64", seed.dtype)
    if seed.shape != (2,):
        raise ShapeError("seed", "seed = [seed, offset], shape [2]", list(seed.shape))
    if len(x.shape) < features:
        raise ShapeError("x", f"features={features} axes, or more", list(x.shape))
    return Rule({"y": x.like()}, {"seed": seed} if needs else {})


def _guard(*inputs: Any, p: float = 0.5, **_: Any) -> None:
    if isinstance(p, bool) or not isinstance(p, int | float):
        raise KindError("p", "a number", repr(p))
    if not 0 <= p <= 1:
        raise ArgumentError("p", "0 ≤ p ≤ 1", p)


def _masked(x: Any, like: Spec, seed: Any, p: float, alpha: bool, features: int, shifted: bool) -> Any:
    threshold, scale, kept, dropped = draws(p, alpha)
    xp = namespace(x)
    shape = (*x.shape[:features], *(1 for _ in x.shape[features:])) if features else x.shape
    keep = (random_bits(seed, math.prod(shape)) >= threshold).reshape(shape)
    v = up(x)
    y = v * (keep.astype(v.dtype) * scale)
    if alpha and shifted:
        y = y + (keep.astype(v.dtype) * (kept - dropped) + dropped)
    return arranged(xp.asarray(y, like.dtype), like.like().order)


def dropout_forward(
    x: Any, seed: Any, *, needs: tuple = (), p: float = 0.5, alpha: bool = False, features: int = 0
) -> tuple[tuple, dict]:
    """y = x m / (1 − p), m = 1 with probability 1 − p, else 0 (Srivastava et al., 2014). With p = 1, y = 0 x.

    x: any shape, float. seed: int64 [seed, offset], which names the draw (see ``_random.py``); equal seeds give equal
    masks on every backend. Returns y with x's shape, dtype and, where x is dense, memory order.

    features: so many leading axes of x have an m for each of their elements, all others share it: 2 for each channel of
    each sample, [N, C, …], which are drawn as an array [N, C] is (Tompson et al., 2015); 0 for one for each element.
    alpha: y = a (x m + α′ (1 − m)) + b, α′ = −1.7581, with a and b that keep mean 0 and variance 1 (Klambauer et al.,
    "Self-normalizing neural networks", 2017).

    Raises ValueError for p outside [0, 1].
    """
    return (_masked(x, spec(x), seed, p, alpha, features, True),), {"seed": seed} if needs else {}


def dropout_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 0.5, alpha: bool = False, features: int = 0
) -> tuple:
    """dx = dy m / (1 − p), or dy m a: the mask is drawn again."""
    return _masked(dys[0], inputs[0], saved["seed"], p, alpha, features, False), None


dropout = Op(dropout_rule, dropout_forward, dropout_backward, differentiable=("x",), dynamic=("p",), guard=_guard)
