"""Optimizers' updates in blocks: every array is read and written once, with two blocks of scratch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpulayers.arrays import bfloat16

from .._updates import bound
from . import _blocks, _random

REFUSALS = {"float64": "float64 is left to the definition"}


def _order(x: np.ndarray) -> list[int]:
    return sorted(range(x.ndim), key=lambda a: -x.strides[a])


def _over(
    arrays: Sequence[np.ndarray], written: Sequence[int], update: Callable, finish: Callable | None = None
) -> None:
    """update(*blocks) on float32 blocks of arrays of one shape, in place; other dtypes and layouts are copied in and
    back, after finish(the first block, its first element)."""
    flat = [_blocks.flat(x) for x in arrays]
    alike = all(x.flags.c_contiguous for x in arrays) or all(_order(x) == _order(arrays[0]) for x in arrays)
    if any(x is None for x in flat) or not alike:
        copies = [np.ascontiguousarray(x) for x in arrays]
        _over(copies, written, update, finish)
        for i in written:
            arrays[i][...] = copies[i]
        return

    def work(lo: int, hi: int) -> None:
        views = [x[lo:hi] for x in flat]
        blocks = [v.astype(np.float32, copy=False) for v in views]
        with np.errstate(all="ignore"):
            update(*blocks)
            if finish is not None:
                finish(blocks[0], lo)
            for i in written:
                if blocks[i] is not views[i]:
                    views[i][...] = blocks[i]

    _blocks.each(arrays[0].size, _blocks.CHAIN, work)


def _refuses(*lists: Any) -> str | None:
    everything = [x for arrays in lists if arrays is not None for x in arrays]
    return REFUSALS["float64"] if any(x.dtype == np.float64 for x in everything) else None


def sgd_update_refuses(
    params: Any, grads: Any, momentums: Any = None, *, needs: tuple = (), **options: Any
) -> str | None:
    return _refuses(params, grads, momentums)


def sgd_update_forward(
    params: list,
    grads: list,
    momentums: list | None = None,
    *,
    needs: tuple = (),
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    first: bool = False,
    grad_scale: float = 1.0,
) -> tuple[tuple, dict]:
    keep, take = (0.0, 1.0) if first else (momentum, 1 - dampening)
    scale = -grad_scale if maximize else grad_scale

    def update(p: np.ndarray, g: np.ndarray, m: np.ndarray | None = None) -> None:
        u = g * scale
        if weight_decay:
            u += weight_decay * p
        if m is not None:
            np.multiply(m, keep, out=m)
            m += u if take == 1 else take * u
            if nesterov:
                u += momentum * m
            else:
                np.copyto(u, m)
        u *= lr
        p -= u

    lists = (params, grads) if momentums is None else (params, grads, momentums)
    for arrays in zip(*lists):
        _over(arrays, (0,) if momentums is None else (0, 2), update)
    return (), {}


def adamw_update_refuses(
    params: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any, *, needs: tuple = (), **options: Any
) -> str | None:
    return _refuses(params, grads, exp_avgs, exp_avg_sqs)


def adamw_update_forward(
    params: list,
    grads: list,
    exp_avgs: list,
    exp_avg_sqs: list,
    *,
    needs: tuple = (),
    lr: float = 1e-3,
    betas: tuple = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    step: int = 1,
    grad_scale: float = 1.0,
) -> tuple[tuple, dict]:
    b1, b2 = betas
    step_size, root = lr / (1 - b1**step), math.sqrt(1 - b2**step)
    decay, scale = 1 - lr * weight_decay, -grad_scale if maximize else grad_scale

    def update(p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray) -> None:
        u = g * ((1 - b1) * scale)
        m *= b1
        m += u
        np.multiply(g, scale, out=u)
        u *= u
        u *= 1 - b2
        v *= b2
        v += u
        np.sqrt(v, out=u)
        u /= root
        u += eps
        np.divide(m, u, out=u)
        u *= step_size
        p *= decay
        p -= u

    for arrays in zip(params, grads, exp_avgs, exp_avg_sqs):
        _over(arrays, (0, 2, 3), update)
    return (), {}


_PLACE = 40
"""Array k of a list draws the words of the counters from k · 2⁴⁰ on."""


def _round(w: np.ndarray, first: int, seed: tuple[int, int], place: int) -> None:
    """Round elements from the ``first`` on to bfloat16, up or down by chance, in place."""
    skipped, last = first % 4, first + w.size
    counter = np.arange(first // 4, -(-last // 4), dtype=np.uint64) + np.uint64(place << _PLACE)
    words = np.stack(_random.philox(seed[0], counter, seed[1]), axis=1).reshape(-1)[skipped : skipped + w.size]
    bits = w.view(np.uint32)
    up = (bits + (words & np.uint64(0xFFFF)).astype(np.uint32)) & np.uint32(0xFFFF0000)
    np.copyto(bits, up, where=(bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000))


def optimizer_update_refuses(
    params: Any, grads: Any, first: Any = None, second: Any = None, third: Any = None, masters: Any = None,
    scale: Any = None, seed: Any = None, *, needs: tuple = (), **options: Any,
) -> str | None:  # fmt: skip
    return _refuses(params, grads, first, second, third)


def optimizer_update_forward(
    params: list, grads: list, first: list | None = None, second: list | None = None, third: list | None = None,
    masters: list | None = None, scale: Any = None, seed: Any = None, *, needs: tuple = (), rule: str = "sgd",
    numbers: tuple = (1e-3,), l2: float = 0.0, shrink: float = 1.0, grad_scale: float = 1.0,
) -> tuple[tuple, dict]:  # fmt: skip
    factor = grad_scale if scale is None else grad_scale * float(scale.reshape(()))
    if scale is not None and not math.isfinite(factor):
        return (), {}
    formula, given = bound(rule, np), tuple(map(float, numbers))

    def update(p: np.ndarray, g: np.ndarray, *rest: np.ndarray) -> None:
        source, states = (p, rest) if masters is None else (rest[0], rest[1:])
        u = g * factor
        if l2:
            u += l2 * source
        w, *new = formula(source if shrink == 1 else shrink * source, u, *states, *given)
        for old, x in zip((p, source, *states), (w, w, *new)):
            np.copyto(old, x)

    lists = [x for x in (params, grads, masters, first, second, third) if x is not None]
    halves = None if seed is None else _random.halves(seed)
    for place, arrays in enumerate(zip(*lists)):
        finish = None
        if halves is not None and arrays[0].dtype == bfloat16:
            finish = functools.partial(_round, seed=halves, place=place)
        _over(arrays, (0, *range(2, len(arrays))), update, finish)
    return (), {}


def _squares(x: np.ndarray) -> float:
    """The sum of all squares."""
    total, row = 0.0, _blocks.flat(x)
    row = np.ascontiguousarray(x).reshape(-1) if row is None else row
    for start in range(0, row.size, _blocks.CHAIN):
        block = row[start : start + _blocks.CHAIN].astype(np.float32, copy=False)
        whole = block.size // 256 * 256  # short sums in float32, theirs in float64
        parts, rest = block[:whole].reshape(-1, 256), block[whole:]
        with np.errstate(all="ignore"):
            total += float(np.einsum("ij,ij->i", parts, parts).sum(dtype=np.float64)) + float(np.dot(rest, rest))
    return total


def grad_norm_refuses(grads: Any, *, needs: tuple = (), **options: Any) -> str | None:
    return _refuses(grads)


def grad_norm_forward(
    grads: list, *, needs: tuple = (), max_norm: float = math.inf, grad_scale: float = 1.0
) -> tuple[tuple, dict]:
    total = sum(map(_squares, grads), 0.0)
    norm = math.sqrt(total) * abs(grad_scale) if total >= 0 else math.nan
    factor = min(1.0, max_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0
    return (np.array([norm], np.float32), np.array([factor], np.float32)), {}


def layerwise_update_refuses(
    params: Any, grads: Any, first: Any, second: Any = None, masters: Any = None, scale: Any = None, *,
    needs: tuple = (), **options: Any,
) -> str | None:  # fmt: skip
    return _refuses(params, grads, first, second)


def layerwise_update_forward(
    params: list, grads: list, first: list, second: list | None = None, masters: list | None = None, scale: Any = None,
    *, needs: tuple = (), rule: str = "lars", numbers: tuple = (0.9,), trust: tuple = (1e-3, math.inf, 0.0, 0.0),
    lr: float = 1e-3, weight_decay: float = 0.0, grad_scale: float = 1.0,
) -> tuple[tuple, dict]:  # fmt: skip
    factor = grad_scale if scale is None else grad_scale * float(scale.reshape(()))
    if scale is not None and not math.isfinite(factor):
        return (), {}
    formula, given = bound(rule, np), (weight_decay, *map(float, numbers))

    def turn(d: np.ndarray, w: np.ndarray, g: np.ndarray, *states: np.ndarray) -> None:
        for old, x in zip((d, *states), formula(w, g * factor, *states, 1.0, *given)):
            np.copyto(old, x)

    def slide(w: np.ndarray, g: np.ndarray, m: np.ndarray, rate: float) -> np.ndarray:
        np.copyto(m, formula(w, g * factor, m, rate, *given)[0])
        return m

    for i, (p, g) in enumerate(zip(params, grads)):
        w = p if masters is None else masters[i]
        if second is None:
            _descend(p, w, (g, first[i]), slide, lr * _trust_ratio(w, g, factor, trust))
        else:
            d = np.empty_like(w, np.float32)
            _over((d, w, g, first[i], second[i]), (0, 3, 4), turn)
            _descend(p, w, (d,), lambda w, d, rate: rate * d, lr * _trust_ratio(w, d, 1.0, trust))
    return (), {}


def _trust_ratio(w: np.ndarray, direction: np.ndarray, factor: float, trust: tuple) -> float:
    coefficient, most, decay, eps = map(float, trust)
    length, other = math.sqrt(_squares(w)), math.sqrt(_squares(direction)) * abs(factor)
    if not (length > 0 and other > 0):
        return 1.0
    return coefficient * min(length, most) / (other + decay * length + eps)


def _descend(p: np.ndarray, w: np.ndarray, others: Sequence[np.ndarray], shift: Callable, rate: float) -> None:
    """w − shift(w, *others, rate) is w anew; shift may write to the last of the others; p is w, rounded."""
    alone = p is w

    def update(*blocks: np.ndarray) -> None:
        source, *rest = blocks if alone else blocks[1:]
        source -= shift(source, *rest, rate)
        if not alone:
            np.copyto(blocks[0], source)

    arrays = (p, *others) if alone else (p, w, *others)
    _over(arrays, (0, *range(1, 1 + (not alone)), len(arrays) - 1), update)
