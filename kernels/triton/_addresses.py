"""Launches over many arrays at once: a table of their addresses, and a plan of which chunk each program has.

A plan holds the arrays' sizes and which chunk of which array each program has; it is copied to the GPU once for
each set of sizes. The addresses may change with every launch: launches write them, passed by value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _tile

CHUNK = 8192
"""Elements of an array that are one program's."""
WRITTEN, STEP = 128, 32
"""Addresses that one launch writes, and what their number is a multiple of."""
_plans: dict[tuple, Any] = {}
"""Never emptied: captured graphs read them."""

BUDGETS = {
    # Constants.
    "_write_kernel": Budget(registers=64, blocks=16, narrow="stores"),
}


@triton.jit(do_not_specialize=["values"])
def _write_kernel(table, first, values, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(table + first + i, values[i])


@triton.jit
def _chunk(plan, count, CHUNK: tl.constexpr):
    """(array, its size, first element) of this program's chunk: the plan holds sizes, places, then array and chunk."""
    at = plan + 2 * count + 2 * tl.program_id(0).to(tl.int64)
    index = tl.load(at)
    return index, tl.load(plan + index), tl.load(at + 1) * CHUNK


@triton.jit
def _array(table, row, count, index, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to an array of the list ``row``."""
    p = tl.load(table + row * count + index).to(tl.pointer_type(KIND))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def _load(p, i, mask, WHOLE: tl.constexpr):
    if WHOLE:
        x = tl.load(p + i)
    else:
        x = tl.load(p + i, mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _store(p, i, x, mask, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(p + i, x.to(p.dtype.element_ty))
    else:
        tl.store(p + i, x.to(p.dtype.element_ty), mask)


def _plan(sizes: tuple[int, ...], places: tuple[int, ...], like: Any) -> tuple[Any, int]:
    """(the plan on the device of ``like``, number of chunks); made once for these sizes and places in the lists."""
    import torch

    key = (like.device, sizes, places)
    if key not in _plans:
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph cannot capture the first update, or the first norm, of a set of arrays: run one before"
            )
        pairs = [n for i, size in enumerate(sizes) for c in range(_tile.cdiv(size, CHUNK)) for n in (i, c)]
        # This copy waits for the GPU, once: every stream may read the plan from then on.
        _plans[key] = torch.tensor([*sizes, *places, *pairs], dtype=torch.int64).to(like.device), len(pairs) // 2
    plan, chunks = _plans[key]
    return _tile.lasting(plan), chunks


def _kind(dtype: Any) -> Any:
    """Triton's type for a tensor's elements."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def _table(arrays: Sequence[Any], empty: Callable) -> Any:
    """The arrays' addresses as an int64 array on their device. Launches carry them by value, so that nothing waits, and a
    CUDA graph or a tape holds them itself."""
    addresses = [x.data_ptr() or 1 << 40 for x in arrays]  # a meta tensor has no address
    whole = _tile.cdiv(len(addresses), STEP) * STEP
    table = empty((whole,), "int64")
    padded = addresses + [addresses[-1]] * (whole - len(addresses))
    for first in range(0, whole, WRITTEN):
        values = tuple(padded[first : first + WRITTEN])
        _tile.launch(_write_kernel, (1,), table, first, values, COUNT=len(values), num_warps=1)
    return table


def _alike(p: Any, x: Any) -> bool:
    """Whether two arrays of one shape are dense in the same memory order."""
    return p.stride() == x.stride() or (p.is_contiguous() and x.is_contiguous())


def _kinds(
    lists: Sequence[Sequence[Any]], written: Sequence[int], empty: Callable
) -> tuple[dict[tuple, list[tuple]], list[tuple[Any, Any]]]:
    """({(aligned, *dtypes): [(place, *arrays)]}, [(an array of the lists ``written``, its copy, which is written)])."""
    kinds: dict[tuple, list[tuple]] = {}
    back: list[tuple[Any, Any]] = []
    for place, arrays in enumerate(zip(*lists)):
        if not arrays[0].numel():
            continue
        dense = _tile.order(arrays[0]) is not None or arrays[0].is_contiguous()
        if not dense or not all(_alike(arrays[0], x) for x in arrays[1:]):
            copies = tuple(_tile.dense(x, empty) for x in arrays)
            back += [(arrays[i], copies[i]) for i in written if copies[i] is not arrays[i]]
            arrays = copies
        aligned = all(x.data_ptr() % 16 == 0 for x in arrays)
        kinds.setdefault((aligned, *(x.dtype for x in arrays)), []).append((place, *arrays))
    return kinds, back


def _planned(group: Sequence[tuple]) -> tuple[list[Any], Any, int]:
    """(arrays, one list after the other; the plan; number of chunks) of one of ``_kinds``."""
    places, *columns = zip(*group)
    flat = [x for column in columns for x in column]
    return flat, *_plan(tuple(x.numel() for x in columns[0]), places, flat[0])
