"""What losses over classes share: walks over samples × classes, labels, and the second stage of sums over samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import _invariance
from .._budget import Budget
from . import _configs, _tile

BUDGETS = {
    # A handful of numbers.
    "_reduce_kernel": Budget(registers=48, blocks=10, narrow="loads"),
}


@triton.jit
def _reduce_kernel(losses, shares, y, total, P, count, BLOCK: tl.constexpr):
    """y = Σ losses / Σ shares, or / count where there are no shares. One program: there are few partial sums."""
    lane = tl.arange(0, BLOCK)
    loss = tl.zeros((BLOCK,), tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, P, BLOCK):
        loss += tl.load(losses + start + lane, start + lane < P, other=0.0)
        if shares is not None:
            share += tl.load(shares + start + lane, start + lane < P, other=0.0)
    by = tl.zeros((), tl.float32) + count
    if shares is not None:
        by = tl.sum(share, 0)
        if total is not None:
            tl.store(total, by)
    tl.store(y, (tl.sum(loss, 0) / by).to(y.dtype.element_ty))


def reduced(losses: Any, shares: Any, y: Any, total: Any, count: int) -> None:
    _tile.launch(_reduce_kernel, (1,), losses, shares, y, total, losses.numel(), count, BLOCK=1024, num_warps=4)


@triton.jit
def samples_of(S, ROWS: tl.constexpr, blocks):
    """(outer index, sample, block of classes) of this program; sample is (ROWS, 1), along the inner axes."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(S, ROWS)
    return pid // blocks // tiles, pid // blocks % tiles * ROWS + tl.arange(0, ROWS)[:, None], pid % blocks


@triton.jit
def label_of(target, weight, mask, C, ignore_index):
    """(label, whether it counts, its weight): a label out of range has weight NaN; masked like an ignored one."""
    label = tl.load(target, mask, other=ignore_index).to(tl.int64)
    counts = mask & (label != ignore_index)
    valid = counts & (label >= 0) & (label < C)
    w = tl.where(valid, 1.0, 0.0)
    if weight is not None:
        w = tl.load(weight + label, valid, other=0.0).to(tl.float32)
    return label, counts, valid, tl.where(counts & (valid == 0), float("nan"), w)


class Walk(NamedTuple):
    """Arrays (N, C, *d) seen as (outer, C, S): samples lie S deep along the inner axes."""

    arrays: list
    steps: list
    """(outer, sample, class) steps of each array."""
    outer: int
    S: int
    C: int


def walk_over(*xs: Any, empty: Any) -> Walk:
    """Where samples of all arrays lie evenly (matrices, channels-last memory), they are one axis: outer is 1."""
    shape = tuple(xs[0].shape)
    n, classes, inner = (1, shape[0], ()) if len(shape) == 1 else (shape[0], shape[1], shape[2:])
    depth = 1
    for size in inner:
        depth *= size
    arrays, steps = [], []
    for x in xs:
        step = _inner_step(x)
        if step is None:
            x = _tile.dense(x, empty)
            step = 1
        arrays.append(x)
        steps.append((0, 0, x.stride(0)) if x.ndim == 1 else (x.stride(0), step, x.stride(1)))
    if inner == () or depth == 1:
        return Walk(arrays, [(0, outer, c) for outer, _, c in steps], 1, n, classes)
    if n == 1 or all(outer == depth * s for outer, s, _ in steps):
        return Walk(arrays, [(0, s, c) for _, s, c in steps], 1, n * depth, classes)
    return Walk(arrays, steps, n, depth, classes)


def _inner_step(x: Any) -> int | None:
    """Elements from one position to the next along all axes after the second; None if that is not uniform."""
    step = expected = None
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:])):
        if size == 1:
            continue
        if step is None:
            step = stride
        elif stride != expected:
            return None
        expected = stride * size
    return 1 if step is None else step


class ClassTiles(NamedTuple):
    """The choices of a kernel over samples × classes."""

    along: _configs.Choice
    """Where classes are neighbours in memory."""
    across: _configs.Choice


def class_tiles(name: str) -> ClassTiles:
    return ClassTiles(_configs.rows(name), _configs.rows(f"{name}.across"))


def class_tile(choices: ClassTiles, walk: Walk) -> tuple[int, int, int]:
    """(samples, classes, warps) of a tile: along the classes where they are neighbours, else along the samples."""
    classes, device = _tile.next_power_of_2(walk.C), _tile.device(walk.arrays[0])
    if walk.steps[0][2] == 1:
        entry = choices.along(device, walk.C)
        block = min(classes, entry.elements)
        return entry.elements // block, block, entry.warps
    entry = choices.across(device, walk.C)
    block = min(classes, 16)
    most = min(entry.elements // block, 256)
    return most if _invariance.on() else _tile.next_power_of_2(walk.S, most), block, entry.warps


def in_units(walk: Walk, *steps: tuple) -> tuple[int, int, list]:
    """(unit, C, steps) with C and the steps from sample to sample in units, where classes are neighbours."""
    if walk.steps[0][2] != 1:
        return 1, walk.C, list(steps)
    unit, classes, *each = _tile.in_units(walk.C, *(s for _, s, _ in steps))
    return unit, classes, [(outer, s, c) for (outer, _, c), s in zip(steps, each)]


def kept(x: Any) -> tuple[int, ...] | None:
    """The order of channels-last memory if x has it, else None."""
    last = (0, *range(2, x.ndim), 1)
    return last if x.ndim > 2 and _tile.order(x) == last else None
