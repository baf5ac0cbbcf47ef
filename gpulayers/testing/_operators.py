"""A tensor's operators, the short way: operands of one type need none of the rules by which Triton mixes types.

Nearly all of an interpreted kernel is such operators; whatever else comes goes through Triton's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl

from gpulayers.testing import _integers
from gpulayers.testing._builder import BUILDER
from gpulayers.testing._values import FLOATS, INT1, INTEGERS, block_type, constant, joined, made

WIDE = {id(tl.float32), id(tl.float64)}

_METHODS: dict[str, tuple[Callable[..., Any] | None, Callable[..., Any] | None]] = {  # name: (on integers, on floats)
    "add": (np.add, np.add),
    "sub": (np.subtract, np.subtract),
    "mul": (np.multiply, np.multiply),
    "truediv": (None, np.divide),
    "floordiv": (_integers.divide, None),
    "mod": (_integers.remainder, None),
    "and": (np.bitwise_and, None),
    "or": (np.bitwise_or, None),
    "xor": (np.bitwise_xor, None),
    "lt": (np.less, np.less),
    "le": (np.less_equal, np.less_equal),
    "gt": (np.greater, np.greater),
    "ge": (np.greater_equal, np.greater_equal),
    "eq": (np.equal, np.equal),
    "ne": (np.not_equal, np.not_equal),
}
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_FUSED = ("add", "sub", "mul", "truediv")


def _computing(name: str) -> dict[int, Callable[..., Any]]:
    """The NumPy function by the operands' common type."""
    on_integers, on_floats = _METHODS[name]
    types = {id(INT1): on_integers} if name in ("and", "or", "xor") else {}
    types |= {ty: on_integers for ty in INTEGERS}
    types |= {ty: on_floats for ty in (WIDE if name == "truediv" else FLOATS)}
    return {ty: function for ty, function in types.items() if function is not None}


def _widened(integers: Any) -> Any:
    if integers.dtype is tl.int64:
        return integers
    ty, data = integers.type, integers.handle.data
    return made(data.astype(np.int64), tl.int64, block_type(tl.int64, data.shape) if ty.is_block() else tl.int64)


def operator(name: str, slow: Callable[..., Any]) -> Callable[..., Any]:
    """The method ``__name__`` of a tensor, or its reflection ``__rname__``."""
    plain = name.removeprefix("r") if name not in _METHODS else name
    reflected, compares, divides = plain != name, plain in _COMPARISONS, plain == "truediv"
    computing, tensor, float32 = _computing(plain).get, tl.tensor, tl.float32
    builds = getattr(BUILDER, f"create_f{plain.removeprefix('true')}") if plain in _FUSED else None

    def call(self: Any, other: Any) -> Any:
        ty = self.dtype
        compute = computing(id(ty))
        if compute is None:
            return slow(self, other)
        if type(other) is tensor:
            if other.dtype is not ty:
                if id(ty) not in INTEGERS or id(other.dtype) not in INTEGERS:
                    return slow(self, other)
                self, other, ty = _widened(self), _widened(other), tl.int64
            out, operand = self.type, other.handle
            if out is not other.type:
                out = joined(out, other.type, ty)
        else:
            operand = constant(other.value if type(other) is tl.constexpr else other, ty)
            out = None if operand is None else self.type
        if out is None:
            return slow(self, other)
        left, right = (operand, self.handle) if reflected else (self.handle, operand)
        if builds is not None and ty is float32 and BUILDER.fused:
            if divides and (
                reflected or out is not self.type
            ):  # x / 1 is x itself, which has to have the result's shape
                return slow(self, other)
            return tensor(builds(left, right), out)
        data = compute(left.data, right.data)
        if not compares:
            return made(data, ty, out)
        return made(data, INT1, INT1 if out is ty else block_type(INT1, data.shape))

    return call


def moved(slow: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    """``__add__``: a pointer and an offset; everything else is for ``then``."""

    def call(self: Any, other: Any) -> Any:
        ty = self.dtype
        if type(ty) is not tl.pointer_type:
            return then(self, other)
        if type(other) is tl.tensor and id(other.dtype) in INTEGERS:
            out, offset = joined(self.type, other.type, ty), other.handle
        else:
            offset = constant(other.value if type(other) is tl.constexpr else other, tl.int32)
            out = None if offset is None else self.type
        return slow(self, other) if out is None else made(BUILDER.moved(self.handle, offset), ty, out)

    return call


EVERYTHING = slice(None)


def indexed(slow: Callable[..., Any]) -> Callable[..., Any]:
    """``__getitem__`` of a block by full slices and None."""

    def call(self: Any, slices: Any) -> Any:
        if not (type(slices) is tuple and self.type.is_block() and all(s is None or s == EVERYTHING for s in slices)):
            return slow(self, slices)
        data = self.handle.data
        if len(slices) - slices.count(None) != data.ndim:
            return slow(self, slices)
        data = data[slices]
        return made(data, self.dtype, block_type(self.dtype, data.shape))

    return call


def operators(slow: Callable[[str], Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The methods of tl.tensor by name; ``slow(name)`` is Triton's own, interpreted."""
    found = {}
    for name in _METHODS:
        found[f"__{name}__"] = operator(name, slow(f"__{name}__"))
        if name not in _COMPARISONS:
            found[f"__r{name}__"] = operator(f"r{name}", slow(f"__r{name}__"))
    found["__getitem__"] = indexed(slow("__getitem__"))
    found["__add__"] = moved(slow("__add__"), found["__add__"])
    return found
