"""Pooling of images by blocks of pixels: what tells where pixels lie is reckoned once for all of a block, and what several of its
windows share is loaded once. Where channels are neighbours in memory a lane has 16 bytes of them; of row-major images, whose rows
begin anywhere (``_pooling_runs`` has those of whole runs), it has one.

Windows are of up to five rows and columns, undilated, and step over no pixel. ``pooling`` has the kernels of everything else.
A window always lies on the image somewhere. Maxima and sums are of each row's columns first, then of the rows.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget, channels_first
from .._pooling import Divisor
from .._window import Window
from . import _configs, _tile
from ._image import first_of, is_wide
from ._pixels import is_far
from ._pooling_runs import divisors
from ._runs import divided
from ._tracing import thread
from ._windows import covered

BUDGETS = {
    "_max_pool_blocks_forward_kernel": Budget(registers=216, blocks=2, narrow=channels_first),
    "_max_pool_blocks_backward_kernel": Budget(registers=168, blocks=3, narrow=channels_first),
    "_avg_pool_blocks_forward_kernel": Budget(registers=184, blocks=2, narrow=channels_first),
    "_avg_pool_blocks_backward_kernel": Budget(registers=184, blocks=2, narrow=channels_first),
}
MOST = 5
"""Rows and columns of a window, all of which are unrolled."""
LONGEST = 65535
"""The second and the third axis of a grid."""
LEAST = 8
"""Channels: of fewer, most of a lane's 16 bytes would be another pixel's."""


@triton.jit
def _lanes_of(M, ROWS, COLUMNS, C, HIGH: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr,
              TH: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """(image, row, column, channel, mask): where each lane's block of HIGH × WIDE pixels begins, TH blocks below each other.
    SPLIT: programs have BC of the channels each. TH = 0: an image is a plane of M's ROWS × COLUMNS blocks."""
    if TH == 0:
        lane = first_of(M, BP) + tl.arange(0, BP)[:, None]
        across = divided(lane, COLUMNS)
        plane = divided(across, ROWS)
        row, column = (across - plane * ROWS) * HIGH, (lane - across * COLUMNS) * WIDE
        return plane, row, column, tl.zeros((1, 1), tl.int32), lane < M
    else:
        tile, part = tl.program_id(0), 0
        if SPLIT:
            parts = tl.cdiv(C, BC)
            part = tile % parts
            tile = tile // parts
        c = part * BC + tl.arange(0, BC)[None, :]
        lane = tile * BP + tl.arange(0, BP)[:, None]
        row = (tl.program_id(1) * TH + lane % TH) * HIGH
        return tl.program_id(2).to(tl.int64), row, lane // TH * WIDE, c, FULL | (c < C)


@triton.jit
def _within(at, SIZE):
    """0 ≤ at < SIZE, by one comparison."""
    return at.to(tl.uint32) < (at * 0 + SIZE).to(tl.uint32)


@triton.jit
def _row(x, w, there, W, step, other, FIRST: tl.constexpr, LAST: tl.constexpr):
    """The pixels of a row from column w + FIRST on to before w + LAST, of which x is that at w, in float32."""
    found = ()
    for s in tl.static_range(FIRST, LAST):
        on = there & _within(w + s, W)
        found += (tl.load(x + s * step, on, other=other).to(tl.float32),)
    return found


@triton.jit
def _max_pool_blocks_forward_kernel(
    x, y, won, indices,
    M, ROWS, COLUMNS, OH, OW, H, W, C, x_n, x_h, x_w, y_n, y_h, y_w,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    UH: tl.constexpr, UW: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr, TH: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """UH × UW windows to a lane."""
    n, i, j, c, mask = _lanes_of(M, ROWS, COLUMNS, C, UH, UW, SPLIT, FULL, TH, BP, BC)
    h, w = i * SH - TOP, j * SW - LEFT
    x += n * x_n + (h * x_h + w * x_w + c)
    y_at = n * y_n + (i * y_h + j * y_w + c)
    columns = ()
    for t in tl.static_range(SH * (UH - 1) + KH):
        there = mask & _within(h + t, H)
        pixels = _row(x + t * x_h, w, there, W, x_w, float("-inf"), 0, SW * (UW - 1) + KW)
        columns += _maxima(pixels, _numbered(t * KW, SW * (UW - 1) + KW), KW, SW, UW)
    for v in tl.static_range(UW):
        values, taps = (), ()
        for t in tl.static_range(SH * (UH - 1) + KH):
            values += (columns[2 * (t * UW + v)],)
            taps += (columns[2 * (t * UW + v) + 1],)
        maxima = _maxima(values, taps, KH, SH, UH)
        for u in tl.static_range(UH):
            best = maxima[2 * u]
            first = tl.maximum(-h - SH * u, 0) * KW + tl.maximum(-w - SW * v, 0)  # the first tap on the image
            tap = tl.where(best == float("-inf"), first, maxima[2 * u + 1] - (SH * u * KW + SW * v))
            inside = mask & (i + u < OH) & (j + v < OW)
            at = y_at + (u * y_h + v * y_w)
            tl.store(y + at, best.to(y.dtype.element_ty), inside)
            if won is not None:
                tl.store(won + at, tap.to(won.dtype.element_ty), inside)
            if indices is not None:
                index = (h + SH * u) * W + (w + SW * v) + tap // KW * (W - KW) + tap
                tl.store(indices + at, index.to(tl.int64), inside)


@triton.jit
def _numbered(FIRST: tl.constexpr, N: tl.constexpr):
    found = ()
    for s in tl.static_range(N):
        found += (FIRST + s,)
    return found


@triton.jit
def _maxima(values, taps, K: tl.constexpr, S: tl.constexpr, U: tl.constexpr):
    """(maximum, tap, maximum, tap, …) of U windows of K of these values, S apart; what two neighbours share is compared once."""
    found = ()
    if U == 1 or K <= S:
        for v in tl.static_range(U):
            found += _maximum(values, taps, S * v, S * v + K)
    else:
        for v in tl.static_range(0, U, 2):
            best, tap = _maximum(values, taps, S * v + S, S * v + K)
            before, tap_before = _maximum(values, taps, S * v, S * v + S)
            after, tap_after = _maximum(values, taps, S * v + K, S * v + K + S)
            found += _greater(before, tap_before, best, tap) + _greater(best, tap, after, tap_after)
    return found


@triton.jit
def _maximum(values, taps, FIRST: tl.constexpr, LAST: tl.constexpr):
    best, tap = values[FIRST], taps[FIRST]
    for s in tl.static_range(FIRST + 1, LAST):
        best, tap = _greater(best, tap, values[s], taps[s])
    return best, tap


@triton.jit
def _greater(a, tap, b, other):
    """The first of equals, and the last NaN."""
    better = (b > a) | (b != b)
    return tl.where(better, b, a), tl.where(better, other, tap)


@triton.jit
def _max_pool_blocks_backward_kernel(
    dy, won, dx,
    M, ROWS, COLUMNS, H, W, OH, OW, C, dy_n, dy_h, dy_w, x_n, x_h, x_w,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    UH: tl.constexpr, UW: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr, TH: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """UH · SH × UW · SW pixels to a lane. Of window i + e, pixel h + o lies in row o + TOP − SH · e."""
    n, i, j, c, mask = _lanes_of(M, ROWS, COLUMNS, C, UH, UW, SPLIT, FULL, TH, BP, BC)
    of = n * dy_n + (i * dy_h + j * dy_w + c)
    acc = (tl.zeros((BP, BC), tl.float32),) * (UH * SH * UW * SW)
    for e in tl.static_range(-((KH - 1 - TOP) // SH), (SH * UH - 1 + TOP) // SH + 1):
        row = mask & _within(i + e, OH)
        for f in tl.static_range(-((KW - 1 - LEFT) // SW), (SW * UW - 1 + LEFT) // SW + 1):
            there = row & _within(j + f, OW)
            at = of + (e * dy_h + f * dy_w)
            tap = tl.load(won + at, there, other=-1).to(tl.int32)
            g = tl.load(dy + at, there, other=0.0).to(tl.float32)
            acc = _given(acc, g, tap, TOP - SH * e, LEFT - SW * f, KH, KW, UH * SH, UW * SW)
    _store_block(dx, acc, n * x_n + c, i * SH, j * SW, H, W, x_h, x_w, mask, UH * SH, UW * SW)


@triton.jit
def _given(acc, g, tap, TOP: tl.constexpr, LEFT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, HIGH: tl.constexpr,
           WIDE: tl.constexpr):  # fmt: skip
    """The sums of a block's pixels, and what a window gives to each of them."""
    found = ()
    for o in tl.static_range(HIGH):
        for p in tl.static_range(WIDE):
            total = acc[o * WIDE + p]
            if o + TOP >= 0 and o + TOP < KH and p + LEFT >= 0 and p + LEFT < KW:
                total = tl.where(tap == (o + TOP) * KW + p + LEFT, total + g, total)
            found += (total,)
    return found


@triton.jit
def _store_block(dx, block, at, h, w, H, W, x_h, x_w, mask, HIGH: tl.constexpr, WIDE: tl.constexpr):
    dx += at + (h * x_h + w * x_w)
    for o in tl.static_range(HIGH):
        for p in tl.static_range(WIDE):
            inside = mask & (h + o < H) & (w + p < W)
            tl.store(dx + (o * x_h + p * x_w), block[o * WIDE + p].to(dx.dtype.element_ty), inside)


@triton.jit
def _avg_pool_blocks_forward_kernel(
    x, y,
    M, ROWS, COLUMNS, OH, OW, H, W, C, x_n, x_h, x_w, y_n, y_h, y_w, SCALE,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    SAME: tl.constexpr, INCLUDE_PAD: tl.constexpr,
    UH: tl.constexpr, UW: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr, TH: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """SAME: SCALE is what every sum is multiplied by."""
    n, i, j, c, mask = _lanes_of(M, ROWS, COLUMNS, C, UH, UW, SPLIT, FULL, TH, BP, BC)
    h, w = i * SH - TOP, j * SW - LEFT
    x += n * x_n + (h * x_h + w * x_w + c)
    y += n * y_n + (i * y_h + j * y_w + c)
    rows = ()
    for u in tl.static_range(UH):
        for t in tl.static_range((SH * (u - 1) + KH) * (u > 0), SH * u + KH):
            there = mask & _within(h + t, H)
            pixels = _row(x + t * x_h, w, there, W, x_w, 0.0, 0, SW * (UW - 1) + KW)
            rows += (_sums(pixels, KW, SW, UW),)
        for v in tl.static_range(UW):
            total = rows[SH * u][v]
            for r in tl.static_range(1, KH):
                total += rows[SH * u + r][v]
            if SAME:
                total *= SCALE
            else:
                of_rows = covered(i + u, H, KH, SH, TOP, INCLUDE_PAD)
                total *= 1.0 / (of_rows * covered(j + v, W, KW, SW, LEFT, INCLUDE_PAD)).to(tl.float32)
            inside = mask & (i + u < OH) & (j + v < OW)
            tl.store(y + (u * y_h + v * y_w), total.to(y.dtype.element_ty), inside)


@triton.jit
def _sums(pixels, K: tl.constexpr, S: tl.constexpr, U: tl.constexpr):
    """Of each of U windows the sum of its K."""
    found = ()
    for v in tl.static_range(U):
        total = pixels[S * v]
        for q in tl.static_range(1, K):
            total += pixels[S * v + q]
        found += (total,)
    return found


@triton.jit
def _avg_pool_blocks_backward_kernel(
    dy, dx,
    M, ROWS, COLUMNS, H, W, OH, OW, C, dy_n, dy_h, dy_w, x_n, x_h, x_w, SCALE,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    SAME: tl.constexpr, INCLUDE_PAD: tl.constexpr,
    UH: tl.constexpr, UW: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr, TH: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    n, i, j, c, mask = _lanes_of(M, ROWS, COLUMNS, C, UH, UW, SPLIT, FULL, TH, BP, BC)
    dy += n * dy_n + (i * dy_h + j * dy_w + c)
    FIRST: tl.constexpr = -((KW - 1 - LEFT) // SW)
    LAST: tl.constexpr = (SW * UW - 1 + LEFT) // SW + 1
    acc = (tl.zeros((BP, BC), tl.float32),) * (UH * SH * UW * SW)
    for e in tl.static_range(-((KH - 1 - TOP) // SH), (SH * UH - 1 + TOP) // SH + 1):
        on = _within(i + e, OH)
        given = _row(dy + e * dy_h, j, mask & on, OW, dy_w, 0.0, FIRST, LAST)
        if SAME:
            given = _scaled(given, SCALE, LAST - FIRST)
        else:
            by = 1.0 / tl.where(on, covered(i + e, H, KH, SH, TOP, INCLUDE_PAD), 1).to(tl.float32)
            given = _shares(given, by, j, OW, W, KW, SW, LEFT, INCLUDE_PAD, FIRST, LAST)
        acc = _added(acc, _spread(given, KW, SW, LEFT, UW, FIRST), TOP - SH * e, KH, UH * SH, UW * SW)
    _store_block(dx, acc, n * x_n + c, i * SH, j * SW, H, W, x_h, x_w, mask, UH * SH, UW * SW)


@triton.jit
def _scaled(given, by, N: tl.constexpr):
    found = ()
    for f in tl.static_range(N):
        found += (given[f] * by,)
    return found


@triton.jit
def _shares(given, by, j, OW, W, K: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, INCLUDE_PAD: tl.constexpr,
            FIRST: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """Of gradients of windows in a row what each of their pixels has; by: 1 / (rows that count)."""
    found = ()
    for f in tl.static_range(FIRST, LAST):
        columns = tl.where(_within(j + f, OW), covered(j + f, W, K, S, PAD, INCLUDE_PAD), 1)
        found += (given[f - FIRST] * (by / columns.to(tl.float32)),)
    return found


@triton.jit
def _spread(given, K: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, U: tl.constexpr, FIRST: tl.constexpr):
    """What a row of windows, from the FIRST on, gives to each of U · S columns."""
    found = ()
    for p in tl.static_range(U * S):
        total = given[(p + PAD) // S - FIRST]
        for f in tl.static_range(-((K - 1 - PAD - p) // S), (p + PAD) // S):
            total += given[f - FIRST]
        found += (total,)
    return found


@triton.jit
def _added(acc, sums, TOP: tl.constexpr, KH: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr):
    """The sums of a block's pixels, and those of a row of windows, in which pixel o lies in row o + TOP."""
    found = ()
    for o in tl.static_range(HIGH):
        for p in tl.static_range(WIDE):
            total = acc[o * WIDE + p]
            if o + TOP >= 0 and o + TOP < KH:
                total += sums[p]
            found += (total,)
    return found


# --- launches --------------------------------------------------------------------------------------------------------


def _fits(window: Window, *arrays: Any) -> bool:
    """Whether these kernels are for a window, and for images such as these."""
    if arrays[0].ndim != 4 or window.dilation != (1, 1) or max(window.kernel) > MOST or window.taps == 1:
        return False
    steps = all([s <= k for s, k in zip(window.stride, window.kernel)])
    return steps and all([a.numel() > 0 for a in arrays]) and (_in_planes(*arrays) or _by_channels(*arrays))


def _by_channels(*arrays: Any) -> bool:
    near = all([a.stride(1) == 1 and a.shape[1] >= LEAST and not is_far(a) for a in arrays])
    return near and arrays[0].shape[0] <= LONGEST and arrays[0].shape[2] <= LONGEST


def _in_planes(*arrays: Any) -> bool:
    return all([a.is_contiguous() and not is_wide(a) for a in arrays])


def _plan(choice: _configs.Choice, x: Any, rows: int, columns: int, planes: bool) -> tuple[tuple, tuple, dict]:
    """(grid, blocks, tile) of a kernel that makes so many blocks of pixels in each image of ``x``."""
    n, c = x.shape[:2]
    length = 16 // x.element_size()
    entry = choice(_tile.device(x), x.numel() // c)
    if planes:
        lanes, blocks = 32 * entry.warps, n * c * rows * columns
        tile = {"SPLIT": False, "FULL": True, "TH": 0, "BP": lanes, "BC": 1, "num_warps": entry.warps}
        return (_tile.cdiv(blocks, lanes),), (blocks, rows, columns), tile
    channels = _channels(c)
    lanes = max(1, min(entry.elements, 32 * entry.warps * length) // channels)
    high = _high(lanes, rows, columns)
    parts = _tile.cdiv(c, channels)
    grid = (_tile.cdiv(columns * high, lanes) * parts, _tile.cdiv(rows, high), n)
    split, full = parts > 1, c % channels == 0
    tile = {"SPLIT": split, "FULL": full, "TH": high, "BP": lanes, "BC": channels, "num_warps": entry.warps}
    return grid, (None, None, None), tile


def _channels(c: int) -> int:
    """Of a program: as many as leave the fewest lanes idle."""
    return min((64, 32, 16, 8), key=lambda b: _tile.cdiv(c, b) * b)


def _high(lanes: int, rows: int, columns: int) -> int:
    """How many blocks of pixels below each other, such that the fewest of a program's lanes are idle; nearly a square of them."""
    if thread.compiler is not None:
        rows, columns = thread.compiler.hint(rows), thread.compiler.hint(columns)

    def idle(high: int) -> tuple[int, int]:
        return _tile.cdiv(rows, high) * _tile.cdiv(columns * high, lanes), abs(high * high - lanes)

    return min(range(1, min(lanes, rows) + 1), key=idle)


def _constants(window: Window, high: int, wide: int) -> dict[str, int]:
    (kh, kw), (sh, sw), (top, left) = window.kernel, window.stride, window.padding
    return {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "TOP": top, "LEFT": left, "UH": high, "UW": wide}


def _steps(x: Any, planes: bool) -> tuple[int, int, int]:
    n, c, h, w = x.stride()
    return c if planes else n, h, w


def _each(window: Window, forward: bool, planes: bool) -> tuple[int, int]:
    """Rows and columns of the windows (or, where they step, of the steps) that are a lane's: as many as share enough."""
    shared = any([k > s for k, s in zip(window.kernel, window.stride)])
    if planes:  # a warp's lanes move neighbours, so that stores are whole
        return 4 if window.kernel[0] > 1 and window.stride[0] <= 2 else 1, 2 if window.stride == (
            1,
            1,
        ) and shared else 1
    if window.stride == (1, 1) and shared:
        return 2, 2
    return 1, 2 if shared and forward else 1


def _forward(choice: _configs.Choice, x: Any, y: Any, window: Window) -> tuple[tuple, tuple, dict]:
    """(grid, sizes and steps, constants)"""
    planes = _in_planes(x, y)
    high, wide = _each(window, True, planes)
    grid, blocks, tile = _plan(choice, y, _tile.cdiv(y.shape[2], high), _tile.cdiv(y.shape[3], wide), planes)
    sizes = (*blocks, *y.shape[2:], *x.shape[2:], x.shape[1], *_steps(x, planes), *_steps(y, planes))
    return grid, sizes, {**_constants(window, high, wide), **tile}


def _backward(choice: _configs.Choice, dy: Any, dx: Any, window: Window) -> tuple[tuple, tuple, dict]:
    planes, (sh, sw) = _in_planes(dy, dx), window.stride
    high, wide = _each(window, False, planes)
    grid, blocks, tile = _plan(
        choice, dx, _tile.cdiv(dx.shape[2], high * sh), _tile.cdiv(dx.shape[3], wide * sw), planes
    )
    sizes = (*blocks, *dx.shape[2:], *dy.shape[2:], dx.shape[1], *_steps(dy, planes), *_steps(dx, planes))
    return grid, sizes, {**_constants(window, high, wide), **tile}


def max_forward(choice: _configs.Choice, x: Any, y: Any, tap: Any, indices: Any, window: Window) -> bool:
    """Whether it has been done."""
    fits = _fits(window, x, y) and x.shape[2] * x.shape[3] < 2**31
    if fits:
        grid, sizes, constants = _forward(choice, x, y, window)
        _tile.launch(_max_pool_blocks_forward_kernel, grid, x, y, tap, indices, *sizes, **constants)
    return fits


def max_backward(choice: _configs.Choice, dy: Any, tap: Any, dx: Any, window: Window) -> bool:
    fits = _fits(window, dx, dy, tap) and dy.stride() == tap.stride()
    if fits:
        grid, sizes, constants = _backward(choice, dy, dx, window)
        _tile.launch(_max_pool_blocks_backward_kernel, grid, dy, tap, dx, *sizes, **constants)
    return fits


def avg_forward(choice: _configs.Choice, x: Any, y: Any, window: Window, divisor: Divisor) -> bool:
    fits = _fits(window, x, y)
    if fits:
        scale, how = divisors(window, divisor, x.shape[2:], y.shape[2:])
        grid, sizes, constants = _forward(choice, x, y, window)
        _tile.launch(_avg_pool_blocks_forward_kernel, grid, x, y, *sizes, scale, **how, **constants)
    return fits


def avg_backward(choice: _configs.Choice, dy: Any, dx: Any, window: Window, divisor: Divisor) -> bool:
    fits = _fits(window, dx, dy)
    if fits:
        scale, how = divisors(window, divisor, dx.shape[2:], dy.shape[2:])
        grid, sizes, constants = _backward(choice, dy, dx, window)
        _tile.launch(_avg_pool_blocks_backward_kernel, grid, dy, dx, *sizes, scale, **how, **constants)
    return fits
