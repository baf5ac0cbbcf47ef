"""The operations of a recorded graph in array code, on NumPy and CuPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpulayers.arrays import namespace
from gpulayers.ops._random import random_bits
from gpulayers.ops._special import erf

_NAMES = {
    "sub": "subtract", "mul": "multiply", "div": "divide", "floordiv": "floor_divide", "mod": "remainder",
    "pow": "power", "neg": "negative", "round": "rint", "and": "logical_and", "or": "logical_or", "xor": "logical_xor",
    "not": "logical_not", "asin": "arcsin", "acos": "arccos", "atan": "arctan", "asinh": "arcsinh",
    "acosh": "arccosh", "atanh": "arctanh", "broadcast": "broadcast_to", "gather": "take", "reverse": "flip",
}  # fmt: skip
"""What NumPy calls an operation, where it is not the operation's own name."""


def _slice(x: Any, spans: tuple) -> Any:
    return x[tuple(slice(*span) for span in spans)]


def _segment_sum(x: Any, i: Any, size: int) -> Any:
    xp = namespace(x)
    total = xp.zeros((size, *x.shape[1:]), x.dtype)
    xp.add.at(total, i, x)
    return total


def _pad(x: Any, edges: tuple, value: float) -> Any:
    return namespace(x).pad(x, edges, constant_values=value)


def _concat(*xs: Any, axis: int) -> Any:
    return namespace(xs[0]).concatenate(xs, axis)


_OWN: dict[str, Callable] = {
    "erf": erf, "slice": _slice, "segment_sum": _segment_sum, "pad": _pad, "concat": _concat,
    "reshape": lambda x, shape: x.reshape(shape), "cast": lambda x: x, "reciprocal": lambda x: 1 / x,
    "const": lambda value: value, "random_bits": lambda draw, shape: random_bits(draw, shape[0]),
}  # fmt: skip
_PLACES = ("broadcast", "gather", "reverse", "transpose")
"""Those whose attribute NumPy takes by its place."""


def computed(op: str, xs: Sequence[Any], attributes: dict[str, Any], xp: Any) -> Any:
    """What an operation gives: attributes are numbers, xp is numpy or cupy."""
    if op in _OWN:
        return _OWN[op](*xs, **attributes)
    if op == "full":
        return xp.full(attributes["shape"], attributes["value"])
    function = getattr(xp, _NAMES.get(op, op))
    if op in _PLACES:
        return function(*xs, *attributes.values())
    if "keepdims" in attributes:
        attributes = {"axis": attributes["axes"], "keepdims": attributes["keepdims"]}
    return function(*xs, **attributes)
