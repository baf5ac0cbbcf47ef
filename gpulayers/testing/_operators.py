"""A tensor's operators, the short way: operands of one type need none of the rules by which Triton mixes types.

Nearly all of an interpreted kernel is such operators; whatever else comes goes through Triton's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl

from gpulayers.testing._builder import BUILDER, FLOATS, INT1, INTEGERS, Handle, block_type

WIDE = {id(tl.float32), id(tl.float64)}

_METHODS = {  # name: (on integers, on floats)
    "add": ("add", "fadd"),
    "sub": ("sub", "fsub"),
    "mul": ("mul", "fmul"),
    "truediv": (None, "fdiv"),
    "floordiv": ("sdiv", None),
    "mod": ("srem", None),
    "and": ("and", None),
    "or": ("or", None),
    "xor": ("xor", None),
    "lt": ("icmpSLT", "fcmpOLT"),
    "le": ("icmpSLE", "fcmpOLE"),
    "gt": ("icmpSGT", "fcmpOGT"),
    "ge": ("icmpSGE", "fcmpOGE"),
    "eq": ("icmpEQ", "fcmpOEQ"),
    "ne": ("icmpNE", "fcmpUNE"),
}
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


def constant(value: Any, ty: Any) -> Handle | None:
    """A number beside a tensor of type ``ty``, as Triton takes it; None where its rules have to say."""
    kind = type(value)
    if (kind is float or kind is int) and (storage := FLOATS.get(id(ty))) is not None:
        return Handle(np.array(value).astype(storage), ty)
    if kind is int and (storage := INTEGERS.get(id(ty))) is not None and -(2**31) <= value < 2**31:
        return Handle(np.array(value, storage), ty)
    return None


@cache
def _joined(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that two blocks of as many axes are broadcast to; None where Triton has a word to say."""
    if len(a) != len(b) or any(m != n and 1 not in (m, n) for m, n in zip(a, b)):
        return None
    return tuple(map(max, a, b))


def _together(left: Any, right: Any, scalar: Any) -> Any:
    """The type of an element-wise result of two tensors' types, which NumPy broadcasts; None for Triton's own way."""
    if left is right or right is scalar:
        return left
    if left is scalar:
        return right
    shape = _joined(left.shape, right.shape)
    return left if shape == left.shape else shape and block_type(scalar, shape)


def _widened(integers: Any) -> Any:
    if integers.dtype is tl.int64:
        return integers
    ty, data = integers.type, integers.handle.data
    return tl.tensor(
        Handle(data.astype(np.int64), tl.int64), block_type(tl.int64, data.shape) if ty.is_block() else tl.int64
    )


def operator(name: str, slow: Callable[..., Any]) -> Callable[..., Any]:
    """The method ``__name__`` of a tensor, or its reflection ``__rname__``."""
    plain = name.removeprefix("r") if name not in _METHODS else name
    reflected, compares, divides = plain != name, plain in _COMPARISONS, plain == "truediv"
    on_integers, on_floats = (getattr(BUILDER, f"create_{part}", None) for part in _METHODS[plain])

    def call(self: Any, other: Any) -> Any:
        ty = self.dtype
        compute = on_floats if id(ty) in FLOATS else on_integers if id(ty) in INTEGERS or ty is INT1 else None
        if compute is None or (divides and id(ty) not in WIDE) or (ty is INT1 and plain not in ("and", "or", "xor")):
            return slow(self, other)
        if type(other) is tl.tensor:
            if other.dtype is not ty:
                if id(ty) not in INTEGERS or id(other.dtype) not in INTEGERS:
                    return slow(self, other)
                self, other, ty = _widened(self), _widened(other), tl.int64
            out, operand = _together(self.type, other.type, ty), other.handle
            if divides and out is not self.type:  # x / 1 is x itself, which has to have the result's shape
                out = None
        else:
            operand = constant(other.value if type(other) is tl.constexpr else other, ty)
            out = None if operand is None or (divides and reflected) else self.type
        if out is None:
            return slow(self, other)
        found = compute(operand, self.handle) if reflected else compute(self.handle, operand)
        if compares:
            out = block_type(INT1, found.data.shape) if out is not ty else INT1
        return tl.tensor(found, out)

    return call


def moved(slow: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    """``__add__``: a pointer and an offset; everything else is for ``then``."""

    def call(self: Any, other: Any) -> Any:
        if type(self.dtype) is not tl.pointer_type:
            return then(self, other)
        if type(other) is not tl.tensor or id(other.dtype) not in INTEGERS:
            return slow(self, other)
        out, right = self.type, other.type
        if right.is_block():
            shape = _joined(out.shape, right.shape) if out.is_block() else right.shape
            if shape is None:
                return slow(self, other)
            if not out.is_block() or shape != out.shape:
                out = block_type(self.dtype, shape)
        return tl.tensor(BUILDER.create_addptr(self.handle, other.handle), out)

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
        return tl.tensor(Handle(data, self.dtype), block_type(self.dtype, data.shape))

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
