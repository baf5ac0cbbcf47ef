"""The norm of all gradients together: a sum for each chunk, then one program that adds them in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._addresses import CHUNK, _array, _chunk, _kind, _load, _plan, _table

GRAD_NORM = _configs.rows("grad_norm")

BUDGETS = {
    "_squares_kernel": Budget(registers=64, blocks=8),
    "_norm_kernel": Budget(registers=64, blocks=8, narrow="loads, stores"),
}


@triton.jit
def _squares_kernel(
    table, plan, count, sums, first,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index, size, start = _chunk(plan, count, CHUNK)
    g = _array(table, 0, count, index, GRAD, ALIGNED)
    total = tl.zeros((BLOCK,), tl.float32)
    if start + CHUNK <= size:
        for part in range(0, CHUNK, BLOCK):
            x = _load(g, start + part + tl.arange(0, BLOCK), True, True)
            total += x * x
    else:
        for rest in range(0, size - start, BLOCK):  # another name: its type is another
            i = start + rest + tl.arange(0, BLOCK)
            x = _load(g, i, i < size, False)
            total += x * x
    tl.store(sums + first + tl.program_id(0), tl.sum(total))


@triton.jit
def _norm_kernel(sums, count, norm, factor, grad_scale, max_norm, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(sums + i, i < count, other=0.0)
    length = tl.sqrt(tl.sum(total)) * tl.abs(grad_scale)
    tl.store(norm, length)
    clipped = tl.minimum(max_norm / (length + 1e-6), 1.0)
    tl.store(factor, tl.where(length < float("inf"), clipped, 1.0))  # NaN is not below


class _Numbers(NamedTuple):
    """The parameters of the kernel that change from step to step."""

    grad_scale: float
    max_norm: float


def grad_norm_varying(max_norm: float = float("inf"), grad_scale: float = 1.0, **_: Any) -> _Numbers:
    return _Numbers(grad_scale, max_norm)


def grad_norm_forward(
    grads: list, *, needs: tuple = (), max_norm: float = float("inf"), grad_scale: float = 1.0, empty: Callable
) -> tuple[tuple, dict]:
    kinds: dict[tuple, list] = {}
    for x in grads:
        if x.numel():
            x = x if _tile.order(x) is not None or x.is_contiguous() else _tile.dense(x, empty)
            kinds.setdefault((x.data_ptr() % 16 == 0, x.dtype), []).append(x)
    chunks = sum(_tile.cdiv(x.numel(), CHUNK) for group in kinds.values() for x in group)
    sums, norm, factor = empty((max(chunks, 1),), "float32"), empty((1,), "float32"), empty((1,), "float32")
    entry, first = GRAD_NORM(_tile.device(norm), chunks * CHUNK), 0
    for (aligned, dtype), group in kinds.items():
        plan, programs = _plan(tuple(x.numel() for x in group), tuple(range(len(group))), group[0])
        table = _table(group, empty)
        _tile.launch_on_table(
            group, _squares_kernel, (programs,), table, plan, len(group), sums, first,
            GRAD=_kind(dtype), ALIGNED=aligned, CHUNK=CHUNK,
            BLOCK=min(entry.elements, CHUNK), num_warps=entry.warps,
        )  # fmt: skip
        first += programs
    numbers = map(float, grad_norm_varying(max_norm, grad_scale))
    _tile.launch(_norm_kernel, (1,), sums, chunks, norm, factor, *numbers, BLOCK=1024, num_warps=4)
    return (norm, factor), {}
