"""The recorded array: what a layer gets in place of a NumPy array."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np

from gpulayers import arrays
from gpulayers.export.recording import _functions, _ufuncs
from gpulayers.export.recording._handle import Handle, full, lift, select
from gpulayers.export.recording._indexing import Indexing
from gpulayers.export.recording._place import refuse
from gpulayers.export.recording._products import dot, matmul
from gpulayers.export.recording._reductions import Reductions
from gpulayers.export.recording._shapes import Shapes
from gpulayers.layers._weight import Weight


def _leaves(what: str, advice: str) -> Callable:
    def leaves(self: Any, *_: Any, **__: Any) -> Any:
        refuse(f"{what} needs the array's values, which a recording does not have", advice)

    return leaves


def _in_place(function: Callable) -> Callable:
    def assign(self: Any, other: Any) -> Any:
        y = function(self, other)
        return self.write(y) if self.mask is None and self.ndim else y  # NumPy's scalars stay as they are

    return assign


class Recorded(Indexing, Shapes, Reductions):
    """An array that notes what is done to it."""

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, where: Any = True, **options: Any
    ) -> Any:
        name = ufunc.__name__.removesuffix(" (vectorized)")
        given = [x.data if isinstance(x, Weight) else x for x in inputs]
        if method != "__call__":
            return _by_method_of(ufunc, method, given, options)
        dtype = options.pop("dtype", None)
        if name == "matmul" and not options:
            result = matmul(*given)
        elif name in _ufuncs.REWRITTEN and not options:
            result = _ufuncs.REWRITTEN[name](*given)
        elif name in _ufuncs.UFUNCS and not options:
            result = _ufuncs.elementwise(ufunc, name, given)
        else:
            refuse(f"np.{name}({', '.join(options)}) has no counterpart in a recording", _ufuncs.ADVICE.get(name, ""))
        result = result if dtype is None else result.astype(dtype)
        target = None if out is None else out[0]
        if target is None and where is not True:
            refuse(f"np.{name} with where= and no out=: what it leaves has no value", "np.where(mask, …, …)")
        if target is not None and not isinstance(target, Recorded):
            refuse("the target of a write is a plain NumPy array", "np.zeros_like(x, shape=…) in its place")
        result = result if where is True else select(where, result, target)
        return result if target is None else target.write(result)

    def __array_function__(self, function: Any, kinds: Any, args: Any, kwargs: Any) -> Any:
        own = _functions.FUNCTIONS.get(function)
        if own is None:
            name = function.__name__
            home = function.__module__.replace("numpy", "np", 1)  # np.linalg
            refuse(f"{home}.{name} has no counterpart in a recording", _functions.ADVICE.get(name, ""))
        return own(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(np.ndarray, name):
            refuse(f"the array's {name} has no counterpart in a recording", _functions.ADVICE.get(name, ""))
        raise AttributeError(name)

    def dot(self, other: Any) -> Any:
        return dot(self, other)

    def round(self, decimals: int = 0, out: Any = None) -> Any:
        return np.round(self, decimals)

    __array__ = _leaves(
        "a plain NumPy array of it (np.vectorize, np.array([x, y]), an item of np.zeros, …)",
        "the array itself; np.stack([x, y]); np.zeros_like(x, shape=…) for one to fill",
    )
    __bool__ = _leaves("a branch (if, while, and, or, max())", "np.where, np.maximum, &, |")
    __float__ = __int__ = __index__ = __round__ = __complex__ = item = tolist = _leaves(
        "a Python number from it (float, int, .item(), math.exp, …)", "NumPy's functions of the array"
    )
    __iadd__, __isub__, __imul__ = _in_place(np.add), _in_place(np.subtract), _in_place(np.multiply)  # type: ignore[assignment]
    __itruediv__, __ipow__ = _in_place(np.true_divide), _in_place(np.power)  # type: ignore[assignment]
    __iand__, __ior__ = _in_place(np.bitwise_and), _in_place(np.bitwise_or)  # type: ignore[assignment]


def _by_method_of(ufunc: np.ufunc, method: str, inputs: list[Any], options: dict[str, Any]) -> Any:
    """np.add.reduce, np.add.accumulate, np.add.at."""
    name = ufunc.__name__
    reductions = {"add": "sum", "multiply": "prod", "maximum": "max", "minimum": "min"}
    if method == "reduce" and name in reductions and not options.keys() - {"axis", "keepdims", "dtype"}:
        return getattr(lift(inputs[0]), reductions[name])(**({"axis": 0} | options))
    if method == "accumulate" and name == "add":
        return lift(inputs[0]).cumsum(inputs[1] if len(inputs) > 1 else options.get("axis", 0))
    if method == "at" and name == "add":
        return _functions.add_at(*inputs)
    advice = "np.add.at into zeros, then np.where" if method == "at" else ""
    refuse(f"np.{name}.{method}({', '.join(options)}) has no counterpart in a recording", advice)


class _Namespace(types.ModuleType):
    """NumPy, whose constructors give recorded arrays: what definitions of ops call functions of."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def zeros(shape: Any, dtype: Any = float) -> Any:
        return full(shape, 0, dtype)

    empty = zeros

    @staticmethod
    def ones(shape: Any, dtype: Any = float) -> Any:
        return full(shape, 1, dtype)

    @staticmethod
    def full(shape: Any, value: Any, dtype: Any = None) -> Any:
        return full(shape, value, dtype)

    @staticmethod
    def asarray(x: Any, dtype: Any = None) -> Any:
        return lift(x) if dtype is None else lift(x).astype(dtype, copy=False)

    array = ascontiguousarray = asarray


NAMESPACE = _Namespace("numpy")
Handle.concrete = Recorded
arrays.learn(Recorded, NAMESPACE)
