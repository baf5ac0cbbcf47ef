"""Two or three products that share an operand, or a sum, in one launch that walks the tiles of all: y_i = x W_iᵀ + b_i,
dW_i = dy_iᵀ x and dx = Σ dy_i W_i. Which weight's descriptors a tile loads through is chosen by selects, so that loads stay
ahead of the products as in ``_matmul.py``; what that kernel takes through pointers is a launch for each weight here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl

from .. import _invariance
from .._budget import Budget
from . import _tile
from ._matmul import GROUP, HALF_TMA, PART, _describe, _finish_tile, _place, _turned, _unit, by_tma, finish, matmul

BUDGETS = {"_linears_kernel": Budget(registers=248)}


@triton.jit
def _one_of(first, second, third, which, COUNT: tl.constexpr):
    found = first
    if which == 1:
        found = second
    if COUNT == 3:  # noqa: SIM102
        if which == 2:
            found = third
    return found


@triton.jit
def _linears_kernel(
    a, a_2, a_3, b, b_2, b_3, bias, bias_2, bias_3, out, out_2, out_3, sums, sums_2, sums_3,
    M, N, size, size_2, size_3, biased, biased_2, biased_3, each, splits,
    AXIS: tl.constexpr, COUNT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out_i = A_i B_iᵀ + bias_i, or their sum where AXIS, of which each has its ``size``, is "K"; what AXIS is not of is one
    for all, the first. M, N: the sizes of the other axes. a, b, out: descriptors, of out (splits, M, N); TURNED: with K first.

    A split has ``each`` steps along K. biased: numbers of a bias, 0 where there is none.
    sums_i (splits, 1, M): of a_i along K. COUNT: of the products.
    """
    LONG: tl.constexpr = BM if AXIS == "M" else BN if AXIS == "N" else BK
    second = tl.cdiv(size, LONG)  # where its tiles begin
    third = second + tl.cdiv(size_2, LONG)
    all_of = third + tl.cdiv(size_3, LONG)
    tiles_m = all_of if AXIS == "M" else tl.cdiv(M, BM)
    tiles_n = all_of if AXIS == "N" else tl.cdiv(N, BN)
    tiles = tiles_m * tiles_n
    for index in tl.range(tl.program_id(0), tiles * splits, tl.num_programs(0), flatten=True):
        split = index // tiles
        tile_m, tile_n = _place(index % tiles, tiles_m, tiles_n, GROUP_M)
        row, column = tile_m * BM, tile_n * BN
        which = 0
        if AXIS != "K":
            at = tile_m if AXIS == "M" else tile_n
            which = (at >= second).to(tl.int32)
            if COUNT == 3:
                which += (at >= third).to(tl.int32)
            inside = (at - _one_of(0, second, third, which, COUNT)) * LONG
            if AXIS == "M":
                row = inside
            else:
                column = inside
        acc = tl.zeros((BM, BN), tl.float32)
        if AXIS == "M":
            left_of = _one_of(a, a_2, a_3, which, COUNT)
            right_of = b
            total = tl.zeros((BM, BK), tl.float32)
        elif AXIS == "N":
            left_of = a
            right_of = _one_of(b, b_2, b_3, which, COUNT)
        tl.assume(each > 0)
        for step in range(each):
            place = split * each + step
            if AXIS == "K":
                now = (place >= second).to(tl.int32)
                if COUNT == 3:
                    now += (place >= third).to(tl.int32)
                left_of = _one_of(a, a_2, a_3, now, COUNT)
                right_of = _one_of(b, b_2, b_3, now, COUNT)
                place -= _one_of(0, second, third, now, COUNT)
            k = place * BK
            left = left_of.load([k, row]).T if A_TURNED else left_of.load([row, k])
            right = right_of.load([k, column]) if B_TURNED else right_of.load([column, k]).T
            acc = tl.dot(left, right, acc)
            if AXIS == "M" and (sums is not None or sums_2 is not None or sums_3 is not None):
                total += left.to(tl.float32)
        if AXIS == "M":
            m = row + tl.arange(0, BM)
            there = (m < _one_of(size, size_2, size_3, which, COUNT)) & (tile_n == 0)
            if sums is not None:
                tl.store(sums + split.to(tl.int64) * size + m, tl.sum(total, 1), there & (which == 0))
            if sums_2 is not None:
                tl.store(sums_2 + split.to(tl.int64) * size_2 + m, tl.sum(total, 1), there & (which == 1))
            if sums_3 is not None:
                tl.store(sums_3 + split.to(tl.int64) * size_3 + m, tl.sum(total, 1), there & (which == 2))
        to = out if AXIS == "K" else _one_of(out, out_2, out_3, which, COUNT)
        its = bias
        limit = N
        if bias is not None:
            its = _one_of(bias, bias_2, bias_3, which, COUNT)
            limit = _one_of(biased, biased_2, biased_3, which, COUNT)
        _finish_tile(acc, split, row, column, its, None, to, M, limit, 0.0, 0.0, BM, BN, PARTS, True, None, False)


def by_one_launch(a: Sequence[Any], b: Sequence[Any], outs: Sequence[Any]) -> bool:
    """Whether one launch computes outs_i = A_i B_iᵀ, or their sum."""
    alike = len({*map(_turned, a)}) == len({*map(_turned, b)}) == 1
    stored = all(o.shape[1] * o.element_size() % 16 == 0 and _tile.begins_aligned(o) for o in outs)
    return len(a) > 1 and alike and stored and all(map(by_tma, a, b))


def products(
    axis: str, a: Sequence[Any], b: Sequence[Any], outs: Sequence[Any], empty: Callable,
    biases: Sequence[Any] = (None,) * 3, sums: Sequence[Any] = (None,) * 3,
) -> None:  # fmt: skip
    """outs_i = A_i B_iᵀ + biases_i of one to three products, or outs_0 = Σ A_i B_iᵀ where ``axis`` is "K".

    axis: "M", "N" or "K", the one along which they differ: the operands without it are one array. outs: row-major. sums_i:
    A_i's along K, where ``by_one_launch``. Batch-invariant ones are a launch each.
    """
    a, b = ([_unit(x, empty) for x in xs] for xs in (a, b))
    if (axis == "M" or not _invariance.on()) and by_one_launch(a, b, outs):
        _launch(axis, a, b, outs, empty, biases, sums)
    elif axis == "K" and len(a) > 1:
        parts = empty((len(a), *outs[0].shape), "float32")  # rounded once
        for i, pair in enumerate(zip(a, b)):
            matmul(*pair, parts[i], empty)
        finish(parts, outs[0])
    else:
        for of_a, of_b, out, bias in zip(a, b, outs, biases):
            matmul(of_a, of_b, out, empty, bias=bias, weights=axis == "M")


def _launch(
    axis: str, a: Sequence[Any], b: Sequence[Any], outs: Sequence[Any], empty: Callable, biases: Any, sums: Any
) -> None:
    device, along = _tile.device(a[0]), {"M": 0, "N": 0, "K": 1}[axis]
    sizes = [x.shape[along] for x in (b if axis == "N" else a)]
    m, n, k = a[0].shape[0], b[0].shape[0], a[0].shape[1]
    m, n, k = (sum(sizes) if axis == own else size for own, size in zip("MNK", (m, n, k)))
    c, splits = HALF_TMA(device, m, n, k, a[0].element_size(), True, True)
    tiles = [_tile.cdiv(s, {"M": c.BM, "N": c.BN, "K": c.BK}[axis]) for s in sizes]
    steps = sum(tiles) if axis == "K" else _tile.cdiv(k, c.BK)
    splits, each = _tile.split(steps, splits)
    targets, parts = outs, sums
    if splits > 1:
        targets = [empty((splits, *out.shape), "float32") for out in outs]
        parts = [s if s is None else empty((splits, 1, *s.shape), "float32") for s in sums]
    left = [_describe(x, c.BM, c.BK) for x in (a[:1] if axis == "N" else a)]
    right = [_describe(x, c.BN, c.BK) for x in (b[:1] if axis == "M" else b)]
    to = [_tile.described(t.view(splits, *t.shape[-2:]), [1, c.BM, PART]) for t in targets]
    rows, columns = _tile.cdiv(m, c.BM), _tile.cdiv(n, c.BN)
    rows, columns = sum(tiles) if axis == "M" else rows, sum(tiles) if axis == "N" else columns
    given = [[*x, *[None] * (3 - len(x))] for x in (left, right, to)]  # none twice: a compiler copies what is written
    some = None if splits > 1 else next((x for x in biases if x is not None), None)
    ends = [x if x is not None and some is not None else some for x in (*biases, None)[:3]]
    biased = [0 if x is None else x.shape[0] for x in (*biases, None)[:3]]
    _tile.launch(
        _linears_kernel, (min(rows * columns * splits, device.sms),), *given[0], *given[1], *ends, *given[2], *(*parts, None)[:3],
        m, n, *(*sizes, 0)[:3], *biased, each, splits, AXIS=axis, COUNT=len(a), BM=c.BM, BN=c.BN, BK=c.BK, GROUP_M=GROUP,
        A_TURNED=_turned(a[0]), B_TURNED=_turned(b[0]), PARTS=c.BN // PART, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    if splits > 1:
        for target, out, bias, part, total in zip(targets, outs, biases, parts, sums):
            finish(target, out, bias, sums=part, total=total)
