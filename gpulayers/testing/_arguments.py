"""The arguments of an interpreted launch as its kernel sees them."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.jit import mangle_type

from gpulayers.testing import _launches
from gpulayers.testing._builder import SEMANTIC
from gpulayers.testing._values import INT32, STORAGE, made, pointer_to
from gpulayers.testing.memory import Memory


def argument(arg: Any, parameter: Any, memory: Memory) -> Any:
    """A number that the compiler takes for a constant stays one; arrays are registered on the way."""
    return _value(arg, parameter.name, parameter.annotation_type, memory, not parameter.do_not_specialize)


def _value(arg: Any, name: str, annotation: str, memory: Memory, ones: bool) -> Any:
    """ones: the integer 1 is a constant, unless annotated; whole tuples share this."""
    if type(arg) is int and not annotation and -(2**31) <= arg < 2**31:
        return arg if arg == 1 and ones else made(np.array([arg], np.int32), INT32, INT32)
    if isinstance(arg, np.ndarray) or hasattr(arg, "data_ptr"):
        ty = pointer_to(_element_type(arg))
        return made(np.array([memory.add(name, arg)], np.uint64), ty, ty)
    if isinstance(arg, np.generic):
        arg = arg.item()
    if isinstance(arg, tuple):
        items = [_value(item, f"{name}[{i}]", "", memory, ones) for i, item in enumerate(arg)]
        return type(arg)(*items) if hasattr(arg, "_fields") else tl.tuple(items)
    if type(arg).__name__ == "TensorDescriptor":
        return _descriptor(arg, name, memory)
    if not isinstance(arg, bool | int | float) or (type(arg) is int and arg == 1 and ones and not annotation):
        return arg
    ty = tl.str_to_ty(annotation or mangle_type(arg), None)  # a float is float32, an int as wide as it needs
    return made(np.array([arg]).astype(STORAGE[ty.name]), ty, ty)


def _descriptor(arg: Any, name: str, memory: Memory) -> Any:
    def part(value: Any) -> Any:
        return _value(value, name, "", memory, False)

    shape, strides = [part(int(n)) for n in arg.shape], [part(int(n)) for n in arg.strides[:-1]]
    block = [tl.constexpr(n) for n in arg.block_shape]
    return SEMANTIC.make_tensor_descriptor(part(arg.base), shape, [*strides, tl.constexpr(1)], block, arg.padding)


def _element_type(array: Any) -> Any:
    """The Triton type of an array's elements."""
    if isinstance(array.dtype, tl.dtype):  # triton.reinterpret
        return array.dtype
    name = _launches.dtype_name(array)
    return getattr(tl, {"bool": "int1", "float8_e4m3fn": "float8e4nv", "float8_e5m2": "float8e5"}.get(name, name))
