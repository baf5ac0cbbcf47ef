"""Padding. Bound by memory: each pixel of y is read from where it shows x, so forward is one copy.

Backward gathers: each pixel of x looks up the places that show it (one inside, a few near the edges), so nothing is
added to in turn. Row-major images are in ``_pad_runs``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget, channels_first
from .._window import image, output_order
from . import _configs, _pad_runs, _tile
from ._pad_places import frame, places, shown_at, source_of
from ._pixels import pixel_plan, placed, sizes_of, step_to, steps_of, three, voxels_of

BUDGETS = {
    "_pad_forward_kernel": Budget(registers=80, blocks=7, narrow=channels_first),
    "_pad_backward_kernel": Budget(registers=208, blocks=2, narrow=channels_first),
}


@triton.jit
def _pad_forward_kernel(
    x, y,
    M, DY, HY, WY, DX, HX, WX, C, x_n, x_d, x_h, x_w, x_c, y_n, y_d, y_h, y_w, y_c,
    FRONT, TOP, LEFT, D0, D1, H0, H1, W0, W1, VALUE,
    MODE: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n, k, i, j, c, mask = voxels_of(M, DY, HY, WY, C, DEEP, BP, BC)
    h, w = source_of(i - TOP, H0, H1, MODE), source_of(j - LEFT, W0, W1, MODE)
    d = source_of(k - FRONT, D0, D1, MODE)
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
        k, of_slice = shown_at(e, d, DY, FRONT, D0, D1, MODE)
        for a in range(UP):
            i, of_row = shown_at(a, h, HY, TOP, H0, H1, MODE)
            row = mask & of_row
            if DEEP:
                row &= of_slice
            for b in range(ACROSS):
                j, of_column = shown_at(b, w, WY, LEFT, W0, W1, MODE)
                at = placed(k, i, j, dy_d, dy_h, dy_w, DEEP, WIDE)
                acc += tl.load(dy + at, row & of_column, other=0.0).to(tl.float32)
    place = n * x_n + step_to(c, x_c, WIDE) + placed(d, h, w, x_d, x_h, x_w, DEEP, WIDE)
    tl.store(dx + place, acc.to(dx.dtype.element_ty), mask)


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
    sizes, edges = sizes_of(out, source), frame(source.shape[2:], _of_images(padding), mode)
    if not _pad_runs.forward(FORWARD, source, out, sizes[1:-1], edges, value, MODE=mode, DEEP=x.ndim == 5):
        grid, tile = pixel_plan(FORWARD, out, source)
        _tile.launch(
            _pad_forward_kernel, grid, source, out, *sizes, *steps_of(source), *steps_of(out), *edges, value, MODE=mode, **tile
        )  # fmt: skip
    return (y,), {}


def pad_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, padding: tuple, mode: str, value: float, empty: Any
) -> tuple:
    (x,) = inputs
    dx = empty(x.shape, x.dtype, x.like().order)
    dy, out, around = image(dys[0]), image(dx), _of_images(padding)
    sizes, edges = sizes_of(out, dy), frame(out.shape[2:], around, mode)
    each = three([places(n, p, mode) for n, p in zip(out.shape[2:], around)], 1)
    if not _pad_runs.backward(BACKWARD, dy, out, sizes[1:-1], edges, each, around[-1], MODE=mode, DEEP=out.ndim == 5):
        grid, tile = pixel_plan(BACKWARD, out, dy)
        _tile.launch(
            _pad_backward_kernel, grid, dy, out, *sizes, *steps_of(dy), *steps_of(out), *edges,
            **dict(zip(("INWARD", "UP", "ACROSS"), each)), MODE=mode, **tile,
        )  # fmt: skip
    return (dx,)
