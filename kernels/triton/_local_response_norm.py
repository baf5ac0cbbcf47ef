"""Local response norm. A tile of channels and pixels is loaded once for each neighbour, all but the first time from the
cache; scale is written by a forward that saves, and read by backward, which would else sum squares of squares' neighbours.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._batch_norm import channels_last, in_order

BUDGETS = {
    # Channels-last, a neighbour's row begins at any channel.
    "_local_response_norm_forward_kernel": Budget(
        registers=80, blocks=6, narrow=lambda c: "loads" if c["LAST"] else ""
    ),
    "_local_response_norm_backward_kernel": Budget(
        registers=80, blocks=6, narrow=lambda c: "loads" if c["LAST"] else ""
    ),
}


@triton.jit
def _place(C, S, UNIT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(C, channels, offsets, mask, from one channel to the next) of this program's tile. Sizes come in units."""
    pid = tl.program_id(0).to(tl.int64)
    if LAST:
        C = C * UNIT
        columns = (C - 1) // COLS + 1
        rows = (S - 1) // ROWS + 1
        channel = (pid % columns).to(tl.int32) * COLS + tl.arange(0, COLS)[None, :]
        pixel = pid // columns % rows * ROWS + tl.arange(0, ROWS)[:, None]
        at = (pid // columns // rows * S + pixel) * C + channel
        return C, channel, at, (pixel < S) & (channel < C), tl.full((), 1, tl.int64)
    else:
        S = S * UNIT
        columns = (S - 1) // COLS + 1
        rows = (C - 1) // ROWS + 1
        pixel = pid % columns * COLS + tl.arange(0, COLS)[None, :]
        channel = (pid // columns % rows).to(tl.int32) * ROWS + tl.arange(0, ROWS)[:, None]
        at = (pid // columns // rows * C + channel) * S + pixel
        return C, channel, at, (pixel < S) & (channel < C), S.to(tl.int64)


@triton.jit
def _local_response_norm_forward_kernel(
    x, y, scale, C, S, before, taps, slope, beta, k,
    UNIT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    C, channel, at, mask, step = _place(C, S, UNIT, LAST, ROWS, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for tap in range(taps):
        d = tap - before
        near = mask & (channel + d >= 0) & (channel + d < C)
        v = tl.load(x + (at + d * step), near, other=0.0).to(tl.float32)
        total += v * v
    s = total * slope + k
    if scale is not None:
        tl.store(scale + at, s, mask)
    v = tl.load(x + at, mask, other=0.0).to(tl.float32)
    tl.store(y + at, (v * tl.exp2(-beta * tl.log2(s))).to(y.dtype.element_ty), mask)


@triton.jit
def _local_response_norm_backward_kernel(
    dy, x, scale, dx, C, S, before, taps, slope, beta,
    UNIT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    C, channel, at, mask, step = _place(C, S, UNIT, LAST, ROWS, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for tap in range(taps):
        d = tap - before
        near = mask & (channel + d >= 0) & (channel + d < C)
        there = at + d * step
        t = tl.load(dy + there, near, other=0.0).to(tl.float32) * tl.load(x + there, near, other=0.0).to(tl.float32)
        total += t * tl.exp2((-beta - 1) * tl.log2(tl.load(scale + there, near, other=1.0)))
    g = tl.load(dy + at, mask, other=0.0).to(tl.float32)
    v = tl.load(x + at, mask, other=0.0).to(tl.float32)
    s = tl.load(scale + at, mask, other=1.0)
    tl.store(dx + at, (g * tl.exp2(-beta * tl.log2(s)) - v * total * slope).to(dx.dtype.element_ty), mask)


# --- launchers -------------------------------------------------------------------------------------------------------

TILES = _configs.rows("local_response_norm"), _configs.rows("local_response_norm.channels_last")
"""Channels-last, a tile has as many channels of a pixel as there are, up to a quarter of it."""


def _launch(
    kernel: Any, x: Any, last: tuple[int, ...] | None, arrays: tuple, near: tuple[int, int], *rest: Any
) -> None:
    """near: how many channels before and after count."""
    samples, channels = x.shape[:2]
    pixels = math.prod(x.shape[2:])
    inner, outer = (channels, pixels) if last else (pixels, channels)
    entry = TILES[last is not None](_tile.device(x), inner)
    cols = _tile.next_power_of_2(max(inner, 1), entry.elements // 4)
    rows = _tile.next_power_of_2(max(outer, 1), entry.elements // cols)
    unit, length = _tile.in_units(inner)
    before, after = (min(n, max(channels - 1, 0)) for n in near)
    grid = (samples * _tile.cdiv(inner, cols) * _tile.cdiv(outer, rows),)
    sizes = (length, pixels) if last else (channels, length)
    tile = dict(UNIT=unit, LAST=last is not None, ROWS=rows, COLS=cols, num_warps=entry.warps)
    _tile.launch(kernel, grid, *arrays, *sizes, before, before + after + 1, *rest, **tile)


def local_response_norm_forward(
    x: Any,
    *,
    needs: tuple = (),
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    empty: Any,
) -> tuple[tuple, dict]:
    given, last = x, channels_last(x)
    x = in_order(x, last, empty)
    y, scale = empty(x.shape, x.dtype, last), empty(x.shape, "float32", last) if needs else None
    near = size // 2, (size - 1) // 2
    _launch(_local_response_norm_forward_kernel, x, last, (x, y, scale), near, alpha / size, beta, k)
    return (y,), {"x": given, "scale": scale} if needs else {}


def local_response_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    empty: Any,
) -> tuple:
    last = channels_last(saved["x"])
    dy, x, scale = (in_order(a, last, empty) for a in (dys[0], saved["x"], saved["scale"]))
    dx, near = empty(x.shape, x.dtype, last), ((size - 1) // 2, size // 2)
    slope = 2 * alpha * beta / size
    _launch(_local_response_norm_backward_kernel, x, last, (dy, x, scale, dx), near, slope, beta)
    return (dx,)
