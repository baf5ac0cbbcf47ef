"""Means of whole images of a few pixels, as networks end with, and what a mean gives back to each of its pixels.

Where channels are neighbours a lane has 16 bytes of them. Of row-major images the planes lie behind each other: eight lanes add
up one of them, and on the way back a run of 16 bytes (of fewer, in planes of fewer) ends in the next plane at most.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._image import evenly_spaced, first_of, flattened, is_wide
from ._runs import divided

BUDGETS = {
    # Planes of an odd number of pixels begin anywhere.
    "_mean_of_few_kernel": Budget(registers=128, blocks=4, narrow=lambda c: "loads" if c.get("x_w") == 1 else ""),
    # One dy serves a whole image.
    "_mean_to_planes_kernel": Budget(
        registers=64, blocks=8, narrow=lambda c: "loads" if c["V"] > 2 else "loads, stores"
    ),
    "_mean_to_pixels_kernel": Budget(registers=64, blocks=8),
}
FEW = 32
"""Rounds of a sum, all of which are unrolled."""
LONGEST = 65535
"""The second and the third axis of a grid."""


@triton.jit
def _mean_of_few_kernel(
    x, y, C, x_n, x_w, x_c, SCALE, P: tl.constexpr, FULL: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr
):
    """y[n, c] = SCALE · Σ over P pixels of x[n, c, pixel], BP of them at a time."""
    n = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    p = tl.arange(0, BP)[:, None]
    mask = FULL | (c < C)
    x += n * x_n + (c * x_c + p * x_w)
    acc = tl.zeros((BP, BC), tl.float32)
    for first in tl.static_range(0, P, BP):
        there = mask if first + BP <= P else mask & (p < P - first)
        acc += tl.load(x + first * x_w, there, other=0.0).to(tl.float32)
    total = tl.sum(acc, 0, keep_dims=True) * SCALE
    tl.store(y + n * C + c, total.to(y.dtype.element_ty), mask)


@triton.jit
def _mean_to_planes_kernel(dy, dx, M, P, PLANES, SCALE, WHOLE: tl.constexpr, V: tl.constexpr, BL: tl.constexpr):
    """dx[e] = SCALE · dy[e // P] of M numbers. WHOLE: V divides M; V ≤ P."""
    at = (first_of(M, BL * V) + tl.arange(0, BL) * V)[:, None]
    plane = divided(at, P)
    here = tl.load(dy + plane, at < M, other=0.0).to(tl.float32) * SCALE
    after = tl.load(dy + tl.minimum(plane + 1, PLANES - 1), at < M, other=0.0).to(tl.float32) * SCALE
    v = tl.arange(0, V)[None, :]
    g = tl.where(v < (plane + 1) * P - at, here.to(dx.dtype.element_ty), after.to(dx.dtype.element_ty))
    tl.store(dx + (at + v), g, at < M if WHOLE else v < M - at)


@triton.jit
def _mean_to_pixels_kernel(
    dy, dx, C, P, dy_n, x_n, x_w, SCALE,
    FULL: tl.constexpr, ROUNDS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx[n, pixel, c] = SCALE · dy[n, c] of ROUNDS · BP pixels."""
    n = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    p = tl.program_id(1) * (BP * ROUNDS) + tl.arange(0, BP)[:, None]
    mask = FULL | (c < C)
    g = tl.load(dy + n * dy_n + (p * 0 + c), mask & (p < P), other=0.0).to(tl.float32) * SCALE
    g = g.to(dx.dtype.element_ty)
    dx += n * x_n + (p * x_w + c)
    for k in tl.static_range(ROUNDS):
        tl.store(dx + k * BP * x_w, g, mask & (p + k * BP < P))


# --- launches --------------------------------------------------------------------------------------------------------


def _last(x: Any) -> bool:
    """Whether 16 bytes of channels are neighbours, and pixels evenly spaced."""
    return x.stride(1) == 1 and x.shape[1] >= 8 and x.shape[0] <= LONGEST and evenly_spaced(x) and not is_wide(x)


def _channels(x: Any, warps: int) -> tuple[int, int]:
    """(pixels, channels) of a tile with 16 bytes to a lane."""
    channels = min(64, _tile.next_power_of_2(x.shape[1]))
    return max(1, 32 * warps * 16 // x.element_size() // channels), channels


def forward(x: Any, y: Any) -> bool:
    """Whether it has been done."""
    pixels = math.prod(x.shape[2:])
    if type(pixels) is not int or not x.numel():
        return False
    n, c = x.shape[:2]
    if _last(x):
        warps, (rows, channels) = 1, _channels(x, 1)
        steps = x.stride(0), flattened(x).stride(-1), 1
    elif x.is_contiguous() and not is_wide(x) and pixels % 8:
        n, c, warps, rows = 1, n * c, 4, 8 if pixels <= 64 else 32
        channels, steps = 4 * 32 * warps // rows, (0, 1, pixels)
    else:
        return False
    few = pixels <= FEW * rows
    if few:
        _tile.launch(
            _mean_of_few_kernel, (_tile.cdiv(c, channels), n), x, y, c, *steps, 1 / pixels,
            P=pixels, FULL=c % channels == 0, BP=rows, BC=channels, num_warps=warps,
        )  # fmt: skip
    return few


def backward(choice: _configs.Choice, dy: Any, dx: Any) -> bool:
    pixels, (n, c) = math.prod(dx.shape[2:]), dx.shape[:2]
    if not dx.numel() or dy.stride(1) != 1:
        return False
    entry, scale = choice(_tile.device(dx), n * pixels), 1 / pixels
    if _last(dx):
        few = pixels <= 64
        warps = 1 if few else entry.warps
        rows, channels = _channels(dx, warps)
        rounds = _tile.cdiv(pixels, rows) if few else 8
        grid = (_tile.cdiv(c, channels), _tile.cdiv(pixels, rows * rounds), n)
        _tile.launch(
            _mean_to_pixels_kernel, grid, dy, dx, c, pixels, dy.stride(0), dx.stride(0), flattened(dx).stride(-1), scale,
            FULL=c % channels == 0, ROUNDS=rounds, BP=rows, BC=channels, num_warps=warps,
        )  # fmt: skip
        return True
    if dx.is_contiguous() and dy.is_contiguous() and not is_wide(dx):
        length = next(v for v in (16 // dx.element_size(), 4, 2, 1) if v <= pixels)
        lanes, whole = 32 * entry.warps, dx.numel() % length == 0
        _tile.launch(
            _mean_to_planes_kernel, (_tile.cdiv(dx.numel(), lanes * length),), dy, dx, dx.numel(), pixels, n * c, scale,
            WHOLE=whole, V=length, BL=lanes, num_warps=entry.warps,
        )  # fmt: skip
        return True
    return False
