"""Arrays that are to a definition what CuPy's are, on a machine without a GPU: CuPy's names alone, and no implicit
conversion from or to NumPy. What runs on them with NumPy's bits runs on CuPy."""

from __future__ import annotations

import operator
import sys
import types
from typing import Any

import numpy as np

from gpulayers import arrays
from gpulayers.testing.arena import copy_with_strides

_MODULE = "gpulayers_cupy_like"


class Array:
    """A NumPy array that can do no more than CuPy's."""

    __slots__ = ("_a",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, a: np.ndarray):
        self._a = a

    def __getattr__(self, name: str) -> Any:
        import cupy

        if name.startswith("__") or not hasattr(cupy.ndarray, name):
            raise AttributeError(f"CuPy's arrays have no attribute {name!r}")
        value = getattr(self._a, name)
        return _wrapped(_function(value) if callable(value) else value)

    def __getitem__(self, index: Any) -> Any:
        return _wrapped(self._a[_unwrapped(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self._a[_unwrapped(index)] = _unwrapped(value)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("implicit conversion of a CuPy array to NumPy")

    def __len__(self) -> int:
        return len(self._a)

    def __bool__(self) -> bool:
        return bool(self._a)

    def __int__(self) -> int:
        return int(self._a)

    def __float__(self) -> float:
        return float(self._a)


def _operator(name: str) -> Any:
    function = getattr(operator, name)

    def forward(self: Array, *others: Any) -> Any:
        return _wrapped(function(self._a, *map(_unwrapped, others)))

    def reflected(self: Array, other: Any) -> Any:
        return _wrapped(function(_unwrapped(other), self._a))

    return forward, reflected


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and_",
    "or_",
    "xor",
    "lshift",
    "rshift",
):
    _forward, _reflected = _operator(_name)
    _bare = _name.rstrip("_")
    setattr(Array, f"__{_bare}__", _forward)
    setattr(Array, f"__r{_bare}__", _reflected)
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert"):
    setattr(Array, f"__{_name}__", _operator(_name)[0])


def _in_place(name: str) -> Any:
    function = getattr(operator, name)

    def update(self: Array, other: Any) -> Array:
        self._a = function(self._a, _unwrapped(other))
        return self

    return update


for _name in ("iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor"):
    setattr(Array, f"__{_name}__", _in_place(_name))


def _unwrapped(value: Any) -> Any:
    if isinstance(value, Array):
        return value._a
    if isinstance(value, np.ndarray):
        raise TypeError("a NumPy array where CuPy wants its own")
    if isinstance(value, list | tuple):
        return type(value)(map(_unwrapped, value))
    return value


def _wrapped(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and not isinstance(value, np.dtype):
        return Array(np.asarray(value))  # CuPy's reductions give 0-dim arrays, too
    return (
        type(value)(map(_wrapped, value)) if type(value) in (list, tuple) and value and _holds_arrays(value) else value
    )


def _holds_arrays(values: Any) -> bool:
    return any(isinstance(v, np.ndarray) for v in values)


def _function(function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        return _wrapped(function(*map(_unwrapped, args), **{k: _unwrapped(v) for k, v in kwargs.items()}))

    return call


class _Namespace(types.ModuleType):
    """numpy, cut down to the names that cupy has."""

    def __getattr__(self, name: str) -> Any:
        import cupy

        if not hasattr(cupy, name):
            raise AttributeError(f"cupy has no {name!r}")
        value = getattr(np, name)
        if isinstance(value, type) or not callable(value):
            return value
        wrapped = _function(value)
        if hasattr(value, "at"):
            wrapped.at = _function(value.at)
        return wrapped


Array.__module__ = _MODULE  # arrays.namespace finds the module by this name
sys.modules[_MODULE] = _Namespace(_MODULE)
arrays._LIBRARIES[Array] = arrays.NUMPY


def wrap(x: Any) -> Any:
    """A NumPy array (copied, strides kept), or a list or dict of them, as CuPy-like arrays; None stays."""
    if x is None:
        return None
    if isinstance(x, dict):
        return {k: wrap(v) for k, v in x.items()}
    return type(x)(map(wrap, x)) if isinstance(x, list | tuple) else Array(copy_with_strides(x))


def unwrap(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: unwrap(v) for k, v in x.items()}
    return type(x)(map(unwrap, x)) if isinstance(x, list | tuple) else x._a if isinstance(x, Array) else x
