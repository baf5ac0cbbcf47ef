"""Row-major images made twice or half as wide, by whole runs of 16 bytes (``_runs``): the columns by constants, the rows by
``resize``'s table, which has the kernel of every other size."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._resize_tables import Axis
from ._runs import column, lanes_of, load_columns, run_length, run_plan, store_run, woven

BUDGETS = {"_resample_runs_kernel": Budget(registers=128, blocks=4)}


class Doubling(NamedTuple):
    """Two columns of the wide image to each of the narrow one, with this weight, and their next neighbours with that; beyond
    the image the one at its edge."""

    up: bool
    """y is the wide one."""
    near: float
    far: float


def doubling(size: int, out: int, mode: str, align_corners: bool, antialias: bool, scale: float) -> Doubling | None:
    """How ``out`` columns are made of ``size``, if so."""
    if antialias or align_corners:
        return None
    if out == 2 * size and (scale <= 0 or scale == 2):
        weights = {"nearest": (1.0, 0.0), "nearest-exact": (1.0, 0.0), "area": (1.0, 0.0), "linear": (0.75, 0.25)}.get(
            mode
        )
        return Doubling(True, *weights) if weights else None
    halved = size == 2 * out and (scale <= 0 or scale == 0.5) and mode in ("area", "linear")
    return Doubling(False, 0.5, 0.0) if halved else None


@triton.jit
def _resample_runs_kernel(
    x, y, of_h, by_h,
    M, R, OH, H, RX,
    KH: tl.constexpr, UP: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr, V: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """A lane makes two runs of y from one of x (UP), or one from two."""
    plane, h, run, mask = lanes_of(M, R, OH, BL)
    even = tl.zeros((BL, V), tl.float32)
    odd = even
    before = tl.zeros((BL,), tl.float32)
    after = before
    for b in tl.static_range(KH):
        i = tl.load(of_h + b * OH + h, mask, other=-1)
        weight = tl.load(by_h + b * OH + h, mask, other=0.0)
        e, o, p, n = load_columns(
            x, plane * H + i, run, RX, mask & (i >= 0), 0.0, 1 if UP else 2, FAR > 0, FAR > 0, V, True
        )
        even += e.to(tl.float32) * weight[:, None]
        odd += o.to(tl.float32) * weight[:, None]
        before += p.to(tl.float32) * weight
        after += n.to(tl.float32) * weight
    at = (plane * OH + h) * R + run
    if UP:
        first, second = even * NEAR, even * NEAR
        if FAR > 0:
            first += column(even, even, before, after, -1, 1, V) * FAR
            second += column(even, even, before, after, 1, 1, V) * FAR
        first, second = woven(first, second, V)
        store_run(y, 2 * at, first, mask, V)
        store_run(y, 2 * at + 1, second, mask, V)
    else:
        acc = (even + odd) * NEAR
        if FAR > 0:
            acc += (column(even, odd, before, after, -1, 2, V) + column(even, odd, before, after, 2, 2, V)) * FAR
        store_run(y, at, acc, mask, V)


def resample(choice: _configs.Choice, x: Any, y: Any, rows: Axis, across: Doubling) -> bool:
    """y (N, C, H, W) from x, by the table of y's rows. Whether it has been done."""
    length = run_length(x, y) if rows.taps <= MOST_ROWS else 0
    if length:
        narrow = x if across.up else y
        grid, (m, r, oh), tile = run_plan(choice, y, narrow.shape[3] // length, length)
        _tile.launch(
            _resample_runs_kernel, grid, x, y, *rows[:2], m, r, oh, x.shape[2], x.shape[3] // length,
            KH=rows.taps, UP=across.up, NEAR=across.near, FAR=across.far, **tile,
        )  # fmt: skip
    return length > 0


MOST_ROWS = 6
"""Taps of a column that are unrolled."""
