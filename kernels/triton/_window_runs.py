"""unfold and fold of row-major images by windows that step by one and reach a column to either side, as 3×3 ones with a pixel
of padding: a tap's columns are a row of the image, moved by one at most, so whole runs of 16 bytes are moved (``_runs``).
``window`` has the kernels of all others."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from .._window import Window
from . import _configs, _tile
from ._runs import column, lanes_of, load_columns, run_length, run_plan, store_run

BUDGETS = {
    "_unfold_runs_kernel": Budget(registers=128, blocks=4),
    "_fold_runs_kernel": Budget(registers=128, blocks=4),
}


@triton.jit
def _unfold_runs_kernel(
    x, y,
    M, R, OH, H,
    KH: tl.constexpr, KW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, V: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """A lane makes all taps of a run of windows: a row of the image is read once for its KW taps."""
    plane, i, run, mask = lanes_of(M, R, OH, BL)
    for r in tl.static_range(KH):
        h = i + r - TOP
        there = mask & (h >= 0) & (h < H)
        v, _, before, after = load_columns(x, plane * H + h, run, R, there, 0.0, 1, LEFT > 0, KW - LEFT > 1, V)
        for q in tl.static_range(KW):
            tap = plane * (KH * KW) + (r * KW + q)
            store_run(y, (tap * OH + i) * R + run, column(v, v, before, after, q - LEFT, 1, V), mask, V)


@triton.jit
def _fold_runs_kernel(
    y, x,
    M, R, H, OH,
    KH: tl.constexpr, KW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, V: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    plane, h, run, mask = lanes_of(M, R, H, BL)
    acc = tl.zeros((BL, V), tl.float32)
    for r in tl.static_range(KH):
        i = h + TOP - r
        there = mask & (i >= 0) & (i < OH)
        for q in tl.static_range(KW):
            tap = plane * (KH * KW) + (r * KW + q)
            v, _, before, after = load_columns(y, tap * OH + i, run, R, there, 0.0, 1, q > LEFT, q < LEFT, V)
            acc += column(
                v.to(tl.float32), v.to(tl.float32), before.to(tl.float32), after.to(tl.float32), LEFT - q, 1, V
            )
    store_run(x, (plane * H + h) * R + run, acc, mask, V)


def _constants(window: Window) -> dict[str, int]:
    (kh, kw), (top, left) = window.kernel, window.padding
    return {"KH": kh, "KW": kw, "TOP": top, "LEFT": left}


def _length(window: Window, x: Any, y: Any) -> int:
    """``run_length`` of images x and of y (N, C · taps, windows), where the window is one for these kernels, else 0."""
    (kh, kw), (_, left) = window.kernel, window.padding
    same_width = kw == 2 * left + 1
    fits = same_width and kh * kw <= MOST_TAPS and left <= 1 and window.stride == window.dilation == (1, 1)
    return run_length(x, y) if fits else 0


def unfold(choice: _configs.Choice, x: Any, y: Any, window: Window) -> bool:
    """Whether it has been done."""
    length = _length(window, x, y)
    if length:
        w = x.shape[3]
        out = y.view(x.shape[0] * x.shape[1], window.taps, y.shape[2] // w, w)
        grid, (m, r, oh), tile = run_plan(choice, out[:, 0], w // length, length)
        _tile.launch(_unfold_runs_kernel, grid, x, y, m, r, oh, x.shape[2], **_constants(window), **tile)
    return length > 0


def fold(choice: _configs.Choice, y: Any, x: Any, window: Window) -> bool:
    length = _length(window, x, y)
    if length:
        w = x.shape[3]
        grid, (m, r, h), tile = run_plan(choice, x, w // length, length)
        _tile.launch(_fold_runs_kernel, grid, y, x, m, r, h, y.shape[2] // w, **_constants(window), **tile)
    return length > 0


MOST_TAPS = 15
"""They are unrolled."""
