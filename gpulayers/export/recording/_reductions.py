"""What an array has to sum itself up."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.export.recording._handle import Handle, cast, emit, kind_of, select, spread
from gpulayers.export.recording._place import refuse
from gpulayers.export.recording._shapes import along


def _axes(x: Any, axis: Any) -> tuple[int, ...]:
    return tuple(range(x.ndim)) if axis is None else tuple(a % x.ndim for a in np.atleast_1d(axis).tolist())


class Reductions(Handle):
    def _reduce(
        self, op: str, axis: Any = None, keepdims: bool = False, dtype: Any = None, out: Any = None, **more: Any
    ) -> Any:
        if more or out is not None:
            refuse(f"{op} with {', '.join(more) or 'out'}=…", f"np.where(…, x, …).{op}(axis)")
        x: Any = self
        if self.mask is not None:
            if op != "sum":
                refuse(f"{op} of what a mask selected", "(x * mask).sum() / mask.sum()")
            x = select(spread(self.mask, self), self.bare(), 0)
        how = {} if dtype is None else {"dtype": dtype}
        value = np.asarray(getattr(x.value, op)(axis=axis, keepdims=keepdims, **how))
        kind = {"any": "b", "all": "b", "max": x.kind, "min": x.kind}.get(op) or kind_of(value)
        axes = _axes(x, axis)
        return emit(op, [cast(x, kind)], value, axes=axes, keepdims=bool(keepdims)) if axes else cast(x, kind)

    def sum(self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False, **more: Any) -> Any:
        return self._reduce("sum", axis, keepdims, dtype, out, **more)

    def prod(self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False, **more: Any) -> Any:
        return self._reduce("prod", axis, keepdims, dtype, out, **more)

    def mean(self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False, **more: Any) -> Any:
        return self._reduce("mean", axis, keepdims, dtype, out, **more)

    def max(self, axis: Any = None, out: Any = None, keepdims: bool = False, **more: Any) -> Any:
        return self._reduce("max", axis, keepdims, None, out, **more)

    def min(self, axis: Any = None, out: Any = None, keepdims: bool = False, **more: Any) -> Any:
        return self._reduce("min", axis, keepdims, None, out, **more)

    def any(self, axis: Any = None, out: Any = None, keepdims: bool = False, **more: Any) -> Any:
        return self._reduce("any", axis, keepdims, None, out, **more)

    def all(self, axis: Any = None, out: Any = None, keepdims: bool = False, **more: Any) -> Any:
        return self._reduce("all", axis, keepdims, None, out, **more)

    def _place_of(self, op: str, axis: int | None, keepdims: bool) -> Any:
        x: Any = self if axis is not None else self.reshape(-1)  # type: ignore[attr-defined]
        value = getattr(self.value, op)(axis=axis, keepdims=keepdims)
        x = cast(x, "i") if x.kind == "b" else x  # no target has it of truth values on every backend
        axis = (axis or 0) % x.ndim
        return emit(op, [x], getattr(x.value, op)(axis=axis), axis=axis).reshape(np.shape(value))

    def argmax(self, axis: int | None = None, out: Any = None, *, keepdims: bool = False) -> Any:
        return self._place_of("argmax", axis, keepdims)

    def argmin(self, axis: int | None = None, out: Any = None, *, keepdims: bool = False) -> Any:
        return self._place_of("argmin", axis, keepdims)

    def var(
        self, axis: Any = None, dtype: Any = None, out: Any = None, ddof: float = 0, keepdims: bool = False, **_: Any
    ) -> Any:
        x: Any = self
        off = x - x.mean(axis, keepdims=True)
        squares = off * off
        if not ddof:
            return squares.mean(axis, keepdims=keepdims)
        count = x.size // max(x.value.sum(axis).size, 1)
        return squares.sum(axis, keepdims=keepdims) / (count - ddof)

    def std(self, *args: Any, **options: Any) -> Any:
        return np.sqrt(self.var(*args, **options))

    def cumsum(self, axis: int | None = None, dtype: Any = None, out: Any = None) -> Any:
        x: Any = self.reshape(-1) if axis is None else self  # type: ignore[attr-defined]
        x = cast(x, kind_of(x.value.cumsum(axis or 0, dtype=dtype)))
        return along(x, (axis or 0) % x.ndim, lambda x, a: emit("cumsum", [x], x.value.cumsum(a, dtype=dtype), axis=a))

    def clip(self, min: Any = None, max: Any = None, out: Any = None, **_: Any) -> Any:
        if out is not None:
            refuse("clip with out=…", "y[...] = np.clip(x, a, b)")
        x: Any = self
        y = x.bare() if min is None else np.maximum(x, min)
        return y if max is None else np.minimum(y, max)
