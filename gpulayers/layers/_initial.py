"""How weights start: names for initial values, and functions that draw them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Init = str | float | Callable


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan in, fan out) of a weight (out, in, *kernel)."""
    if len(shape) < 2:
        return (shape[0], shape[0]) if shape else (1, 1)
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


def uniform(bound: float) -> Callable:
    """An init: uniform in ±bound."""
    return lambda shape, random: random.uniform(-bound, bound, shape)


def _uniform(bound: Callable[[Sequence[int]], float]) -> Callable:
    return lambda shape, random: random.uniform(-bound(shape), bound(shape), shape)


def _normal(deviation: Callable[[Sequence[int]], float]) -> Callable:
    return lambda shape, random: random.normal(0.0, deviation(shape), shape)


INITS: dict[str, Callable[[Sequence[int], np.random.Generator], np.ndarray]] = {
    "zeros": lambda shape, random: np.zeros(shape),
    "ones": lambda shape, random: np.ones(shape),
    "normal": _normal(lambda shape: 0.02),
    # torch's default for linear and convolution: kaiming_uniform with a = √5
    "fan_in_uniform": _uniform(lambda shape: 1 / math.sqrt(max(1, fans(shape)[0]))),
    # He et al. 2015, for relu
    "kaiming_uniform": _uniform(lambda shape: math.sqrt(6 / max(1, fans(shape)[0]))),
    "kaiming_normal": _normal(lambda shape: math.sqrt(2 / max(1, fans(shape)[0]))),
    # Glorot and Bengio 2010
    "xavier_uniform": _uniform(lambda shape: math.sqrt(6 / max(1, sum(fans(shape))))),
    "xavier_normal": _normal(lambda shape: math.sqrt(2 / max(1, sum(fans(shape))))),
}


def initial(init: Init, shape: Sequence[int], random: np.random.Generator) -> np.ndarray:
    """Values for a weight: ``init`` is a name in INITS, a number, or a function of (shape, generator)."""
    if isinstance(init, str):
        if init not in INITS:
            raise ValueError(f"init: the rule is one of {', '.join(INITS)}, a number or a function; got {init!r}")
        init = INITS[init]
    return np.asarray(init(shape, random) if callable(init) else np.full(shape, init))
