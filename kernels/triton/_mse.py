"""The mean squared error: bound by memory, one pass forward and one backward."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._classes import reduced
from ._tile import rows_tile

BUDGETS = {
    "_mse_forward_kernel": Budget(registers=40, blocks=12),
    "_mse_sum_kernel": Budget(registers=56, blocks=10),
    "_mse_backward_kernel": Budget(registers=56, blocks=10),
}


@triton.jit
def _mse_forward_kernel(x, target, y, M, N, x_row, t_row, y_row, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, n, mask = rows_tile(M, N, ROWS, BLOCK)
    d = tl.load(x + row * x_row + n, mask, other=0.0).to(tl.float32)
    d -= tl.load(target + row * t_row + n, mask, other=0.0).to(tl.float32)
    tl.store(y + row * y_row + n, (d * d).to(y.dtype.element_ty), mask)


@triton.jit
def _mse_sum_kernel(x, target, losses, M, N, x_row, t_row, each, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    columns = (N - 1) // BLOCK + 1  # tl.cdiv would overflow for N just below 2^31
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(each):
        tile = (i * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        row = tile // columns * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
        n = tile % columns * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
        mask = (row < M) & (n < N)
        d = tl.load(x + row * x_row + n, mask, other=0.0).to(tl.float32)
        d -= tl.load(target + row * t_row + n, mask, other=0.0).to(tl.float32)
        total += d * d
    tl.store(losses + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit
def _mse_backward_kernel(
    dy,
    x,
    target,
    dx,
    dt,
    M,
    N,
    dy_row,
    x_row,
    t_row,
    dx_row,
    scale,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, n, mask = rows_tile(M, N, ROWS, BLOCK)
    d = tl.load(x + row * x_row + n, mask, other=0.0).to(tl.float32)
    d -= tl.load(target + row * t_row + n, mask, other=0.0).to(tl.float32)
    if EACH:
        g = d * (tl.load(dy + row * dy_row + n, mask, other=0.0).to(tl.float32) * scale)
    else:
        g = d * (tl.load(dy).to(tl.float32) * scale)
    if dx is not None:
        tl.store(dx + row * dx_row + n, g.to(dx.dtype.element_ty), mask)
    if dt is not None:
        tl.store(dt + row * dx_row + n, (-g).to(dt.dtype.element_ty), mask)


MSE_FORWARD = _configs.rows("mse_forward")
MSE_SUM = _configs.rows("mse_forward.sum")
MSE_BACKWARD = _configs.rows("mse_backward")


def mse_forward(x: Any, target: Any, *, needs: tuple = (), reduction: str = "mean", empty: Any) -> tuple[tuple, dict]:
    axes = _tile.order(x)
    saved = {"x": x, "target": target} if needs else {}
    if reduction == "none":
        y = empty(x.shape, x.dtype, axes)
        walk = _tile.pointwise(MSE_FORWARD, axes, x, target, y, empty=empty)
        _tile.launch(_mse_forward_kernel, walk.grid, *walk.arrays, walk.M, walk.N, *walk.steps, **walk.tile)
        return (y,), saved
    y = empty((), x.dtype)
    walk = _tile.pointwise(MSE_SUM, axes, x, target, empty=empty)
    programs, each = _tile.split(walk.grid[0], 8 * _tile.device(x).sms)
    losses = empty((programs,), "float32")
    _tile.launch(_mse_sum_kernel, (programs,), *walk.arrays, losses, walk.M, walk.N, *walk.steps, each, **walk.tile)
    reduced(losses, None, y, None, x.numel() if reduction == "mean" else 1)
    return (y,), saved


def mse_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, reduction: str = "mean", empty: Any) -> tuple:
    (dy,), x, target = dys, saved["x"], saved["target"]
    axes = _tile.order(x)
    each = reduction == "none"
    grads = [empty(x.shape, x.dtype, axes) if name in needs else None for name in ("x", "target")]
    first = next(g for g in grads if g is not None)
    walk = _tile.pointwise(MSE_BACKWARD, axes, *((dy,) if each else ()), x, target, first, empty=empty)
    arrays, steps = (walk.arrays, walk.steps) if each else ([dy, *walk.arrays], [0, *walk.steps])
    scale = 2 / max(x.numel(), 1) if reduction == "mean" else 2.0
    _tile.launch(
        _mse_backward_kernel,
        walk.grid,
        *(*arrays[:3], *grads, walk.M, walk.N, *steps, scale),
        EACH=each,
        **walk.tile,
    )
    return tuple(grads)
