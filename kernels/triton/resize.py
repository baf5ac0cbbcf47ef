"""Resizing, forward and backward by one kernel: each axis has a table of (index, weight) for each of its places, and a
pixel is the sum over the taps of all axes at once. So nothing lies between the axes: what moves is x and y, once each.

A gradient's table is the forward's turned around: for each pixel of x the run of those in y that it is a tap of.
Row-major images are in ``_resize_runs`` and ``_resize_rows``, channels-last ones in ``_resize_last``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from gpulayers._taps import taps, transposed

from .._budget import Budget
from .._window import output_order
from . import _configs, _resize_last, _resize_rows, _resize_runs, _tile
from ._affine_grid import affine_grid_backward as affine_grid_backward
from ._affine_grid import affine_grid_forward as affine_grid_forward
from ._conv import volume
from ._grid_sample import REFUSALS as REFUSALS
from ._grid_sample import grid_sample_backward as grid_sample_backward
from ._grid_sample import grid_sample_forward as grid_sample_forward
from ._grid_sample import grid_sample_refuses as grid_sample_refuses
from ._image import evenly_spaced, first_of, image_pixel, is_wide, pixel_tile, run_of, steps
from ._resize_runs import doubling
from ._resize_tables import axis

BUDGETS = {
    # Neighbours of y show pixels of x that begin anywhere, and tables are read number by number.
    "_resample_kernel": Budget(registers=168, blocks=3, narrow="loads, stores"),
}


@triton.jit
def _resample_kernel(
    x, y, of_d, of_h, of_w, by_d, by_h, by_w,
    M, P, D, H, W, C, x_n, x_d, x_h, x_w, x_c, y_n, y_d, y_h, y_w, y_c,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DEEP: tl.constexpr, TALL: tl.constexpr,
    EVEN: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y[pixel, c] = Σ of by_d · by_h · by_w · x at (of_d, of_h, of_w), tables (taps, places) of each axis of y."""
    start = first_of(M, BP)
    n, pixel = image_pixel(start, P, ALIGNED, BP)
    n, pixel = n[:, None], pixel[:, None]
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    inside = (tl.arange(0, BP) < M - start)[:, None]
    mask = inside & (c < C)
    w, h, d = pixel % W, pixel // W % H, pixel // W // H
    if WIDE:
        c = c.to(tl.int64)
    else:
        n = n.to(tl.int32)
    source = n * x_n + c * x_c
    acc = tl.zeros((BP, BC), tl.float32)
    for a in range(KD):
        i = tl.zeros((BP, 1), tl.int32)
        of_depth = tl.full((BP, 1), 1.0, tl.float32)
        if DEEP:
            i = tl.load(of_d + a * D + d, inside, other=-1)
            of_depth = tl.load(by_d + a * D + d, inside, other=0.0)
        for b in range(KH):
            j = tl.zeros((BP, 1), tl.int32)
            weight = of_depth
            if TALL:
                j = tl.load(of_h + b * H + h, inside, other=-1)
                weight = of_depth * tl.load(by_h + b * H + h, inside, other=0.0)
            row = tl.zeros((BP, BC), tl.float32)
            for e in range(KW):
                k = tl.load(of_w + e * W + w, inside, other=-1)
                hit = mask & (i >= 0) & (j >= 0) & (k >= 0)
                if WIDE:
                    place = i.to(tl.int64) * x_d + j.to(tl.int64) * x_h + k.to(tl.int64) * x_w
                else:
                    place = i * x_d + j * x_h + k * x_w
                v = tl.load(x + (source + place), hit, other=0.0).to(tl.float32)
                row += v * tl.load(by_w + e * W + w, inside, other=0.0)
            acc += row * weight
    if WIDE:
        pixel, d, h, w = pixel.to(tl.int64), d.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    if EVEN:
        place = y + n * y_n + pixel * y_w + c * y_c
    else:
        place = y + n * y_n + d * y_d + h * y_h + w * y_w + c * y_c
    tl.store(place, acc.to(y.dtype.element_ty), mask)


RESAMPLE = _configs.rows("resample")


def _resample(x: Any, y: Any, make: Any, how: list[tuple]) -> None:
    """y from x, of any strides, by the table of each spatial axis."""
    across = doubling(*how[-1]) if len(how) == 2 else None
    if across is not None:
        across = across if make is taps else across._replace(up=not across.up)
        if _resize_runs.resample(RESAMPLE, x, y, axis(make, how[0], x), across):
            return
    axes = [axis(make, one, x) for one in how]
    if len(axes) == 2 and (_resize_rows.resample(x, y, *axes) or _resize_last.resample(RESAMPLE, x, y, *axes)):
        return
    none = (3 - len(axes)) * [axes[0]._replace(taps=1)]  # not read
    of, by, counts, _ = zip(*none, *axes)
    x, y = volume(x), volume(y)
    n, c, d, h, w = y.shape
    pixels = d * h * w
    entry = RESAMPLE(_tile.device(x), n * pixels)
    elements = entry.elements
    if y.stride(1) == 1 and c > 1:
        run, channels = pixel_tile(y, n * pixels, elements)
    else:  # a pixel's tables serve several channels
        channels = min(_tile.next_power_of_2(c), 4)
        run = _tile.next_power_of_2(n * pixels, elements // channels)
    grid = (_tile.cdiv(n * pixels, run), _tile.cdiv(c, channels))
    _tile.launch(
        _resample_kernel, grid, x, y, *of, *by, n * pixels, pixels, d, h, w, c, *steps(x), *steps(y),
        KD=counts[0], KH=counts[1], KW=counts[2], DEEP=len(axes) > 2, TALL=len(axes) > 1, EVEN=evenly_spaced(y),
        ALIGNED=run_of(pixels, run), WIDE=is_wide(x, y), BP=run, BC=channels, num_warps=entry.warps,
        maxnreg=_tile.MOST_REGISTERS,
    )  # fmt: skip


def _how(sizes: tuple, size: tuple, scales: tuple, *mode: Any) -> list[tuple]:
    """The arguments of each axis's table."""
    return [(n, out, *mode, scale) for n, out, scale in zip(sizes, size, scales)]


def interpolate_forward(
    x: Any,
    *,
    needs: tuple = (),
    size: tuple,
    mode: str,
    align_corners: bool,
    antialias: bool,
    scales: tuple,
    empty: Any,
) -> tuple[tuple, dict]:
    y = empty((*x.shape[:2], *size), x.dtype, output_order(x))
    _resample(x, y, taps, _how(tuple(x.shape[2:]), size, scales, mode, align_corners, antialias))
    return (y,), {}


def interpolate_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    size: tuple,
    mode: str,
    align_corners: bool,
    antialias: bool,
    scales: tuple,
    empty: Any,
) -> tuple:
    (dy,), (x,) = dys, inputs
    dx = empty(x.shape, x.dtype, x.like().order)
    _resample(dy, dx, transposed, _how(tuple(x.shape[2:]), size, scales, mode, align_corners, antialias))
    return (dx,)
