"""Windows over three axes as constants of a kernel; the columns of a wide one are unrolled some at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from .._window import Window
from ._pixels import three

WIDEST = 32
"""Columns of a window that are unrolled all at once; of a wider one, so many at a time."""
AT_A_TIME = 8
_NAMES = {
    "kernel": ("KD", "KH", "KW"),
    "stride": ("SD", "SH", "SW"),
    "padding": ("FRONT", "TOP", "LEFT"),
    "dilation": ("DD", "DH", "DW"),
}


@triton.jit
def covered(i, size, taps, stride, pad, INCLUDE_PAD: tl.constexpr):
    """Rows (or columns) of window i that count."""
    start = i * stride - pad
    end = tl.minimum(start + taps, size + pad)
    if INCLUDE_PAD:
        return end - start
    else:
        return tl.minimum(end, size) - tl.maximum(start, 0)


def unrolled(columns: int) -> int:
    return columns if columns <= WIDEST else AT_A_TIME


def _constants(window: Window, of: tuple[str, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for option in of:
        found |= zip(_NAMES[option], three(getattr(window, option), int(option != "padding")))
    return found


def forward_constants(window: Window, *of: str) -> dict[str, int]:
    """Those options of a window, for a kernel that makes an output from what lies under it."""
    return {**_constants(window, of), "UNROLL": unrolled(window.kernel[-1])}


def backward_constants(window: Window, *of: str) -> dict[str, int]:
    """Those options, and how many windows a pixel may lie under."""
    laps = dict(zip(("LAPS_D", "LAPS_H", "LAPS_W"), three(window.laps, 1)))
    return {**_constants(window, of), **laps, "UNROLL": unrolled(window.laps[-1])}
