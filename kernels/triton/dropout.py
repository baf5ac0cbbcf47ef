"""Dropout, bound by memory: 2 elements moved for each of x, forward and backward; the mask is drawn, never stored.

Four neighbours share a Philox counter. Where memory order is not row-major, each element draws its own counter and
takes its word of it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from . import _tile


@triton.jit
def _draw(seed, counter):
    """The four words of 64-bit counters under seed = [seed, offset], as in ops/_random.py."""
    zero = tl.zeros_like(counter)
    offset = tl.load(seed + 1) + zero
    c0, c1 = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = (offset & 0xFFFFFFFF).to(tl.uint32), (offset >> 32).to(tl.uint32)
    return tl.philox(tl.load(seed), c0, c1, c2, c3)


@triton.jit
def _dropout_kernel(x, seed, y, size, threshold, scale, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    r0, r1, r2, r3 = _draw(seed, start // 4 + tl.arange(0, BLOCK // 4))
    bits = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))  # r0[0], r1[0], r2[0], r3[0], r0[1], …
    i = start + tl.arange(0, BLOCK)
    v = tl.load(x + i, i < size, other=0.0).to(tl.float32)
    v *= tl.where(bits.to(tl.int64) >= threshold, scale, 0.0)
    tl.store(y + i, v.to(y.dtype.element_ty), i < size)


@triton.jit
def _dropout_permuted_kernel(x, seed, y, size, n1, n2, step0, step1, step2, threshold, scale, BLOCK: tl.constexpr):
    """x and y lie in memory as (n0, n1, n2), whose axes are step0, step1, step2 elements apart row-major."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    element = i // n2 // n1 * step0 + i // n2 % n1 * step1 + i % n2 * step2
    r0, r1, r2, r3 = _draw(seed, element // 4)
    word = element % 4
    bits = tl.where(word < 2, tl.where(word == 0, r0, r1), tl.where(word == 2, r2, r3))
    v = tl.load(x + i, i < size, other=0.0).to(tl.float32)
    v *= tl.where(bits.to(tl.int64) >= threshold, scale, 0.0)
    tl.store(y + i, v.to(y.dtype.element_ty), i < size)


def _axes(shape: tuple, order: tuple) -> list[tuple[int, int]]:
    """(size, row-major step) of each axis from the slowest to the fastest in memory, joined where they can be."""
    steps, step = [0] * len(shape), 1
    for a in reversed(range(len(shape))):
        steps[a] = step
        step *= shape[a]
    joined: list[tuple[int, int]] = []
    for a in order:
        if joined and joined[-1][1] == steps[a] * shape[a]:
            joined[-1] = joined[-1][0] * shape[a], steps[a]
        elif shape[a] != 1:
            joined.append((shape[a], steps[a]))
    return joined


def _masked(x: Any, order: tuple | None, seed: Any, p: float, empty: Any) -> Any:
    threshold, scale = min(round(p * 2**32), 2**32 - 1), 1 / (1 - p) if p < 1 else 0.0
    y = empty(x.shape, x.dtype, order)
    size, seed = x.numel(), _tile.dense(seed)
    axes = [] if order is None else _axes(tuple(x.shape), order)
    if order is None:
        grid = (_tile.cdiv(size, 2048),)
        _tile.launch(_dropout_kernel, grid, _tile.dense(x), seed, y, size, threshold, scale, BLOCK=2048)
    elif len(axes) <= 3:
        (_, step0), (n1, step1), (n2, step2) = [(1, 0)] * (3 - len(axes)) + axes
        walk = _tile.pointwise(order, x, y)
        arguments = (walk.arrays[0], seed, y, size, n1, n2, step0, step1, step2, threshold, scale)
        _tile.launch(_dropout_permuted_kernel, (_tile.cdiv(size, 1024),), *arguments, BLOCK=1024)
    else:  # a rare permutation of four axes or more
        y.copy_(_masked(x, None, seed, p, empty))
    return y


def dropout_forward(x: Any, seed: Any, *, needs: tuple = (), p: float = 0.5, empty: Any) -> tuple[tuple, dict]:
    return (_masked(x, _tile.order(x), seed, p, empty),), {"seed": seed} if needs else {}


def dropout_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 0.5, empty: Any) -> tuple:
    order = inputs[0].order if inputs[0].contiguous else None
    return _masked(dys[0], order, saved["seed"], p, empty), None
