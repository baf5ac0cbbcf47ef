"""Pooling of row-major images whose rows are whole runs of 16 bytes (``_runs``): windows of up to three columns, or four by a step
of two, with a column of padding at most, undilated. ``pooling`` has the kernels of everything else.

A window always lies on the image somewhere, so a maximum starts at its first tap there. Sums go over the rows first.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from .._pooling import Divisor
from .._window import Window
from . import _configs, _tile
from ._runs import column, lanes_of, load_columns, run_length, run_plan, store_run, woven
from ._windows import covered

BUDGETS = {
    "_max_pool_runs_forward_kernel": Budget(registers=128, blocks=4),
    "_max_pool_runs_backward_kernel": Budget(registers=128, blocks=4),
    "_avg_pool_runs_forward_kernel": Budget(registers=128, blocks=4),
    "_avg_pool_runs_backward_kernel": Budget(registers=128, blocks=4),
}


@triton.jit
def _max_pool_runs_forward_kernel(
    x, y, won,
    M, R, OH, H, RX,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    V: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    plane, i, run, mask = lanes_of(M, R, OH, BL)
    best = tl.full((BL, V), float("-inf"), tl.float32)
    j = run[:, None] * V + tl.arange(0, V)[None, :]
    tap = tl.maximum(TOP - i * SH, 0)[:, None] * KW + tl.maximum(LEFT - j * SW, 0)
    for r in tl.static_range(KH):
        h = i * SH - TOP + r
        there = mask & (h >= 0) & (h < H)
        even, odd, before, after = load_columns(
            x, plane * H + h, run, RX, there, float("-inf"), SW, LEFT > 0, KW - LEFT > SW, V
        )
        even, odd, before, after = (
            even.to(tl.float32), odd.to(tl.float32), before.to(tl.float32), after.to(tl.float32)
        )  # fmt: skip
        for q in tl.static_range(KW):
            v = column(even, odd, before, after, q - LEFT, SW, V)
            better = (v > best) | (v != v)
            best = tl.where(better, v, best)
            tap = tl.where(better, r * KW + q, tap)
    at = (plane * OH + i) * R + run
    store_run(y, at, best, mask, V)
    if won is not None:
        store_run(won, at, tap, mask, V)


@triton.jit
def _max_pool_runs_backward_kernel(
    dy, won, dx,
    M, R, H, OH, RX, RY,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    LAPS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, V: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """LAPS: windows that a pixel may lie under along a column. A lane makes SW runs of dx."""
    plane, h, run, mask = lanes_of(M, R, H, BL)
    first = tl.zeros((BL, V), tl.float32)
    second = first
    for a in tl.static_range(LAPS):
        i = (h + TOP) // SH - a
        r = h + TOP - i * SH
        there = mask & (i >= 0) & (i < OH) & (r < KH)
        of = plane * OH + i
        g, _, g_before, g_after = load_columns(dy, of, run, RY, there, 0.0, 1, BEFORE, AFTER, V)
        t, _, t_before, t_after = load_columns(won, of, run, RY, there, -1, 1, BEFORE, AFTER, V)
        g, g_before, g_after = g.to(tl.float32), g_before.to(tl.float32), g_after.to(tl.float32)
        t, t_before, t_after = t.to(tl.int32), t_before.to(tl.int32), t_after.to(tl.int32)
        for s in tl.static_range(-1, 2):
            for p in tl.static_range(SW):
                if p + LEFT - SW * s >= 0 and p + LEFT - SW * s < KW:
                    gs = column(g, g, g_before, g_after, s, 1, V)
                    ts = column(t, t, t_before, t_after, s, 1, V)
                    found = tl.where(ts == (r * KW + (p + LEFT - SW * s))[:, None], gs, 0.0)
                    if p == 0:
                        first += found
                    else:
                        second += found
    _store_columns(dx, plane * H + h, run, RX, first, second, mask, SW, V)


@triton.jit
def _store_columns(dx, row, run, R, first, second, mask, SW: tl.constexpr, V: tl.constexpr):
    at = row * R + run * SW
    if SW == 2:
        first, second = woven(first, second, V)
        store_run(dx, at + 1, second, mask & (run * SW + 1 < R), V)
    store_run(dx, at, first, mask, V)


@triton.jit
def _avg_pool_runs_forward_kernel(
    x, y,
    M, R, OH, H, RX, SCALE,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    SAME: tl.constexpr, INCLUDE_PAD: tl.constexpr, V: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """SAME: SCALE is what every sum is multiplied by."""
    plane, i, run, mask = lanes_of(M, R, OH, BL)
    even = tl.zeros((BL, V), tl.float32)
    odd = even
    before = tl.zeros((BL,), tl.float32)
    after = before
    for r in tl.static_range(KH):
        h = i * SH - TOP + r
        there = mask & (h >= 0) & (h < H)
        more = load_columns(x, plane * H + h, run, RX, there, 0.0, SW, LEFT > 0, KW - LEFT > SW, V)
        even, odd, before, after = _added(even, odd, before, after, more, SW, LEFT > 0, KW - LEFT > SW)
    acc = tl.zeros((BL, V), tl.float32)
    for q in tl.static_range(KW):
        acc += column(even, odd, before, after, q - LEFT, SW, V)
    if SAME:
        acc = acc * SCALE
    else:
        j = run[:, None] * V + tl.arange(0, V)[None, :]
        of_rows = 1.0 / covered(i, H, KH, SH, TOP, INCLUDE_PAD).to(tl.float32)
        acc = acc * of_rows[:, None] * _of_columns(j, R * V, RX * V, KW, SW, LEFT, INCLUDE_PAD)
    store_run(y, (plane * OH + i) * R + run, acc, mask, V)


@triton.jit
def _avg_pool_runs_backward_kernel(
    dy, dx,
    M, R, H, OH, RX, RY, SCALE,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    LAPS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    SAME: tl.constexpr, INCLUDE_PAD: tl.constexpr, V: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    plane, h, run, mask = lanes_of(M, R, H, BL)
    total = tl.zeros((BL, V), tl.float32)
    before = tl.zeros((BL,), tl.float32)
    after = before
    for a in tl.static_range(LAPS):
        i = (h + TOP) // SH - a
        there = mask & (i >= 0) & (i < OH) & (h + TOP - i * SH < KH)
        g, _, g_before, g_after = load_columns(dy, plane * OH + i, run, RY, there, 0.0, 1, BEFORE, AFTER, V)
        g, g_before, g_after = g.to(tl.float32), g_before.to(tl.float32), g_after.to(tl.float32)
        if not SAME:
            by = 1.0 / tl.where(there, covered(i, H, KH, SH, TOP, INCLUDE_PAD), 1).to(tl.float32)
            g, g_before, g_after = g * by[:, None], g_before * by, g_after * by
        total += g
        before += g_before
        after += g_after
    if SAME:
        total, before, after = total * SCALE, before * SCALE, after * SCALE
    else:
        j = run[:, None] * V + tl.arange(0, V)[None, :]
        total *= _of_columns(j, RY * V, RX * V, KW, SW, LEFT, INCLUDE_PAD)
        before *= _of_columns(run * V - 1, RY * V, RX * V, KW, SW, LEFT, INCLUDE_PAD)
        after *= _of_columns(run * V + V, RY * V, RX * V, KW, SW, LEFT, INCLUDE_PAD)
    first = tl.zeros((BL, V), tl.float32)
    second = first
    for s in tl.static_range(-1, 2):
        for p in tl.static_range(SW):
            if p + LEFT - SW * s >= 0 and p + LEFT - SW * s < KW:
                if p == 0:
                    first += column(total, total, before, after, s, 1, V)
                else:
                    second += column(total, total, before, after, s, 1, V)
    _store_columns(dx, plane * H + h, run, RX, first, second, mask, SW, V)


@triton.jit
def _of_columns(j, COUNT, size, K: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, INCLUDE_PAD: tl.constexpr):
    """1 / (columns of window j of COUNT that count): of these windows only the first and the last hang over an edge."""
    zero = tl.program_id(0) * 0
    first = 1.0 / covered(zero, size, K, S, PAD, INCLUDE_PAD).to(tl.float32)
    last = 1.0 / covered(zero + COUNT - 1, size, K, S, PAD, INCLUDE_PAD).to(tl.float32)
    return tl.where(j == 0, first, tl.where(j == COUNT - 1, last, 1.0 / K))


@triton.jit
def _added(even, odd, before, after, more, S: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    even += more[0].to(tl.float32)
    if S == 2:
        odd += more[1].to(tl.float32)
    else:
        odd = even
    if BEFORE:
        before += more[2].to(tl.float32)
    if AFTER:
        after += more[3].to(tl.float32)
    return even, odd, before, after


# --- launches --------------------------------------------------------------------------------------------------------


def _length(window: Window, *arrays: Any) -> int:
    """``run_length`` where these are images and the window is one for these kernels, else 0. The first array has the elements
    to move."""
    if arrays[0].ndim != 4:
        return 0
    (kh, kw), (_, sw), (_, left) = window.kernel, window.stride, window.padding
    few = kh <= 4 and sw <= 2 and left <= 1 and kw - left <= sw + 1 and window.dilation == (1, 1)
    return run_length(*arrays) if few else 0


def _constants(window: Window) -> dict[str, int]:
    (kh, kw), (sh, sw), (top, left) = window.kernel, window.stride, window.padding
    return {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "TOP": top, "LEFT": left}


def _gathered(window: Window) -> dict[str, Any]:
    """And how many windows a pixel may lie under, and whether some of those before and after a run of them."""
    kw, sw, left = window.kernel[1], window.stride[1], window.padding[1]
    return {**_constants(window), "LAPS": window.laps[0], "BEFORE": kw > left + sw, "AFTER": left > 0}


def max_forward(choice: _configs.Choice, x: Any, y: Any, tap: Any, window: Window) -> bool:
    """Whether it has been done."""
    length = _length(window, x, y)
    if length:
        runs = y.shape[3] // length
        grid, (m, r, oh), tile = run_plan(choice, y, runs, length)
        _tile.launch(
            _max_pool_runs_forward_kernel, grid, x, y, tap, m, r, oh, x.shape[2], x.shape[3] // length,
            **_constants(window), **tile,
        )  # fmt: skip
    return length > 0


def max_backward(choice: _configs.Choice, dy: Any, tap: Any, dx: Any, window: Window) -> bool:
    length = _length(window, dx, dy, tap)
    if length:
        rx, ry = dx.shape[3] // length, dy.shape[3] // length
        grid, (m, r, h), tile = run_plan(choice, dx, _tile.cdiv(rx, window.stride[1]), length)
        _tile.launch(
            _max_pool_runs_backward_kernel, grid, dy, tap, dx, m, r, h, dy.shape[2], rx, ry, **_gathered(window), **tile
        )
    return length > 0


def divisors(window: Window, divisor: Divisor, size: tuple, counts: tuple) -> tuple[float, dict[str, bool]]:
    """(SCALE, what else of the divisor the kernels know): one scale where no window hangs over what counts."""
    pad = window.padding if divisor.include_pad else (0, 0)
    whole = all([
        p >= own and reach <= n + 2 * p for n, p, own, reach in zip(size, pad, window.padding, window.reach(counts))
    ])  # fmt: skip
    same = divisor.override is not None or whole
    return 1 / (divisor.override or window.taps), {"SAME": same, "INCLUDE_PAD": divisor.include_pad and not same}


def avg_forward(choice: _configs.Choice, x: Any, y: Any, window: Window, divisor: Divisor) -> bool:
    length = _length(window, x, y)
    if length:
        scale, how = divisors(window, divisor, x.shape[2:], y.shape[2:])
        grid, (m, r, oh), tile = run_plan(choice, y, y.shape[3] // length, length)
        _tile.launch(
            _avg_pool_runs_forward_kernel, grid, x, y, m, r, oh, x.shape[2], x.shape[3] // length, scale,
            **_constants(window), **how, **tile,
        )  # fmt: skip
    return length > 0


def avg_backward(choice: _configs.Choice, dy: Any, dx: Any, window: Window, divisor: Divisor) -> bool:
    length = _length(window, dx, dy)
    if length:
        scale, how = divisors(window, divisor, dx.shape[2:], dy.shape[2:])
        rx, ry = dx.shape[3] // length, dy.shape[3] // length
        grid, (m, r, h), tile = run_plan(choice, dx, _tile.cdiv(rx, window.stride[1]), length)
        _tile.launch(
            _avg_pool_runs_backward_kernel, grid, dy, dx, m, r, h, dy.shape[2], rx, ry, scale,
            **_gathered(window), **how, **tile,
        )  # fmt: skip
    return length > 0
