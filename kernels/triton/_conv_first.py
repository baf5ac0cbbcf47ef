"""Convolutions of one tap over images with pixels neighbouring in memory (NCHW): products w (O, C) · x[n] (C, pixels) by TMA.

A descriptor steps in 16 bytes, so no matrix of rows of 7² or 14² pixels is one to it. But STEP such rows in one are: channel
STEP · q + j of an image then begins at column j · P of row q, and a box may begin at any column. What it reads behind the last
pixel is the next channel, in columns of the product that nobody stores. So channels are summed in steps of STEP, j after j; w
turned is walked so by its own descriptor, w as it is by a copy of its few elements. For dweight, which sums over pixels, there
is a descriptor for each j that ends with its channel's last pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._configs import Tile
from ._conv_tiles import cost_of, machine_refusal, resident
from ._image import finish


def _narrow(c: dict[str, Any]) -> str:
    """Rows of pixels that no descriptor knows are stored pixel by pixel."""
    return "" if c["STORED"] else "stores"


BUDGETS = {
    "_conv_first_kernel": Budget(registers=240, blocks=1, narrow=_narrow),
    # Channels of a block of shares lie STEP apart.
    "_conv_first_weight_kernel": Budget(registers=224, blocks=1, narrow="stores"),
}


@triton.jit
def _store(acc, y, step, rows, columns, APART: tl.constexpr, PART: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The first rows and columns of a tile to y, where they are ``step`` and APART apart; in parts of PART, whose addresses are
    not all held at once."""
    if BM * BN > PART:
        HALF: tl.constexpr = BN // 2
        left, right = tl.split(acc.reshape(BM, 2, HALF).permute(0, 2, 1))
        _store(left, y, step, rows, columns, APART, PART, BM, HALF)
        _store(right, y + HALF * APART, step, rows, columns - HALF, APART, PART, BM, HALF)
    else:
        row = tl.arange(0, BM)[:, None]
        column = tl.arange(0, BN)[None, :]
        there = (row < rows) & (column < columns)
        tl.store(y + row * step + column * APART, acc.to(y.dtype.element_ty), there)


@triton.jit
def _conv_first_kernel(
    x, w, bias, y, N, UNITS, C, O,
    STEP: tl.constexpr, TURNED: tl.constexpr, WIDE: tl.constexpr, STORED: tl.constexpr, PART: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[n, o, p] = Σ_c w[o, c] · x[n, c, p] + bias[o].

    x, w: descriptors, of x as (N, C / STEP, STEP · P), of w as (O, STEP · C / STEP), channel after channel of each j; WIDE:
    as (O, STEP, C / STEP); TURNED: as (C / STEP, STEP · O). STORED: y is a descriptor, too. P: UNITS of the pixels that fill
    16 bytes in STEP channels.
    """
    P = UNITS * (8 // STEP)  # known to be a multiple: pixels are stored as wide as they lie
    tiles_o = tl.cdiv(O, BM)
    tiles_p = tl.cdiv(P, BN)
    rows = C // STEP
    blocks = tl.cdiv(rows, BK)
    steps = STEP * blocks
    for tile in tl.range(tl.program_id(0), N * tiles_p * tiles_o, tl.num_programs(0), flatten=True):
        o = tile % tiles_o * BM
        p = tile // tiles_o % tiles_p * BN
        n = tile // tiles_o // tiles_p
        tl.assume(steps > 0)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(steps):
            j = k // blocks
            q = k % blocks * BK
            pixels = x.load([n, q, j * P + p]).reshape(BK, BN)
            if TURNED:
                taps = w.load([q, j * O + o]).T
            elif WIDE:
                taps = w.load([o, j, q]).reshape(BM, BK)
            else:
                taps = w.load([o, j * rows + q])
            acc = tl.dot(taps, pixels, acc)
        at = o + tl.arange(0, BM)
        if bias is not None:
            acc += tl.load(bias + at, at < O, other=0.0).to(tl.float32)[:, None]
        if STORED:
            y.store([n, o, p], acc.to(y.dtype).reshape(1, BM, BN))
        else:
            _store(acc, y + (n.to(tl.int64) * O + o) * P + p, P, O - o, P - p, 1, PART, BM, BN)


@triton.jit
def _picked(v0, v1, v2, v3, v4, v5, v6, v7, i, STEP: tl.constexpr):
    """The i-th of STEP descriptors."""
    view = v0
    if STEP > 1:  # noqa: SIM102
        if i == 1:
            view = v1
    if STEP > 2:
        if i == 2:
            view = v2
        if i == 3:
            view = v3
    if STEP > 4:
        if i == 4:
            view = v4
        if i == 5:
            view = v5
        if i == 6:
            view = v6
        if i == 7:
            view = v7
    return view


@triton.jit
def _conv_first_weight_kernel(
    d0, d1, d2, d3, d4, d5, d6, d7, x0, x1, x2, x3, x4, x5, x6, x7, partial, STEPS, EACH, P, C, O,
    STEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial[split, o, c] = Σ over the split's EACH of all STEPS blocks of pixels of dy[n, o, p] · x[n, c, p].

    d0 … d7, x0 … x7: descriptors of dy and x as (N · channels / STEP, (j + 1) · P).
    """
    tiles_p = tl.cdiv(P, BK)
    rows_o = O // STEP
    rows_c = C // STEP
    blocks_o = tl.cdiv(rows_o, BM)
    blocks_c = tl.cdiv(rows_c, BN)
    o = tl.program_id(0) % blocks_o * BM
    c = tl.program_id(0) // blocks_o % blocks_c * BN
    of_o = tl.program_id(0) // blocks_o // blocks_c % STEP
    of_c = tl.program_id(0) // blocks_o // blocks_c // STEP
    dy = _picked(d0, d1, d2, d3, d4, d5, d6, d7, of_o, STEP)
    x = _picked(x0, x1, x2, x3, x4, x5, x6, x7, of_c, STEP)
    first = tl.program_id(1) * EACH
    last = tl.minimum(first + EACH, STEPS)
    tl.assume(last > first)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(first, last):
        n = step // tiles_p
        p = step % tiles_p * BK
        g = dy.load([n * rows_o + o, of_o * P + p])
        acc = tl.dot(g, x.load([n * rows_c + c, of_c * P + p]).T, acc)
    share = partial + (tl.program_id(1).to(tl.int64) * O + o * STEP + of_o) * C + c * STEP + of_c
    _store(acc, share, C * STEP, rows_o - o, rows_c - c, STEP, 4096, BM, BN)


# --- choices ---------------------------------------------------------------------------------------------------------


def step_of(pixels: int) -> int:
    """Channels whose pixels together are a multiple of 16 bytes."""
    return 8 // math.gcd(8, pixels)


def _fitted(tile: Tile, rows: int) -> Tile:
    """The tile with the longest BK that leaves at most a quarter of the last block of so many rows empty."""
    blocks = [b for b in (64, 32, 16) if b <= tile.BK and 4 * rows >= 3 * _tile.cdiv(rows, b) * b]
    return tile._replace(BK=blocks[0] if blocks else 16)


def _choose(
    entries: Sequence[Tile], device: _tile.Device, n: int, pixels: int, rows: int, o: int
) -> tuple[int, Tile] | None:
    """The tile that ends first: by its rounds of the GPU, or by what its boxes load from L2, whichever takes longer."""
    best, least = None, math.inf
    for i, entry in enumerate(entries):
        tile, shared = _fitted(entry, rows), shared_of(entry)
        if shared > device.shared - 2048:
            continue
        tiles = n * _tile.cdiv(pixels, tile.BN) * _tile.cdiv(o, tile.BM)
        cost = cost_of(tile, tiles, resident(device, shared, tile.warps))
        if cost < least:
            best, least = (i, tile), cost
    return best


def shared_of(tile: Tile) -> int:
    """Bytes for the stages' boxes and a tile of y."""
    return tile.shared(2) + tile.BM * tile.BN * 2


HALF = _configs.tiles("conv_first.half", _choose, inner=(64,))


def _choose_weight(
    entries: Sequence[Tile], device: _tile.Device, pixels: int, o: int, c: int
) -> tuple[int, Tile] | None:
    """The tile that reads fewest bytes, for products of (o, c) channels; with the shorter BK where the longer would leave a
    tenth of its pixels empty."""
    best, least = None, math.inf
    for i, tile in enumerate(entries):
        if tile.shared(2) > device.shared - 2048:
            continue
        deep = 64 if 10 * _tile.cdiv(pixels, 64) * 64 <= 11 * _tile.cdiv(pixels, 32) * 32 else 32
        cost = _tile.cdiv(o, tile.BM) * _tile.cdiv(c, tile.BN) * (tile.BM + tile.BN)
        if cost < least:
            best, least = (i, tile._replace(BK=deep)), cost
    return best


WEIGHT_HALF = _configs.tiles("conv_first_weight.half", _choose_weight, inner=(64,))
LEAST_STEPS = 4
"""Blocks of pixels that a program sums at least, or its share costs more than it brings."""


# --- what it serves --------------------------------------------------------------------------------------------------


def refusal(x: Any, y: Any, plain: bool, groups: int) -> str | None:
    """Why y = w · x, or the gradient of either, is not done on images with their pixels last; None if it is."""
    if reason := machine_refusal(x, y):
        return reason
    pixels = math.prod(x.shape[2:])
    if not plain or groups > 1 or not (x.is_contiguous() and y.is_contiguous()):
        return "more than one tap or group, or pixels that are not neighbours in memory"
    if pixels < FEW:
        return f"fewer than {FEW} pixels: most of a tile would be empty"
    if any(c % max(8, step_of(pixels)) for c in (x.shape[1], y.shape[1])):
        return "channels that are no multiple of 8: a descriptor steps in 16 bytes"
    if not (_tile.begins_aligned(x) and _tile.begins_aligned(y)):
        return "arrays that do not begin at multiples of 16 bytes"
    return None


FEW = 33
"""Pixels that an image has at least."""


# --- launches --------------------------------------------------------------------------------------------------------


def _rows(x: Any, step: int = 1) -> Any:
    """(N, C / step, step · pixels), a view."""
    n, c = x.shape[:2]
    return x.view(n, c // step, step * math.prod(x.shape[2:]))


def _by_step(taps: Any, step: int, wide: bool, empty: Any) -> Any:
    """(O, C) with channel step · q + j at j · C / step + q, or wide (O, step, C / step), whose rows begin at 16 bytes."""
    o, c = taps.shape
    if step == 1:
        return taps.view(o, 1, c) if wide else taps
    rows = c // step
    found = empty((o, step, _tile.cdiv(rows, 8) * 8), taps.dtype)
    _tile.copy(taps.view(o, rows, step).permute(0, 2, 1), found[..., :rows])
    return found[..., :rows] if wide else found.view(o, c)


def product(x: Any, taps: Any, bias: Any, y: Any, empty: Any, turned: bool = False) -> None:
    """y (N, O, …) from x (N, C, …) and the matrix ``taps``, (O, C) or ``turned`` (C, O), row-major; y is dx then."""
    (n, c), o, pixels = x.shape[:2], y.shape[1], math.prod(x.shape[2:])
    step = step_of(pixels)
    rows, stored = c // step, step == 1
    tile = HALF(_tile.device(x), n, pixels, rows, o)
    wide = rows % tile.BK != 0 and not turned
    taps = taps if _tile.begins_aligned(taps) else _tile.copied(taps, None, empty)
    if turned:
        taps, block = taps.view(rows, step * o), (tile.BK, tile.BM)
    else:
        taps = _by_step(taps, step, wide, empty)
        block = (tile.BM, 1, tile.BK) if wide else (tile.BM, tile.BK)
    tiles = n * _tile.cdiv(pixels, tile.BN) * _tile.cdiv(o, tile.BM)
    programs = min(tiles, resident(_tile.device(x), shared_of(tile), tile.warps))
    _tile.launch(
        _conv_first_kernel, (programs,), _tile.described(_rows(x, step), (1, tile.BK, tile.BN)),
        _tile.described(taps, block), bias, _tile.described(_rows(y), (1, tile.BM, tile.BN)) if stored else y,
        n, pixels * step // 8, c, o, STEP=step, TURNED=turned, WIDE=wide, STORED=stored,
        PART=2048 if _tile.device(x).arch >= 100 else 4096,  # smaller ones make sm_90's assembler serialize its wgmmas
        BM=tile.BM, BN=tile.BN, BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def weight_gradient(dy: Any, x: Any, dweight: Any, empty: Any) -> None:
    """dweight (O, C, 1, …), of any strides."""
    (n, o), c, pixels, device = dy.shape[:2], x.shape[1], math.prod(x.shape[2:]), _tile.device(x)
    step = step_of(pixels)
    tile = WEIGHT_HALF(device, pixels, o // step, c // step)
    blocks = _tile.cdiv(o // step, tile.BM) * _tile.cdiv(c // step, tile.BN) * step * step
    steps = n * _tile.cdiv(pixels, tile.BK)
    room = resident(device, tile.shared(2), tile.warps)
    splits, each = _tile.split(steps, min(max(1, room // blocks), max(1, steps // LEAST_STEPS)))
    partial = empty((splits, o, 1, c), "float32")
    _tile.launch(
        _conv_first_weight_kernel, (blocks, splits), *_ends(dy, step, (tile.BM, tile.BK)), *_ends(x, step, (tile.BN, tile.BK)),
        partial, steps, each, pixels, c, o, STEP=step,
        BM=tile.BM, BN=tile.BN, BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    finish(partial, dweight)


def _ends(x: Any, step: int, block: tuple) -> list[Any]:
    """Descriptors of x as (N · C / step, (j + 1) · pixels), which ends with the j-th channel; None after the last."""
    n, c, pixels = *x.shape[:2], math.prod(x.shape[2:])
    rows = x.view(n * c // step, step * pixels)
    return [*(_tile.described(rows[:, : (j + 1) * pixels], block) for j in range(step)), *[None] * (8 - step)]
