"""A layer's weights: arrays with a gradient; how they start, what pulls at them, what holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpulayers import arrays, transfer
from gpulayers.layers._config import Configurable


class Weight(np.lib.mixins.NDArrayOperatorsMixin):
    """An array that a layer owns. In array code it stands for its ``data``: ``x * self.beta`` works.

    data: float32 unless asked otherwise, where the layer is. grad: starts at zero; a backward adds to it.
    """

    def __init__(
        self,
        name: str,
        data: np.ndarray,
        trainable: bool = True,
        regularizer: Callable | None = None,
        constraint: Callable | None = None,
    ):
        self.name, self.trainable, self.regularizer, self.constraint = name, trainable, regularizer, constraint
        self._data: Any = data
        self._grad: Any = None
        self._casts: dict[np.dtype, Any] = {}

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, value: Any) -> None:
        if tuple(value.shape) != self.shape:
            raise ValueError(f"{self.name}: the rule is shape = {list(self.shape)}; got {list(value.shape)}")
        self._data = value
        self.changed()

    def changed(self) -> None:
        """Say that ``data`` was written in place."""
        self._casts.clear()

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

    def as_dtype(self, dtype: np.dtype) -> Any:
        """``data`` in another dtype, cast once until the weight changes (mixed precision)."""
        if dtype == self.dtype:
            return self._data
        if dtype not in self._casts:
            self._casts[dtype] = arrays.cast(self._data, dtype)
        return self._casts[dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._data.shape)

    @property
    def dtype(self) -> np.dtype:
        return arrays.library(self._data).dtype(self._data)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __repr__(self) -> str:
        return f"Weight({self.name!r}, {self.dtype}{list(self.shape)}{'' if self.trainable else ', frozen'})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(transfer.to_numpy(self._data), dtype=dtype, copy=copy)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return getattr(ufunc, method)(*_unwrapped(inputs), **{k: _unwrapped(v) for k, v in kwargs.items()})

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return function(*_unwrapped(args), **{k: _unwrapped(v) for k, v in kwargs.items()})

    def __getitem__(self, index: Any) -> Any:
        return self._data[index]


def _unwrapped(value: Any) -> Any:
    if isinstance(value, Weight):
        return value.data
    return type(value)(map(_unwrapped, value)) if type(value) in (list, tuple) else value


# --- how weights start -----------------------------------------------------------------------------------------------


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan in, fan out) of a weight (out, in, *kernel)."""
    if len(shape) < 2:
        return (shape[0], shape[0]) if shape else (1, 1)
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


def uniform(bound: float) -> Callable:
    """An init: uniform in ±bound."""
    return lambda shape, random: random.uniform(-bound, bound, shape)


def _uniform(bound: Callable[[Sequence[int]], float]) -> Callable:
    return lambda shape, random: random.uniform(-bound(shape), bound(shape), shape)


def _normal(deviation: Callable[[Sequence[int]], float]) -> Callable:
    return lambda shape, random: random.normal(0.0, deviation(shape), shape)


INITS: dict[str, Callable[[Sequence[int], np.random.Generator], np.ndarray]] = {
    "zeros": lambda shape, random: np.zeros(shape),
    "ones": lambda shape, random: np.ones(shape),
    "normal": _normal(lambda shape: 0.02),
    # torch's default for linear and convolution: kaiming_uniform with a = √5
    "fan_in_uniform": _uniform(lambda shape: 1 / math.sqrt(max(1, fans(shape)[0]))),
    # He et al. 2015, for relu
    "kaiming_uniform": _uniform(lambda shape: math.sqrt(6 / max(1, fans(shape)[0]))),
    "kaiming_normal": _normal(lambda shape: math.sqrt(2 / max(1, fans(shape)[0]))),
    # Glorot and Bengio 2010
    "xavier_uniform": _uniform(lambda shape: math.sqrt(6 / max(1, sum(fans(shape))))),
    "xavier_normal": _normal(lambda shape: math.sqrt(2 / max(1, sum(fans(shape))))),
}


def initial(init: str | float | Callable, shape: Sequence[int], random: np.random.Generator) -> np.ndarray:
    """Values for a weight: ``init`` is a name in INITS, a number, or a function of (shape, generator)."""
    if isinstance(init, str):
        if init not in INITS:
            raise ValueError(f"init: the rule is one of {', '.join(INITS)}, a number or a function; got {init!r}")
        init = INITS[init]
    return np.asarray(init(shape, random) if callable(init) else np.full(shape, init))


# --- what pulls at weights, and what holds them ----------------------------------------------------------------------


class L1(Configurable):
    """A penalty of ``rate`` Σ |w|; its gradient is rate · sign(w)."""

    def __init__(self, rate: float = 1e-4):
        self.rate = rate

    def __call__(self, w: Any) -> tuple[Any, Any]:
        return self.rate * abs(w).sum(), self.rate * ((w > 0).astype(w.dtype) - (w < 0).astype(w.dtype))


class L2(Configurable):
    """A penalty of ``rate`` Σ w²; its gradient is 2 · rate · w."""

    def __init__(self, rate: float = 1e-4):
        self.rate = rate

    def __call__(self, w: Any) -> tuple[Any, Any]:
        return self.rate * (w * w).sum(), 2 * self.rate * w


class NonNegative(Configurable):
    """After each update, w ← max(w, 0)."""

    def __call__(self, w: Any) -> Any:
        return w * (w > 0)


class MaxNorm(Configurable):
    """After each update, the norm of each output's weights is at most ``most``."""

    def __init__(self, most: float = 1.0):
        self.most = most

    def __call__(self, w: Any) -> Any:
        norm = (w * w).sum(tuple(range(1, w.ndim)), keepdims=True) ** 0.5
        return w * (self.most / norm.clip(self.most, None))
