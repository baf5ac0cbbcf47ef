"""Optimizers' updates in blocks: every array is read and written once, with two blocks of scratch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import _blocks

REFUSALS = {"float64": "float64 is left to the definition"}


def _order(x: np.ndarray) -> list[int]:
    return sorted(range(x.ndim), key=lambda a: -x.strides[a])


def _over(arrays: Sequence[np.ndarray], written: Sequence[int], update: Callable) -> None:
    """update(*blocks) on float32 blocks of arrays of one shape, in place; other dtypes and layouts are copied in and
    back."""
    flat = [_blocks.flat(x) for x in arrays]
    alike = all(x.flags.c_contiguous for x in arrays) or all(_order(x) == _order(arrays[0]) for x in arrays)
    if any(x is None for x in flat) or not alike:
        copies = [np.ascontiguousarray(x) for x in arrays]
        _over(copies, written, update)
        for i in written:
            arrays[i][...] = copies[i]
        return

    def work(lo: int, hi: int) -> None:
        views = [x[lo:hi] for x in flat]
        blocks = [v.astype(np.float32, copy=False) for v in views]
        with np.errstate(all="ignore"):
            update(*blocks)
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
