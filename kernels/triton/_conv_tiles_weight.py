"""A convolution's weight gradient on the tiles of pixels of ``_conv_tiles.py``: dyᵀ(O, pixels) · x(pixels, C) under each tap.

Every program takes as many steps (a block of the result, a tile of pixels) as the others, one block after the other, so that
no multiprocessor waits whatever the number of blocks. A block that several programs share is summed from their float32 shares
in a second stage, in a fixed order.

- Boxes divide the image's rows and columns: one that hung over would multiply pixels of x by dy's zeros outside, which of
  Inf makes NaN. Over images they may hang: there x is zero, too.
- dy is the product's first operand, which comes from shared memory only if no reshape stands between (``_conv_tiles.py``). So
  where a box's pixels lie evenly in dy, as whole rows or as one pixel of many images do, dy is a matrix to its descriptor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._configs import Tile
from ._conv import Walk
from ._conv_tiles import (
    Axis,
    as_images,
    depth_of,
    frame_under,
    is_deep,
    refusal,
    resident,
    rows_of,
    under_tap,
    views_of,
)
from ._image import finish, in_line

BUDGETS = {"_conv_tiles_weight_kernel": Budget(registers=252, blocks=1)}
STACKED, EVEN, BOXED = 0, 1, 2
"""How a box lies in dy: one pixel of many images, pixels in a row, or neither."""


@triton.jit
def _conv_tiles_weight_kernel(
    dy, x, v1, v2, v3, partial,
    N, H, W, C, O, ALL_O, KH, KW, ALL_TAPS, H0, W0, UP, LEFT, DH, DW, DY, DX, SD, D0, DD, EACH, SHARES, STEPS,
    DEEP: tl.constexpr, IN_H: tl.constexpr, IN_W: tl.constexpr, WAY: tl.constexpr, TAPS: tl.constexpr,
    NB: tl.constexpr, HB: tl.constexpr, WB: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """partial[share, o, tap, c] = Σ over a share of the pixels of dy[pixel, o] · x[pixel under the tap, c].

    Of each block, BO · BC channels under TAPS (1 or 3) neighbouring taps; a program takes EACH of all STEPS, which are
    counted block after block. dy, x, partial, v1 … v3: descriptors, of dy as WAY says; the sums' geometry is
    ``_conv_tiles_kernel``'s.
    """
    PIXELS: tl.constexpr = NB * HB * WB
    tiles_h = H // HB
    tiles_w = W // WB
    tiles = tl.cdiv(N, NB) * tiles_h * tiles_w
    blocks_o = tl.cdiv(O, BO)
    blocks_c = tl.cdiv(C, BC)
    runs = tl.cdiv(ALL_TAPS, TAPS)
    first = tl.program_id(0) * EACH
    last = tl.minimum(first + EACH, STEPS)
    for block in range(first // tiles, (last - 1) // tiles + 1):
        o = block % blocks_o * BO
        c = block // blocks_o % blocks_c * BC
        tap = block // blocks_o // blocks_c % runs * TAPS
        group = block // blocks_o // blocks_c // runs
        r0 = UP + tap // KW % KH * DH
        q0 = LEFT + tap % KW * DW
        r1 = UP + (tap + 1) // KW % KH * DH
        q1 = LEFT + (tap + 1) % KW * DW
        r2 = UP + (tap + 2) // KW % KH * DH
        q2 = LEFT + (tap + 2) % KW * DW
        start = tl.maximum(first, block * tiles)
        end = tl.minimum(last, (block + 1) * tiles)
        tl.assume(end > start)  # or ptxas, where dy comes through registers, runs the products one after another
        acc0 = tl.zeros((BO, BC), tl.float32)
        acc1 = acc0
        acc2 = acc0
        for step in range(start, end):
            tile = step - block * tiles
            n = tile // tiles_w // tiles_h * NB
            i = tile // tiles_w % tiles_h * HB
            j = tile % tiles_w * WB
            if WAY == 0:
                g = dy.load([n, (i * W + j) * ALL_O + group * O + o]).T
            elif WAY == 1:
                g = dy.load([(n * H + i) * W + j, group * O + o]).T
            else:
                g = dy.load([n, i, j, group * O + o]).reshape(PIXELS, BO).T
            ch = group * C + c
            n0, n1, n2 = n, n, n
            if DEEP:
                n0 = frame_under(n, tap // (KH * KW), DY, DX, SD, D0, DD, False)
                n1 = frame_under(n, (tap + 1) // (KH * KW), DY, DX, SD, D0, DD, False)
                n2 = frame_under(n, (tap + 2) // (KH * KW), DY, DX, SD, D0, DD, False)
            acc0 = tl.dot(g, under_tap(x, v1, v2, v3, n0, i + H0, j + W0, r0, q0, ch, IN_H, IN_W, PIXELS, BC), acc0)
            if TAPS == 3:
                acc1 = tl.dot(g, under_tap(x, v1, v2, v3, n1, i + H0, j + W0, r1, q1, ch, IN_H, IN_W, PIXELS, BC), acc1)
                acc2 = tl.dot(g, under_tap(x, v1, v2, v3, n2, i + H0, j + W0, r2, q2, ch, IN_H, IN_W, PIXELS, BC), acc2)
        share = tl.program_id(0) - block * tiles // EACH
        row = group * O + o
        partial.store([share, row, tap, c], acc0.reshape(1, BO, 1, BC))
        if TAPS == 3:
            partial.store([share, row, tap + 1, c], acc1.reshape(1, BO, 1, BC))
            partial.store([share, row, tap + 2, c], acc2.reshape(1, BO, 1, BC))
        if end == (block + 1) * tiles:  # the others' last shares, which this block has not, are zero
            for missing in range(share + 1, SHARES):
                for t in tl.static_range(TAPS):
                    partial.store([missing, row, tap + t, c], tl.zeros((1, BO, 1, BC), tl.float32))


# --- choices ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def whole_box(pixels: int, n: int, h: int, w: int) -> tuple[tuple[int, int, int], int] | None:
    """((images, rows, columns), way) of a tile whose rows and columns divide the image's: of those that hang over images
    least, one that lies in dy as a product wants it. None where each hangs over by more than a third."""
    sides = [1 << i for i in range(pixels.bit_length())]
    found = []
    for rows in (s for s in sides if h % s == 0):
        for columns in (s for s in sides if w % s == 0 and rows * s <= pixels):
            box = pixels // (rows * columns), rows, columns
            hangs = _tile.cdiv(n, box[0]) * box[0] / n
            if hangs <= 4 / 3:
                found.append((hangs, _way(box, h, w), box[0], box))
    return (min(found)[3], min(found)[1]) if found else None


def _way(box: tuple[int, int, int], h: int, w: int) -> int:
    images, rows, columns = box
    if (columns == w or rows == 1) and ((rows, columns) == (h, w) or images == 1):
        return EVEN
    return STACKED if rows * columns == 1 else BOXED


def taps_at_once(tile: Tile, taps: int, arch: int) -> int:
    """3, where there are as many and their sums fit a thread's registers; sm_100's compiler spills them in four warps."""
    fit = MOST_SUMS * 32 * tile.warps >= 3 * tile.BM * tile.BN and (arch != 100 or tile.warps > 4)
    return 3 if taps >= 3 and fit else 1


MOST_SUMS = 192
"""That a thread holds."""


def _shared(tile: Tile, at_once: int) -> int:
    """Bytes for the stages' boxes and a block of the result."""
    return tile.stages * (tile.BM + at_once * tile.BN) * tile.BK * 2 + tile.BM * tile.BN * 4


def _choose(
    entries: Sequence[Tile], device: _tile.Device, n: int, h: int, w: int, c: int, o: int, taps: int, grouped: bool
) -> tuple[int, Tile] | None:
    """The tile that reads fewest bytes: of BM channels of dy and BN of x, and BK pixels at a time, as many as a box has."""
    best, least = None, math.inf
    for i, tile in enumerate(entries):
        pixels = next((p for p in (64, 32, 16) if p <= tile.BK and whole_box(p, n, h, w)), None)
        if pixels is None or (grouped and (o % tile.BM or c % tile.BN)):
            continue
        tile = tile._replace(BK=pixels)
        at_once = taps_at_once(tile, taps, device.arch)
        loads = tile.BM + at_once * tile.BN
        if _shared(tile, at_once) > device.shared - 2048:
            continue
        cost = _tile.cdiv(o, tile.BM) * _tile.cdiv(c, tile.BN) * _tile.cdiv(taps, at_once) * loads
        if cost < least:
            best, least = (i, tile), cost
    return best


HALF = _configs.tiles("conv_tiles_weight.half", _choose, inner=(64,))
LEAST_STEPS = 4
"""Tiles of pixels that a program sums at least, or its share costs more than it brings."""


def refusal_of_weight(dy: Any, x: Any, dweight: Any, walk: Walk) -> str | None:
    """Why dweight takes the kernel of pointers; None if it does not. Arguments as in ``weight_gradient``."""
    if reason := refusal(x, dweight, dy, walk):
        return reason
    rows, one = rows_of(dy), math.prod((*dweight.shape[2:], *walk.stride)) == 1 and not any(walk.before)
    plain = one and x.shape[2:] == dy.shape[2:]
    return box_refusal(as_images(rows, rows_of(x))[0] if plain else rows, is_deep(dweight.shape[2:], walk))


def box_refusal(dy: Any, deep: bool = False) -> str | None:
    """Why no box of pixels serves dy (N, H, W, O). deep: a box lies in one frame."""
    n, h, w, _ = dy.shape
    n = 1 if deep else n
    if all(whole_box(pixels, n, h, w) is None for pixels in (64, 32, 16)):
        return "images that no box divides, too few for a box of one pixel of each"
    if math.prod(dy.shape) >= 2**31 * min(8, n):
        return "more pixels than 32 bits count"
    return None


# --- the launch ------------------------------------------------------------------------------------------------------


def weight_gradient(dy: Any, x: Any, dweight: Any, walk: Walk, plain: bool, empty: Any) -> None:
    """dweight (O, C / groups, *kernel), of any strides, from dy and x with channels last; three spatial axes.

    plain: one tap takes every pixel as it is.
    """
    (o, c, *kernel), groups = dweight.shape, walk.groups
    g, source = rows_of(dy), rows_of(x)
    if plain:
        g, source = as_images(g, source)
    walks = [Axis.of(*along) for along in list(zip(dweight.shape[2:], *walk[:3]))[1:]]
    depth = depth_of(x, dy, kernel, walk)
    partial = shares_of(g, source, walks, (o, c, *kernel), groups, empty, depth)
    finish(partial, dweight)


def shares_of(
    g: Any, source: Any, walks: Sequence[Axis], sizes: tuple, groups: int, empty: Any, depth: tuple | None = None
) -> Any:
    """The shares (S, O, taps, C / groups) of dweight from dy and x, (N, H, W, C). sizes: O, C / groups, and three of the
    kernel; in ``source`` there may be fewer channels, which read as zero. depth: as in ``_conv_tiles.summed``."""
    (o, c, *kernel), (n, h, w, _), taps = sizes, g.shape, math.prod(sizes[2:])
    frames, n = (n, 1) if depth else (1, n)
    tile = HALF(_tile.device(g), n, h, w, c, o // groups, taps, groups > 1)
    (box, way), at_once = whole_box(tile.BK, n, h, w), taps_at_once(tile, taps, _tile.device(g).arch)
    if not (g.is_contiguous() if way == STACKED else in_line(g.shape[:3], g.stride()[:3])):
        way = BOXED  # a part of an array is no such matrix
    views = views_of(source, [a.picks for a in walks], [a.steps for a in walks], (*box, tile.BN))

    tiles = frames * math.prod(map(_tile.cdiv, (n, h, w), box))
    blocks = _tile.cdiv(o // groups, tile.BM) * _tile.cdiv(c, tile.BN) * _tile.cdiv(taps, at_once) * groups
    most = resident(_tile.device(g), _shared(tile, at_once), tile.warps)
    programs, each = _tile.split(tiles * blocks, min(most, max(1, tiles * blocks // LEAST_STEPS)))
    shares = max(((b + 1) * tiles - 1) // each - b * tiles // each + 1 for b in range(blocks))
    partial = empty((shares, o, taps, c), "float32")
    _tile.launch(
        _conv_tiles_weight_kernel, (programs,), _described(g, box, way, tile.BM), *views,
        _tile.described(partial, (1, tile.BM, 1, tile.BN)),
        n * frames, h, w, c, o // groups, o, *kernel[1:], taps, *(a.start for a in walks), *(a.offset for a in walks),
        *(a.jump for a in walks), *(depth[:2] + depth[3:] if depth else [1] * 5), each, shares, tiles * blocks,
        DEEP=depth is not None, IN_H=walks[0].views, IN_W=walks[1].views, WAY=way, TAPS=at_once,
        NB=box[0], HB=box[1], WB=box[2], BO=tile.BM, BC=tile.BN, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partial


def _described(g: Any, box: tuple, way: int, channels: int) -> Any:
    n, _, _, o = g.shape
    if way == BOXED:
        return _tile.described(g, (*box, channels))
    return _tile.described(g.view(n, -1) if way == STACKED else g.view(-1, o), (math.prod(box), channels))
