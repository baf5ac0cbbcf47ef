"""Values of interpreted kernels: arrays with Triton's types, made cheaply, since a kernel makes one with each operation.

Types of blocks are single objects, told apart by identity: Triton's own are compared and hashed by Python code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

STORAGE: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "int1": np.bool_,
        "int8": np.int8,
        "int16": np.int16,
        "int32": np.int32,
        "int64": np.int64,
        "uint8": np.uint8,
        "uint16": np.uint16,
        "uint32": np.uint32,
        "uint64": np.uint64,
        "fp16": np.float16,
        "fp32": np.float32,
        "fp64": np.float64,
        "bf16": ml_dtypes.bfloat16,
        "fp8e4nv": ml_dtypes.float8_e4m3fn,
        "fp8e5": ml_dtypes.float8_e5m2,
        "fp8e4b8": ml_dtypes.float8_e4m3fnuz,
        "fp8e5b16": ml_dtypes.float8_e5m2fnuz,
    }.items()
}
POINTER = np.dtype(np.uint64)
INT1, INT32 = tl.int1, tl.int32
FLOATS = {id(ty): STORAGE[ty.name] for ty in (tl.float16, tl.bfloat16, tl.float32, tl.float64)}
INTEGERS = {id(ty): STORAGE[ty.name] for ty in (tl.int32, tl.int64)}
SIZES = {ty: np.uint64(kind.itemsize) for ty, kind in (FLOATS | INTEGERS).items()}
"""By identity, as all types of elements here."""


def storage(ty: Any) -> np.dtype:
    """The NumPy dtype that holds values of a Triton scalar, pointer or block type."""
    ty = ty.scalar
    return POINTER if ty.is_ptr() else STORAGE[ty.name]


class Handle(stock.TensorHandle):
    """A value: its array (shape (1,) for a scalar) and its Triton element type."""

    attr: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, data: np.ndarray, dtype: Any):  # replaces the dataclass's __init__, which validates each time
        self.data, self.dtype = data, dtype

    def set_attr(self, key: str, value: Any) -> None:
        self.attr = {**self.attr, key: value}


def factors(handle: stock.TensorHandle) -> tuple[np.ndarray, np.ndarray] | None:
    """Of a product that a sum takes unrounded (`Builder.fused`)."""
    return handle.attr.get("factors")


_new = object.__new__
_blocks: dict[tuple[str, tuple[int, ...]], Any] = {}
_joins: dict[tuple[int, int, int], Any] = {}


_pointers: dict[str, Any] = {}


def pointer_to(element: Any) -> Any:
    """The one type of pointers to such elements."""
    return _pointers.get(element.name) or _pointers.setdefault(element.name, tl.pointer_type(element))


def block_type(scalar: Any, shape: tuple[int, ...]) -> Any:
    """The one block type of these elements and this shape."""
    found = _blocks.get((scalar.name, shape))
    if found is None:
        found = tl.block_type(scalar, list(shape))
        found.known = tuple(found.shape)
        found = _blocks.setdefault((scalar.name, found.known), found)
    return found


def interned(ty: Any) -> Any:
    """A type as `block_type` gives it: one that Triton's code has just made is replaced."""
    return ty if not ty.is_block() or "known" in vars(ty) else block_type(ty.scalar, tuple(ty.shape))


def joined(left: Any, right: Any, scalar: Any) -> Any:
    """The type with elements `scalar` of an element-wise result of two tensors' types, which NumPy broadcasts; None for
    blocks of other numbers of axes, or that do not fit: Triton has a word to say."""
    key = id(left), id(right), id(scalar)
    if key not in _joins:
        _joins[key] = _join(left, right, scalar), left, right, scalar  # what is kept keeps its identity
    return _joins[key][0]


def _join(left: Any, right: Any, scalar: Any) -> Any:
    a, b = (tuple(ty.shape) if ty.is_block() else None for ty in (left, right))
    if a is None or b is None:
        return scalar if a == b else block_type(scalar, a or b or ())
    if len(a) != len(b) or any(m != n and 1 not in (m, n) for m, n in zip(a, b)):
        return None
    return block_type(scalar, tuple(map(max, a, b)))


def made(data: np.ndarray, dtype: Any, ty: Any) -> Any:
    """A tensor of elements `dtype` and of type `ty`, which is the dtype or has come from `block_type`."""
    handle = _new(Handle)
    handle.data, handle.dtype = data, dtype
    out = _new(tl.tensor)
    out.handle, out.type, out.dtype = handle, ty, dtype
    return out


def of(data: np.ndarray, dtype: Any) -> Any:
    """A block around an array."""
    return made(data, dtype, block_type(dtype, data.shape))


def converter(source: Any, target: Any) -> np.dtype | None:
    """What NumPy converts to between widths of one kind and from integers to floats; None where Triton's rules have to
    say."""
    if (kind := FLOATS.get(id(target))) is not None:
        return kind if id(source) in FLOATS or id(source) in INTEGERS else None
    return INTEGERS.get(id(target)) if id(source) in INTEGERS else None


_constants: dict[tuple[type, float, int], Handle] = {}


def constant(value: Any, ty: Any) -> Handle | None:
    """A number beside a tensor of type ``ty``, as Triton takes it; None where its rules have to say."""
    kind = type(value)
    if kind is not int and kind is not float:
        return None
    key = kind, value, id(ty)
    found = _constants.get(key)
    if found is None:
        if (storage := FLOATS.get(id(ty))) is not None:
            data = np.array(value or 0).astype(storage)  # Triton knows one zero
        elif kind is int and (storage := INTEGERS.get(id(ty))) is not None and -(2**31) <= value < 2**31:
            data = np.array(value, storage)
        else:
            return None
        data.flags.writeable = False
        found = Handle(data, ty)
        if value == value and len(_constants) < 4096:
            _constants[key] = found
    return found


def _dimensions(self: Any) -> Any:
    ty = self.type
    found = vars(ty).get("_dimensions")
    if found is None:
        found = tl.tuple([tl.constexpr(n) for n in (ty.shape if ty.is_block() else ())])
        ty._dimensions = found
    return found


def _numel(self: Any) -> Any:
    return tl.constexpr(self.type.numel if self.type.is_block() else 1)


def _init(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, interned(type), type.scalar


TENSOR: dict[str, Callable[..., Any] | property] = {
    "__init__": _init,
    "shape": property(_dimensions),
    "numel": property(_numel),
}
"""What a tensor derives from its type, derived when it is asked for."""
