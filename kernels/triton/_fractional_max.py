"""Maxima under windows of random steps. Where a channel's windows begin follows from one number in [0, 1) for each axis;
backward asks the windows that may lie over a pixel which pixel won."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget, channels_first
from .._window import image
from . import _configs, _tile
from ._adaptive_max import gathered, kept, outputs, returned, views
from ._pixels import pixel_plan, placed, sizes_of, step_to, steps_of, three, voxels_of
from ._random import word_of

BUDGETS = {
    "_samples_kernel": Budget(registers=64, blocks=8, narrow="loads"),
    # Each channel's windows are its own.
    "_fractional_max_pool_kernel": Budget(registers=208, blocks=2, narrow=lambda c: channels_first(c) or "loads"),
}


@triton.jit
def _samples_kernel(seed, samples, SIZE, BLOCK: tl.constexpr):
    """Philox's numbers in [0, 1), of 24 bits."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(samples + i, (word_of(seed, i) >> 8).to(tl.float32) * 5.9604644775390625e-08, i < SIZE)


@triton.jit
def _start(i, samples, channel, at, SIZE, OUT, K, ALPHA):
    """Where the i-th window begins along an axis, by the ``at``-th of its channel's samples."""
    u = 0.5
    if samples is not None:
        u = tl.load(samples + channel + at).to(tl.float32)
    step = ((i.to(tl.float32) + u) * ALPHA).to(tl.int32) - tl.floor(u * ALPHA).to(tl.int32)
    return tl.where(i == OUT - 1, SIZE - K, step)


@triton.jit
def _fractional_max_pool_kernel(
    x, samples, y, index, indices,
    M, DY, HY, WY, DX, HX, WX, C, x_n, x_d, x_h, x_w, x_c, y_n, y_d, y_h, y_w, y_c, ALPHA_D, ALPHA_H, ALPHA_W,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, AT_D: tl.constexpr, AT_H: tl.constexpr, AT_W: tl.constexpr,
    AXES: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """AT: which of a channel's samples is an axis'."""
    n, k, i, j, c, mask = voxels_of(M, DY, HY, WY, C, DEEP, BP, BC)
    channel = tl.where(mask, n * C + c, 0) * AXES
    top, front = i + c * 0, k
    if AXES > 1:
        top = _start(i, samples, channel, AT_H, HX, HY, KH, ALPHA_H)
    if DEEP:
        front = _start(k, samples, channel, AT_D, DX, DY, KD, ALPHA_D)
    left = _start(j, samples, channel, AT_W, WX, WY, KW, ALPHA_W)
    x += n * x_n + step_to(c, x_c, WIDE)
    best = tl.full((BP, BC), float("-inf"), tl.float32)
    won = tl.full((BP, BC), -1, tl.int32)
    for z in range(KD):
        d = front + z
        for r in range(KH):
            h = top + r
            first = h * WX
            if DEEP:
                first += d * HX * WX
            for q in range(KW):
                w = left + q
                v = tl.load(x + placed(d, h, w, x_d, x_h, x_w, DEEP, WIDE), mask, other=float("-inf")).to(tl.float32)
                better = (v > best) | (v != v) | (won < 0)
                best = tl.where(better, v, best)
                won = tl.where(better, first + w, won)
    kept(y, index, indices, best, won, n, k, i, j, c, mask, y_n, y_d, y_h, y_w, y_c, DEEP, WIDE)


# --- launches --------------------------------------------------------------------------------------------------------


FORWARD = _configs.rows("fractional_max_pool_forward")
SAMPLES = _configs.rows("fractional_samples")


def _drawn(seed: Any, x: Any, axes: int, empty: Any) -> Any:
    samples = empty((*x.shape[:2], axes), "float32")
    size = samples.numel()
    entry = SAMPLES(_tile.device(x), size)
    _tile.launch(
        _samples_kernel, (_tile.cdiv(size, entry.elements),), _tile.dense(seed, empty), samples, size,
        BLOCK=entry.elements, num_warps=entry.warps,
    )  # fmt: skip
    return samples


def fractional_max_pool_forward(
    x: Any,
    seed: Any = None,
    samples: Any = None,
    *,
    needs: tuple = (),
    kernel_size: tuple,
    output_size: tuple,
    return_indices: bool,
    empty: Any,
) -> tuple[tuple, dict]:
    axes, found = len(kernel_size), outputs(x, output_size, needs, return_indices, empty)
    source, (y, index, indices) = image(x), views(found)
    samples = _drawn(seed, x, axes, empty) if seed is not None else samples
    samples = None if samples is None else _tile.dense(samples, empty)
    grid, tile = pixel_plan(FORWARD, y, source)
    each = zip(x.shape[2:], kernel_size, output_size)
    alphas = three(tuple([(n - k) / max(o - 1, 1) for n, k, o in each]), 0)
    places = three(tuple([axis if axes == 3 else axes - 1 - axis for axis in range(axes)]), 0)
    _tile.launch(
        _fractional_max_pool_kernel, grid, source, samples, y, index, indices, *sizes_of(y, source), *steps_of(source),
        *steps_of(y), *map(float, alphas), **dict(zip(("KD", "KH", "KW"), three(kernel_size, 1))),
        **dict(zip(("AT_D", "AT_H", "AT_W"), places)), AXES=axes, **tile,
    )  # fmt: skip
    return returned(*found)


def fractional_max_pool_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    kernel_size: tuple,
    output_size: tuple,
    return_indices: bool,
    empty: Any,
) -> tuple:
    each = zip(inputs[0].shape[2:], output_size, kernel_size)
    laps = [min(o, _tile.cdiv((k + 1) * (o - 1), max(n - k, 1)) + 2) for n, o, k in each]
    return gathered(dys[0], saved["index"], inputs[0], empty, three(kernel_size, 1), three(laps, 1)), None, None
