"""How kernels walk over pixels × channels of images and volumes, (N, C, H, W) and (N, C, D, H, W), of any strides.

A kernel sees three axes. DEEP says that the first of them is there: without, nothing of it is compiled. WIDE says that an
image's elements lie so far apart that their places take 64 bits; images themselves are always found in 64.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from . import _configs, _tile
from ._image import pixel_tile, pixels_of


@triton.jit
def voxels_of(M, D, H, W, C, DEEP: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """(n, d, h, w, c, mask) of this program's pixels × channels: (BP, 1) four times, (1, BC), (BP, BC)."""
    if DEEP:
        n, row, w, c, mask = pixels_of(M, D * H * W, W, C, BP, BC)
        return n, row // H, row % H, w, c, mask
    else:
        n, h, w, c, mask = pixels_of(M, H * W, W, C, BP, BC)
        return n, h, h, w, c, mask


@triton.jit
def step_to(at, step, WIDE: tl.constexpr):
    """How far the ``at``-th place along an axis lies."""
    if WIDE:
        return at.to(tl.int64) * step
    else:
        return at * step


@triton.jit
def placed(d, h, w, s_d, s_h, s_w, DEEP: tl.constexpr, WIDE: tl.constexpr):
    """How far a pixel lies from its image's first."""
    within = step_to(h, s_h, WIDE) + step_to(w, s_w, WIDE)
    if DEEP:
        within += step_to(d, s_d, WIDE)
    return within


def pixel_plan(choice: _configs.Choice, x: Any, *others: Any) -> tuple[tuple, dict]:
    """(grid, tile) for a kernel that makes every pixel of every channel of ``x``, and reads or writes the others, too."""
    n, c, *sizes = x.shape
    pixels = n * math.prod(sizes)
    entry = choice(_tile.device(x), pixels)
    # Channels first, or of few channels, a lane's pixels have places of their own; a volume's take so many registers that it
    # has half of them.
    own = x.ndim == 5 and (x.stride(1) != 1 or c < 8)
    rows, channels = pixel_tile(x, pixels, entry.elements // 2 if own else entry.elements)
    tile = {"DEEP": x.ndim == 5, "WIDE": is_far(x, *others), "BP": rows, "BC": channels, "num_warps": entry.warps}
    if x.ndim == 5:
        tile["maxnreg"] = _tile.MOST_REGISTERS
    return (_tile.cdiv(pixels, rows), _tile.cdiv(c, channels)), tile


def is_far(*arrays: Any) -> bool:
    """Whether an element may lie too far from its image's first for 32 bits."""
    return any([_reach(a) >= 2**31 for a in arrays])


def _reach(x: Any) -> int:
    """Elements from an image's first to its last."""
    return sum([(size - 1) * step for size, step in zip(x.shape[1:], x.stride()[1:])])


def sizes_of(out: Any, other: Any) -> tuple:
    """(pixels of ``out``, its D, H, W, the other's D, H, W, C); no depth is 1."""
    n, c, *sizes = out.shape
    return n * math.prod(sizes), *three(sizes, 1), *three(other.shape[2:], 1), c


def steps_of(x: Any) -> tuple[int, ...]:
    """Strides in the order n, d, h, w, c; no depth is 0."""
    n, c, *pixels = x.stride()
    return n, *three(pixels, 0), c


def three(values: Any, fill: int) -> tuple[int, ...]:
    """``values`` of an image or a volume, for three axes."""
    return (*(fill,) * (3 - len(values)), *values)
