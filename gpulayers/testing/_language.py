"""Swaps triton.language for the length of a launch.

While an interpreted launch runs, every builtin of triton.language computes through `_builder.SEMANTIC`; `patched()`
puts all of it back afterwards, so the compiler sees Triton as it is.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.jit import JITFunction

from gpulayers.testing import _functions, _operators, _rewriting, _values
from gpulayers.testing._builder import BUILDER, SEMANTIC
from gpulayers.testing._rewriting import Loop, StaticLoop, interpreted, rewritten
from gpulayers.testing._values import block_type, factors, made
from gpulayers.testing.memory import ADDRESS_BITS

MISSING = object()


# --- Reductions and scans --------------------------------------------------------------------------------------------


def tensor(data: np.ndarray, dtype: Any) -> Any:
    """A Triton tensor around an array; an array of shape () becomes a scalar."""
    return _values.of(data, dtype) if data.ndim else made(data.reshape(1), dtype, dtype)


def _combined(combine: Any, first: list[np.ndarray], second: list[np.ndarray], types: list[Any]) -> list[np.ndarray]:
    """Apply a combine function to two lists of arrays, all of one shape."""
    args = [tensor(data, ty) for data, ty in zip(first + second, types + types)]
    out = combine(*args)
    outs = out if isinstance(out, tuple) else (out,)
    shape = first[0].shape
    return [np.broadcast_to(SEMANTIC.cast(o, ty).handle.data, shape) for o, ty in zip(outs, types)]


def _is(combine: Any, name: str) -> bool:
    return combine is getattr(tl.standard, name, MISSING)


def _reduction(combine: Any, dtype: np.dtype) -> np.ufunc | None:
    """The NumPy ufunc whose reduction gives what the combine function gives, for types where it rounds alike."""
    if _is(combine, "_sum_combine"):
        return np.add if dtype.itemsize >= 4 else None  # NumPy would accumulate float16 in float32
    if _is(combine, "_elementwise_max"):
        return np.fmax if dtype.kind == "f" else np.maximum
    if _is(combine, "_elementwise_min"):
        return np.fmin if dtype.kind == "f" else np.minimum
    return None


def reduce(input: Any, axis: Any, combine_fn: Any, keep_dims: bool = False, **_: Any) -> Any:
    """tl.reduce: neighbours are combined pair by pair, so a combine function runs log2(n) times, on whole blocks."""
    many = not isinstance(input, tl.tensor)
    inputs = tuple(input) if many else (input,)
    axis, keep_dims = (getattr(v, "value", v) for v in (axis, keep_dims))
    data, types = [t.handle.data for t in inputs], [t.dtype for t in inputs]
    shape = data[0].shape
    if axis is None:
        data, axis, kept = [d.reshape(-1) for d in data], 0, (1,) * len(shape)
    else:
        axis %= len(shape)
        kept = (*shape[:axis], 1, *shape[axis + 1 :])
    ufunc = None if many else _reduction(combine_fn, data[0].dtype)
    even, odd = ((slice(None),) * axis + (slice(first, None, 2),) for first in (0, 1))
    while ufunc is np.add and data[0].shape[axis] > 1:  # pair by pair as a GPU adds: one long sum rounds worse
        data = [data[0][even] + data[0][odd]]
    if ufunc is not None:
        data = [ufunc.reduce(data[0], axis=axis, keepdims=True).astype(data[0].dtype, copy=False)]
    while data[0].shape[axis] > 1:
        data = _combined(combine_fn, [d[even] for d in data], [d[odd] for d in data], types)
    data = [d.reshape(kept) if keep_dims else d.squeeze(axis) for d in data]
    out = tuple(tensor(d, ty) for d, ty in zip(data, types))
    if not many and (pair := factors(input.handle)) and data[0].size == input.handle.data.size:  # no sum
        out[0].handle.set_attr("factors", [np.broadcast_to(f, shape).reshape(out[0].handle.data.shape) for f in pair])
    return out if many else out[0]


def associative_scan(input: Any, axis: Any, combine_fn: Any, reverse: bool = False, **_: Any) -> Any:
    """tl.associative_scan, inclusive: log2(n) steps, each combining every element with one 1, 2, 4, … before it."""
    many = not isinstance(input, tl.tensor)
    inputs = tuple(input) if many else (input,)
    axis, reverse = (getattr(v, "value", v) for v in (axis, reverse))
    data, types = [t.handle.data for t in inputs], [t.dtype for t in inputs]
    axis %= data[0].ndim
    if reverse:
        data = [np.flip(d, axis) for d in data]
    n = data[0].shape[axis]
    position = np.arange(n).reshape(-1, *(1,) * (data[0].ndim - axis - 1))
    step = 1
    while step < n:
        combined = _combined(combine_fn, [np.roll(d, step, axis) for d in data], data, types)
        data = [np.where(position >= step, c, d) for c, d in zip(combined, data)]
        step *= 2
    if reverse:
        data = [np.flip(d, axis) for d in data]
    out = tuple(tensor(d, ty) for d, ty in zip(data, types))
    return out if many else out[0]


# --- triton.language, for the length of a launch ---------------------------------------------------------------------


def _static_assert(condition: Any, message: Any = "", **_: Any) -> None:
    assert condition, message


def _hint(name: str, holds: Callable[[np.ndarray, int], bool]) -> Callable[..., Any]:
    """A hint to the compiler that is checked: what it says must hold for runs of so many lanes along each axis."""

    def hint(input: Any, values: Any, *_: Any, **__: Any) -> Any:
        data = input.handle.data
        if input.dtype.is_ptr():
            data, BUILDER.memory.asked_where = data & ADDRESS_BITS, True
        for axis, value in enumerate(values if isinstance(values, list | tuple | tl.tuple) else [values]):
            run = int(getattr(value, "value", value))
            if data.size and not holds(np.moveaxis(data, axis, 0), run):
                raise ValueError(f"tl.{name}(…, {run}) does not hold along axis {axis}: {data.reshape(-1)[:8]} …")
        return input

    return hint


def _runs_start_at_multiples(lanes: np.ndarray, of: int) -> bool:
    """What the compiler makes of it together with max_contiguous: the first of ``of`` neighbours is a multiple."""
    return not (lanes[::of] % np.asarray(of, lanes.dtype)).any()


def _in_runs(step: int) -> Callable[[np.ndarray, int], bool]:
    """Whether lanes rise by ``step`` within each run."""

    def holds(lanes: np.ndarray, run: int) -> bool:
        rises = np.diff(lanes.astype(np.int64), axis=0) == step
        return bool(rises[np.arange(1, len(lanes)) % run != 0].all())

    return holds


def _scalar(self: Any) -> Any:
    return self.handle.data.reshape(-1)[0].item()


def _truth(self: Any) -> bool:
    if _rewriting.triton_asks:
        return True
    if self.handle.data.size != 1:
        raise ValueError("a block of several elements is neither true nor false")
    return bool(self.handle.data.reshape(-1)[0])


def _transposed(self: Any) -> Any:
    return SEMANTIC.permute(self, (*range(len(self.shape) - 2), len(self.shape) - 1, len(self.shape) - 2))


def _identity_type(self: Any, builder: Any) -> Any:
    return self


def _builtins(owner: Any) -> Iterator[tuple[Any, str, Any]]:
    for name, member in inspect.getmembers(owner):
        if tl.core.is_builtin(member):
            yield owner, name, interpreted(member)


@cache
def _changes() -> list[tuple[Any, str, Any, Any]]:
    """(owner, name, stand-in, what was there or MISSING) for everything a launch swaps; worked out once."""
    owners = [tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base]
    wanted = {(id(owner), name): (owner, name, new) for o in owners for owner, name, new in _builtins(o)}
    functions = {
        "reduce": reduce,
        "associative_scan": associative_scan,
        "range": Loop,
        "static_range": StaticLoop,
        "static_assert": _static_assert,
        "static_print": print,
        "multiple_of": _hint("multiple_of", _runs_start_at_multiples),
        "max_contiguous": _hint("max_contiguous", _in_runs(1)),
        "max_constancy": _hint("max_constancy", _in_runs(0)),
    } | _functions.functions(lambda name: interpreted(getattr(tl, name)))
    methods: dict[str, Any] = _values.TENSOR | {
        "__bool__": _truth,
        "__repr__": lambda self: repr(self.handle.data),
        "__str__": lambda self: str(self.handle.data),
        "T": property(_transposed),
        "reduce": reduce,
        "associative_scan": associative_scan,
    }
    changes: list[tuple[Any, str, Any]] = [
        (owner, name, new) for owner in (tl, tl.core) for name, new in functions.items()
    ]
    methods |= _operators.operators(lambda name: interpreted(getattr(tl.tensor, name)))
    methods |= _functions.methods(lambda name: interpreted(getattr(tl.tensor, name)))
    changes += [(tl.tensor, name, new) for name, new in methods.items()]
    changes += [(ty, "to_ir", _identity_type) for ty in (tl.dtype, tl.pointer_type, tl.block_type)]
    changes += [(tl.block_type, "with_element_ty", lambda self, scalar: block_type(scalar, tuple(self.shape)))]
    changes += [(JITFunction, "__call__", lambda self, *args, **kwargs: rewritten(self.fn)(*args, **kwargs))]
    wanted |= {(id(owner), name): (owner, name, new) for owner, name, new in changes}
    return [(owner, name, new, vars(owner).get(name, MISSING)) for owner, name, new in wanted.values()]


@cache
def _in_modules() -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """(names of a module, stand-ins, what was there): swapped in one go."""
    found = []
    for module in (tl, tl.core, tl.math):
        own = [(name, new, old) for owner, name, new, old in _changes() if owner is module and old is not MISSING]
        found.append((vars(module), {n: new for n, new, _ in own}, {n: old for n, _, old in own}))
    return found


@cache
def _in_classes() -> list[tuple[Any, str, Any, Any]]:
    return [c for c in _changes() if not inspect.ismodule(c[0]) or c[3] is MISSING]


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Within, triton.language computes on NumPy and a jitted function can be called like a plain one."""
    modules, classes = _in_modules(), _in_classes()
    try:
        for names, new, _ in modules:
            names.update(new)
        for owner, name, stand_in, _ in classes:
            setattr(owner, name, stand_in)
        yield
    finally:
        for names, _, own in modules:
            names.update(own)
        for owner, name, _, old in classes:
            if old is MISSING:
                if name in vars(owner):
                    delattr(owner, name)
            else:
                setattr(owner, name, old)
