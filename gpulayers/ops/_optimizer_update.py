"""One step of any optimizer whose rule is in the table: the engine of all but SGD and AdamW over plain parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gpulayers.arrays import Spec, bfloat16, compute_dtype, float32, float64, namespace
from gpulayers.definition import ArgumentError, Rule, ShapeError, UnsupportedTypeError
from gpulayers.kernels._updates import UPDATES, bound
from gpulayers.ops._lists import check_lists
from gpulayers.ops._op import Op
from gpulayers.ops._random import philox

PLACE = 40
"""Array k of a list draws the words of the counters from k · 2⁴⁰ on, four elements each."""


def optimizer_update_rule(
    params: list,
    grads: list,
    first: list | None = None,
    second: list | None = None,
    third: list | None = None,
    masters: list | None = None,
    scale: Any = None,
    seed: Any = None,
    *,
    needs: tuple = (),
    rule: str = "sgd",
) -> Rule:
    if rule not in UPDATES:
        raise ArgumentError("rule", f"one of {', '.join(UPDATES)}", repr(rule))
    given = {"first": first, "second": second, "third": third}
    for i, (name, state) in enumerate(given.items()):
        if (state is not None) != (i < UPDATES[rule].states):
            wanted = "a list" if i < UPDATES[rule].states else "None"
            raise ShapeError(name, f"{wanted} for {rule}", "None" if state is None else "a list")
    lists = given | {"masters": masters}
    check_lists(params=params, grads=grads, **{name: x for name, x in lists.items() if x is not None})
    for i, x in enumerate(masters or ()):
        if x.dtype != float32:
            raise UnsupportedTypeError(f"masters[{i}]", "dtype = float32", x.dtype)
    if scale is not None and (scale.dtype not in (float32, float64) or math.prod(scale.shape) != 1):
        raise ShapeError("scale", "one float32 or float64 number", f"{scale.dtype}{list(scale.shape)}")
    if seed is not None:
        _check_seed(params, seed)
    return Rule({})


def _check_seed(params: Any, seed: Spec) -> None:
    if str(seed.dtype) != "int64" or tuple(seed.shape) != (2,):
        raise ShapeError("seed", "int64, shape [2]", f"{seed.dtype}{list(seed.shape)}")
    for i, p in enumerate(params):
        if p.dtype not in (bfloat16, float32):
            raise UnsupportedTypeError(f"params[{i}]", "dtype ∈ {bfloat16, float32} with a seed", p.dtype)


def _guard(*lists: Any, rule: str = "sgd", numbers: tuple = (1e-3,), **_: Any) -> None:
    if rule in UPDATES and len(numbers) != UPDATES[rule].numbers:
        raise ArgumentError("numbers", f"{UPDATES[rule].numbers} numbers for {rule}", len(numbers))


def _memory_order(arrays: Sequence[Any]) -> list[int]:
    """The axes of arrays as they lie in memory where all are dense and lie alike; row-major elsewhere."""
    order = sorted(range(arrays[0].ndim), key=lambda a: -arrays[0].strides[a])
    plain = all(x.flags.c_contiguous for x in arrays)
    alike = not plain and all(x.transpose(order).flags.c_contiguous for x in arrays)
    return order if alike else list(range(arrays[0].ndim))


def rounded(w: Any, words: Any) -> Any:
    """float32 numbers whose lower 16 bits are rounded away: up with the probability that they say; words: uint32."""
    xp = namespace(w)
    bits = w.view(xp.uint32)
    up = (bits + (words & xp.uint32(0xFFFF))) & xp.uint32(0xFFFF0000)
    finite = (bits & xp.uint32(0x7F800000)) != xp.uint32(0x7F800000)
    return xp.where(finite, up, bits).view(xp.float32)


def _by_chance(w: Any, arrays: Sequence[Any], seed: Any, place: int) -> Any:
    """``w`` rounded to bfloat16 by the words of the array at this place."""
    xp, order = namespace(w), _memory_order(arrays)
    key, offset = seed.view(xp.uint64).reshape(2, 1)
    counter = xp.arange(-(-w.size // 4), dtype=xp.uint64) + xp.uint64(place << PLACE)
    words = xp.stack(philox(key, counter, offset), axis=1).reshape(-1)[: w.size].astype(xp.uint32)
    words = words.reshape([w.shape[a] for a in order])
    return rounded(w.astype(float32), words.transpose([order.index(a) for a in range(w.ndim)]))


def optimizer_update_forward(
    params: list,
    grads: list,
    first: list | None = None,
    second: list | None = None,
    third: list | None = None,
    masters: list | None = None,
    scale: Any = None,
    seed: Any = None,
    *,
    needs: tuple = (),
    rule: str = "sgd",
    numbers: tuple = (1e-3,),
    l2: float = 0.0,
    shrink: float = 1.0,
    grad_scale: float = 1.0,
) -> tuple[tuple, dict]:
    """One step of the optimizer ``rule`` with ``numbers``, both as ``gpulayers.kernels._updates`` makes them.

    g ← grad_scale · scale · grad + l2 p;  p ← shrink p;  then the rule's formula, whose state is first, second, third.
    masters: float32 copies of the parameters, which are updated in their place; the parameters are them, rounded.
    scale: one float32 on the device; where it is not finite, nothing is written. seed: int64 [seed, offset]; bfloat16
    parameters are rounded up or down by chance, by Philox's words (in memory order where all arrays lie alike, row-major
    elsewhere), so that small updates are kept on average.

    Raises RuntimeError for lists that do not fit, ValueError for another number of numbers or an unknown rule.
    """
    states = [x for x in (first, second, third) if x is not None]
    numbers = tuple(map(float, numbers))
    for i, (p, grad) in enumerate(zip(params, grads)):
        work, xp = compute_dtype(p.dtype), namespace(p)
        factor = grad_scale if scale is None else grad_scale * scale.reshape(()).astype(work)
        w = (p if masters is None else masters[i]).astype(work)
        g = grad.astype(work) * factor + l2 * w
        w, *new = bound(rule, xp)(shrink * w, g, *(s[i].astype(work) for s in states), *numbers)
        written = [(s[i], x) for s, x in zip(states, new)]
        if masters is not None:
            written.append((masters[i], w))
        if seed is not None and p.dtype == bfloat16:
            kept = () if masters is None else (masters[i],)
            w = _by_chance(w, (p, grad, *kept, *(s[i] for s in states)), seed, i)
        for old, x in (*written, (p, w)):
            x = x if scale is None else xp.where(xp.isfinite(factor), x, old.astype(x.dtype))
            old[...] = x.astype(old.dtype)
    return (), {}


optimizer_update = Op(
    optimizer_update_rule,
    optimizer_update_forward,
    updates=("params", "first", "second", "third", "masters"),
    dynamic=("numbers", "l2", "shrink", "grad_scale"),
    guard=_guard,
    family="optim",
)
