"""Updates whose rate is each array's own: sums for each chunk, one program for each array that makes its trust ratio of them
in order, then the step.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._budget import Budget
from .._updates import LAYERWISE
from . import _configs, _tile
from ._addresses import CHUNK, _array, _chunk, _kind, _kinds, _load, _planned, _store, _table

LAYERWISE_UPDATE = _configs.rows("layerwise_update")
"""Elements that a program reads or updates at a time."""
BUDGETS = {
    "_lengths_kernel": Budget(registers=128, blocks=4),
    "_ratio_kernel": Budget(registers=64, blocks=8, narrow="loads, stores"),
    "_layerwise_kernel": Budget(registers=168, blocks=3),
}


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


# Under their own names, as in ``optim``.
lamb, lars = (triton.jit(types.FunctionType(LAYERWISE[rule].formula.__code__, globals())) for rule in ("lamb", "lars"))


@triton.jit
def _squares(
    g, master, a, b, i, size, factor, weight_decay, n0, n1, n2, n3, n4, n5, n6, RULE: tl.constexpr, WHOLE: tl.constexpr
):
    """(of the parameter, of what its trust ratio compares it with)."""
    mask = i < size
    w = _load(master, i, mask, WHOLE)
    d = _load(g, i, mask, WHOLE) * factor
    if RULE == "lamb":
        x, y = _load(a, i, mask, WHOLE), _load(b, i, mask, WHOLE)
        d, x, y = lamb(w, d, x, y, 1.0, weight_decay, n0, n1, n2, n3, n4, n5, n6)
        if not WHOLE:
            d = tl.where(mask, d, 0.0)  # 0 / 0 without eps
    return w * w, d * d


@triton.jit
def _lengths_kernel(
    table, plan, count, scale, sums, grad_scale, weight_decay, n0, n1, n2, n3, n4, n5, n6,
    KIND: tl.constexpr, GRAD: tl.constexpr, MASTER: tl.constexpr, STATE: tl.constexpr, STATE2: tl.constexpr,
    RULE: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index, size, start = _chunk(plan, count, CHUNK)
    FIRST: tl.constexpr = 2 if MASTER is None else 3
    g = _array(table, 1, count, index, GRAD, ALIGNED)
    if MASTER is None:
        master = _array(table, 0, count, index, KIND, ALIGNED)
    else:
        master = _array(table, 2, count, index, MASTER, ALIGNED)
    a = _array(table, FIRST, count, index, STATE, ALIGNED)
    b = _array(table, FIRST + 1, count, index, STATE2, ALIGNED) if RULE == "lamb" else a
    if SCALED:
        grad_scale *= tl.load(scale)
    numbers = (grad_scale, weight_decay, n0, n1, n2, n3, n4, n5, n6)
    length, other = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if start + CHUNK <= size:
        for part in range(0, CHUNK, BLOCK):
            x, y = _squares(g, master, a, b, start + part + tl.arange(0, BLOCK), size, *numbers, RULE, True)
            length, other = length + x, other + y
    else:
        for rest in range(0, size - start, BLOCK):  # another name: its type is another
            x, y = _squares(g, master, a, b, start + rest + tl.arange(0, BLOCK), size, *numbers, RULE, False)
            length, other = length + x, other + y
    tl.store(sums + 2 * tl.program_id(0), tl.sum(length))
    tl.store(sums + 2 * tl.program_id(0) + 1, tl.sum(other))


@triton.jit
def _ratio_kernel(plan, count, sums, ratios, coefficient, most, share, near, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """An array's trust ratio: its chunks' sums follow those of all arrays before it."""
    index = tl.program_id(0)
    before = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, index, BLOCK):
        i = start + tl.arange(0, BLOCK)
        before += (tl.load(plan + i, i < index, other=0) + CHUNK - 1) // CHUNK
    own = sums + 2 * tl.sum(before)
    length, other = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    chunks = (tl.load(plan + index) + CHUNK - 1) // CHUNK
    for chunk in range(0, chunks, BLOCK):  # another name: its type is another
        at = chunk + tl.arange(0, BLOCK)
        length += tl.load(own + 2 * at, at < chunks, other=0.0)
        other += tl.load(own + 2 * at + 1, at < chunks, other=0.0)
    w, d = tl.sqrt(tl.sum(length)), tl.sqrt(tl.sum(other))
    ratio = coefficient * tl.minimum(w, most) / (d + share * w + near)
    tl.store(ratios + index, tl.where((w > 0) & (d > 0), ratio, 1.0))


@triton.jit
def _layerwise_part(
    p, g, master, a, b, i, size, factor, rate, weight_decay, n0, n1, n2, n3, n4, n5, n6,
    RULE: tl.constexpr, MASTER: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    mask = i < size
    w = _load(master, i, mask, WHOLE)
    grad = _load(g, i, mask, WHOLE) * factor
    x = _load(a, i, mask, WHOLE)
    if RULE == "lamb":
        y = _load(b, i, mask, WHOLE)
        shift, x, y = lamb(w, grad, x, y, rate, weight_decay, n0, n1, n2, n3, n4, n5, n6)
        _store(b, i, y, mask, WHOLE)
    else:
        shift, x = lars(w, grad, x, rate, weight_decay, n0)
    w = w - shift
    if MASTER:
        _store(master, i, w, mask, WHOLE)
    _store(p, i, w, mask, WHOLE)
    _store(a, i, x, mask, WHOLE)


@triton.jit
def _layerwise_kernel(
    table, plan, count, scale, ratios, grad_scale, lr, weight_decay, n0, n1, n2, n3, n4, n5, n6,
    KIND: tl.constexpr, GRAD: tl.constexpr, MASTER: tl.constexpr, STATE: tl.constexpr, STATE2: tl.constexpr,
    RULE: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index, size, start = _chunk(plan, count, CHUNK)
    FIRST: tl.constexpr = 2 if MASTER is None else 3
    p = _array(table, 0, count, index, KIND, ALIGNED)
    g = _array(table, 1, count, index, GRAD, ALIGNED)
    master = p if MASTER is None else _array(table, 2, count, index, MASTER, ALIGNED)
    a = _array(table, FIRST, count, index, STATE, ALIGNED)
    b = _array(table, FIRST + 1, count, index, STATE2, ALIGNED) if RULE == "lamb" else a
    if SCALED:
        grad_scale *= tl.load(scale)
        size = tl.where(tl.abs(grad_scale) < float("inf"), size, 0)  # nothing is written
    rate = lr * tl.load(ratios + index)
    numbers = (grad_scale, rate, weight_decay, n0, n1, n2, n3, n4, n5, n6)
    if start + CHUNK <= size:
        for part in range(0, CHUNK, BLOCK):
            i = start + part + tl.arange(0, BLOCK)
            _layerwise_part(p, g, master, a, b, i, size, *numbers, RULE, MASTER is not None, True)
    else:
        for rest in range(0, size - start, BLOCK):  # other names: their types are others
            at = start + rest + tl.arange(0, BLOCK)
            _layerwise_part(p, g, master, a, b, at, size, *numbers, RULE, MASTER is not None, False)


class _Numbers(NamedTuple):
    """The parameters of the kernels that change from step to step."""

    grad_scale: float
    lr: float
    weight_decay: float
    coefficient: float
    most: float
    share: float
    near: float
    n0: float
    n1: float
    n2: float
    n3: float
    n4: float
    n5: float
    n6: float


def layerwise_update_varying(
    numbers: tuple = (0.9,), trust: tuple = (1e-3, math.inf, 0.0, 0.0), lr: float = 1e-3, weight_decay: float = 0.0,
    grad_scale: float = 1.0, **_: Any,
) -> _Numbers:  # fmt: skip
    most = max(rule.numbers for rule in LAYERWISE.values())
    return _Numbers(grad_scale, lr, weight_decay, *trust, *numbers, *(0.0,) * (most - len(numbers)))


def layerwise_update_forward(
    params: list, grads: list, first: list, second: list | None = None, masters: list | None = None, scale: Any = None,
    *, needs: tuple = (), rule: str = "lars", numbers: tuple = (0.9,), trust: tuple = (1e-3, math.inf, 0.0, 0.0),
    lr: float = 1e-3, weight_decay: float = 0.0, grad_scale: float = 1.0, empty: Callable,
) -> tuple[tuple, dict]:  # fmt: skip
    scale = None if scale is None else _tile.dense(scale, empty)
    factor, rate, decay, *rest = map(float, layerwise_update_varying(numbers, trust, lr, weight_decay, grad_scale))
    ratio, own = rest[:4], rest[4:]
    named = dict(KIND=params, GRAD=grads, MASTER=masters, STATE=first, STATE2=second)
    lists = {name: x for name, x in named.items() if x is not None}
    kinds, back = _kinds([*lists.values()], (0, *range(2, len(lists))), empty)
    for (aligned, *dtypes), group in kinds.items():
        flat, plan, chunks = _planned(group)
        table, count = _table(flat, empty), len(group)
        sums, ratios = empty((2 * chunks,), "float32"), empty((count,), "float32")
        entry = LAYERWISE_UPDATE(_tile.device(flat[0]), chunks * CHUNK)
        constants: dict[str, Any] = dict.fromkeys(named.keys() - lists.keys()) | dict(zip(lists, map(_kind, dtypes)))
        constants |= dict(
            RULE=rule, SCALED=scale is not None, ALIGNED=aligned, CHUNK=CHUNK, BLOCK=min(entry.elements, CHUNK),
            num_warps=entry.warps,
        )  # fmt: skip
        where = (table, plan, count, scale)
        _tile.launch_on_table(flat, _lengths_kernel, (chunks,), *where, sums, factor, decay, *own, **constants)
        _tile.launch(_ratio_kernel, (count,), plan, count, sums, ratios, *ratio, CHUNK=CHUNK, BLOCK=512, num_warps=4)
        _tile.launch_on_table(
            flat, _layerwise_kernel, (chunks,), *where, ratios, factor, rate, decay, *own, **constants
        )
    for target, copy in back:
        _tile.copy(copy, target)
    return (), {}
