"""Instance norm: by the statistics of x it is group norm with a group for each channel, by running ones batch norm."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from .._norm import group_norm_saved
from . import _tile
from ._batch_norm import batch_norm_backward, batch_norm_forward
from ._group_norm import gradients, normalise

BUDGETS = {"_instance_norm_running_kernel": Budget(registers=56, blocks=9)}


@triton.jit
def _instance_norm_running_kernel(
    mean, var, running_mean, running_var, N, C, momentum, unbiased, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Running statistics moved towards the means over samples; ``unbiased`` is what makes var so."""
    c = tl.program_id(0) * COLS + tl.arange(0, COLS)  # (COLS,)
    means = tl.zeros((ROWS, COLS), tl.float32)
    variances = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, N, ROWS):
        n = start + tl.arange(0, ROWS)[:, None]
        mask = (n < N) & (c < C)[None, :]
        means += tl.load(mean + n.to(tl.int64) * C + c[None, :], mask, other=0.0)
        variances += tl.load(var + n.to(tl.int64) * C + c[None, :], mask, other=0.0)
    old = tl.load(running_mean + c, c < C, other=0.0).to(tl.float32)
    new = (1 - momentum) * old + momentum * (tl.sum(means, 0) / N)
    tl.store(running_mean + c, new.to(running_mean.dtype.element_ty), c < C)
    old = tl.load(running_var + c, c < C, other=0.0).to(tl.float32)
    new = (1 - momentum) * old + momentum * (tl.sum(variances, 0) / N * unbiased)
    tl.store(running_var + c, new.to(running_var.dtype.element_ty), c < C)


def _update(mean: Any, var: Any, running: tuple, count: int, momentum: float, empty: Any) -> None:
    n, c = mean.shape
    ready = [_tile.dense(r, empty) for r in running]
    rest = (n, c, momentum, count / max(count - 1, 1))
    _tile.launch(
        _instance_norm_running_kernel, (_tile.cdiv(c, 32) if n else 0,), mean, var, *ready, *rest, ROWS=16, COLS=32,
        num_warps=4,
    )  # fmt: skip
    for target, copy in zip(running, ready):
        if copy is not target:
            _tile.copy(copy, target)


def instance_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    residual: Any = None,
    *,
    needs: tuple = (),
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    empty: Any,
) -> tuple[tuple, dict]:
    running = running_mean, running_var
    if not use_input_stats:
        options: dict[str, Any] = dict(needs=needs, eps=eps, activation=activation, empty=empty)
        return batch_norm_forward(x, weight, bias, *running, residual, **options)
    keep, moved = bool(needs), running_mean is not None
    how: tuple = x.shape[1], eps, activation, empty
    y, mean, var, rstd = normalise(x, weight, bias, residual, *how, keep=keep or moved, spread=moved)
    if moved:
        _update(mean, var, running, math.prod(x.shape[2:]), momentum, empty)
    return (y,), group_norm_saved(activation, x, mean, rstd, weight, bias, residual) if needs else {}


def instance_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    empty: Any,
) -> tuple:
    if not use_input_stats:
        how: dict[str, Any] = dict(inputs=inputs, needs=needs, eps=eps, activation=activation, empty=empty)
        return batch_norm_backward(dys, saved, **how)
    *grads, dresidual = gradients(dys[0], saved, inputs, needs, saved["x"].shape[1], activation, empty)
    return *grads, None, None, dresidual
