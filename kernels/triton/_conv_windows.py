"""Convolutions of images with few channels, as the first of a network, on the tiles of ``_conv_tiles.py``.

Where channels are neighbours in memory, all columns under a row of the kernel are neighbours, too: a run of kw · C elements.
So an image whose pixels are those runs, SW · C elements apart, is convolved by a kernel of one column. A descriptor wants
steps of 16 bytes, and zeros where a run begins before a row: the image is copied with zeros around its rows and channels
enough beside its own.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._conv import FEW_CHANNELS, Walk
from ._conv_runs import apart
from ._conv_tiles import VIEWS, Axis, in_rows, machine_refusal, rows_of, summed
from ._conv_tiles_weight import shares_of
from ._epilogue import Epilogue
from ._image import finish

BUDGETS = {
    # A run of few channels begins anywhere.
    "_conv_windows_kernel": Budget(registers=64, blocks=8, narrow="loads"),
}
MOST_RUN = 256
"""Elements of a run: the longest side of a box."""


@triton.jit
def _conv_windows_kernel(
    x, y, H, W, C, PADDED, LEFT, ROW, x_n, x_h, x_w, x_c, BLOCK: tl.constexpr
):  # fmt: skip
    """y[n, h, PADDED · (LEFT + w) + c] = x[n, h, w, c] in rows of ROW elements, and zeros around."""
    blocks = tl.cdiv(ROW, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    w = at // PADDED - LEFT
    c = at % PADDED
    there = (at < ROW) & (w >= 0) & (w < W) & (c < C)
    value = tl.load(x + row // H * x_n + row % H * x_h + w.to(tl.int64) * x_w + c.to(tl.int64) * x_c, there, other=0.0)
    tl.store(y + row * ROW + at, value, at < ROW)


WINDOWS = _configs.rows("conv_windows")


def _padded_channels(c: int, step: int) -> int:
    """So many that a step of windows is a multiple of 16 bytes."""
    return next(n for n in range(c, c + 8) if n * step % 8 == 0)


def refusal(x: Any, y: Any, kernel: tuple, walk: Walk) -> str | None:
    """Why a convolution of x (or its dweight, from dy for y) is not done by windows; None if it is. kernel: three sizes."""
    c, (_, sh, sw), (_, dh, dw) = x.shape[1], walk.stride, walk.dilation
    if reason := machine_refusal(x, y):
        return reason
    if {x.shape[2], y.shape[2], kernel[0], walk.stride[0]} != {1} or walk.before[0]:
        return "a third spatial axis"
    if c >= FEW_CHANNELS or walk.groups > 1:
        return "channels enough for tiles, or groups"
    if apart(x, kernel, y, walk):
        return "windows that share no column, which lie in memory as runs already"
    if y.shape[1] % 8 or not in_rows(y):
        return "a result whose channels are not neighbours in memory, or no multiple of 8"
    if dw > 1 < kernel[2] or kernel[2] * _padded_channels(c, sw) > MOST_RUN:
        return f"columns under a kernel that are not neighbours, or more than {MOST_RUN} elements"
    if x.shape[3] < sh or Axis.of(kernel[1], sh, 0, dh).views > VIEWS:
        return "an image smaller than its stride, or too many views of it"
    return None


def _spread(x: Any, left: int, channels: int, row: int, empty: Any) -> Any:
    """(N · H, row): rows of x (N, C, 1, H, W), each pixel as many channels, after ``left`` pixels of zeros."""
    n, c, _, h, w = x.shape
    y = empty((n * h, row), x.dtype)
    entry = WINDOWS(_tile.device(x), row)
    x_n, x_c, _, x_h, x_w = x.stride()
    _tile.launch(
        _conv_windows_kernel, (n * h * _tile.cdiv(row, entry.elements),), x, y, h, w, c, channels, left, row,
        x_n, x_h, x_w, x_c, BLOCK=entry.elements, num_warps=entry.warps,
    )  # fmt: skip
    return y


def _windows(x: Any, y: Any, kernel: tuple, walk: Walk, empty: Any) -> tuple[Any, int, int]:
    """(x as (N, H, OW, run), channels of its pixels, elements of a run rounded up to a step of products)."""
    (n, c, _, h, _), ow, kw, step = x.shape, y.shape[4], kernel[2], walk.stride[2]
    channels = _padded_channels(c, step)
    row = _tile.cdiv(((ow - 1) * step + kw) * channels, 16) * 16
    rows = _spread(x, walk.before[2], channels, row, empty)
    run = kw * channels
    return rows.as_strided((n, h, ow, run), (h * row, row, step * channels, 1)), channels, _tile.cdiv(run, 16) * 16


def _walks(kernel: tuple, walk: Walk) -> list[Axis]:
    return [Axis.of(kernel[1], walk.stride[1], walk.before[1], walk.dilation[1]), Axis.of(1, 1, 0, 1)]


def forward(x: Any, taps: Any, end: Epilogue, y: Any, walk: Walk, empty: Any, moments: Any = None) -> list[Any]:
    """y of a convolution that is not refused. taps: (O, C, 1, kh, kw). moments: as in ``_conv_tiles.forward``."""
    kernel = tuple(taps.shape[2:])
    windows, channels, run = _windows(x, y, kernel, walk, empty)
    weights = _spread(taps, 0, channels, run, empty).view(taps.shape[0], kernel[1], run)
    return summed(windows, weights, end, rows_of(y), _walks(kernel, walk), (kernel[1], 1), 1, moments)


def weight_gradient(dy: Any, x: Any, dweight: Any, walk: Walk, empty: Any) -> None:
    o, c, *kernel = dweight.shape
    windows, channels, run = _windows(x, dy, tuple(kernel), walk, empty)
    partial = shares_of(rows_of(dy), windows, _walks(tuple(kernel), walk), (o, run, 1, kernel[1], 1), 1, empty)
    whole = empty((o, kernel[1], run), dweight.dtype)
    finish(partial, whole.permute(0, 2, 1).unsqueeze(3))
    taps = whole[:, :, : kernel[2] * channels].unflatten(2, (kernel[2], channels))[..., :c]
    _tile.copy(taps.permute(0, 3, 1, 2).unsqueeze(2), dweight)
