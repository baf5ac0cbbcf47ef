"""Padding of row-major images by whole runs of 16 bytes. What is read begins anywhere, so it is read number by number, from L1;
rows are looked up for a run.

- A padded image is one line of runs, wherever its rows begin: a run lies in one row or in two that follow each other.
- Backward, rows that are whole runs have the padding's columns at places of the first and the last run that are constants;
  others are a line as well.

``padding`` has the kernels of all other images."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._image import first_of, is_wide
from ._pad_places import shown_at, source_of
from ._runs import divided, lanes_of, line_length, line_plan, run_length, run_plan, store_run

BUDGETS = {
    "_pad_line_forward_kernel": Budget(registers=96, blocks=4, narrow="loads"),
    "_pad_line_backward_kernel": Budget(registers=128, blocks=4, narrow="loads"),
    "_pad_runs_backward_kernel": Budget(registers=96, blocks=4, narrow="loads"),
}


@triton.jit
def _rows_of(M, H, W, V: tl.constexpr, BL: tl.constexpr):
    """(run, plane, row, next row's plane, next row, columns from the first row's begin on, mask) of each lane's run."""
    run = first_of(M, BL) + tl.arange(0, BL)
    row = divided(run * V, W)
    plane = divided(row, H)
    h = row - plane * H
    ends = h == H - 1
    column = (run * V - row * W)[:, None] + tl.arange(0, V)[None, :]
    return run, plane, h, plane + ends, tl.where(ends, 0, h + 1), column, run < M


@triton.jit
def _either(row, next_row, beyond):
    return tl.where(beyond, next_row[:, None], row[:, None])


@triton.jit
def _far(there):
    """Added to a column it is one that no place shows, unless it is there."""
    return tl.where(there, 0, 1 << 30)


@triton.jit
def _row_shown(plane, i, DY, DX, HX, WX, FRONT, TOP, D0, D1, H0, H1, MODE: tl.constexpr, DEEP: tl.constexpr):
    """(where the row of x begins that a row of y shows, whether there is one)."""
    h = source_of(i - TOP, H0, H1, MODE)
    there = (h >= 0) & (h < HX)
    if DEEP:
        image = divided(plane, DY)
        d = source_of(plane - image * DY - FRONT, D0, D1, MODE)
        there &= (d >= 0) & (d < DX)
        plane = image * DX + d
    return (plane * HX + h) * WX, there


@triton.jit
def _pad_line_forward_kernel(
    x, y,
    M, DY, HY, WY, DX, HX, WX, FRONT, TOP, LEFT, D0, D1, H0, H1, W0, W1, VALUE,
    MODE: tl.constexpr, DEEP: tl.constexpr, V: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    run, plane, i, next_plane, next_i, j, mask = _rows_of(M, HY, WY, V, BL)
    row, there = _row_shown(plane, i, DY, DX, HX, WX, FRONT, TOP, D0, D1, H0, H1, MODE, DEEP)
    next_row, next_there = _row_shown(next_plane, next_i, DY, DX, HX, WX, FRONT, TOP, D0, D1, H0, H1, MODE, DEEP)
    beyond = j >= WY
    if MODE == "constant":
        w = j + _either(_far(there & mask) - LEFT, _far(next_there & mask) - LEFT - WY, beyond)
        shown = w.to(tl.uint32) < (w * 0 + WX).to(tl.uint32)
        v = tl.load(x + (_either(row - LEFT, next_row - LEFT - WY, beyond) + j), shown, other=0.0)
        v = tl.where(shown, v, (VALUE + tl.zeros((1, 1), tl.float32)).to(v.dtype))
    else:
        w = source_of(tl.where(beyond, j - WY, j) - LEFT, W0, W1, MODE)
        v = tl.load(x + (_either(row, next_row, beyond) + w), mask[:, None], other=0.0)
    store_run(y, run, v, mask, V)


@triton.jit
def _row_showing(image, d, h, e, a, DY, HY, WY, FRONT, TOP, D0, D1, H0, H1, MODE: tl.constexpr, DEEP: tl.constexpr):
    """(where the row of dy begins that is, of those that show row h of slice d, the a-th of the e-th slice, whether there is one)."""
    i, there = shown_at(a, h, HY, TOP, H0, H1, MODE)
    if DEEP:
        k, of_slice = shown_at(e, d, DY, FRONT, D0, D1, MODE)
        image = image * DY + k
        there &= of_slice
    return (image * HY + i) * WY, there


@triton.jit
def _slice_of(plane, D, DEEP: tl.constexpr):
    """(image, slice) of a plane."""
    image = plane
    if DEEP:
        image = divided(plane, D)
    return image, plane - image * D


@triton.jit
def _pad_line_backward_kernel(
    dy, dx,
    M, DX, HX, WX, DY, HY, WY, FRONT, TOP, LEFT, D0, D1, H0, H1, W0, W1,
    INWARD: tl.constexpr, UP: tl.constexpr, ACROSS: tl.constexpr,
    MODE: tl.constexpr, DEEP: tl.constexpr, V: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    run, plane, h, next_plane, next_h, column, mask = _rows_of(M, HX, WX, V, BL)
    image, d = _slice_of(plane, DX, DEEP)
    next_image, next_d = _slice_of(next_plane, DX, DEEP)
    beyond = column >= WX
    acc = tl.zeros((BL, V), tl.float32)
    for e in tl.static_range(INWARD):
        for a in tl.static_range(UP):
            row, there = _row_showing(image, d, h, e, a, DY, HY, WY, FRONT, TOP, D0, D1, H0, H1, MODE, DEEP)
            next_row, next_there = _row_showing(
                next_image, next_d, next_h, e, a, DY, HY, WY, FRONT, TOP, D0, D1, H0, H1, MODE, DEEP
            )
            start = _either(row, next_row, beyond)
            w = column + _either(_far(there & mask), _far(next_there & mask) - WX, beyond)
            for b in tl.static_range(ACROSS):
                j, shows = shown_at(b, w, WY, LEFT, W0, W1, MODE)
                acc += tl.load(dy + (start + j), shows, other=0.0).to(tl.float32)
    store_run(dx, run, acc, mask, V)


@triton.jit
def _pad_runs_backward_kernel(
    dy, dx,
    M, R, DX, HX, DY, HY, WY, FRONT, TOP, D0, D1, H0, H1,
    INWARD: tl.constexpr, UP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    MODE: tl.constexpr, DEEP: tl.constexpr, V: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """LEFT, RIGHT: columns of padding before and after a row of R runs, fewer than V."""
    plane, h, run, mask = lanes_of(M, R, HX, BL)
    image, d = _slice_of(plane, DX, DEEP)
    at = tl.arange(0, V)[None, :]
    acc = tl.zeros((BL, V), tl.float32)
    for e in tl.static_range(INWARD):
        for a in tl.static_range(UP):
            row, there = _row_showing(image, d, h, e, a, DY, HY, WY, FRONT, TOP, D0, D1, H0, H1, MODE, DEEP)
            there &= mask
            acc += tl.load(dy + (row + run * V + LEFT)[:, None] + at, there[:, None], other=0.0).to(tl.float32)
            before = there & (run == (R - 1 if MODE == "circular" else 0))
            after = there & (run == (0 if MODE == "circular" else R - 1))
            for t in tl.static_range(1, LEFT + 1):
                to = 0 if MODE == "replicate" else (t if MODE == "reflect" else V - t)
                v = tl.load(dy + row + (LEFT - t), before, other=0.0).to(tl.float32)
                acc = tl.where(at == to, acc + v[:, None], acc)
            for t in tl.static_range(1, RIGHT + 1):
                to = V - 1 if MODE == "replicate" else (V - 1 - t if MODE == "reflect" else t - 1)
                v = tl.load(dy + row + (R * V + LEFT - 1 + t), after, other=0.0).to(tl.float32)
                acc = tl.where(at == to, acc + v[:, None], acc)
    store_run(dx, (plane * HX + h) * R + run, acc, mask, V)


def _fits(other: Any) -> bool:
    return other.is_contiguous() and other.numel() > 0 and not is_wide(other)


def forward(choice: _configs.Choice, x: Any, y: Any, sizes: tuple, frame: tuple, value: float, **mode: Any) -> bool:
    """``sizes``: of y and of x, three each. Whether it has been done."""
    length = line_length(y) if _fits(x) else 0
    if not length:
        return False
    grid, lanes, tile = line_plan(choice, y, length)
    _tile.launch(_pad_line_forward_kernel, grid, x, y, lanes, *sizes, *frame, value, **mode, **tile)
    return True


def backward(
    choice: _configs.Choice, dy: Any, dx: Any, sizes: tuple, frame: tuple, each: tuple, across: tuple, **mode: Any
) -> bool:
    """``sizes``: of dx and of dy, three each; ``each``: how many places may show one slice, row and column; ``across``: columns
    before and after."""
    if not _fits(dy) or math.prod(each[:2]) > MOST_PLACES:
        return False
    length, (left, right) = run_length(dx), across
    if mode["MODE"] != "constant" and min(across) >= 0 and max(across) <= min(length - 1, MOST_COLUMNS):
        grid, (m, r, _), tile = run_plan(choice, dx, dx.shape[-1] // length, length)
        (front, top, _, d0, d1, h0, h1, _, _), (dz, hx, _, *others) = frame, sizes
        _tile.launch(
            _pad_runs_backward_kernel, grid, dy, dx, m, r, dz, hx, *others, front, top, d0, d1, h0, h1,
            INWARD=each[0], UP=each[1], LEFT=left, RIGHT=right, **mode, **tile,
        )  # fmt: skip
        return True
    length = line_length(dx) if math.prod(each) <= MOST_PLACES else 0
    if not length:
        return False
    grid, lanes, tile = line_plan(choice, dx, length)
    _tile.launch(
        _pad_line_backward_kernel, grid, dy, dx, lanes, *sizes, *frame, **dict(zip(("INWARD", "UP", "ACROSS"), each)), **mode, **tile
    )  # fmt: skip
    return True


MOST_PLACES = 9
"""They are unrolled."""
MOST_COLUMNS = 4
"""Of padding to one side of rows of whole runs; they are constants."""
