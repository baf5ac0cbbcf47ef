"""What every backend says of several weights of one input, and of products in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WEIGHTS = ("weight", "weight_2", "weight_3")
BIASES = ("bias", "bias_2", "bias_3")


def named(weights: Sequence[Any]) -> dict[str, Any]:
    """Those that there are, by name."""
    return {name: w for name, w in zip(WEIGHTS, weights) if w is not None}


def kept(x: Any, weights: dict[str, Any], needs: Sequence[str]) -> dict[str, Any]:
    """What backward takes."""
    return ({"x": x} if {*WEIGHTS} & {*needs} else {}) | (weights if "x" in needs else {})


def added_up(x: Any, shape: tuple) -> Any:
    """The sum of ``x`` over the axes along which an array of ``shape`` was broadcast to it."""
    x = x.sum(tuple(range(x.ndim - len(shape)))) if x.ndim > len(shape) else x
    alone = tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1)
    return x.sum(alone, keepdims=True) if alone else x


def broadcast(one: Sequence[Any], other: Sequence[Any]) -> tuple | None:
    """The shape that both are broadcast to, None where there is none. Sizes may be symbols, or None for one not known."""
    length = max(len(one), len(other))
    pairs = zip(*((1,) * (length - len(s)) + tuple(s) for s in (one, other)))
    found = [b if a == 1 or a is None else a if b in (1, None) or a == b else False for a, b in pairs]
    return None if any(n is False for n in found) else tuple(found)
