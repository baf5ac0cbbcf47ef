"""What an array has for its shape: views in another shape, order or dtype, and rows taken from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpulayers.export.recording._handle import Handle, cast, emit, kind_of, lift
from gpulayers.export.recording._place import refuse
from gpulayers.layers._weight import Weight


class _Flags:
    writeable = True


class Shapes(Handle):
    dtype = property(lambda self: self._value.dtype)
    ndim = property(lambda self: self._value.ndim)
    shape = property(lambda self: self._sized().shape)
    size = property(lambda self: self._sized().size)
    strides = property(lambda self: self._value.strides)
    nbytes = property(lambda self: self._value.nbytes)
    itemsize = property(lambda self: self._value.itemsize)
    flags = property(lambda self: _Flags)
    T = property(lambda self: self.transpose())
    mT = property(lambda self: self.swapaxes(-1, -2))
    real = property(lambda self: self)

    def _sized(self) -> np.ndarray:
        if self.mask is not None:
            refuse("how many a mask selected depends on values", "mask.sum()")
        return self._value

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))  # type: ignore[index]

    def reshape(self, *shape: Any, order: str = "C", copy: Any = None) -> Any:
        if order != "C":
            refuse(f"reshape with order={order!r}", "x.transpose(…).reshape(…)")
        new = self.value.reshape(*shape)
        y = emit("reshape", [self], new, shape=new.shape)
        return self.as_view(y, lambda base: base.reshape(new.shape), lambda base, v: v.reshape(base.shape))

    def transpose(self, *axes: Any) -> Any:
        axes = axes[0] if len(axes) == 1 and not isinstance(axes[0], int | np.integer) else axes
        order = tuple(int(a) % self.ndim for a in axes or range(self.ndim)[::-1])
        y = emit("transpose", [self], self.value.transpose(order), axes=order)
        back = np.argsort(order).tolist()
        return self.as_view(y, lambda base: base.transpose(order), lambda base, v: v.transpose(back))

    def swapaxes(self, a: int, b: int) -> Any:
        axes = list(range(self.ndim))
        axes[a], axes[b] = axes[b], axes[a]
        return self.transpose(axes)

    def moveaxis(self, source: Any, to: Any) -> Any:
        sizes = np.empty(range(1, 1 + self.ndim))
        return self.transpose([n - 1 for n in np.moveaxis(sizes, source, to).shape])

    def broadcast_to(self, shape: Any, subok: bool = False) -> Any:
        value = np.broadcast_to(self.value, shape)
        return emit("broadcast", [self], value, shape=value.shape)

    def ravel(self, *_: Any, **__: Any) -> Any:
        return self.reshape(-1)

    def flatten(self, *_: Any) -> Any:
        return self.reshape(-1).copy()

    def squeeze(self, axis: Any = None) -> Any:
        return self.reshape(self.value.squeeze(axis).shape)

    def copy(self, *_: Any, **__: Any) -> Any:
        return self.bare()

    def astype(self, dtype: Any, copy: bool = True, **_: Any) -> Any:
        value = self.value.astype(dtype)
        if not copy and value.dtype == self.dtype:
            return self
        y = Handle.concrete(cast(self.bare(), kind_of(value)).node, value)
        y.mask = self.mask
        return y

    def take(self, indices: Any, axis: int | None = None, out: Any = None, mode: str = "raise") -> Any:
        if out is not None or mode != "raise":
            refuse(f"take with {'out' if out is not None else 'mode'}=…", "x.take(indices, axis)")
        x = self.reshape(-1) if axis is None else self
        axis = (axis or 0) % x.ndim
        indices = indices.data if isinstance(indices, Weight) else indices
        if not isinstance(indices, Handle):
            indices = np.asarray(indices) % max(x.shape[axis], 1)  # no target wants one below zero
        elif indices.kind != "i":
            refuse("an index that is no integer", "indices.astype(np.int64)")
        i = lift(indices, "i")
        return emit("gather", [x, i], np.take(x.value, i.value, axis), axis=axis)

    def repeat(self, repeats: Any, axis: int | None = None) -> Any:
        x = self.reshape(-1) if axis is None else self
        return x.take(np.repeat(np.arange(x.shape[axis or 0]), repeats), axis or 0)

    def fill(self, value: Any) -> None:
        self.write(value)


def along(x: Any, axis: int, do: Callable) -> Any:
    """``do(x, axis)``, in three dimensions where x has more than four: WebGL knows no more."""
    if x.ndim <= 4:
        return do(x, axis)
    before, after = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    return do(x.reshape(before, x.shape[axis], after), 1).reshape(x.shape)


def padded(x: Any, edges: tuple, value: Any) -> Any:
    """np.pad with one value; one axis at a time where x has more than four: WebGL knows no more."""
    if x.ndim <= 4:
        return emit("pad", [x], np.pad(x.value, edges, constant_values=value), edges=edges, value=value)
    for axis, edge in enumerate(edges):
        if any(edge):
            before, after = x.shape[:axis], x.shape[axis + 1 :]
            flat = x.reshape(math.prod(before), x.shape[axis], math.prod(after))
            y = padded(flat, ((0, 0), edge, (0, 0)), value)
            x = y.reshape(*before, y.shape[1], *after)
    return x
