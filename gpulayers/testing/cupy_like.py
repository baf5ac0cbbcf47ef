"""Arrays that are to a definition what CuPy's are, on a machine without a GPU: what runs on them runs on CuPy.

They compute with NumPy, and refuse what CuPy would refuse or do otherwise. What CuPy can do is read from CuPy itself, which
imports without a GPU: its names, its functions' parameters, and the dtypes that each of its ufuncs has a loop for.
Refused are

- names, parameters and dtypes that CuPy lacks, and results that would have another dtype there (Python's numbers take
  the dtype of the first loop that fits: ``where(mask, 1.5, 0.0)`` is float16);
- NumPy arrays and lists where CuPy wants its arrays, and implicit conversion to NumPy;
- what would wait for the GPU: a truth value, int(), float(), item(), an index by a mask, and the like.

What a function makes is row-major, as in CuPy, where NumPy keeps the order of its inputs: text that counts on one of the
two is found by the strides of its results.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpulayers import arrays, dispatch
from gpulayers.testing.arena import Arena, copy_with_strides

ran: set[tuple[str, str]] = set()
"""(op, dtype) of the definitions that ``check_op`` ran here."""

_MODULE = "gpulayers_cupy_like"
_WAITS = {"item", "tolist", "get", "tobytes", "nonzero", "dump", "dumps", "tofile", "argwhere", "flatnonzero", "unique"}
_ARRAYS_FIRST = {"condition", "ary", "array", "arr", "b", "x", "a"}
"""Parameters of CuPy's functions that take its arrays alone, …"""
_CONVERT = {"array", "asarray", "asanyarray", "ascontiguousarray", "full", "arange"}
"""… but for these functions, which make arrays of numbers."""
_KEEP_ORDER = {"astype", "zeros_like", "ones_like", "empty_like", "full_like"}
"""Functions and methods whose result has the memory order of their first argument, in CuPy too."""
_OPERATORS = {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide", "floordiv": "floor_divide",
    "mod": "remainder", "pow": "power", "matmul": "matmul", "and": "bitwise_and", "or": "bitwise_or",
    "xor": "bitwise_xor", "lshift": "left_shift", "rshift": "right_shift",
}  # fmt: skip
_COMPARISONS = {
    "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal", "ne": "not_equal",
    "neg": "negative", "abs": "absolute", "invert": "invert",
}  # fmt: skip


class Array:
    """A NumPy array that can do no more than CuPy's."""

    __slots__ = ("_a", "dtype")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, a: np.ndarray):
        self._a, self.dtype = a, a.dtype

    def __getattr__(self, name: str) -> Any:
        import cupy

        if name.startswith("__") or not hasattr(cupy.ndarray, name):
            raise AttributeError(f"CuPy's arrays have no attribute {name!r}")
        value = getattr(self._a, name)
        if not callable(value):
            return _wrapped(value, self._a)
        if name in _WAITS:
            raise TypeError(f"{name} waits for the GPU")
        return functools.partial(_method, name, self)

    def __getitem__(self, index: Any) -> Any:
        if any(isinstance(i, Array) and i.dtype == bool for i in (index if isinstance(index, tuple) else (index,))):
            raise TypeError("an index by a mask waits for the GPU")
        return _wrapped(self._a[_unwrapped(index)], self._a)

    def __setitem__(self, index: Any, value: Any) -> None:
        _number_or_array("[…] =", value)
        self._a[_unwrapped(index)] = _unwrapped(value)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("implicit conversion of a CuPy array to NumPy")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        return getattr(_namespace, ufunc.__name__)(*inputs, **options) if method == "__call__" else NotImplemented

    def __array_function__(self, function: Any, _: Any, args: tuple, options: dict) -> Any:
        return getattr(_namespace, function.__name__)(*args, **options)

    def __len__(self) -> int:
        return len(self._a)


def _waits(name: str) -> Callable:
    def refuse(self: Array) -> Any:
        raise TypeError(f"{name} of a CuPy array waits for the GPU")

    return refuse


for _name in ("bool", "int", "float", "complex", "index"):
    setattr(Array, f"__{_name}__", _waits(_name))


def _operator(name: str, function: str) -> None:
    def forward(self: Array, *others: Any) -> Any:
        return getattr(_namespace, function)(self, *others)

    def reflected(self: Array, other: Any) -> Any:
        return getattr(_namespace, function)(other, self)

    def update(self: Array, other: Any) -> Array:
        return getattr(_namespace, function)(self, other, out=self)

    setattr(Array, f"__{name}__", forward)
    if name in _OPERATORS:
        setattr(Array, f"__r{name}__", reflected)
        setattr(Array, f"__i{name}__", update)


for _name, _theirs in (_OPERATORS | _COMPARISONS).items():
    _operator(_name, _theirs)


# --- arrays in, arrays out -------------------------------------------------------------------------------------------


def _number_or_array(name: str, value: Any) -> None:
    if not isinstance(value, Array | bool | int | float | np.generic):
        raise TypeError(f"{name}: a {type(value).__name__} where CuPy wants an array of its own or a number")


def _unwrapped(value: Any) -> Any:
    if isinstance(value, Array):
        return value._a
    if isinstance(value, np.ndarray):
        raise TypeError("a NumPy array where CuPy wants its own")
    if isinstance(value, list | tuple):
        return type(value)(map(_unwrapped, value))
    return value


def _wrapped(value: Any, *given: Any) -> Any:
    """A result as CuPy gives it: 0-dim arrays for NumPy's scalars, new memory row-major."""
    if isinstance(value, list | tuple) and any(isinstance(v, np.ndarray) for v in value):
        return type(value)([_wrapped(v, *given) for v in value])
    if not isinstance(value, np.ndarray | np.generic):
        return value
    value = np.asarray(value)
    if not value.flags.c_contiguous and not any(
        isinstance(a, np.ndarray) and np.may_share_memory(a, value) for a in given
    ):
        value = value.copy("C")
    return Array(value)


# --- what CuPy offers ------------------------------------------------------------------------------------------------


@functools.cache
def _loops(name: str) -> tuple[tuple[str, str], ...]:
    """(characters of the inputs' dtypes, of the outputs') of each loop of CuPy's ufunc; none for other functions."""
    import cupy
    from cupy._core import _routines_math
    from cupy._sorting import search

    hidden = {"where": search._where_ufunc, "clip": _routines_math._clip}
    found = hidden.get(name, getattr(cupy, name))
    return tuple(tuple(loop.split("->")) for loop in getattr(found, "types", ()))  # type: ignore[misc]


@functools.cache
def _parameters(name: str, method: bool) -> inspect.Signature | None:
    """The parameters of CuPy's function or method; None where it does not say."""
    import cupy

    function = getattr(cupy.ndarray if method else cupy, name)
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        text = (function.__doc__ or "").split("\n")[0]
    inside = text.partition("(")[2].rpartition(")")[0]
    names = [part.split()[-1] if "=" not in part else part for part in map(str.strip, inside.split(",")) if part]
    try:
        return inspect.signature(eval(f"lambda {', '.join(names)}: None"))
    except (SyntaxError, NameError):
        return None


def _dtype(char: str) -> np.dtype:
    return arrays.bfloat16 if char == "E" else np.dtype(char)


def _casts(kind: Any, to: np.dtype) -> bool:
    """Whether a value of this dtype fits a loop for ``to``; Python's numbers, known by their type, fit all of their kind."""
    if isinstance(kind, np.dtype):
        return np.can_cast(kind, to)
    return (bool, int, float).index(kind) <= (0 if to.kind == "b" else 1 if to.kind in "iu" else 2)


@functools.cache
def _result_dtype(name: str, kinds: tuple) -> np.dtype:
    """Of the first loop that takes values of these kinds, as CuPy chooses it."""
    for into, out in _loops(name):
        if len(into) == len(kinds) and all(map(_casts, kinds, map(_dtype, into))):
            return _dtype(out[0])
    raise TypeError(f"cupy.{name} has no loop for {', '.join(map(str, kinds))}")


def _kind(name: str, value: Any) -> Any:
    _number_or_array(name, value)
    return value.dtype if isinstance(value, Array | np.generic) else type(value)


def _function(name: str, *args: Any, **kwargs: Any) -> Any:
    """A function of the namespace, called."""
    if name in _WAITS:
        raise TypeError(f"cupy.{name} waits for the GPU")
    if name == "where" and not isinstance(args[0], Array):
        raise TypeError(f"cupy.where: a {type(args[0]).__name__} where the condition is an array")
    if _loops(name):
        if unknown := set(kwargs) - {"out", "dtype", "casting"}:
            raise TypeError(f"cupy.{name} is called with {', '.join(unknown)}")
        if not any(isinstance(a, Array) for a in args):
            raise TypeError(f"cupy.{name}: none of its arguments is an array")
        kinds = [_kind(name, a) for a in args]
        wanted = _result_dtype(name, (np.dtype(bool), *kinds[1:]) if name == "where" else tuple(kinds))
    else:
        _check_call(name, args, kwargs)
        wanted = None
    given = [_unwrapped(a) for a in args]
    options = {k: _unwrapped(v) for k, v in kwargs.items()}
    found = getattr(np, name)(*given, **options)
    if "out" in kwargs:
        return kwargs["out"]
    if wanted is not None and "dtype" not in kwargs and found.dtype != wanted:
        raise TypeError(f"cupy.{name} gives {wanted} here, NumPy {found.dtype}")
    return Array(found) if name in _KEEP_ORDER else _wrapped(found, *arrays.lists(given))


@functools.cache
def _bound(name: str, method: bool, count: int, keywords: tuple[str, ...]) -> dict[str, Any]:
    """The number or keyword of the argument that each parameter gets."""
    signature = _parameters(name, method)
    return dict(signature.bind(*range(count), **{k: k for k in keywords}).arguments) if signature else {}


def _check_call(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    for parameter, where in _bound(name, False, len(args), tuple(kwargs)).items():
        if not isinstance(where, int | str):
            continue  # all that are left over
        value = args[where] if isinstance(where, int) else kwargs[where]
        if parameter == "tup" and not all(isinstance(a, Array) for a in value):
            raise TypeError(f"cupy.{name}: {parameter} must be CuPy's arrays")
        if parameter in _ARRAYS_FIRST and name not in _CONVERT and not isinstance(value, Array):
            raise TypeError(f"cupy.{name}: {parameter} is a {type(value).__name__}, not one of CuPy's arrays")
    if name == "matmul" and not all(isinstance(a, Array) and a.dtype.char in "efd" for a in args):
        raise TypeError("cupy.matmul takes arrays in float16, float32 and float64")


def _method(name: str, self: Array, *args: Any, **kwargs: Any) -> Any:
    """A method of an array, called."""
    _bound(name, True, 1 + len(args), tuple(kwargs))
    given = [_unwrapped(a) for a in args]
    options = {k: _unwrapped(v) for k, v in kwargs.items()}
    found = getattr(self._a, name)(*given, **options)
    return Array(found) if name in _KEEP_ORDER else _wrapped(found, self._a)


class _Namespace(types.ModuleType):
    """numpy, cut down to what cupy has."""

    def __getattr__(self, name: str) -> Any:
        import cupy

        if not hasattr(cupy, name):
            raise AttributeError(f"cupy has no {name!r}")
        value = getattr(np, name)
        if isinstance(value, type) or not callable(value):
            return value
        return functools.partial(_function, name)


class _Library(arrays.Library):
    """To dispatch they are arrays on a GPU, for the definition on CuPy to compute."""

    name = "cupy"

    def signature(self, x: Any) -> tuple:
        return type(x), x.shape, x.dtype, x.strides

    def device(self, x: Any) -> str:
        return "cuda:0"


Array.__module__ = _MODULE  # arrays.namespace finds the module by this name
_namespace = sys.modules[_MODULE] = _Namespace(_MODULE)
arrays._LIBRARIES[Array] = _Library()


class _Room(Arena):
    def put(self, x: Any) -> Any:
        return wrap(x)

    def get(self, x: Any) -> Any:
        return unwrap(x)


@contextlib.contextmanager
def room() -> Iterator[Arena]:
    """Where the definition meets such arrays."""
    with dispatch.only("definition"), np.errstate(all="ignore"):
        yield _Room("cupy_like")


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
