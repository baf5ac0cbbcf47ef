"""Softmax, softmin and log-softmax. Bound by memory: forward moves 2 and backward 3 elements for each element of x.

A row that fits in registers is read once. Longer rows, and rows that do not lie along the last axis, are walked in
blocks with a running maximum and sum; the second walk mostly hits L2.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile

BUDGETS = {
    "_softmax_forward_kernel": Budget(registers=136, blocks=1),
    "_softmax_forward_looped_kernel": Budget(registers=56, blocks=5),
    "_softmax_backward_kernel": Budget(registers=120, blocks=1),
    "_softmax_backward_looped_kernel": Budget(registers=48, blocks=5),
}


@triton.jit
def _load(x, mask, KIND: tl.constexpr):
    """x, or −x for softmin, in float32; −∞ outside."""
    v = tl.load(x, mask, other=float("inf") if KIND == "softmin" else float("-inf")).to(tl.float32)
    return -v if KIND == "softmin" else v


@triton.jit
def _softmax_forward_kernel(
    x, y, M, N, x_row, UNIT: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    N, x_row = N * UNIT, x_row * UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    n = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    mask = (row < M) & (n < N)
    v = _load(x + row * x_row + n, mask, KIND)
    d = v - tl.max(v, 1, keep_dims=True)
    e = tl.exp(d)
    total = tl.sum(e, 1, keep_dims=True)
    out = d - tl.log(total) if KIND == "log_softmax" else e / total
    tl.store(y + row * N + n, out.to(y.dtype.element_ty), mask)


@triton.jit
def _columns(C, COLS: tl.constexpr):
    """(outer index, columns) of this program."""
    if COLS == 1:  # one row: no offset, so that the compiler sees aligned addresses
        return tl.program_id(0).to(tl.int64), tl.zeros((1, 1), tl.int64)
    else:
        blocks = tl.cdiv(C, COLS)
        first = (tl.program_id(0) % blocks).to(tl.int64) * COLS
        return (tl.program_id(0) // blocks).to(tl.int64), first + tl.arange(0, COLS)[None, :]


@triton.jit
def _softmax_forward_looped_kernel(
    x, y, C, N, x_outer, x_c, x_n, y_c, y_n, KIND: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr
):
    outer, c = _columns(C, COLS)  # c: (1, COLS)
    x += outer * x_outer + c * x_c
    y += outer * C * N + c * y_c
    top = tl.full((1, COLS), float("-inf"), tl.float32)
    total = tl.zeros((1, COLS), tl.float32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)[:, None].to(tl.int64)  # (BLOCK, 1)
        v = _load(x + n * x_n, (n < N) & (c < C), KIND)
        new = tl.maximum(top, tl.max(v, 0, keep_dims=True))
        # While a row is all −inf so far, its sum stays 0: exp(−inf − (−inf)) would make it NaN too early.
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(v - shift), 0, keep_dims=True)
        top = new
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)[:, None].to(tl.int64)
        mask = (n < N) & (c < C)
        d = _load(x + n * x_n, mask, KIND) - top
        out = d - tl.log(total) if KIND == "log_softmax" else tl.exp(d) / total
        tl.store(y + n * y_n, out.to(y.dtype.element_ty), mask)


@triton.jit
def _gradient(dy, y, dot, KIND: tl.constexpr):
    if KIND == "log_softmax":
        return dy - tl.exp(y) * dot
    elif KIND == "softmin":
        return y * (dot - dy)
    else:
        return y * (dy - dot)


@triton.jit
def _softmax_backward_kernel(
    dy, y, dx, M, N, dy_row, UNIT: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    N, dy_row = N * UNIT, dy_row * UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    n = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    mask = (row < M) & (n < N)
    g = tl.load(dy + row * dy_row + n, mask, other=0.0).to(tl.float32)
    v = tl.load(y + row * N + n, mask, other=0.0).to(tl.float32)
    dot = tl.sum(g if KIND == "log_softmax" else g * v, 1, keep_dims=True)
    tl.store(dx + row * N + n, _gradient(g, v, dot, KIND).to(dx.dtype.element_ty), mask)


@triton.jit
def _softmax_backward_looped_kernel(
    dy, y, dx, C, N, s_c, s_n, KIND: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr
):
    outer, c = _columns(C, COLS)  # c: (1, COLS)
    base = outer * C * N + c * s_c
    dot = tl.zeros((1, COLS), tl.float32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)[:, None].to(tl.int64)  # (BLOCK, 1)
        mask = (n < N) & (c < C)
        g = tl.load(dy + base + n * s_n, mask, other=0.0).to(tl.float32)
        if KIND == "log_softmax":
            dot += tl.sum(g, 0, keep_dims=True)
        else:
            dot += tl.sum(g * tl.load(y + base + n * s_n, mask, other=0.0).to(tl.float32), 0, keep_dims=True)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)[:, None].to(tl.int64)
        mask = (n < N) & (c < C)
        g = tl.load(dy + base + n * s_n, mask, other=0.0).to(tl.float32)
        v = tl.load(y + base + n * s_n, mask, other=0.0).to(tl.float32)
        tl.store(dx + base + n * s_n, _gradient(g, v, dot, KIND).to(dx.dtype.element_ty), mask)


def _extents(shape: tuple, axis: int) -> tuple[int, int, int]:
    """(outer, N, inner): the sizes before, along and after the axis."""
    return math.prod(shape[:axis]), shape[axis] if shape else 1, math.prod(shape[axis + 1 :])


FORWARD = _tile.held_rows("softmax_forward")
FORWARD_WALKED = _configs.rows("softmax_forward.walked")
FORWARD_ACROSS = _configs.rows("softmax_forward.across")
BACKWARD = _tile.held_rows("softmax_backward")
BACKWARD_WALKED = _configs.rows("softmax_backward.walked")
BACKWARD_ACROSS = _configs.rows("softmax_backward.across")
COLUMNS = 64
"""Neighbouring columns that a program walks down, at most: whole cache lines."""


def _looped_tile(walked: _configs.Choice, across: _configs.Choice, x: Any, n: int, inner: int) -> dict:
    """What a program walks with: one long row, or neighbouring columns."""
    entry = (walked if inner == 1 else across)(_tile.device(x), n)
    if inner == 1:
        return dict(COLS=1, BLOCK=entry.elements, num_warps=entry.warps)
    cols = _tile.next_power_of_2(inner, COLUMNS)
    return dict(COLS=cols, BLOCK=max(1, entry.elements // COLUMNS), num_warps=entry.warps)


def _forward(x: Any, needs: tuple, axis: int, empty: Any, kind: str) -> tuple[tuple, dict]:
    outer, n, inner = _extents(x.shape, axis)
    y = empty(x.shape, x.dtype)
    if inner == 1 and (held := FORWARD(_tile.device(x), n)):
        x, row = _tile.rows(x, n, empty)
        count, block, warps = held
        grid, (unit, *sizes) = (_tile.cdiv(outer, count) if n else 0,), _tile.in_units(n, row)
        tile = dict(UNIT=unit, KIND=kind, ROWS=count, BLOCK=block, num_warps=warps)
        _tile.launch(_softmax_forward_kernel, grid, x, y, outer, *sizes, **tile)
    else:
        x, tile = _tile.dense(x, empty), _looped_tile(FORWARD_WALKED, FORWARD_ACROSS, x, n, inner)
        grid = (outer * _tile.cdiv(inner, tile["COLS"]) if n else 0,)
        steps = (n * inner, 1, inner, 1, inner)
        _tile.launch(_softmax_forward_looped_kernel, grid, x, y, inner, n, *steps, KIND=kind, **tile)
    return (y,), {"y": y} if needs else {}


def _backward(dys: tuple, saved: dict, axis: int, empty: Any, kind: str) -> tuple:
    (dy,), y = dys, saved["y"]
    outer, n, inner = _extents(y.shape, axis)
    dx = empty(y.shape, y.dtype)
    if inner == 1 and (held := BACKWARD(_tile.device(y), n)):
        dy, row = _tile.rows(dy, n, empty)
        count, block, warps = held
        grid, (unit, *sizes) = (_tile.cdiv(outer, count) if n else 0,), _tile.in_units(n, row)
        tile = dict(UNIT=unit, KIND=kind, ROWS=count, BLOCK=block, num_warps=warps)
        _tile.launch(_softmax_backward_kernel, grid, dy, y, dx, outer, *sizes, **tile)
    else:
        dy, tile = _tile.dense(dy, empty), _looped_tile(BACKWARD_WALKED, BACKWARD_ACROSS, y, n, inner)
        grid = (outer * _tile.cdiv(inner, tile["COLS"]) if n else 0,)
        _tile.launch(_softmax_backward_looped_kernel, grid, dy, y, dx, inner, n, 1, inner, KIND=kind, **tile)
    return (dx,)


def softmax_forward(x: Any, *, needs: tuple = (), axis: int = -1, empty: Any) -> tuple[tuple, dict]:
    return _forward(x, needs, axis, empty, "softmax")


def softmax_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, axis: int = -1, empty: Any) -> tuple:
    return _backward(dys, saved, axis, empty, "softmax")


def softmin_forward(x: Any, *, needs: tuple = (), axis: int = -1, empty: Any) -> tuple[tuple, dict]:
    return _forward(x, needs, axis, empty, "softmin")


def softmin_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, axis: int = -1, empty: Any) -> tuple:
    return _backward(dys, saved, axis, empty, "softmin")


def log_softmax_forward(x: Any, *, needs: tuple = (), axis: int = -1, empty: Any) -> tuple[tuple, dict]:
    return _forward(x, needs, axis, empty, "log_softmax")


def log_softmax_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, axis: int = -1, empty: Any) -> tuple:
    return _backward(dys, saved, axis, empty, "log_softmax")
