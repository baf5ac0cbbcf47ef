"""Padding. Bound by memory: each pixel of y is read from where it shows x, so forward is one copy.

Backward gathers: each pixel of x looks up the places that show it (one inside, a few near the edges), so nothing is
added to in turn.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget, channels_first
from .._window import image, output_order
from . import _configs, _tile
from ._pixels import pixel_plan, placed, sizes_of, step_to, steps_of, three, voxels_of

BUDGETS = {
    "_pad_forward_kernel": Budget(registers=80, blocks=7, narrow=channels_first),
    "_pad_backward_kernel": Budget(registers=208, blocks=2, narrow=channels_first),
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
def _pad_forward_kernel(
    x, y,
    M, DY, HY, WY, DX, HX, WX, C, x_n, x_d, x_h, x_w, x_c, y_n, y_d, y_h, y_w, y_c,
    FRONT, TOP, LEFT, D0, D1, H0, H1, W0, W1, VALUE,
    MODE: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n, k, i, j, c, mask = voxels_of(M, DY, HY, WY, C, DEEP, BP, BC)
    h, w = _source(i - TOP, H0, H1, MODE), _source(j - LEFT, W0, W1, MODE)
    d = _source(k - FRONT, D0, D1, MODE)
    there = mask
    if MODE == "constant":
        there = mask & (h >= 0) & (h < HX) & (w >= 0) & (w < WX)
        if DEEP:
            there &= (d >= 0) & (d < DX)
    place = n * x_n + step_to(c, x_c, WIDE) + placed(d, h, w, x_d, x_h, x_w, DEEP, WIDE)
    v = tl.load(x + place, there, other=0.0).to(tl.float32)
    if MODE == "constant":
        v = tl.where(there, v, VALUE)
    place = n * y_n + step_to(c, y_c, WIDE) + placed(k, i, j, y_d, y_h, y_w, DEEP, WIDE)
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
def _pad_backward_kernel(
    dy, dx,
    M, DX, HX, WX, DY, HY, WY, C, dy_n, dy_d, dy_h, dy_w, dy_c, x_n, x_d, x_h, x_w, x_c,
    FRONT, TOP, LEFT, D0, D1, H0, H1, W0, W1,
    INWARD: tl.constexpr, UP: tl.constexpr, ACROSS: tl.constexpr,
    MODE: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """INWARD, UP, ACROSS: how many places may show one slice, one row, and one column."""
    n, d, h, w, c, mask = voxels_of(M, DX, HX, WX, C, DEEP, BP, BC)
    dy += n * dy_n + step_to(c, dy_c, WIDE)
    acc = tl.zeros((BP, BC), tl.float32)
    for e in range(INWARD):
        k = _shown(e, d, DY, FRONT, D0, D1, MODE)
        for a in range(UP):
            i = _shown(a, h, HY, TOP, H0, H1, MODE)
            row = mask & (i >= 0)
            if DEEP:
                row &= k >= 0
            for b in range(ACROSS):
                j = _shown(b, w, WY, LEFT, W0, W1, MODE)
                at = placed(k, i, j, dy_d, dy_h, dy_w, DEEP, WIDE)
                acc += tl.load(dy + at, row & (j >= 0), other=0.0).to(tl.float32)
    place = n * x_n + step_to(c, x_c, WIDE) + placed(d, h, w, x_d, x_h, x_w, DEEP, WIDE)
    tl.store(dx + place, acc.to(dx.dtype.element_ty), mask)


def _frame(sizes: tuple, padding: tuple, mode: str) -> tuple:
    """(FRONT, TOP, LEFT, D0, D1, H0, H1, W0, W1) for images of this size."""
    more = 3 - len(sizes)
    befores = three(tuple([before for before, _ in padding]), 0)
    if mode != "circular":
        ends = [(0, size) for size in sizes]
    else:
        ends = [(max(0, -before), size - max(0, -after)) for size, (before, after) in zip(sizes, padding)]
    return *befores, *(0, 1) * more, *[end for both in ends for end in both]


def _places(size: int, around: tuple, mode: str) -> int:
    """How many places may show one row (or column)."""
    if mode == "constant" or max(around) <= 0:
        return 1
    if mode != "replicate":
        return 3
    return size + sum(around) if size == 1 else max(around) + 1


FORWARD = _configs.rows("pad_forward")
BACKWARD = _configs.rows("pad_backward")


def _of_images(padding: tuple) -> tuple:
    """For sequences, as images of one row."""
    return ((0, 0), *padding) if len(padding) == 1 else padding


def pad_forward(
    x: Any, *, needs: tuple = (), padding: tuple, mode: str, value: float, empty: Any
) -> tuple[tuple, dict]:
    size = [n + sum(p) for n, p in zip(x.shape[2:], padding)]
    y = empty((*x.shape[:2], *size), x.dtype, output_order(x))
    source, out = image(x), image(y)
    grid, tile = pixel_plan(FORWARD, out, source)
    _tile.launch(
        _pad_forward_kernel, grid, source, out, *sizes_of(out, source), *steps_of(source), *steps_of(out),
        *_frame(source.shape[2:], _of_images(padding), mode), value, MODE=mode, **tile,
    )  # fmt: skip
    return (y,), {}


def pad_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, padding: tuple, mode: str, value: float, empty: Any
) -> tuple:
    (x,) = inputs
    dx = empty(x.shape, x.dtype, x.like().order)
    dy, out, around = image(dys[0]), image(dx), _of_images(padding)
    grid, tile = pixel_plan(BACKWARD, out, dy)
    each = three([_places(n, p, mode) for n, p in zip(out.shape[2:], around)], 1)
    _tile.launch(
        _pad_backward_kernel, grid, dy, out, *sizes_of(out, dy), *steps_of(dy), *steps_of(out),
        *_frame(out.shape[2:], around, mode), **dict(zip(("INWARD", "UP", "ACROSS"), each)), MODE=mode, **tile,
    )  # fmt: skip
    return (dx,)
