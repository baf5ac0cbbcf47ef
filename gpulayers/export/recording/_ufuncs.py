"""NumPy's element-wise functions as operations of the graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpulayers.export.recording._handle import Handle, emit, kind_of, lift, plain
from gpulayers.export.recording._place import refuse

_SAME = (
    "exp expm1 log log1p sqrt tanh sin cos tan sinh cosh floor ceil sign reciprocal isnan isinf isfinite "
    "greater less greater_equal less_equal equal not_equal maximum minimum"
)
UFUNCS = {name: name for name in _SAME.split()} | {
    "add": "add", "subtract": "sub", "multiply": "mul", "divide": "div", "floor_divide": "floordiv", "remainder": "mod",
    "power": "pow", "float_power": "pow", "logical_and": "and", "logical_or": "or", "logical_xor": "xor",
    "bitwise_and": "and", "bitwise_or": "or", "bitwise_xor": "xor", "logical_not": "not", "invert": "not",
    "negative": "neg", "absolute": "abs", "fabs": "abs", "rint": "round", "erf": "erf",
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh",
}  # fmt: skip
"""The operation of each."""

_OF_BOOLEANS = {"add": "or", "maximum": "or", "mul": "and", "minimum": "and"}

REWRITTEN: dict[str, Callable] = {
    "square": lambda x: x * x,
    "positive": lambda x: lift(x).bare(),
    "conjugate": lambda x: lift(x).bare(),
    "exp2": lambda x: np.exp(x * math.log(2)),
    "log2": lambda x: np.log(x) * (1 / math.log(2)),
    "log10": lambda x: np.log(x) * (1 / math.log(10)),
    "hypot": lambda x, y: np.sqrt(x * x + y * y),
    "logaddexp": lambda x, y: np.maximum(x, y) + np.log1p(np.exp(-np.abs(x - y))),
    "trunc": lambda x: np.where(x < 0, np.ceil(x), np.floor(x)),
    "right_shift": lambda x, n: np.floor(x * 2.0**-n) if lift(x).kind == "f" else x // 2**n,
}
"""What is computed in place of functions that no target has."""

ADVICE = {
    "fmax": "np.maximum, and np.where(np.isnan(x), …) for NaN",
    "fmin": "np.minimum, and np.where(np.isnan(x), …) for NaN",
    "arctan2": "np.arctan(y / x), with the quadrant by np.where",
    "divmod": "x // y and x % y",
    "copysign": "np.where(y < 0, -np.abs(x), np.abs(x))",
    "heaviside": "np.where(x > 0, 1, np.where(x < 0, 0, y))",
    "vecdot": "(x * y).sum(-1)",
    "cbrt": "np.sign(x) * np.abs(x) ** (1 / 3)",
}


def elementwise(ufunc: np.ufunc, name: str, inputs: list[Any]) -> Any:
    """The result of a call of a ufunc in ``UFUNCS``."""
    if name == "power" and isinstance(inputs[1], int | float | np.generic) and inputs[1] in (0.5, 2):  # as NumPy does
        return np.sqrt(inputs[0]) if inputs[1] == 0.5 else inputs[0] * inputs[0]
    handles = [x for x in inputs if isinstance(x, Handle)]
    masks = [x.mask for x in handles if x.mask is not None]
    if any(h.value.ndim and (h.mask is None or h.mask.node is not masks[0].node) for h in handles if masks):
        refuse("what a mask selected goes with numbers, and with what the same mask selected", "np.where(mask, …, …)")
    value, loop = _computed(ufunc, name, [plain(x) for x in inputs])
    kinds = [kind_of(np.empty(0, dtype)) for dtype in loop]
    op = UFUNCS[name]
    if name in ("bitwise_and", "bitwise_or", "bitwise_xor", "invert") and kinds[0] != "b":
        refuse(f"np.{name} of integers", "booleans, or // and % by powers of two")
    if kinds[0] == "b":
        op = _OF_BOOLEANS.get(op, op)
    y = emit(op, [lift(x.bare() if isinstance(x, Handle) else x, kind) for x, kind in zip(inputs, kinds)], value)
    y.mask = masks[0] if masks else None
    return y


def _computed(ufunc: np.ufunc, name: str, values: list[Any]) -> tuple[np.ndarray, list[np.dtype]]:
    """(the value, the dtypes that NumPy casts the operands to for it)."""
    if name == "erf":  # np.frompyfunc(math.erf, 1, 1), scipy.special.erf
        return np.asarray(ufunc(values[0])).astype(values[0].dtype), [values[0].dtype]
    value = np.asarray(ufunc(*values))
    weak: list[Any] = [
        type(v) if type(v) in (int, float) else np.dtype(bool) if type(v) is bool else np.asarray(v).dtype
        for v in values
    ]
    return value, list(ufunc.resolve_dtypes((*weak, *[None] * ufunc.nout)))[: ufunc.nin]
