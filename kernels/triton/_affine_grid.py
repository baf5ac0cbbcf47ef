"""Places that an affine map gives. A gradient is sums over all pixels: parts of an image first, then those in their order."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._image import finish, is_wide
from ._pixels import three

BUDGETS = {
    # A map's few numbers are read one by one.
    "_affine_grid_forward_kernel": Budget(registers=96, blocks=5, narrow="loads"),
    # The numbers of one coordinate lie two or three apart.
    "_affine_grid_backward_kernel": Budget(registers=96, blocks=5, narrow="loads, stores"),
}


@triton.jit
def _coordinate(i, SIZE, ALIGN: tl.constexpr):
    """Of the i-th pixel along an axis: from −1 to 1."""
    last = SIZE - 1 if ALIGN else SIZE
    return (2 * i - (SIZE - 1)).to(tl.float32) / tl.maximum(last, 1).to(tl.float32)


@triton.jit
def _affine_grid_forward_kernel(
    theta, grid, N, SIZE, D, H, W, t_n, t_k, t_j, K: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr
):
    """grid[n, pixel, k], K numbers for each pixel: SIZE an image."""
    parts = tl.cdiv(SIZE, BLOCK)
    n = tl.program_id(0).to(tl.int64) // parts
    at = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    p, k = at // K, at % K
    own = theta + n * t_n + k * t_k
    total = tl.load(own + K * t_j).to(tl.float32)
    total += tl.load(own).to(tl.float32) * _coordinate(p % W, W, ALIGN)
    total += tl.load(own + t_j).to(tl.float32) * _coordinate(p // W % H, H, ALIGN)
    if K == 3:
        total += tl.load(own + 2 * t_j).to(tl.float32) * _coordinate(p // W // H, D, ALIGN)
    tl.store(grid + n * SIZE + at, total.to(grid.dtype.element_ty), at < SIZE)


@triton.jit
def _affine_grid_backward_kernel(
    dy, partial, N, P, EACH, D, H, W, y_n, y_d, y_h, y_w, y_k,
    K: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """partial[s, n, j, k] = Σ over the s-th EACH pixels of dy[n, pixel, k] · the j-th coordinate; the last is 1."""
    n, k = tl.program_id(0).to(tl.int64) // K, tl.program_id(0) % K
    first = tl.program_id(1) * EACH
    last = tl.minimum(first + EACH, P)
    j = tl.arange(0, 4)[None, :]
    dy += n * y_n + k.to(tl.int64) * y_k
    acc = tl.zeros((BP, 4), tl.float32)
    for start in range(first, last, BP):
        p = start + tl.arange(0, BP)[:, None]
        w, h, d = p % W, p // W, p * 0
        if K == 3:
            h, d = h % H, h // H
        if WIDE:
            at = w.to(tl.int64) * y_w + h.to(tl.int64) * y_h + d.to(tl.int64) * y_d
        else:
            at = w * y_w + h * y_h + d * y_d
        g = tl.load(dy + at, p < last, other=0.0).to(tl.float32)
        by = tl.where(j == 0, _coordinate(w, W, ALIGN), tl.where(j == 1, _coordinate(h, H, ALIGN), 1.0))
        if K == 3:
            by = tl.where(j == 2, _coordinate(d, D, ALIGN), by)
        acc += g * by
    total = tl.sum(acc, 0, keep_dims=True)
    place = ((tl.program_id(1) * N + n) * (K + 1) + j) * K + k
    tl.store(partial + place, total, j <= K)


FORWARD = _configs.rows("affine_grid_forward")
BACKWARD = _configs.rows("affine_grid_backward")


def affine_grid_forward(
    theta: Any, *, needs: tuple = (), size: tuple, align_corners: bool, empty: Any
) -> tuple[tuple, dict]:
    n, count = theta.shape[0], len(size)
    grid, numbers = empty((n, *size, count), theta.dtype), math.prod(size) * count
    entry = FORWARD(_tile.device(theta), numbers)
    _tile.launch(
        _affine_grid_forward_kernel, (n * _tile.cdiv(numbers, entry.elements),), theta, grid, n, numbers,
        *three(size, 1), *theta.stride(), K=count, ALIGN=align_corners, BLOCK=entry.elements, num_warps=entry.warps,
    )  # fmt: skip
    return (grid,), {}


def affine_grid_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, size: tuple, align_corners: bool, empty: Any
) -> tuple:
    (dy,), theta = dys, inputs[0]
    n, count, pixels = theta.shape[0], len(size), math.prod(size)
    device = _tile.device(dy)
    entry = BACKWARD(device, pixels)
    rows = _tile.next_power_of_2(pixels, entry.elements)
    rounds = _tile.cdiv(pixels, rows)
    splits, each = _tile.split(rounds, max(1, min(2 * device.sms // max(1, n * count), rounds // 4)))
    partial = empty((splits, n, count + 1, count), "float32")
    y_n, *steps, y_k = dy.stride()
    _tile.launch(
        _affine_grid_backward_kernel, (n * count, splits), dy, partial, n, pixels, each * rows, *three(size, 1), y_n,
        *three(steps, 0), y_k, K=count, ALIGN=align_corners, WIDE=is_wide(dy), BP=rows, num_warps=entry.warps,
    )  # fmt: skip
    dtheta = empty(theta.shape, theta.dtype, theta.like().order)
    finish(partial, dtheta.unsqueeze(2))
    return (dtheta,)
