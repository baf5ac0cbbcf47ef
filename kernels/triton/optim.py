"""Optimizers' updates: one launch over all parameters of one kind (dtypes, alignment), bound by memory. ``_addresses`` says how a
program finds its chunk of them.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._budget import Budget
from .._updates import MOST_NUMBERS, UPDATES
from . import _configs, _tile
from ._addresses import CHUNK, _array, _chunk, _kind, _kinds, _load, _planned, _store, _table
from ._grad_norm import grad_norm_forward as grad_norm_forward
from ._grad_norm import grad_norm_varying as grad_norm_varying
from ._layerwise import layerwise_update_forward as layerwise_update_forward
from ._layerwise import layerwise_update_varying as layerwise_update_varying
from ._random import words

SGD_UPDATE = _configs.rows("sgd_update")
ADAMW_UPDATE = _configs.rows("adamw_update")
OPTIMIZER_UPDATE = _configs.rows("optimizer_update")
"""Elements that a program updates at a time."""
BUDGETS = {
    "_sgd_kernel": Budget(registers=96, blocks=5),
    "_adamw_kernel": Budget(registers=96, blocks=5),
    # Masters and two moments: 3 blocks still have more loads on their way than the memory needs.
    "_optimizer_kernel": Budget(registers=168, blocks=3),
}


@triton.jit
def _sgd_part(
    p, g, m, i, size, lr, momentum, keep, take, weight_decay, grad_scale,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    mask = i < size
    w = _load(p, i, mask, WHOLE)
    u = _load(g, i, mask, WHOLE) * grad_scale + weight_decay * w
    if MOMENTUM:
        v = keep * _load(m, i, mask, WHOLE) + take * u
        _store(m, i, v, mask, WHOLE)
        u = u + momentum * v if NESTEROV else v
    _store(p, i, w - lr * u, mask, WHOLE)


@triton.jit
def _sgd_kernel(
    table, plan, count, lr, momentum, keep, take, weight_decay, grad_scale,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, KIND: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index, size, start = _chunk(plan, count, CHUNK)
    p = _array(table, 0, count, index, KIND, ALIGNED)
    g = _array(table, 1, count, index, GRAD, ALIGNED)
    m = _array(table, 2, count, index, STATE, ALIGNED) if MOMENTUM else p
    numbers = (lr, momentum, keep, take, weight_decay, grad_scale)
    if start + CHUNK <= size:
        for part in range(0, CHUNK, BLOCK):
            _sgd_part(p, g, m, start + part + tl.arange(0, BLOCK), size, *numbers, MOMENTUM, NESTEROV, True)
    else:
        for rest in range(0, size - start, BLOCK):  # another name: its type is another
            _sgd_part(p, g, m, start + rest + tl.arange(0, BLOCK), size, *numbers, MOMENTUM, NESTEROV, False)


@triton.jit
def _adamw_part(
    p, g, m, v, i, size, decay, step_size, root, eps, beta1, rest1, beta2, rest2, grad_scale, WHOLE: tl.constexpr
):
    mask = i < size
    grad = _load(g, i, mask, WHOLE) * grad_scale
    first = beta1 * _load(m, i, mask, WHOLE) + rest1 * grad
    second = beta2 * _load(v, i, mask, WHOLE) + rest2 * grad * grad
    w = _load(p, i, mask, WHOLE) * decay
    _store(p, i, w - step_size * first / (tl.sqrt(second) / root + eps), mask, WHOLE)
    _store(m, i, first, mask, WHOLE)
    _store(v, i, second, mask, WHOLE)


@triton.jit
def _adamw_kernel(
    table, plan, count, decay, step_size, root, eps, beta1, rest1, beta2, rest2, grad_scale,
    KIND: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, STATE2: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index, size, start = _chunk(plan, count, CHUNK)
    p = _array(table, 0, count, index, KIND, ALIGNED)
    g = _array(table, 1, count, index, GRAD, ALIGNED)
    m = _array(table, 2, count, index, STATE, ALIGNED)
    v = _array(table, 3, count, index, STATE2, ALIGNED)
    numbers = (decay, step_size, root, eps, beta1, rest1, beta2, rest2, grad_scale)
    if start + CHUNK <= size:
        for part in range(0, CHUNK, BLOCK):
            _adamw_part(p, g, m, v, start + part + tl.arange(0, BLOCK), size, *numbers, True)
    else:
        for rest in range(0, size - start, BLOCK):  # another name: its type is another
            _adamw_part(p, g, m, v, start + rest + tl.arange(0, BLOCK), size, *numbers, False)


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


def _formula(rule: str) -> Any:
    """A rule's formula as a device function, over this module's functions."""
    return triton.jit(types.FunctionType(UPDATES[rule].formula.__code__, globals()))


# Under their own names, which compilers that copy a kernel's text write into it.
sgd, sgd_momentum, sgd_nesterov = map(_formula, ("sgd", "sgd_momentum", "sgd_nesterov"))
adam, nadam, adamax, adagrad = map(_formula, ("adam", "nadam", "adamax", "adagrad"))
radam, radam_unrectified, lion, muon = map(_formula, ("radam", "radam_unrectified", "lion", "muon"))
rmsprop, rmsprop_momentum = map(_formula, ("rmsprop", "rmsprop_momentum"))
rmsprop_centered, rmsprop_centered_momentum = map(_formula, ("rmsprop_centered", "rmsprop_centered_momentum"))


@triton.jit
def _ruled(w, g, a, b, c, n0, n1, n2, n3, n4, n5, n6, n7, RULE: tl.constexpr):
    """(w, a, b, c) by the rule's formula; state that it has not stays."""
    if RULE == "sgd":
        w = sgd(w, g, n0)
    elif RULE == "sgd_momentum":
        w, a = sgd_momentum(w, g, a, n0, n1, n2)
    elif RULE == "sgd_nesterov":
        w, a = sgd_nesterov(w, g, a, n0, n1, n2, n3)
    elif RULE == "adam":
        w, a, b = adam(w, g, a, b, n0, n1, n2, n3, n4, n5, n6)
    elif RULE == "nadam":
        w, a, b = nadam(w, g, a, b, n0, n1, n2, n3, n4, n5, n6, n7)
    elif RULE == "radam":
        w, a, b = radam(w, g, a, b, n0, n1, n2, n3, n4, n5)
    elif RULE == "radam_unrectified":
        w, a, b = radam_unrectified(w, g, a, b, n0, n1, n2, n3, n4, n5)
    elif RULE == "adamax":
        w, a, b = adamax(w, g, a, b, n0, n1, n2, n3, n4)
    elif RULE == "adagrad":
        w, a = adagrad(w, g, a, n0, n1)
    elif RULE == "rmsprop":
        w, a = rmsprop(w, g, a, n0, n1, n2, n3)
    elif RULE == "rmsprop_momentum":
        w, a, b = rmsprop_momentum(w, g, a, b, n0, n1, n2, n3, n4)
    elif RULE == "rmsprop_centered":
        w, a, b = rmsprop_centered(w, g, a, b, n0, n1, n2, n3)
    elif RULE == "rmsprop_centered_momentum":
        w, a, b, c = rmsprop_centered_momentum(w, g, a, b, c, n0, n1, n2, n3, n4)
    elif RULE == "lion":
        w, a = lion(w, g, a, n0, n1, n2, n3, n4)
    elif RULE == "muon":
        w, a = muon(w, g, a, n0, n1, n2, n3)
    return w, a, b, c


@triton.jit
def _by_chance(w, seed, place, start, BLOCK: tl.constexpr):
    """``w`` rounded to bfloat16, up with the probability of what is lost, as float32."""
    bits = w.to(tl.uint32, bitcast=True)
    drawn = words(seed, (place << 42) + start, 1, 1, 0, 0, 0, False, BLOCK).to(tl.uint32)
    up = (bits + (drawn & 0xFFFF)) & 0xFFFF0000
    return tl.where((bits & 0x7F800000) != 0x7F800000, up, bits).to(tl.float32, bitcast=True)


@triton.jit
def _optimizer_part(
    p, g, master, a, b, c, seed, place, start, size, factor, l2, shrink, n0, n1, n2, n3, n4, n5, n6, n7,
    RULE: tl.constexpr, STATES: tl.constexpr, MASTER: tl.constexpr, CHANCE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = start + tl.arange(0, BLOCK)
    mask = i < size
    w = _load(master, i, mask, WHOLE)
    grad = _load(g, i, mask, WHOLE) * factor + l2 * w
    x = _load(a, i, mask, WHOLE) if STATES > 0 else w
    y = _load(b, i, mask, WHOLE) if STATES > 1 else w
    z = _load(c, i, mask, WHOLE) if STATES > 2 else w
    w, x, y, z = _ruled(shrink * w, grad, x, y, z, n0, n1, n2, n3, n4, n5, n6, n7, RULE)
    if MASTER:
        _store(master, i, w, mask, WHOLE)
    if CHANCE:
        w = _by_chance(w, seed, place, start, BLOCK)
    _store(p, i, w, mask, WHOLE)
    if STATES > 0:
        _store(a, i, x, mask, WHOLE)
    if STATES > 1:
        _store(b, i, y, mask, WHOLE)
    if STATES > 2:
        _store(c, i, z, mask, WHOLE)


@triton.jit
def _optimizer_kernel(
    table, plan, count, scale, seed, grad_scale, l2, shrink, n0, n1, n2, n3, n4, n5, n6, n7,
    KIND: tl.constexpr, GRAD: tl.constexpr, MASTER: tl.constexpr, STATE: tl.constexpr, STATE2: tl.constexpr,
    STATE3: tl.constexpr, RULE: tl.constexpr, STATES: tl.constexpr, CHANCE: tl.constexpr, SCALED: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index, size, start = _chunk(plan, count, CHUNK)
    p = _array(table, 0, count, index, KIND, ALIGNED)
    g = _array(table, 1, count, index, GRAD, ALIGNED)
    FIRST: tl.constexpr = 2 if MASTER is None else 3
    master = p if MASTER is None else _array(table, 2, count, index, MASTER, ALIGNED)
    a = _array(table, FIRST, count, index, STATE, ALIGNED) if STATES > 0 else p
    b = _array(table, FIRST + 1, count, index, STATE2, ALIGNED) if STATES > 1 else p
    c = _array(table, FIRST + 2, count, index, STATE3, ALIGNED) if STATES > 2 else p
    place = tl.load(plan + count + index)
    if SCALED:
        grad_scale *= tl.load(scale)
        size = tl.where(tl.abs(grad_scale) < float("inf"), size, 0)  # nothing is written
    numbers = (grad_scale, l2, shrink, n0, n1, n2, n3, n4, n5, n6, n7)
    ROUNDED: tl.constexpr = CHANCE and tl.bfloat16 == KIND
    if start + CHUNK <= size:
        for part in range(0, CHUNK, BLOCK):
            _optimizer_part(
                p, g, master, a, b, c, seed, place, start + part, size, *numbers,
                RULE, STATES, MASTER is not None, ROUNDED, True, BLOCK,
            )  # fmt: skip
    else:
        for rest in range(0, size - start, BLOCK):  # another name: its type is another
            _optimizer_part(
                p, g, master, a, b, c, seed, place, start + rest, size, *numbers,
                RULE, STATES, MASTER is not None, ROUNDED, False, BLOCK,
            )  # fmt: skip


def _update(
    choice: _configs.Choice,
    kernel: Any,
    lists: Sequence[Sequence[Any]],
    written: Sequence[int],
    empty: Callable,
    numbers: Sequence[float],
    names: Sequence[str] = ("KIND", "GRAD", "STATE", "STATE2"),
    besides: Sequence[Any] = (),
    **constants: Any,
) -> None:
    """Launch ``kernel`` over the arrays of each kind; ``written``: the lists it writes to.

    names: the parameters for the lists' types. besides: arrays before the numbers.
    """
    kinds, back = _kinds(lists, written, empty)
    for (aligned, *dtypes), group in kinds.items():
        flat, plan, chunks = _planned(group)
        table = _table(flat, empty)
        own = {name: _kind(dtype) for name, dtype in zip(names, dtypes)}
        entry = choice(_tile.device(flat[0]), chunks * CHUNK)
        _tile.launch_on_table(
            flat, kernel, (chunks,), table, plan, len(group), *besides, *map(float, numbers), **constants, **own,
            ALIGNED=aligned, CHUNK=CHUNK, BLOCK=min(entry.elements, CHUNK), num_warps=entry.warps,
        )  # fmt: skip
    for target, copy in back:
        _tile.copy(copy, target)


class _SgdNumbers(NamedTuple):
    """The parameters of the kernel that change from step to step."""

    lr: float
    momentum: float
    keep: float
    take: float
    weight_decay: float
    grad_scale: float


def sgd_update_varying(
    lr: float = 1e-3, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0, first: bool = False,
    grad_scale: float = 1.0, maximize: bool = False, **_: Any,
) -> _SgdNumbers:  # fmt: skip
    keep, take = (0.0, 1.0) if first else (momentum, 1 - dampening)
    return _SgdNumbers(lr, momentum, keep, take, weight_decay, -grad_scale if maximize else grad_scale)


def sgd_update_forward(
    params: list, grads: list, momentums: list | None = None, *, needs: tuple = (), lr: float = 1e-3, momentum: float = 0.0,
    dampening: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0, maximize: bool = False,
    first: bool = False, grad_scale: float = 1.0, empty: Callable,
) -> tuple[tuple, dict]:  # fmt: skip
    numbers = sgd_update_varying(lr, momentum, dampening, weight_decay, first, grad_scale, maximize)
    lists = (params, grads) if momentums is None else (params, grads, momentums)
    constants = dict(MOMENTUM=momentums is not None, NESTEROV=nesterov)
    if momentums is None:
        constants["STATE"] = None
    _update(SGD_UPDATE, _sgd_kernel, lists, (0, 2)[: len(lists) - 1], empty, numbers, **constants)
    return (), {}


class _AdamwNumbers(NamedTuple):
    """The parameters of the kernel that change from step to step."""

    decay: float
    step_size: float
    root: float
    eps: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    grad_scale: float


def adamw_update_varying(
    lr: float = 1e-3, betas: tuple = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2, step: int = 1,
    grad_scale: float = 1.0, maximize: bool = False, **_: Any,
) -> _AdamwNumbers:  # fmt: skip
    b1, b2 = betas
    step_size, root = lr / (1 - b1**step), math.sqrt(1 - b2**step)
    sign = -grad_scale if maximize else grad_scale
    return _AdamwNumbers(1 - lr * weight_decay, step_size, root, eps, b1, 1 - b1, b2, 1 - b2, sign)


def adamw_update_forward(
    params: list, grads: list, exp_avgs: list, exp_avg_sqs: list, *, needs: tuple = (), lr: float = 1e-3,
    betas: tuple = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2, maximize: bool = False, step: int = 1,
    grad_scale: float = 1.0, empty: Callable,
) -> tuple[tuple, dict]:  # fmt: skip
    numbers = adamw_update_varying(lr, betas, eps, weight_decay, step, grad_scale, maximize)
    _update(ADAMW_UPDATE, _adamw_kernel, (params, grads, exp_avgs, exp_avg_sqs), (0, 2, 3), empty, numbers)
    return (), {}


class _Numbers(NamedTuple):
    """The parameters of the kernel that change from step to step."""

    grad_scale: float
    l2: float
    shrink: float
    n0: float
    n1: float
    n2: float
    n3: float
    n4: float
    n5: float
    n6: float
    n7: float


def optimizer_update_varying(
    numbers: tuple = (1e-3,), l2: float = 0.0, shrink: float = 1.0, grad_scale: float = 1.0, **_: Any
) -> _Numbers:
    return _Numbers(grad_scale, l2, shrink, *numbers, *(0.0,) * (MOST_NUMBERS - len(numbers)))


def optimizer_update_forward(
    params: list, grads: list, first: list | None = None, second: list | None = None, third: list | None = None,
    masters: list | None = None, scale: Any = None, seed: Any = None, *, needs: tuple = (), rule: str = "sgd",
    numbers: tuple = (1e-3,), l2: float = 0.0, shrink: float = 1.0, grad_scale: float = 1.0, empty: Callable,
) -> tuple[tuple, dict]:  # fmt: skip
    named = dict(KIND=params, GRAD=grads, MASTER=masters, STATE=first, STATE2=second, STATE3=third)
    lists = {name: x for name, x in named.items() if x is not None}
    constants = dict.fromkeys(named.keys() - lists.keys()) | dict(
        RULE=rule, STATES=UPDATES[rule].states, CHANCE=seed is not None, SCALED=scale is not None
    )
    besides = [None if x is None else _tile.dense(x, empty) for x in (scale, seed)]
    _update(
        OPTIMIZER_UPDATE, _optimizer_kernel, [*lists.values()], (0, *range(2, len(lists))), empty,
        optimizer_update_varying(numbers, l2, shrink, grad_scale), [*lists], besides, **constants,
    )  # fmt: skip
    return (), {}
