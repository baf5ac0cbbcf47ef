"""Windows as columns, and back; pixels to channels, and back. Bound by memory: every kernel reads each element that its
output shows, and adds nothing to memory in turn.

- unfold gathers: a program copies one tap of a run of windows; rows of whole runs of 16 bytes are in ``_window_runs``.
- fold gathers, too: a pixel looks up the windows that it lies in, at most ⌈span / stride⌉ along each axis.
- the shuffles are one copy of permuted axes, which reads along x's neighbours and writes along y's; where those of a few
  short axes lie in one run of either, the run is moved as it lies and turned in registers.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from .._window import Window, output_order
from . import _configs, _tile, _window_runs
from ._image import evenly_spaced, first_of, image_pixel, is_wide, pixel_tile, run_of, steps


def _narrow_copy(c: dict[str, Any]) -> str:
    """A copy that turns axes elsewhere than in registers moves 16 bytes along one of its two arrays at most."""
    long = {"x": "L", "y": "F"}.get(c["KNIT"])
    knit = long is not None and long not in c["odd"]
    return "" if knit or (c["BF"] == 1 and c["BL"] >= 8) else "loads, stores"


BUDGETS = {
    "_unfold_kernel": Budget(registers=96, blocks=4, narrow="loads, stores"),
    "_fold_kernel": Budget(registers=128, blocks=3, narrow="loads, stores"),
    "_shuffle_kernel": Budget(registers=96, blocks=4, narrow=_narrow_copy),
}


# --- unfold ----------------------------------------------------------------------------------------------------------


@triton.jit
def _unfold_kernel(
    x, y,
    C, H, W, OW, L, TAPS, KW, x_n, x_h, x_w, x_c, y_n, y_c, y_l, TOP, LEFT, DOWN, ACROSS, SH, SW,
    MANY: tl.constexpr, WIDE: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """y[n, c · TAPS + tap, l] = the tap's pixel of window l; DOWN, ACROSS: the dilation, SH, SW: the stride; MANY: neighbouring
    taps of a row that a program has."""
    pid = tl.program_id(0)
    blocks = (L - 1) // BL + 1
    l = pid % blocks * BL + tl.arange(0, BL)[None, :]
    tap = pid // blocks % (TAPS // MANY) * MANY
    n = pid // blocks // (TAPS // MANY)
    c = tl.program_id(1) * BC + tl.arange(0, BC)[:, None]
    h, w = l // OW * SH + tap // KW * DOWN - TOP, l % OW * SW + tap % KW * ACROSS - LEFT
    fits = (h >= 0) & (h < H) & (l < L) & (c < C)
    row = c * TAPS + tap
    if WIDE:
        n, l, c, h, w, row = (
            n.to(tl.int64), l.to(tl.int64), c.to(tl.int64), h.to(tl.int64), w.to(tl.int64), row.to(tl.int64)
        )  # fmt: skip
    x += n * x_n + h * x_h + c * x_c
    y += n * y_n + l * y_l
    for q in tl.static_range(MANY):
        at = w + q * ACROSS
        v = tl.load(x + at * x_w, fits & (at >= 0) & (at < W), other=0.0)
        tl.store(y + (row + q) * y_c, v, (l < L) & (c < C))


UNFOLD = _configs.rows("unfold")
MOST_TAPS = 4
"""Of a row, that are unrolled."""


def _tiles(window: Window, x: Any) -> bool:
    """Whether windows lie side by side and cover an image: each pixel is in one of them."""
    side_by_side = window.stride == window.kernel and window.padding == (0, 0) and window.dilation == (1, 1)
    return side_by_side and all([n % k == 0 for n, k in zip(x.shape[2:], window.kernel)])


def _parted(x: Any, window: Window) -> Any:
    """Images whose windows lie side by side as (N, C, kh, kw, windows down, across), a view."""
    (n, c, h, w), (kh, kw) = x.shape, window.kernel
    return x.view(n, c, h // kh, kh, w // kw, kw).permute(0, 1, 3, 5, 2, 4)


def _unfold(x: Any, y: Any, window: Window) -> None:
    """y (N, C · taps, windows) from images x; both of any strides."""
    if _tiles(window, x):
        parts = _parted(x, window)
        return _shuffle(parts, y.view(parts.shape))
    if _window_runs.unfold(UNFOLD, x, y, window):
        return
    n, c, h, w = x.shape
    counts = window.output_size((h, w), window.padding)
    count = math.prod(counts)
    entry = UNFOLD(_tile.device(x), count)
    channels = min(_tile.next_power_of_2(c), 32) if x.stride(1) == 1 else 1
    run = _tile.next_power_of_2(count, max(1, entry.elements // channels))
    channels = min(_tile.next_power_of_2(c), max(1, entry.elements // run))
    many = window.kernel[1] if window.kernel[1] <= MOST_TAPS else 1
    grid = (n * (window.taps // many) * _tile.cdiv(count, run), _tile.cdiv(c, channels))
    _tile.launch(
        _unfold_kernel, grid, x, y, c, h, w, counts[1], count, window.taps, window.kernel[1], *steps(x), *y.stride(),
        *window.padding, *window.dilation, *window.stride,
        MANY=many, WIDE=is_wide(x, y), BC=channels, BL=run, num_warps=entry.warps,
    )  # fmt: skip


# --- fold ------------------------------------------------------------------------------------------------------------


@triton.jit
def _fold_kernel(
    y, x,
    M, P, W, C, OH, OW, KH, KW, TAPS, y_n, y_c, y_l, x_n, x_h, x_w, x_c, TOP, LEFT, DOWN, ACROSS, SH, SW,
    UP: tl.constexpr, OVER: tl.constexpr, MANY: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """x[pixel, c] = Σ of y over the windows that the pixel lies in: UP along a column, OVER along a row, at most, MANY of
    these unrolled. Pixels are neighbouring lanes', as windows in y are; x turns the tile where it is channels-last."""
    start = first_of(M, BP)
    n, pixel = image_pixel(start, P, ALIGNED, BP)
    n, pixel = n[None, :], pixel[None, :]
    c = tl.program_id(1) * BC + tl.arange(0, BC)[:, None]
    mask = (tl.arange(0, BP) < M - start)[None, :] & (c < C)
    if WIDE:
        c, pixel = c.to(tl.int64), pixel.to(tl.int64)
    else:
        n = n.to(tl.int32)
    h, w = pixel // W, pixel % W
    acc = tl.zeros((BC, BP), tl.float32)
    source = y + n * y_n + c * TAPS * y_c
    for a in range(UP):
        i = (h + TOP) // SH - a
        down = h + TOP - i * SH
        r = down // DOWN
        of_row = (i >= 0) & (i < OH) & (r < KH) & (r * DOWN == down)
        for first in range(0, OVER, MANY):
            for b in tl.static_range(MANY):
                j = (w + LEFT) // SW - (first + b)
                over = w + LEFT - j * SW
                q = over // ACROSS
                hit = of_row & (j >= 0) & (j < OW) & (q < KW) & (q * ACROSS == over) & mask
                acc += tl.load(source + (r * KW + q) * y_c + (i * OW + j) * y_l, hit, other=0.0).to(tl.float32)
    if EVEN:
        place = x + n * x_n + pixel * x_w + c * x_c
    else:
        place = x + n * x_n + h * x_h + w * x_w + c * x_c
    tl.store(place, acc.to(x.dtype.element_ty), mask)


FOLD = _configs.rows("fold")


def _fold(y: Any, x: Any, window: Window) -> None:
    """Images x from y (N, C · taps, windows); both of any strides."""
    if _tiles(window, x):
        parts = _parted(x, window)
        return _shuffle(y.view(parts.shape), parts)
    if _window_runs.fold(FOLD, y, x, window):
        return
    n, c, h, w = x.shape
    entry = FOLD(_tile.device(x), n * h * w)
    pixels, channels = pixel_tile(x, n * h * w, entry.elements)
    if channels == 64:
        pixels, channels = _tile.next_power_of_2(n * h * w, entry.elements // 32), 32
    grid = (_tile.cdiv(n * h * w, pixels), _tile.cdiv(c, channels))
    up, over = window.laps
    many = over if over <= MOST_TAPS else 1
    _tile.launch(
        _fold_kernel, grid, y, x, n * h * w, h * w, w, c, *window.output_size((h, w), window.padding), *window.kernel,
        window.taps, *y.stride(), *steps(x), *window.padding, *window.dilation, *window.stride,
        UP=up, OVER=over, MANY=many, EVEN=evenly_spaced(x), ALIGNED=run_of(h * w, pixels), WIDE=is_wide(x, y),
        BP=pixels, BC=channels, num_warps=entry.warps,
    )  # fmt: skip


def unfold_forward(
    x: Any, *, needs: tuple = (), kernel_size: tuple, dilation: tuple, padding: tuple, stride: tuple, empty: Any
) -> tuple[tuple, dict]:
    window, (n, c, *size) = Window(kernel_size, stride, padding, dilation), x.shape
    y = empty((n, c * window.taps, math.prod(window.output_size(size, padding))), x.dtype)
    _unfold(x, y, window)
    return (y,), {}


def unfold_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    kernel_size: tuple,
    dilation: tuple,
    padding: tuple,
    stride: tuple,
    empty: Any,
) -> tuple:
    (x,) = inputs
    dx = empty(x.shape, x.dtype, x.like().order)
    _fold(dys[0], dx, Window(kernel_size, stride, padding, dilation))
    return (dx,)


def fold_forward(
    x: Any,
    *,
    needs: tuple = (),
    output_size: tuple,
    kernel_size: tuple,
    dilation: tuple,
    padding: tuple,
    stride: tuple,
    empty: Any,
) -> tuple[tuple, dict]:
    window = Window(kernel_size, stride, padding, dilation)
    y = empty((x.shape[0], x.shape[1] // window.taps, *output_size), x.dtype)
    _fold(x, y, window)
    return (y,), {}


def fold_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    output_size: tuple,
    kernel_size: tuple,
    dilation: tuple,
    padding: tuple,
    stride: tuple,
    empty: Any,
) -> tuple:
    (x,) = inputs
    dx = empty(x.shape, x.dtype, x.like().order)
    _unfold(dys[0], dx, Window(kernel_size, stride, padding, dilation))
    return (dx,)


# --- shuffles --------------------------------------------------------------------------------------------------------


@triton.jit
def _stepped(b, S1, S2, S3, s_0, s_1, s_2, s_3, AXES: tl.constexpr):
    """How far the b-th of up to four axes' places lies, S3 the size of the last."""
    to = b * 0
    if AXES > 1:
        to, b = to + b % S3 * s_3, b // S3
    if AXES > 2:
        to, b = to + b % S2 * s_2, b // S2
    if AXES > 3:
        to, b = to + b % S1 * s_1, b // S1
    return to + b * s_0


@triton.jit
def _shuffle_kernel(
    x, y,
    B, S1, S2, S3, F, L, x_0, x_1, x_2, x_3, x_f, x_l, x_m, y_0, y_1, y_2, y_3, y_f, y_l, y_m,
    KNIT: tl.constexpr, INNER: tl.constexpr, AXES: tl.constexpr, WIDE: tl.constexpr,
    BB: tl.constexpr, BF: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """y[b, f, l] = x[b, f, l], b a number for up to four axes.

    KNIT: (f, l) is one run of y ("y"), or (l, f) one of x ("x"), of BL or BF to a step, which has INNER of one axis for each
    of another, m: the run is moved as it lies, and turned in between.
    """
    tiles_f, tiles_l = (F - 1) // BF + 1, (L - 1) // BL + 1
    pid = tl.program_id(0)
    of_l, of_f, of_b = pid % tiles_l * BL, pid // tiles_l % tiles_f * BF, pid // tiles_l // tiles_f * BB
    l = of_l + tl.arange(0, BL)[None, None, :]
    f = of_f + tl.arange(0, BF)[None, :, None]
    b = of_b + tl.arange(0, BB)[:, None, None]
    row = of_b + tl.arange(0, BB)[:, None]
    # Of a knit tile one of the first two is 0.
    run = of_f * BL + of_l * BF + tl.arange(0, BF * BL)[None, :]
    mask = (b < B) & (f < F) & (l < L)
    if WIDE:
        b, f, l, row, run = b.to(tl.int64), f.to(tl.int64), l.to(tl.int64), row.to(tl.int64), run.to(tl.int64)
    if KNIT == "x":
        source = x + _stepped(row, S1, S2, S3, x_0, x_1, x_2, x_3, AXES) + run
        v = tl.load(source, (row < B) & (run < L * BF), other=0.0)
        v = tl.permute(tl.reshape(v, (BB, BL, BF)), (0, 2, 1))
        f_to, l_to = f % INNER * y_f + f // INNER * y_m, l * y_l
    else:
        source = x + _stepped(b, S1, S2, S3, x_0, x_1, x_2, x_3, AXES)
        if KNIT == "y":
            source += f * x_f + l % INNER * x_l + l // INNER * x_m
        else:
            source += f * x_f + l * x_l
        v = tl.load(source, mask, other=0.0)
        f_to, l_to = f * y_f, l * y_l
    if KNIT == "y":
        target = y + _stepped(row, S1, S2, S3, y_0, y_1, y_2, y_3, AXES) + run
        tl.store(target, tl.reshape(v, (BB, BF * BL)), (row < B) & (run < F * BL))
    else:
        tl.store(y + _stepped(b, S1, S2, S3, y_0, y_1, y_2, y_3, AXES) + f_to + l_to, v, mask)


SHUFFLE = _configs.rows("shuffle")
Axis = tuple[int, int, int]
ONE: Axis = (1, 0, 0)
"""The axis of what has none."""


def _joined(x: Any, y: Any) -> list[Axis]:
    """(size, step in x, step in y) of each axis, slowest in y first; axes that are one in both arrays count once."""
    axes: list[Axis] = []
    for n, x_step, y_step in sorted(zip(x.shape, x.stride(), y.stride()), key=lambda axis: -axis[2]):
        if axes and axes[-1][1] == n * x_step and axes[-1][2] == n * y_step:
            axes[-1] = axes[-1][0] * n, x_step, y_step
        elif n != 1:
            axes.append((n, x_step, y_step))
    return axes or [(1, 1, 1)]


KNIT = 16
"""The longest step of a run that is turned in registers."""


def _knit(first: Axis, last: Axis, axes: list[Axis], run: int) -> tuple[Axis, Axis] | None:
    """(short, middle) axes where all elements of short, then of middle, then of the other lie in one run of x (1) or y (2)
    that is short enough to be turned; middle, of size 1 or taken from ``axes``, is between them."""
    short, long, other = (first, last, 2) if run == 1 else (last, first, 1)
    if short[run] != 1 or long[other] != 1:
        return None
    middle = next((axis for axis in axes if axis[run] == short[0]), None) if long[run] != short[0] else ONE
    if middle is None or long[run] != short[0] * middle[0]:
        return None
    step = short[0] * middle[0]
    return (short, middle) if 1 < step <= KNIT and step == _tile.next_power_of_2(step) else None


def _shuffle(x: Any, y: Any) -> None:
    """y[…] = x: views of one shape, whose axes lie in another order in each."""
    if not x.numel():
        return
    *axes, last = _joined(x, y)
    along = min(range(len(axes)), key=lambda i: (axes[i][1], -i), default=None)
    first = ONE if along is None else axes.pop(along)
    knit = ((run, _knit(first, last, axes, run)) for run in (1, 2))
    run, (short, middle) = next(((run, found) for run, found in knit if found), (0, (ONE, ONE)))
    if middle in axes:
        axes.remove(middle)
    step = short[0] * middle[0]
    f_size, l_size = step if run == 1 else first[0], step if run == 2 else last[0]
    axes.sort(key=lambda axis: -axis[1])  # neighbours in x are neighbours in a tile
    count = math.prod(axis[0] for axis in axes)
    entry = SHUFFLE(_tile.device(x), x.numel())
    most = entry.elements if first[0] == 1 or last[1] == 1 else entry.elements // f_size if run == 1 else 64
    wide = _tile.next_power_of_2(l_size, most)
    high = _tile.next_power_of_2(f_size, max(1, entry.elements // wide))
    many = _tile.next_power_of_2(count, max(1, entry.elements // wide // high))
    slowest, *others = axes or [ONE]
    sizes, x_steps, y_steps = zip(slowest, *[ONE] * (3 - len(others)), *others)  # the first is what is left of b
    grid = (_tile.cdiv(count, many) * _tile.cdiv(f_size, high) * _tile.cdiv(l_size, wide),)
    _tile.launch(
        _shuffle_kernel, grid, x, y, count, *sizes[1:], f_size, l_size, *x_steps, first[1], last[1], middle[1], *y_steps,
        first[2], last[2], middle[2], KNIT=("", "x", "y")[run], INNER=short[0], AXES=1 + len(others),
        WIDE=is_wide(x, y), BB=many, BF=high, BL=wide, num_warps=entry.warps,
    )  # fmt: skip


def _pixel_shuffle(x: Any, y: Any, r: int) -> None:
    n, c, h, w = x.shape
    parts = x.view(n, c // (r * r), r, r, h, w).permute(0, 1, 4, 2, 5, 3)
    _shuffle(parts, y.view(parts.shape))


def _pixel_unshuffle(x: Any, y: Any, r: int) -> None:
    n, c, h, w = y.shape
    parts = x.view(n, c // (r * r), h, r, w, r).permute(0, 1, 3, 5, 2, 4)
    _shuffle(parts, y.view(parts.shape))


def _channel_shuffle(x: Any, y: Any, groups: int) -> None:
    n, c, *size = x.shape
    parts = x.view(n, groups, c // groups, *size).transpose(1, 2)
    _shuffle(parts, y.view(parts.shape))


def pixel_shuffle_forward(x: Any, *, needs: tuple = (), upscale_factor: int, empty: Any) -> tuple[tuple, dict]:
    r, (n, c, h, w) = upscale_factor, x.shape
    y = empty((n, c // (r * r), h * r, w * r), x.dtype, output_order(x))
    _pixel_shuffle(x, y, r)
    return (y,), {}


def pixel_shuffle_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, upscale_factor: int, empty: Any
) -> tuple:
    (x,) = inputs
    dx = empty(x.shape, x.dtype, x.like().order)
    _pixel_unshuffle(dys[0], dx, upscale_factor)
    return (dx,)


def pixel_unshuffle_forward(x: Any, *, needs: tuple = (), downscale_factor: int, empty: Any) -> tuple[tuple, dict]:
    r, (n, c, h, w) = downscale_factor, x.shape
    y = empty((n, c * r * r, h // r, w // r), x.dtype, output_order(x))
    _pixel_unshuffle(x, y, r)
    return (y,), {}


def pixel_unshuffle_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, downscale_factor: int, empty: Any
) -> tuple:
    (x,) = inputs
    dx = empty(x.shape, x.dtype, x.like().order)
    _pixel_shuffle(dys[0], dx, downscale_factor)
    return (dx,)


def channel_shuffle_forward(x: Any, *, needs: tuple = (), groups: int, empty: Any) -> tuple[tuple, dict]:
    y = empty(x.shape, x.dtype, output_order(x))
    _channel_shuffle(x, y, groups)
    return (y,), {}


def channel_shuffle_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, groups: int, empty: Any) -> tuple:
    (x,) = inputs
    dx = empty(x.shape, x.dtype, x.like().order)
    _channel_shuffle(dys[0], dx, x.shape[1] // groups)
    return (dx,)
