"""NumPy's functions of arrays, by the operations and methods of a handle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpulayers.export.recording._handle import Handle, emit, full, kind_of, lift, plain, select, trace
from gpulayers.export.recording._indexing import chosen
from gpulayers.export.recording._place import refuse
from gpulayers.export.recording._products import dot, einsum, outer, tensordot
from gpulayers.export.recording._shapes import padded

FUNCTIONS: dict[Any, Callable] = {np.einsum: einsum, np.tensordot: tensordot, np.dot: dot, np.outer: outer}
"""What stands for each function where an argument is recorded."""

ADVICE = {
    "sort": "np.max, np.min, or np.where with comparisons",
    "argsort": "np.argmax, np.argmin",
    "median": "x.mean(axis)",
    "eye": "np.eye(n) of a size that does not follow the batch",
    "nonzero": "np.where(condition, a, b)",
    "isclose": "np.abs(a - b) <= tolerance",
    "allclose": "np.abs(a - b) <= tolerance",
    "flat": "x.reshape(-1)",
}


def stands_for(*functions: Any) -> Callable:
    def add(own: Callable) -> Callable:
        FUNCTIONS.update(dict.fromkeys(functions, own))
        return own

    return add


def _by_method(name: str) -> Callable:
    return lambda x, *args, **options: getattr(lift(x), name)(*args, **options)


_METHODS = (
    "sum mean max min prod any all argmax argmin var std cumsum reshape transpose ravel squeeze clip repeat take swapaxes "
    "moveaxis broadcast_to copy amax amin"
)
for _name in _METHODS.split():
    FUNCTIONS[getattr(np, _name)] = _by_method({"amax": "max", "amin": "min"}.get(_name, _name))


# --- fresh arrays ----------------------------------------------------------------------------------------------------


def _fresh(like: Any, value: Any, dtype: Any, shape: Any) -> Any:
    return full(like.shape if shape is None else shape, value, like.dtype if dtype is None else dtype)


@stands_for(np.zeros_like, np.empty_like)
def _zeros_like(x: Any, dtype: Any = None, order: str = "K", subok: bool = True, shape: Any = None, **_: Any) -> Any:
    return _fresh(x, 0, dtype, shape)


@stands_for(np.ones_like)
def _ones_like(x: Any, dtype: Any = None, order: str = "K", subok: bool = True, shape: Any = None, **_: Any) -> Any:
    return _fresh(x, 1, dtype, shape)


@stands_for(np.full_like)
def _full_like(x: Any, value: Any, dtype: Any = None, order: str = "K", subok: Any = 1, shape: Any = None) -> Any:
    if isinstance(plain(value), np.ndarray) and isinstance(value, Handle):
        return lift(value).astype(x.dtype if dtype is None else dtype).broadcast_to(x.shape if shape is None else shape)
    return _fresh(x, value, dtype, shape)


# --- arrays joined, cut and moved ------------------------------------------------------------------------------------


@stands_for(np.concatenate)
def _concatenate(xs: Any, axis: int | None = 0, **_: Any) -> Any:
    handles = [lift(x) if axis is not None else lift(x).reshape(-1) for x in xs]
    value = np.concatenate([h.value for h in handles], axis or 0)
    return emit("concat", [lift(h, kind_of(value)) for h in handles], value, axis=(axis or 0) % value.ndim)


@stands_for(np.stack)
def _stack(xs: Any, axis: int = 0, **_: Any) -> Any:
    handles = [lift(x) for x in xs]
    axis = axis % (handles[0].ndim + 1)
    return _concatenate([_expand_dims(h, axis) for h in handles], axis)


@stands_for(np.hstack)
def _hstack(xs: Any, **_: Any) -> Any:
    handles = [lift(x) for x in xs]
    return _concatenate(handles, 0 if handles[0].ndim == 1 else 1)


@stands_for(np.vstack)
def _vstack(xs: Any, **_: Any) -> Any:
    return _concatenate([h.reshape(1, -1) if h.ndim == 1 else h for h in map(lift, xs)], 0)


@stands_for(np.expand_dims)
def _expand_dims(x: Any, axis: Any) -> Any:
    return x.reshape(np.expand_dims(x.value, axis).shape)


@stands_for(np.atleast_2d)
def _atleast_2d(x: Any) -> Any:
    return x.reshape(np.atleast_2d(x.value).shape)


@stands_for(np.pad)
def _pad(x: Any, width: Any, mode: str = "constant", constant_values: Any = 0) -> Any:
    edges = tuple(map(tuple, np.broadcast_to(width, (x.ndim, 2)).tolist()))
    if mode == "constant":
        if np.ndim(constant_values):
            refuse("np.pad with a value for each edge", "np.concatenate")
        return padded(x, edges, constant_values)
    for axis, edge in enumerate(edges):
        x = x.take(np.pad(np.arange(x.shape[axis]), edge, mode), axis) if any(edge) else x  # type: ignore[call-overload]
    return x


@stands_for(np.lib.stride_tricks.sliding_window_view)
def _windows(x: Any, window_shape: Any, axis: Any = None, **_: Any) -> Any:
    sizes = np.atleast_1d(window_shape).tolist()
    axes = range(x.ndim) if axis is None else [a % x.ndim for a in np.atleast_1d(axis).tolist()]
    for size, a in zip(sizes, axes):  # gather makes (…, place, offset, …); offsets go last
        at = np.arange(x.shape[a] - size + 1)[:, None] + np.arange(size)
        x = x.take(at, a).moveaxis(a + 1, -1)
    return x


@stands_for(np.split)
def _split(x: Any, parts: Any, axis: int = 0) -> list[Any]:
    axis = axis % x.ndim
    ends = list(parts) if np.ndim(parts) else [x.shape[axis] // parts * k for k in range(1, parts)]
    before = (slice(None),) * axis
    return [x[(*before, slice(a, b))] for a, b in zip([0, *ends], [*ends, x.shape[axis]])]


@stands_for(np.flip)
def _flip(x: Any, axis: Any = None) -> Any:
    axes = range(x.ndim) if axis is None else [a % x.ndim for a in np.atleast_1d(axis).tolist()]
    return x[tuple(slice(None, None, -1) if a in axes else slice(None) for a in range(x.ndim))]


@stands_for(np.roll)
def _roll(x: Any, shift: Any, axis: Any = None) -> Any:
    if axis is None:
        return _roll(x.reshape(-1), shift, 0).reshape(x.shape)
    for a, by in zip(np.atleast_1d(axis).tolist(), np.broadcast_to(shift, np.shape(np.atleast_1d(axis))).tolist()):
        x = x.take(np.roll(np.arange(x.shape[a]), by), a)
    return x


@stands_for(np.tile)
def _tile(x: Any, reps: Any) -> Any:
    reps = np.atleast_1d(reps).tolist()
    x = x.reshape((1,) * (len(reps) - x.ndim) + x.shape)
    for axis, n in enumerate(reps[::-1], 1):
        x = x.take(np.tile(np.arange(x.shape[-axis]), n), x.ndim - axis) if n != 1 else x
    return x


@stands_for(np.diff)
def _diff(x: Any, n: int = 1, axis: int = -1, **_: Any) -> Any:
    for _step in range(n):
        x = x.moveaxis(axis, 0)
        x = (x[1:] - x[:-1]).moveaxis(0, axis)
    return x


def _rows(x: Any, axis: int) -> Any:
    """(rows, n), with this axis last."""
    x = x.moveaxis(axis, -1)
    return x.reshape(-1, x.shape[-1])


@stands_for(np.take_along_axis)
def _take_along_axis(x: Any, indices: Any, axis: int | None = -1) -> Any:
    x, i, axis = _for_along(x, indices, axis, "take")
    places, n = _rows(i, axis), x.shape[axis]
    found = chosen(np.arange(n) == places.reshape(*places.shape, 1), _rows(x, axis).reshape(-1, 1, n), 2)
    ends = [*np.delete(i.shape, axis), i.shape[axis]]
    return found.reshape(ends).moveaxis(-1, axis)


@stands_for(np.put_along_axis)
def _put_along_axis(y: Any, indices: Any, values: Any, axis: int | None) -> None:
    if not isinstance(y, Handle):
        refuse("the target of a write is a plain NumPy array", "np.zeros_like(x, shape=…) in its place")
    target, i, axis = _for_along(y, indices, axis, "put")
    places, n = _rows(i, axis), target.shape[axis]
    if places.shape[1] > 16:
        refuse("np.put_along_axis with more than 16 places", "np.where(np.arange(n) == i, v, y)")
    v = _rows(lift(values).broadcast_to(i.shape), axis)
    to, at = _rows(target, axis), np.arange(n)
    for k in range(places.shape[1]):  # the last one stays
        to = select(at == places[:, k : k + 1], v[:, k : k + 1], to)
    target.write(to.reshape([*np.delete(target.shape, axis), n]).moveaxis(-1, axis))


def _for_along(x: Any, indices: Any, axis: int | None, what: str) -> tuple[Any, Any, int]:
    """(x, the indices with x's sizes along all other axes, the axis)."""
    if axis is None:
        refuse(f"np.{what}_along_axis of all axes at once", "an axis, of x.reshape(…)")
    x, i = lift(x), lift(indices, "i")
    axis = axis % x.ndim
    return x, i.broadcast_to([*x.shape[:axis], i.shape[axis], *x.shape[axis + 1 :]]), axis


# --- the rest --------------------------------------------------------------------------------------------------------


@stands_for(np.where)
def _where(condition: Any, *ab: Any) -> Any:
    if len(ab) != 2:
        refuse("np.where(condition) alone: how many it finds depends on values", "np.where(condition, a, b)")
    return select(condition, *ab)


@stands_for(np.select)
def _select(conditions: Any, choices: Any, default: Any = 0) -> Any:
    y = default
    for condition, choice in zip(reversed(conditions), reversed(choices)):  # the first that holds
        y = select(condition, choice, y)
    return y


@stands_for(np.inner)
def _inner(a: Any, b: Any) -> Any:
    a, b = lift(a), lift(b)
    return tensordot(a, b, ((a.ndim - 1,), (b.ndim - 1,))) if a.ndim and b.ndim else a * b


@stands_for(np.copyto)
def _copyto(to: Any, x: Any, casting: str = "same_kind", where: Any = True) -> None:
    if not isinstance(to, Handle):
        refuse("the target of a write is a plain NumPy array", "np.zeros_like(x, shape=…) in its place")
    to.write(x if where is True else select(where, x, to))


@stands_for(np.linalg.norm)
def _norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:
    if ord not in (None, 2) or (ord == 2 and axis is None and x.ndim == 2):
        refuse(f"np.linalg.norm with ord={ord!r}", "np.abs(x).sum(axis), np.abs(x).max(axis)")
    return np.sqrt((x * x).sum(axis, keepdims=keepdims))


@stands_for(np.round, np.around)
def _round(x: Any, decimals: int = 0, out: Any = None) -> Any:
    scale = 10.0**decimals
    return np.rint(x) if not decimals else np.rint(x * scale) / scale


@stands_for(np.tril)
def _tril(x: Any, k: int = 0) -> Any:
    return select(np.tri(x.shape[-2], x.shape[-1], k, bool), x, 0).astype(x.dtype)


@stands_for(np.triu)
def _triu(x: Any, k: int = 0) -> Any:
    return select(np.tri(x.shape[-2], x.shape[-1], k - 1, bool), 0, x).astype(x.dtype)


@stands_for(np.count_nonzero)
def _count_nonzero(x: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    return (x != 0).sum(axis, keepdims=keepdims)


@stands_for(np.average)
def _average(x: Any, axis: Any = None, weights: Any = None, returned: bool = False, *, keepdims: bool = False) -> Any:
    if weights is None and not returned:
        return lift(x).mean(axis, keepdims=keepdims)
    refuse("np.average with weights", "(x * weights).sum(axis) / weights.sum()")


@stands_for(np.broadcast_arrays)
def _broadcast_arrays(*xs: Any, **_: Any) -> tuple[Any, ...]:
    handles = [lift(x) for x in xs]
    shape = np.broadcast_shapes(*(h.shape for h in handles))
    return tuple(h.broadcast_to(shape) for h in handles)


@stands_for(np.nan_to_num)
def _nan_to_num(x: Any, copy: bool = True, nan: float = 0.0, posinf: Any = None, neginf: Any = None) -> Any:
    most = np.finfo(x.dtype).max.item()
    low, high = -most if neginf is None else neginf, most if posinf is None else posinf
    return np.where(np.isnan(x), nan, np.where(np.isinf(x), np.where(x < 0, low, high), x)).astype(x.dtype)


FUNCTIONS[np.shape] = lambda x: x.shape
FUNCTIONS[np.ndim] = lambda x: x.ndim
FUNCTIONS[np.size] = lambda x, axis=None: x.size if axis is None else x.shape[axis]
FUNCTIONS[np.result_type] = lambda *xs: np.result_type(*(plain(x) for x in xs))
FUNCTIONS[np.may_share_memory] = lambda a, b, *_: np.may_share_memory(plain(a), plain(b))
FUNCTIONS[np.iscomplexobj] = lambda x: False


def add_at(target: Any, index: Any, value: Any) -> None:
    """np.add.at: rows of ``value`` are added where integers say."""
    if not isinstance(target, Handle):
        refuse("the target of np.add.at is a plain NumPy array", "np.zeros_like(x, shape=…) in its place")
    if not isinstance(plain(index), np.ndarray) or plain(index).dtype.kind not in "iu":
        other = (
            "target += np.where(np.arange(n) == i[:, None], v[:, None], 0), or with a mask in place of the comparison"
        )
        refuse("np.add.at with several indices, or a mask", other)
    to: Any = target
    i = lift(index, "i")
    v = lift(value, target.kind).broadcast_to(i.shape + to.shape[1:]).reshape(-1, *to.shape[1:])
    total = np.zeros_like(to.value)
    np.add.at(total, i.value.reshape(-1), v.value)
    to.write(to + trace().add("segment_sum", (v, i.reshape(-1)), total, size=to.shape[0]))
