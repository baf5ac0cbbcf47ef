"""Resizing of channels-last images: a lane takes 16 bytes of a pixel's channels, or twice as many, and what its tables say once
for all of them."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._image import first_of, is_wide, pixel_tile
from ._resize_tables import Axis
from ._runs import divided

BUDGETS = {
    # Tables are read number by number.
    "_resample_last_kernel": Budget(
        registers=168,
        blocks=3,
        narrow=lambda c: "loads, stores" if c["BC"] < 8 or "C" in c["odd"] else "loads",
    )
}


@triton.jit
def _resample_last_kernel(
    x, y, of_h, by_h, of_w, by_w,
    M, OH, OW, C, x_n, x_h, x_w,
    KH: tl.constexpr, KW: tl.constexpr, STEP: tl.constexpr, TWO: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """STEP: rows that are unrolled. TWO: each lane has BC channels further on ones as well."""
    pixel = first_of(M, BP) + tl.arange(0, BP)
    inside = pixel < M
    row = divided(pixel, OW)
    n = divided(row, OH)
    h, w = row - n * OH, pixel - row * OW
    c = tl.program_id(1) * (2 * BC if TWO else BC) + tl.arange(0, BC)[None, :]
    x += (n * x_n)[:, None] + c
    acc = tl.zeros((BP, BC), tl.float32)
    more = acc
    for first in range(0, KH, STEP):
        for b in tl.static_range(STEP):
            i = tl.load(of_h + (first + b) * OH + h, inside, other=-1)
            weight = tl.load(by_h + (first + b) * OH + h, inside, other=0.0)
            for e in tl.static_range(KW):
                k = tl.load(of_w + e * OW + w, inside, other=-1)
                by = weight * tl.load(by_w + e * OW + w, inside, other=0.0)
                there = ((i | k) >= 0)[:, None] & (c < C)
                source = x + (i * x_h + k * x_w)[:, None]
                acc += tl.load(source, there, other=0.0).to(tl.float32) * by[:, None]
                if TWO:
                    more += tl.load(source + BC, there, other=0.0).to(tl.float32) * by[:, None]
    y += (pixel * C)[:, None] + c
    tl.store(y, acc.to(y.dtype.element_ty), inside[:, None] & (c < C))
    if TWO:
        tl.store(y + BC, more.to(y.dtype.element_ty), inside[:, None] & (c < C))


def resample(choice: _configs.Choice, x: Any, y: Any, rows: Axis, columns: Axis) -> bool:
    """y (N, C, H, W) from x, by the tables of y's rows and columns. Whether it has been done."""
    n, c, h, w = y.shape
    fits = c > 1 and columns.taps <= MOST_COLUMNS and x.stride(1) == 1 and y.permute(0, 2, 3, 1).is_contiguous()
    if not fits or is_wide(x, y) or not y.numel():
        return False
    entry = choice(_tile.device(x), n * h * w)
    pixels, channels = pixel_tile(y, n * h * w, entry.elements)
    half = next((b for b in (64, 32, 16) if c % (2 * b) == 0), 0)
    if half:
        pixels, channels = _tile.next_power_of_2(n * h * w, entry.elements // half), half
    x_n, _, x_h, x_w = x.stride()
    _tile.launch(
        _resample_last_kernel, (_tile.cdiv(n * h * w, pixels), _tile.cdiv(c, 2 * half or channels)), x, y, *rows[:2], *columns[:2],
        n * h * w, h, w, c, x_n, x_h, x_w,
        KH=rows.taps, KW=columns.taps, STEP=rows.taps if rows.taps * columns.taps <= UNROLLED else 1, TWO=half > 0, BP=pixels, BC=channels,
        num_warps=entry.warps,
    )  # fmt: skip
    return True


MOST_COLUMNS = 12
"""Taps of a row that are unrolled."""
UNROLLED = 8
"""Taps of an image that are."""
