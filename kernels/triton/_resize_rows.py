"""Resizing of row-major images whose rows a program holds: its rows of y are first sums of rows of x, read by runs, and then,
in shared memory, of their columns. So a number of x is read, and weighted by its row, once for all columns that show it, and a
lane's columns of the tables serve several rows."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._budget import Budget
from . import _tile
from ._image import first_of, is_wide
from ._resize_tables import Axis
from ._runs import divided

BUDGETS = {"_resample_rows_kernel": Budget(registers=168, blocks=2, narrow="loads, stores")}


@triton.jit
def _resample_rows_kernel(
    x, y, of_h, by_h, of_w, by_w,
    M, OH, H, RX, RY, ROWS,
    KH: tl.constexpr, KW: tl.constexpr, VX: tl.constexpr, VY: tl.constexpr,
    BX: tl.constexpr, BY: tl.constexpr, TAPS: tl.constexpr, TIMES: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """A program has TIMES · ROWS of M rows of y. RX, RY: runs of VX and VY columns in a row of x and of y. FULL: each
    column of y has all TAPS."""
    first = first_of(M, TIMES) * ROWS
    lane = tl.arange(0, BX)
    r = divided(lane, RX)
    row = first + r
    mask = (r < TIMES * ROWS) & (row < M)
    plane = divided(row, OH)
    h = row - plane * OH
    at = plane * H * RX + (lane - r * RX)
    acc = tl.zeros((BX, VX), tl.float32)
    for b in tl.static_range(KH):
        i = tl.load(of_h + b * OH + h, mask, other=-1)
        weight = tl.load(by_h + b * OH + h, mask, other=0.0)
        source = x + ((at + i * RX) * VX)[:, None] + tl.arange(0, VX)[None, :]
        acc += tl.load(source, (i >= 0)[:, None], other=0.0).to(tl.float32) * weight[:, None]
    # (tap, time, lane, column): a lane has the same columns each time.
    lane = tl.arange(0, BY)[None, None, :, None]
    r = divided(lane, RY)
    column = (lane - r * RY) * VY + tl.arange(0, VY)[None, None, None, :]
    tap, time = tl.arange(0, TAPS)[:, None, None, None], tl.arange(0, TIMES)[None, :, None, None]
    inside = r < ROWS
    r = tl.where(inside, r, 0)
    there = inside & (tap < KW)
    k = tl.load(of_w + (tap * (RY * VY) + column), there, other=0 if FULL else -1)
    weight = tl.load(by_w + (tap * (RY * VY) + column), there, other=0.0)
    if FULL:
        place = (r * (RX * VX) + k) + time * (ROWS * RX * VX)
    else:  # the last number held is 0
        place = tl.where(k >= 0, r * (RX * VX) + k, BX * VX - 1) + time * (ROWS * RX * VX)
        place = tl.minimum(place, BX * VX - 1)
    v = tl.gather(tl.reshape(acc, (BX * VX,)), tl.reshape(place, (TAPS * TIMES * BY * VY,)), 0)
    v = tl.sum(tl.reshape(v, (TAPS, TIMES, BY, VY)) * weight, 0, keep_dims=True)
    row = first + time * ROWS + r
    tl.store(y + (row * (RY * VY) + column), v.to(y.dtype.element_ty), inside & (row < M))


class Plan(NamedTuple):
    """Of a launch: its constants, but taps, and rows of y at a time."""

    VX: int
    VY: int
    BX: int
    BY: int
    TIMES: int
    ROWS: int


MOST_ROWS, MOST_COLUMNS = 12, 16
"""Taps of a column, and of a row, that are unrolled."""
LANES, MOST_LANES, HELD = 128, 512, 8192
"""Threads of a program, at least and at most, and numbers that it holds at most."""


@functools.lru_cache(maxsize=4096)
def plan(width: int, out: int, rows: int, columns: int, full: bool, whole: int) -> Plan | None:
    """For rows of ``width`` and ``out`` columns, tables of so many taps, and runs of ``whole`` that are 16 bytes."""
    x_length = next(v for v in (whole, whole // 2, whole // 4, 1) if v and width % v == 0)
    y_length = 1 + (out % 2 == 0)
    lanes = max(LANES, _tile.next_power_of_2(out // y_length))
    taps = _tile.next_power_of_2(columns)
    found = []
    for times in (16, 8, 4, 2, 1):
        at_once = lanes // (out // y_length)
        for rows_at_once in range(at_once, max(0, at_once - 8), -1):
            count = times * rows_at_once
            held = max(_tile.next_power_of_2(count * width + (not full)), lanes)
            made = taps * times * lanes * y_length
            if max(held, made) <= HELD:
                cost = (held * (rows + 1) + made * 2 + lanes * y_length * taps * 2 + lanes * 64) / count
                found.append((cost, Plan(x_length, y_length, held // x_length, lanes, times, rows_at_once)))
    fits = found and lanes <= MOST_LANES and rows <= MOST_ROWS and columns <= MOST_COLUMNS
    return min(found)[1] if fits else None


def resample(x: Any, y: Any, rows: Axis, columns: Axis) -> bool:
    """y (N, C, H, W) from x, by the tables of y's rows and columns. Whether it has been done."""
    if not (x.is_contiguous() and y.is_contiguous()) or is_wide(x, y) or not y.numel():
        return False
    h, w = y.shape[2:]
    taps = _tile.next_power_of_2(columns.taps)
    full = columns.full and taps == columns.taps
    found = plan(x.shape[3], w, rows.taps, columns.taps, full, 16 // x.element_size())
    if found is None:
        return False
    count = y.numel() // w
    *tile, at_once = found
    _tile.launch(
        _resample_rows_kernel, (_tile.cdiv(count, found.TIMES * at_once),), x, y, *rows[:2], *columns[:2],
        count, h, x.shape[2], x.shape[3] // found.VX, w // found.VY, at_once, KH=rows.taps, KW=columns.taps,
        TAPS=taps, FULL=full, **dict(zip(Plan._fields, tile)), num_warps=found.BY // 32,
    )  # fmt: skip
    return True
