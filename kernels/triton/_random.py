"""Random words for kernels that draw as they go: Philox as in ops/_random.py, and how a kernel walks memory to draw.

Four neighbours share a Philox counter. Where memory order is not row-major, each element draws its own counter and
takes its word of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._layout import row_major_steps
from . import _configs, _tile


@triton.jit
def _draw(seed, counter):
    """The four random words of 64-bit counters under seed = [seed, offset]: Philox4x32-10."""
    zero = tl.zeros_like(counter)
    offset = tl.load(seed + 1) + zero
    c0, c1 = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = (offset & 0xFFFFFFFF).to(tl.uint32), (offset >> 32).to(tl.uint32)
    return tl.philox(tl.load(seed), c0, c1, c2, c3)


@triton.jit
def word_of(seed, element):
    """The random word of each element, of a counter of its own."""
    r0, r1, r2, r3 = _draw(seed, element // 4)
    word = element % 4
    return tl.where(word < 2, tl.where(word == 0, r0, r1), tl.where(word == 2, r2, r3))


@triton.jit
def _words_of(seed, counter):
    """The random words of four neighbours for each counter, along the last axis."""
    r0, r1, r2, r3 = _draw(seed, counter)
    return tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))  # r0[0], r1[0], r2[0], r3[0], r0[1], …


@triton.jit
def words(seed, start, n1, n2, step0, step1, step2, PERMUTED: tl.constexpr, BLOCK: tl.constexpr):
    """The words, as int64, of the BLOCK elements from the ``start``-th (a multiple of 4) in memory.

    PERMUTED: memory holds (n0, n1, n2), whose axes are step0, step1, step2 elements apart row-major.
    """
    if PERMUTED:
        i = start + tl.arange(0, BLOCK)
        element = i // n2 // n1 * step0 + i // n2 % n1 * step1 + i % n2 * step2
        bits = word_of(seed, element)
    else:
        bits = _words_of(seed, start // 4 + tl.arange(0, BLOCK // 4))
    return bits.to(tl.int64)


class Walk(NamedTuple):
    """How a kernel walks a dense array: what ``words`` takes."""

    sizes: tuple[int, int, int, int, int]
    """n1, n2, step0, step1, step2."""
    tile: dict
    """PERMUTED, BLOCK and num_warps of a launch."""

    def grid(self, size: int) -> tuple[int]:
        return (_tile.cdiv(size, self.tile["BLOCK"]),)


def choices(name: str) -> tuple[_configs.Choice, _configs.Choice]:
    """Of a kernel that draws: for row-major memory, and for another order."""
    return _configs.rows(name), _configs.rows(f"{name}.permuted")


def walk(choices: tuple[_configs.Choice, _configs.Choice], x: Any, order: tuple[int, ...] | None) -> Walk | None:
    """For ``x``, dense in this memory order; None for a rare permutation of four axes or more."""
    sizes: tuple = (1, 1, 0, 0, 1)
    if order is not None:
        axes = row_major_steps(tuple(x.shape), order)
        if len(axes) > 3:
            return None
        (_, step0), (n1, step1), (n2, step2) = [(1, 0)] * (3 - len(axes)) + axes
        sizes = n1, n2, step0, step1, step2
    entry = choices[order is not None](_tile.device(x), x.numel())
    return Walk(sizes, dict(PERMUTED=order is not None, BLOCK=entry.elements, num_warps=entry.warps))
