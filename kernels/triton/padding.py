"""Padding of images. Bound by memory: each pixel of y is read from where it shows x, so forward is one copy.

Backward gathers: each pixel of x looks up the places that show it (one inside, a few near the edges), so nothing is
added to in turn.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget, channels_first
from .._window import output_order
from . import _configs, _tile
from ._image import pixel_plan, pixels_of, sizes_of, steps

BUDGETS = {
    "_pad2d_forward_kernel": Budget(registers=80, blocks=7, narrow=channels_first),
    "_pad2d_backward_kernel": Budget(registers=208, blocks=2, narrow=channels_first),
}


@triton.jit
def _source(at, LOW, HIGH, MODE: tl.constexpr):
    """The row (or column) of x that a place shows; [LOW, HIGH) are those that go around."""
    if MODE == "reflect":
        return HIGH - 1 - tl.abs(HIGH - 1 - tl.abs(at))
    elif MODE == "replicate":
        return tl.minimum(tl.maximum(at, 0), HIGH - 1)
    elif MODE == "circular":
        return tl.where(at < LOW, at + (HIGH - LOW), tl.where(at >= HIGH, at - (HIGH - LOW), at))
    else:
        return at


@triton.jit
def _pad2d_forward_kernel(
    x, y,
    M, HY, WY, HX, WX, C, x_n, x_h, x_w, x_c, y_n, y_h, y_w, y_c,
    TOP, LEFT, H0, H1, W0, W1, VALUE,
    MODE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n, i, j, c, mask = pixels_of(M, HY * WY, WY, C, BP, BC)
    h, w = _source(i - TOP, H0, H1, MODE), _source(j - LEFT, W0, W1, MODE)
    there = mask
    if MODE == "constant":
        there = mask & (h >= 0) & (h < HX) & (w >= 0) & (w < WX)
    place = n * x_n + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w + c.to(tl.int64) * x_c
    v = tl.load(x + place, there, other=0.0).to(tl.float32)
    if MODE == "constant":
        v = tl.where(there, v, VALUE)
    place = n * y_n + i.to(tl.int64) * y_h + j.to(tl.int64) * y_w + c.to(tl.int64) * y_c
    tl.store(y + place, v.to(y.dtype.element_ty), mask)


@triton.jit
def _shown(a, h, OUT, BEFORE, LOW, HIGH, MODE: tl.constexpr):
    """The a-th place that shows row (or column) h of x; −1 where there is none."""
    at = h + BEFORE
    if MODE == "reflect":
        mirrored = tl.where(
            a == 1, tl.where(h > 0, BEFORE - h, -1), tl.where(h < HIGH - 1, at + 2 * (HIGH - 1 - h), -1)
        )
        at = tl.where(a == 0, at, mirrored)
    elif MODE == "replicate":
        last = tl.where(h == HIGH - 1, OUT - 1, at)
        at = tl.maximum(tl.where(h == 0, 0, at), 0) + a
        at = tl.where(at <= last, at, -1)
    elif MODE == "circular":
        around = tl.where(a == 0, at, tl.where(a == 1, at - (HIGH - LOW), at + (HIGH - LOW)))
        at = tl.where((h >= LOW) & (h < HIGH), around, -1)
    return tl.where((at >= 0) & (at < OUT), at, -1)


@triton.jit
def _pad2d_backward_kernel(
    dy, dx,
    M, HX, WX, HY, WY, C, dy_n, dy_h, dy_w, dy_c, x_n, x_h, x_w, x_c,
    TOP, LEFT, H0, H1, W0, W1,
    UP: tl.constexpr, ACROSS: tl.constexpr, MODE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """UP, ACROSS: how many places may show one row, and one column."""
    n, h, w, c, mask = pixels_of(M, HX * WX, WX, C, BP, BC)
    dy += n * dy_n + c.to(tl.int64) * dy_c
    acc = tl.zeros((BP, BC), tl.float32)
    for a in range(UP):
        i = _shown(a, h, HY, TOP, H0, H1, MODE)
        for b in range(ACROSS):
            j = _shown(b, w, WY, LEFT, W0, W1, MODE)
            hit = mask & (i >= 0) & (j >= 0)
            acc += tl.load(dy + i.to(tl.int64) * dy_h + j.to(tl.int64) * dy_w, hit, other=0.0).to(tl.float32)
    place = dx + n * x_n + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w + c.to(tl.int64) * x_c
    tl.store(place, acc.to(dx.dtype.element_ty), mask)


def _frame(size: tuple, padding: tuple, mode: str) -> tuple:
    """(TOP, LEFT, H0, H1, W0, W1) for an image of this size."""
    (top, bottom), (left, right) = padding
    if mode != "circular":
        return top, left, 0, size[0], 0, size[1]
    return top, left, max(0, -top), size[0] - max(0, -bottom), max(0, -left), size[1] - max(0, -right)


def _places(size: int, around: tuple, mode: str) -> int:
    """How many places may show one row (or column)."""
    if mode == "constant" or max(around) <= 0:
        return 1
    if mode != "replicate":
        return 3
    return size + sum(around) if size == 1 else max(around) + 1


FORWARD = _configs.rows("pad2d_forward")
BACKWARD = _configs.rows("pad2d_backward")


def pad2d_forward(
    x: Any, *, needs: tuple = (), padding: tuple, mode: str, value: float, empty: Any
) -> tuple[tuple, dict]:
    size = [n + sum(p) for n, p in zip(x.shape[2:], padding)]
    y = empty((*x.shape[:2], *size), x.dtype, output_order(x))
    grid, tile = pixel_plan(FORWARD, y)
    _tile.launch(
        _pad2d_forward_kernel, grid, x, y, *sizes_of(y, x), *steps(x), *steps(y),
        *_frame(x.shape[2:], padding, mode), value, MODE=mode, **tile,
    )  # fmt: skip
    return (y,), {}


def pad2d_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, padding: tuple, mode: str, value: float, empty: Any
) -> tuple:
    (dy,), (x,) = dys, inputs
    dx = empty(x.shape, x.dtype, x.like().order)
    grid, tile = pixel_plan(BACKWARD, dx)
    up, across = (_places(n, p, mode) for n, p in zip(x.shape[2:], padding))
    _tile.launch(
        _pad2d_backward_kernel, grid, dy, dx, *sizes_of(dx, dy), *steps(dy), *steps(dx),
        *_frame(x.shape[2:], padding, mode), UP=up, ACROSS=across, MODE=mode, **tile,
    )  # fmt: skip
    return (dx,)
