"""Triton's most used functions, the short way: for arguments of the types that kernels give them nearly always.

Each takes what Triton's own takes; arguments of other kinds, wrong ones too, go there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import triton.language as tl

from gpulayers.testing._builder import BUILDER, SEMANTIC
from gpulayers.testing._values import (
    FLOATS,
    INT1,
    INT32,
    INTEGERS,
    STORAGE,
    block_type,
    constant,
    converter,
    joined,
    made,
)

NUMBERS = FLOATS | INTEGERS
WIDE = {ty for ty, storage in NUMBERS.items() if storage.itemsize >= 4}


def _plain(value: Any) -> Any:
    return value.value if type(value) is tl.constexpr else value


@cache
def _hints_are_known(load: bool, cache_modifier: Any, eviction_policy: Any) -> bool:
    """Raises what Triton raises for others."""
    known = SEMANTIC._str_to_load_cache_modifier if load else SEMANTIC._str_to_store_cache_modifier
    known(_plain(cache_modifier))
    SEMANTIC._str_to_eviction_policy(_plain(eviction_policy))
    return True


def _spread(value: Any, pointer: Any) -> np.ndarray | None:
    """A tensor's array as it is broadcast to a pointer's shape; None if the pointer would have to be, too."""
    data, wanted = value.handle.data, pointer.handle.data.shape
    if data.shape == wanted and value.type.is_block() == pointer.type.is_block():
        return data
    if joined(pointer.type, value.type, pointer.dtype) is not pointer.type:
        return None
    wide = np.empty(wanted, data.dtype)
    wide[...] = data
    return wide


def _masked(mask: Any, pointer: Any) -> tuple[bool, np.ndarray | None]:
    """(whether the short way serves this mask, its array)."""
    if mask is None:
        return True, None
    if type(mask) is not tl.tensor or mask.dtype is not INT1:
        return False, None
    data = _spread(mask, pointer)
    return data is not None, data


@lru_cache(1024)
def _fill(kind: Any, value: float, element: str) -> np.ndarray | None:
    """A number given as `other`, which Triton has as float32 or int32 first."""
    storage, narrow = STORAGE[element], -(2**31) <= value < 2**31 if kind is int else kind is float
    if not narrow or (kind is float and np.dtype(storage).kind in "iu"):
        return None
    return np.array(value or 0, np.float32 if kind is float and storage.itemsize < 8 else None).astype(storage)


def _other(other: Any, pointer: Any, element: Any) -> tuple[bool, Any]:
    """(whether the short way serves this `other`, its array)."""
    other = _plain(other)
    if other is None:
        return True, None
    if type(other) is tl.tensor:
        data = _spread(other, pointer) if other.dtype is element else None
    else:
        kind: Any = type(other)
        data = _fill(kind, other, element.name) if kind is int or kind is float else None
    return data is not None, data


def _load(slow: Callable[..., Any]) -> Callable[..., Any]:
    def load(
        pointer: Any,
        mask: Any = None,
        other: Any = None,
        boundary_check: Any = (),
        padding_option: Any = "",
        cache_modifier: Any = "",
        eviction_policy: Any = "",
        volatile: Any = False,
        _semantic: Any = None,
    ) -> Any:
        ty: Any = getattr(pointer, "dtype", None)
        if type(ty) is tl.pointer_type and id(element := ty.element_ty) in NUMBERS and boundary_check == ():
            served, lanes = _masked(mask, pointer)
            served, fill = _other(other, pointer, element) if served else (False, None)
            if served and padding_option == "" and (mask is not None or other is None):
                _hints_are_known(True, cache_modifier, eviction_policy)
                data = BUILDER.memory.load(pointer.handle.data, lanes, NUMBERS[id(element)], fill)
                return made(data, element, block_type(element, data.shape) if pointer.type.is_block() else element)
        return slow(pointer, mask, other, boundary_check, padding_option, cache_modifier, eviction_policy, volatile)

    return load


def _store(slow: Callable[..., Any]) -> Callable[..., Any]:
    def store(
        pointer: Any,
        value: Any,
        mask: Any = None,
        boundary_check: Any = (),
        cache_modifier: Any = "",
        eviction_policy: Any = "",
        _semantic: Any = None,
    ) -> Any:
        ty: Any = getattr(pointer, "dtype", None)
        if (
            type(ty) is tl.pointer_type
            and type(value) is tl.tensor
            and boundary_check == ()
            and not ty.is_const()
            and (kind := converter(value.dtype, ty.element_ty)) is not None
            and joined(pointer.type, value.type, ty) is pointer.type
        ):
            served, lanes = _masked(mask, pointer)
            if served:
                _hints_are_known(False, cache_modifier, eviction_policy)
                return BUILDER.memory.store(pointer.handle.data, value.handle.data.astype(kind, copy=False), lanes)
        return slow(pointer, value, mask, boundary_check, cache_modifier, eviction_policy)

    return store


def _program_id(slow: Callable[..., Any]) -> Callable[..., Any]:
    def program_id(axis: Any, _semantic: Any = None) -> Any:
        axis = _plain(axis)
        if axis not in (0, 1, 2):
            return slow(axis)
        return made(np.array([BUILDER.grid_idx[axis]], np.int32), INT32, INT32)

    return program_id


def _arange(slow: Callable[..., Any]) -> Callable[..., Any]:
    @lru_cache(256)
    def kept(start: Any, end: Any) -> Any:
        out = slow(start, end)
        out.handle.data.flags.writeable = False
        return out

    return lambda start, end, _semantic=None: kept(_plain(start), _plain(end))


def _full(slow: Callable[..., Any]) -> Callable[..., Any]:
    @lru_cache(128)
    def kept(shape: tuple[int, ...], value: float, kind: Any, dtype: Any) -> Any:
        out = slow(shape, value, dtype)
        out.handle.data.flags.writeable = False
        return out

    def full(shape: Any, value: Any, dtype: Any, _semantic: Any = None) -> Any:
        given, number, ty = _plain(shape), _plain(value), _plain(dtype)
        kind: Any = type(number)
        if id(ty) not in NUMBERS or kind not in (int, float) or type(given) not in (list, tuple, tl.tuple):
            return slow(shape, value, dtype)
        return kept(tuple(map(_plain, given)), number, kind, ty)

    return full


def _cast(slow: Callable[..., Any]) -> Callable[..., Any]:
    def cast(
        input: Any, dtype: Any, fp_downcast_rounding: Any = None, bitcast: Any = False, _semantic: Any = None
    ) -> Any:
        target = _plain(dtype)
        if (
            type(input) is tl.tensor
            and fp_downcast_rounding is None
            and bitcast is False
            and isinstance(target, tl.dtype)
        ):
            target = target.scalar
            if input.dtype is target:
                return input
            if (kind := converter(input.dtype, target)) is not None:
                data = input.handle.data.astype(kind)
                return made(data, target, block_type(target, data.shape) if input.type.is_block() else target)
        return slow(input, dtype, fp_downcast_rounding, bitcast)

    return cast


def _pair(x: Any, y: Any) -> tuple[Any, Any, Any] | None:
    """Two operands' handles and the type of their element-wise result, where they have one type, or one is a number."""
    x, y = _plain(x), _plain(y)
    if type(x) is tl.tensor and type(y) is tl.tensor:
        if x.dtype is not y.dtype or id(x.dtype) not in NUMBERS:
            return None
        out = x.type if x.type is y.type else joined(x.type, y.type, x.dtype)
        return None if out is None else (x.handle, y.handle, out)
    if type(x) is tl.tensor:
        number = constant(y, x.dtype)
        return None if number is None else (x.handle, number, x.type)
    if type(y) is tl.tensor:
        number = constant(x, y.dtype)
        return None if number is None else (number, y.handle, y.type)
    return None


def _extreme(slow: Callable[..., Any], of_integers: np.ufunc, of_floats: np.ufunc) -> Callable[..., Any]:
    def extreme(x: Any, y: Any, propagate_nan: Any = tl.PropagateNan.NONE, _semantic: Any = None) -> Any:
        pair = _pair(x, y) if _plain(propagate_nan) == tl.PropagateNan.NONE else None
        if pair is None or id(ty := pair[2].scalar) not in WIDE:  # beside 16 bits a number makes float32 of them
            return slow(x, y, propagate_nan)
        return made((of_floats if id(ty) in FLOATS else of_integers)(pair[0].data, pair[1].data), ty, pair[2])

    return extreme


def _where(slow: Callable[..., Any]) -> Callable[..., Any]:
    def where(condition: Any, x: Any, y: Any, _semantic: Any = None) -> Any:
        if type(condition) is tl.tensor and condition.dtype is INT1 and (pair := _pair(x, y)) is not None:
            a, b, values = pair
            if (out := joined(condition.type, values, values.scalar)) is not None:
                return made(np.where(condition.handle.data, a.data, b.data), values.scalar, out)
        return slow(condition, x, y)

    return where


def functions(slow: Callable[[str], Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The functions of triton.language by name; ``slow(name)`` is Triton's own, interpreted."""
    found = {
        "load": _load(slow("load")),
        "store": _store(slow("store")),
        "program_id": _program_id(slow("program_id")),
        "arange": _arange(slow("arange")),
        "full": _full(slow("full")),
        "cast": _cast(slow("cast")),
        "where": _where(slow("where")),
        "minimum": _extreme(slow("minimum"), np.minimum, np.fmin),
        "maximum": _extreme(slow("maximum"), np.maximum, np.fmax),
    }
    for function in found.values():
        setattr(function, tl.core.TRITON_BUILTIN, True)
    return found


def methods(slow: Callable[[str], Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Those of tl.tensor."""
    return {"to": _cast(slow("to"))}
