"""Which pixel of x a place of a padded image shows, and which places show a pixel."""

from __future__ import annotations

import triton
import triton.language as tl

from ._pixels import three


@triton.jit
def source_of(at, LOW, HIGH, MODE: tl.constexpr):
    """The row (or column) of x that a place shows; [LOW, HIGH) are those that go around."""
    if MODE == "reflect":
        return HIGH - 1 - tl.abs(HIGH - 1 - tl.abs(at))
    elif MODE == "replicate":
        return tl.minimum(tl.maximum(at, 0), HIGH - 1)
    elif MODE == "circular":
        return tl.where(at < LOW, at + (HIGH - LOW), tl.where(at >= HIGH, at - (HIGH - LOW), at))
    else:
        return at


@triton.jit
def shown_at(a, h, OUT, BEFORE, LOW, HIGH, MODE: tl.constexpr):
    """(the a-th place that shows row (or column) h of x, whether there is one). None shows an h so far out that its place is
    beyond 2^30."""
    at = h + BEFORE
    if MODE == "constant":
        return at, _under(at, OUT)
    elif MODE == "replicate":
        last = tl.where(h == HIGH - 1, OUT - 1, at)
        at = tl.maximum(tl.where(h == 0, 0, at), 0) + a
        return at, (at <= last) & _under(at, OUT)
    else:
        if MODE == "reflect":
            before, after = BEFORE - h, BEFORE + 2 * (HIGH - 1) - h
        else:
            before, after = at - (HIGH - LOW), at + (HIGH - LOW)
        # Few pixels are shown before x as well as after it: of one place more it is the first of these, of two both.
        end = HIGH + BEFORE
        twice = _under(before, tl.minimum(tl.maximum(BEFORE, 0), OUT))
        once = _under(after - end, tl.maximum(OUT - end, 0))
        more = tl.where(a == 1, tl.where(twice, before, after), after)
        there = tl.where(a == 1, twice | once, twice & once)
        return tl.where(a == 0, at, more), tl.where(a == 0, _under(at, OUT), there)


@triton.jit
def _under(at, size):
    """0 ≤ at < size: without signs it is one comparison."""
    return at.to(tl.uint32) < (at * 0 + size).to(tl.uint32)


def frame(sizes: tuple, padding: tuple, mode: str) -> tuple:
    """(FRONT, TOP, LEFT, D0, D1, H0, H1, W0, W1) for images of this size."""
    more = 3 - len(sizes)
    befores = three(tuple([before for before, _ in padding]), 0)
    if mode != "circular":
        ends = [(0, size) for size in sizes]
    else:
        ends = [(max(0, -before), size - max(0, -after)) for size, (before, after) in zip(sizes, padding)]
    return *befores, *(0, 1) * more, *[end for both in ends for end in both]


def places(size: int, around: tuple, mode: str) -> int:
    """How many places may show one row (or column)."""
    before, after = (max(0, p) for p in around)
    if mode == "constant" or before + after == 0:
        return 1
    if mode == "replicate":
        return size + sum(around) if size == 1 else max(around) + 1
    if mode == "reflect":
        return 2 if before == 0 or after == 0 or before + after < size - 1 else 3
    return 2 if before + after <= size + sum(min(0, p) for p in around) else 3
