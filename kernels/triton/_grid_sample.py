"""Images and volumes looked up at any places. Each place has K neighbours along each axis: an index, a weight, a slope.

Forward and the grid's gradient gather. What comes back to x is a scatter by data, which atomics would add in any order: each
neighbour of each place is a term, and ``_scatter.py`` sorts the terms by their pixels, then adds up each pixel's in the order
of the places. That is linear in them, for any grid; dy's infinities and NaN go to neighbours alone.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from gpulayers.arrays import Spec

from .._budget import Budget
from .._window import channels_last, output_order
from . import _configs, _tile
from ._conv import volume
from ._image import is_wide, nhwc, pixel_tile, steps
from ._scatter import scatter

BUDGETS = {
    # A grid may point anywhere, and its numbers lie two or three together.
    "_grid_sample_forward_kernel": Budget(registers=168, blocks=3, narrow="loads, stores"),
    "_grid_sample_grid_kernel": Budget(registers=232, blocks=2, narrow="loads, stores"),  # volumes have three sums
    "_grid_sample_terms_kernel": Budget(registers=96, blocks=5, narrow="loads, stores"),
}


@triton.jit
def _floor_to(v, low, span):
    """(distance behind the last turn, whether the way leads back) of v reflected at low and low + span."""
    far = tl.abs(v - low)
    flips = tl.floor(far / span)
    return far - flips * span, flips - 2 * tl.floor(flips / 2) > 0


@triton.jit
def _padded(v, slope, SIZE, PADDING: tl.constexpr, ALIGN: tl.constexpr):
    """Coordinates that lie on the image, and what a step of them comes to."""
    if PADDING != "zeros":
        last = (SIZE - 1) * 1.0
        if PADDING == "reflection":
            low = 0.0 if ALIGN else -0.5
            span = last if ALIGN else last + 1
            safe = tl.where(span > 0, span, 1.0)
            rest, odd = _floor_to(v, low, safe)
            slope = tl.where((v < low) != odd, -slope, slope)
            slope = tl.where(span > 0, slope, 0.0)
            v = tl.where(span > 0, tl.where(odd, span - rest, rest) + low, 0.0)
        slope = tl.where((v > 0) & (v < last), slope, 0.0)
        v = tl.minimum(tl.maximum(v, 0.0), last)
    return v, slope


@triton.jit
def _coordinate(g, SIZE, MODE: tl.constexpr, PADDING: tl.constexpr, ALIGN: tl.constexpr):
    """(place on the image, its slope by g) for g from −1 to 1; what is no number lies outside, or at 0,
    and is NaN where MODE is "bicubic"."""
    size = SIZE * 1.0
    if ALIGN:
        v = (g + 1) * ((size - 1) / 2)
        slope = tl.zeros_like(g) + (size - 1) / 2
    else:
        v = ((g + 1) * size - 1) / 2
        slope = tl.zeros_like(g) + size / 2
    if MODE == "bicubic":
        near = tl.minimum(tl.maximum(v, -1073741824.0), 1073741824.0)
        return tl.where(tl.abs(v) < float("inf"), near, v - v), slope
    else:
        v, slope = _padded(v, slope, SIZE, PADDING, ALIGN)
        return tl.where(tl.abs(v) < 1073741824.0, v, -100.0 if PADDING == "zeros" else 0.0), slope


@triton.jit
def _nearest_integer(v):
    """Halves to the even one."""
    down = tl.floor(v)
    rest = v - down
    up = (rest > 0.5) | ((rest == 0.5) & (down - 2 * tl.floor(down / 2) > 0))
    return tl.where(up, down + 1, down)


@triton.jit
def _tap(v, slope, SIZE, k, MODE: tl.constexpr, PADDING: tl.constexpr, ALIGN: tl.constexpr):
    """(index, whether it is on the image, weight, slope of that by g) of the k-th neighbour of v."""
    first = tl.floor(v)
    t = v - first
    if MODE == "nearest":
        at = _nearest_integer(v)
        weight, rate = t * 0 + 1, t * 0
    elif MODE == "bilinear":
        at = first + k
        weight = tl.where(k == 0, 1 - t, t)
        rate = tl.where(k == 0, t * 0 - 1, t * 0 + 1) * slope
    else:
        at = first + (k - 1)
        d = (k - 1) - t
        far = tl.abs(d)
        near = far < 1
        weight = tl.where(near, (1.25 * far - 2.25) * far * far + 1, ((far - 5) * far + 8) * far * -0.75 + 3.0)
        rate = tl.where(near, (3.75 * far - 4.5) * far, ((3 * far - 10) * far + 8) * -0.75)
        rate = tl.where(d > 0, -rate, rate) * slope
        at, _ = _padded(at, at, SIZE, PADDING, ALIGN)
        at = tl.where(v == v, _nearest_integer(at) if ALIGN else tl.floor(at), -1.0)
    index = at.to(tl.int32)
    return index, (index >= 0) & (index < SIZE), weight, rate


@triton.jit
def _looked_at(
    grid, p, inside, OH, OW, OD, D, H, W, g_n, g_d, g_h, g_w, g_k,
    MODE: tl.constexpr, PADDING: tl.constexpr, ALIGN: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The places p as (n, d, i, j) of y, and as coordinates and slopes along the width, the height and the depth of x."""
    j, i, d, n = p % OW, p // OW % OH, p // OW // OH % OD, p // OW // OH // OD
    if not WIDE:
        j, i, d, n = j.to(tl.int32), i.to(tl.int32), d.to(tl.int32), n.to(tl.int32)
    at = grid + n * g_n + d * g_d + i * g_h + j * g_w
    vw, sw = _coordinate(tl.load(at, inside, other=0.0).to(tl.float32), W, MODE, PADDING, ALIGN)
    vh, sh = _coordinate(tl.load(at + g_k, inside, other=0.0).to(tl.float32), H, MODE, PADDING, ALIGN)
    vd, sd = vw, sw
    if DEEP:
        vd, sd = _coordinate(tl.load(at + 2 * g_k, inside, other=0.0).to(tl.float32), D, MODE, PADDING, ALIGN)
    return n, d, i, j, vw, sw, vh, sh, vd, sd


@triton.jit
def _grid_sample_forward_kernel(
    x, grid, y,
    M, OH, OW, OD, D, H, W, C, x_n, x_d, x_h, x_w, x_c, g_n, g_d, g_h, g_w, g_k, y_n, y_d, y_h, y_w, y_c,
    MODE: tl.constexpr, PADDING: tl.constexpr, ALIGN: tl.constexpr, DEEP: tl.constexpr, K: tl.constexpr,
    KD: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y[place, c] = Σ weight · x[neighbour, c]."""
    p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)[:, None]
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    inside = p < M
    if WIDE:
        c = c.to(tl.int64)
    n, d, i, j, vw, sw, vh, sh, vd, sd = _looked_at(
        grid, p, inside, OH, OW, OD, D, H, W, g_n, g_d, g_h, g_w, g_k, MODE, PADDING, ALIGN, DEEP, WIDE
    )
    acc = tl.zeros((BP, BC), tl.float32)
    source = x + n * x_n + c * x_c
    for a in range(KD):
        wd, fits_d, place_d = 1.0, inside, 0
        if DEEP:
            at_d, fits, wd, _ = _tap(vd, sd, D, a, MODE, PADDING, ALIGN)
            fits_d = inside & fits
            place_d = (at_d.to(tl.int64) if WIDE else at_d) * x_d
        for b in range(K):
            at_h, fits_h, wh, _ = _tap(vh, sh, H, b, MODE, PADDING, ALIGN)
            for e in range(K):
                at_w, fits_w, ww, _ = _tap(vw, sw, W, e, MODE, PADDING, ALIGN)
                hit = fits_d & fits_h & fits_w & (c < C)
                if WIDE:
                    place = place_d + at_h.to(tl.int64) * x_h + at_w.to(tl.int64) * x_w
                else:
                    place = place_d + at_h * x_h + at_w * x_w
                v = tl.load(source + place, hit, other=0.0).to(tl.float32)
                weight = wd * wh * ww
                acc += tl.where(hit, v * weight, weight * 0.0)
    place = y + n * y_n + d * y_d + i * y_h + j * y_w + c * y_c
    tl.store(place, acc.to(y.dtype.element_ty), inside & (c < C))


@triton.jit
def _grid_sample_grid_kernel(
    x, grid, dy, dgrid,
    M, OH, OW, OD, D, H, W, C, x_n, x_d, x_h, x_w, x_c, g_n, g_d, g_h, g_w, g_k, y_n, y_d, y_h, y_w, y_c,
    z_n, z_d, z_h, z_w, z_k,
    MODE: tl.constexpr, PADDING: tl.constexpr, ALIGN: tl.constexpr, DEEP: tl.constexpr, K: tl.constexpr,
    KD: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dgrid[place] = Σ over channels and neighbours of dy · x · slope along the axis · the other axes' weights."""
    p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    inside = p < M
    n, d, i, j, vw, sw, vh, sh, vd, sd = _looked_at(
        grid, p, inside, OH, OW, OD, D, H, W, g_n, g_d, g_h, g_w, g_k, MODE, PADDING, ALIGN, DEEP, True
    )
    zw, zh, zd = tl.zeros((BP,), tl.float32), tl.zeros((BP,), tl.float32), tl.zeros((BP,), tl.float32)
    source, given = x + n * x_n, dy + n * y_n + d * y_d + i * y_h + j * y_w
    for a in range(KD):
        at_d, fits_d, wd, rd = _tap(vd, sd, D, a, MODE, PADDING, ALIGN)
        if not DEEP:
            at_d, fits_d, wd, rd = at_d * 0, inside, wd * 0 + 1, rd * 0
        for b in range(K):
            at_h, fits_h, wh, rh = _tap(vh, sh, H, b, MODE, PADDING, ALIGN)
            for e in range(K):
                at_w, fits_w, ww, rw = _tap(vw, sw, W, e, MODE, PADDING, ALIGN)
                hit = (inside & fits_d & fits_h & fits_w)[:, None]
                place = at_d.to(tl.int64) * x_d + at_h.to(tl.int64) * x_h + at_w.to(tl.int64) * x_w
                along = tl.zeros((BP,), tl.float32)
                for start in range(0, C, BC):
                    c = (start + tl.arange(0, BC)[None, :]).to(tl.int64)
                    mask = hit & (c < C)
                    v = tl.load((source + place)[:, None] + c * x_c, mask, other=0.0).to(tl.float32)
                    along += tl.sum(v * tl.load(given[:, None] + c * y_c, mask, other=0.0).to(tl.float32), 1)
                zw += along * rw * wh * wd
                zh += along * ww * rh * wd
                zd += along * ww * wh * rd
    target = dgrid + n * z_n + d * z_d + i * z_h + j * z_w
    tl.store(target, zw.to(dgrid.dtype.element_ty), inside)
    tl.store(target + z_k, zh.to(dgrid.dtype.element_ty), inside)
    if DEEP:
        tl.store(target + 2 * z_k, zd.to(dgrid.dtype.element_ty), inside)


@triton.jit
def _grid_sample_terms_kernel(
    grid, pixels, places, weights,
    M, OH, OW, OD, D, H, W, g_n, g_d, g_h, g_w, g_k,
    MODE: tl.constexpr, PADDING: tl.constexpr, ALIGN: tl.constexpr, DEEP: tl.constexpr, K: tl.constexpr,
    TERMS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Of each place's TERMS neighbours: which of all images' pixels it is (−1: none), its place, its weight."""
    p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)[:, None]
    k = tl.arange(0, TERMS)[None, :]
    inside = p < M
    n, _, _, _, vw, sw, vh, sh, vd, sd = _looked_at(
        grid, p, inside, OH, OW, OD, D, H, W, g_n, g_d, g_h, g_w, g_k, MODE, PADDING, ALIGN, DEEP, True
    )
    at_w, fits, weight, _ = _tap(vw, sw, W, k % K, MODE, PADDING, ALIGN)
    at_h, fits_h, wh, _ = _tap(vh, sh, H, k // K % K, MODE, PADDING, ALIGN)
    fits, weight, row = fits & fits_h, weight * wh, n * H
    if DEEP:
        at_d, fits_d, wd, _ = _tap(vd, sd, D, k // (K * K), MODE, PADDING, ALIGN)
        fits, weight, row = fits & fits_d, weight * wd, (n * D + at_d) * H
    pixel = tl.where(fits, (row + at_h) * W + at_w, -1)
    term = p * TERMS + k
    tl.store(pixels + term, pixel.to(tl.int32), inside)
    tl.store(places + term, (p + k * 0).to(tl.int32), inside)
    tl.store(weights + term, weight, inside)


FORWARD = _configs.rows("grid_sample_forward")
GRID = _configs.rows("grid_sample_grid")
TERMS = _configs.rows("grid_sample_terms")
_NEIGHBOURS = {"nearest": 1, "bilinear": 2, "bicubic": 4}
AT_ONCE = 1 << 24
"""Terms that are sorted at a time, images of more on their own: each takes 28 bytes until they are added up."""
REFUSALS = {
    "many": "one image has 2^31 pixels, or its places so many neighbours: what sorts them counts in 32 bits",
}


def _grid_steps(grid: Any) -> tuple[int, ...]:
    """Strides of its n, d, h, w and of the coordinates."""
    n, *places, k = grid.stride()
    return (n, *(0,) * (3 - len(places)), *places, k)


def _how(x: Any, mode: str, padding_mode: str, align_corners: bool) -> dict[str, Any]:
    return {"MODE": mode, "PADDING": padding_mode, "ALIGN": align_corners, "DEEP": x.ndim == 5, "K": _NEIGHBOURS[mode]}


def grid_sample_refuses(x: Spec, grid: Spec, *, needs: tuple, mode: str, **options: Any) -> str | None:
    neighbours = math.prod(grid.shape[1:-1]) * _NEIGHBOURS[mode] ** (x.ndim - 2)
    return REFUSALS["many"] if "x" in needs and max(neighbours, math.prod(x.shape[2:])) >= 2**31 else None


def grid_sample_forward(
    x: Any, grid: Any, *, needs: tuple = (), mode: str, padding_mode: str, align_corners: bool, empty: Any
) -> tuple[tuple, dict]:
    y = empty((*x.shape[:2], *grid.shape[1:-1]), x.dtype, output_order(x))
    how = _how(x, mode, padding_mode, align_corners)
    to, of = volume(y), volume(x)
    n, c, od, oh, ow = to.shape
    places = n * od * oh * ow
    entry = FORWARD(_tile.device(x), places)
    run, channels = pixel_tile(y, places, entry.elements)
    if channels == 1:  # a place's neighbours serve several channels
        channels = min(4, _tile.next_power_of_2(c))
        run = _tile.next_power_of_2(places, entry.elements // channels)
    _tile.launch(
        _grid_sample_forward_kernel, (_tile.cdiv(places, run), _tile.cdiv(c, channels)), of, grid, to, places, oh, ow, od,
        *of.shape[2:], c, *steps(of), *_grid_steps(grid), *steps(to), **how, KD=how["K"] if how["DEEP"] else 1,
        WIDE=is_wide(x, y, grid), BP=run, BC=channels, num_warps=entry.warps,
    )  # fmt: skip
    return (y,), {"x": x, "grid": grid} if needs else {}


def _terms(grid: Any, sizes: tuple[int, ...], how: dict[str, Any], empty: Any) -> tuple[Any, Any, Any]:
    """(pixel, place, weight) of every neighbour of a grid's places on images of these sizes (D, H, W), place by place."""
    n, *places = grid.shape[:-1]
    count, terms = math.prod((n, *places)), how["K"] ** (3 if how["DEEP"] else 2)
    found = (empty((count * terms,), "int32"), empty((count * terms,), "int32"), empty((count * terms,), "float32"))
    od, oh, ow = (1, *places)[-3:]
    entry = TERMS(_tile.device(grid), count)
    run = _tile.next_power_of_2(count, max(1, entry.elements // terms))
    _tile.launch(
        _grid_sample_terms_kernel, (_tile.cdiv(count, run),), grid, *found, count, oh, ow, od, *sizes, *_grid_steps(grid),
        **how, TERMS=terms, BP=run, num_warps=entry.warps,
    )  # fmt: skip
    return found


def _input_gradient(dy: Any, x: Any, grid: Any, how: dict[str, Any], like: Spec, empty: Any) -> Any:
    """dx, scattered as rows of channels: in place where they are neighbours in x, else laid out anew."""
    (n, c, *sizes), last = x.shape, channels_last(x.ndim)
    dx = empty(x.shape, x.dtype, last)
    places, pixels = math.prod(grid.shape[1:-1]), math.prod(sizes)
    rows, given = dx.permute(last).view(n * pixels, c), nhwc(dy, empty).permute(last).view(n * places, c)
    most = max(pixels, places * how["K"] ** len(sizes))
    some = n if n * most <= AT_ONCE else max(1, AT_ONCE // most)
    for first in (0,) if some == n else range(0, n, some):
        end = min(first + some, n)
        found, bags, factors = _terms(grid[first:end], (1, *sizes)[-3:], how, empty)
        into, of = rows[first * pixels : end * pixels], given[first * places : end * places]
        scatter(of, found, into, None, False, empty, bags=bags, factors=factors)
    return _tile.arranged(dx, like.order, empty)


def grid_sample_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    mode: str,
    padding_mode: str,
    align_corners: bool,
    empty: Any,
) -> tuple:
    (dy,), x, grid = dys, saved["x"], saved["grid"]
    how, dx, dgrid = _how(x, mode, padding_mode, align_corners), None, None
    of, from_ = volume(x), volume(dy)
    n, c, od, oh, ow = from_.shape
    sizes = tuple(of.shape[2:])
    if "x" in needs:
        dx = _input_gradient(dy, x, grid, how, inputs[0].like(), empty)
    if "grid" in needs:
        dgrid = empty(grid.shape, grid.dtype, inputs[1].like().order)
        places = n * od * oh * ow
        entry = GRID(_tile.device(x), places)
        channels = min(32, _tile.next_power_of_2(c)) if x.stride(1) == 1 else 1
        run = _tile.next_power_of_2(places, max(1, entry.elements // channels))
        _tile.launch(
            _grid_sample_grid_kernel, (_tile.cdiv(places, run),), of, grid, from_, dgrid, places, oh, ow, od, *sizes, c,
            *steps(of), *_grid_steps(grid), *steps(from_), *_grid_steps(dgrid), **how,
            KD=how["K"] if how["DEEP"] else 1, BP=run, BC=channels, num_warps=entry.warps,
            maxnreg=_tile.MOST_REGISTERS,
        )  # fmt: skip
    return dx, dgrid
