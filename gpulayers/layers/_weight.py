"""A layer's weight: an array with a gradient."""

from __future__ import annotations

import contextlib
import contextvars
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpulayers import arrays, transfer
from gpulayers.arrays import FLOATS
from gpulayers.layers._tokens import token

_casts: contextvars.ContextVar[dict | None] = contextvars.ContextVar("casts", default=None)


@contextlib.contextmanager
def casts_kept(kept: dict) -> Iterator[None]:
    """Inside, and again inside with the same ``kept``, a weight is cast to 16 bits once, however many calls use it.

    A write to the weight in the meantime is not seen.
    """
    before = _casts.set(kept)
    try:
        yield
    finally:
        _casts.reset(before)


def _operators(cls: type) -> type:
    """Arithmetic and comparison, elementwise on ``data``; in-place operators write into the weight."""
    binary = [
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    ]
    for name in [*binary, *["eq", "ne", "lt", "le", "gt", "ge"]]:
        function = getattr(operator, f"__{name}__")
        setattr(cls, f"__{name}__", lambda self, other, f=function: f(self._data, unwrapped(other)))
        if name in binary:
            setattr(cls, f"__r{name}__", lambda self, other, f=function: f(unwrapped(other), self._data))
            setattr(cls, f"__i{name}__", lambda self, other, f=function: self.assign(f(self._data, unwrapped(other))))
    functions: dict[str, Callable] = {
        f"__{n}__": getattr(operator, n) for n in ["neg", "pos", "abs", "invert", "index"]
    }
    functions |= {f"__{f.__name__}__": f for f in (len, iter, bool, int, float, complex)}
    for name, function in functions.items():
        setattr(cls, name, lambda self, f=function: f(self._data))
    return cls


@_operators
class Weight(np.lib.mixins.NDArrayOperatorsMixin):  # whose operators type checkers know
    """An array that a layer owns. In array code it stands for its ``data``: ``x * self.beta`` and ``w.T`` work.

    It is written in place: by ``w[...] = value``, ``w *= 0.5``, ``w.assign(value)``, and by ``layer.w = value``. What is
    computed from it is a plain array.

    name: "layer.weight", for errors. data: a NumPy, CuPy or torch array; numbers and lists become float32.
    trainable: whether ``fit`` trains it. grad: starts at zero; a backward adds to it.
    regularizer: w → (penalty, its gradient), as gl.L2(1e-4). constraint: w → the w to keep, as gl.NonNegative().
    """

    _data: Any

    def __init__(
        self,
        name: str,
        data: Any,
        trainable: bool = True,
        regularizer: Callable | None = None,
        constraint: Callable | None = None,
    ):
        self.name, self.trainable, self.regularizer, self.constraint = name, trainable, regularizer, constraint
        self.learned = trainable
        """What ``trainable`` is again where a layer that was frozen no longer is."""
        self.made = {"regularizer": token(regularizer), "constraint": token(constraint)}
        """What they were at first: a saved model says what they are now, if that is something else."""
        self._data = np.asarray(data, np.float32) if isinstance(data, int | float | list | tuple) else unwrapped(data)
        self._grad: Any = None
        arrays.library(self._data)  # raises TypeError for what is no array

    # --- its values --------------------------------------------------------------------------------------------------

    @property
    def data(self) -> Any:
        """The array itself. Writes into it (``w.data[0] = 1``) are writes into the weight."""
        return self._data

    @data.setter
    def data(self, value: Any) -> None:
        value = unwrapped(value)
        arrays.library(value)
        self._require_shape(value, self.name)
        self._data = value

    def assign(self, value: Any, where: str = "") -> Weight:
        """Write ``value``, an array of this shape from any library, into the weight; its dtype and device stay.

        where: what an error calls the weight; by default its name. Raises ValueError for another shape, TypeError for
        numbers that the dtype does not hold (complex ones; fractions where it is an integer).
        """
        value, where = unwrapped(value), where or self.name
        try:
            came = arrays.library(value).dtype(value)
        except TypeError:
            value = np.asarray(value)
            came = value.dtype
        if came not in FLOATS and came.kind not in ("biu" if self.dtype not in FLOATS else "biuf"):
            raise TypeError(f"{where}: the rule is numbers that {self.dtype} holds; got {came}{list(value.shape)}")
        if came in FLOATS and self.dtype not in FLOATS:
            raise TypeError(f"{where}: the rule is integers, as its dtype is {self.dtype}; got {came}")
        self._require_shape(value, where)
        self[...] = value
        return self

    def _require_shape(self, value: Any, where: str) -> None:
        if tuple(value.shape) != self.shape:
            raise ValueError(f"{where}: the rule is shape = {list(self.shape)}; got {list(value.shape)}")

    def as_dtype(self, dtype: np.dtype) -> Any:
        """``data`` in another dtype (mixed precision)."""
        kept = _casts.get()
        if kept is None or dtype == self.dtype:
            return arrays.cast(self._data, dtype)
        source, cast = kept.get((id(self), dtype), (None, None))
        if source is not self._data:
            cast = arrays.cast(self._data, dtype)
            kept[id(self), dtype] = self._data, cast
        return cast

    # --- its gradient ------------------------------------------------------------------------------------------------

    @property
    def grad(self) -> Any:
        """The sum of the gradients since the last ``zero_grad``."""
        if self._grad is None:
            self._grad = arrays.zeros_like(self._data)
        return self._grad

    @grad.setter
    def grad(self, value: Any) -> None:
        self._grad = value

    @property
    def has_grad(self) -> bool:
        """Whether any backward has reached this weight since the last ``zero_grad``."""
        return self._grad is not None

    def add_grad(self, value: Any) -> None:
        if self._grad is None and value.dtype == self._data.dtype:
            self._grad = value
        else:
            self._grad = self.grad + arrays.cast(value, self.dtype)

    def zero_grad(self) -> None:
        self._grad = None

    # --- an array ----------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._data.shape)

    @property
    def dtype(self) -> np.dtype:
        return arrays.library(self._data).dtype(self._data)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def __getitem__(self, index: Any) -> Any:
        return self._data[unwrapped(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        index, value = unwrapped(index), unwrapped(value)
        library = arrays.library(self._data)
        if library is arrays.NUMPY and not self._data.flags.writeable:
            self._data = self._data.copy()
        with contextlib.suppress(TypeError):  # a number or a list
            if arrays.library(value) is not library:
                value = transfer.beside(transfer.to_numpy(value), self._data)
        self._data[index] = value

    def __getattr__(self, name: str) -> Any:
        """What an array has beside: T, reshape, sum, astype, copy, …"""
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._data, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.dtype}{list(self.shape)}{'' if self.trainable else ', frozen'})"

    __hash__ = object.__hash__

    def __contains__(self, value: Any) -> bool:
        return value in self._data

    def __format__(self, spec: str) -> str:
        return format(self._data.item() if spec and not self.shape else self._data, spec)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(transfer.to_numpy(self._data), dtype=dtype, copy=copy)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        y = getattr(ufunc, method)(*unwrapped(inputs), **{k: unwrapped(v) for k, v in kwargs.items()})
        return _itself(y, kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return _itself(function(*unwrapped(args), **{k: unwrapped(v) for k, v in kwargs.items()}), kwargs)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return _itself(function(*unwrapped(args), **{k: unwrapped(v) for k, v in kwargs.items()}), kwargs)

    @property
    def __cupy_get_ndarray__(self) -> Callable:
        """CuPy's functions take a weight on a GPU for its array by this."""
        if arrays.library(self._data) is not arrays.CUPY:
            raise AttributeError("__cupy_get_ndarray__")
        return lambda: self._data

    def __dlpack__(self, **options: Any) -> Any:
        return self._data.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple:
        return self._data.__dlpack_device__()


def unwrapped(value: Any) -> Any:
    """``value`` with arrays in the place of Weights, in lists, tuples and dicts too."""
    if isinstance(value, Weight):
        return value._data
    if type(value) is dict:
        return {k: unwrapped(v) for k, v in value.items()}
    return type(value)(map(unwrapped, value)) if type(value) in (list, tuple) else value


def _itself(result: Any, kwargs: dict) -> Any:
    """The weight that ``out`` named, where a function returned its array."""
    out = kwargs.get("out")
    for candidate in out if isinstance(out, tuple) else (out,):
        if isinstance(candidate, Weight) and candidate._data is result:
            return candidate
    return result
