"""Sums, means and maxima over bags of rows. A bag is one program's, which walks over its indices in their order; backward
gives each index its bag and its factor, and scatters like any embedding."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._scatter import rows_of, scattered
from ._tile import rows_tile

BUDGETS = {
    # Indices are four or eight bytes each; of a bag, a few numbers; the places of maxima are eight bytes each.
    "_embedding_bag_forward_kernel": Budget(registers=128, blocks=4, narrow="loads, stores"),
    "_embedding_bag_places_kernel": Budget(registers=64, blocks=8, narrow="loads, stores"),
    "_embedding_bag_factors_kernel": Budget(registers=96, blocks=5, narrow="loads, stores"),
}


@triton.jit
def _embedding_bag_forward_kernel(
    weight, indices, offsets, factors, y, winners, sizes, N, B, L, D, V, w_v, w_d, padding,
    MODE: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    D, w_v = D * UNIT, w_v * UNIT
    b, d, mask = rows_tile(B, D, ROWS, BLOCK)
    if offsets is None:
        begin = tl.where(b < B, b * L, 0)
        end = tl.where(b < B, begin + L, 0)
    else:
        begin = tl.maximum(tl.load(offsets + b, b < B, other=0).to(tl.int64), 0)
        last = b + 1 < B + LAST
        end = tl.where(last, tl.load(offsets + b + 1, last, other=0).to(tl.int64), N)
        end = tl.where(b < B, tl.minimum(end, N), 0)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    won = tl.full((ROWS, BLOCK), -1, tl.int32)
    count = tl.zeros((ROWS, 1), tl.int32)
    for start in range(0, tl.max(end - begin).to(tl.int32), AT_ONCE):
        for k in tl.static_range(AT_ONCE):
            at = begin + start + k
            index = tl.load(indices + at, at < end, other=0).to(tl.int64)
            here = (at < end) & (index != padding)
            fits = (index >= 0) & (index < V)
            row = tl.load(weight + index * w_v + d * w_d, mask & here & fits, other=float("nan")).to(tl.float32)
            if MODE == "max":
                better = here & ((won < 0) | (row > acc))
                acc, won = tl.where(better, row, acc), tl.where(better, at.to(tl.int32), won)
            else:
                if factors is not None:
                    row *= tl.load(factors + at, at < end, other=0.0).to(tl.float32)
                acc += tl.where(here, row, 0.0)
                count += here.to(tl.int32)
    if MODE == "mean":
        acc /= tl.maximum(count, 1)
        if sizes is not None:
            tl.store(sizes + b + tl.zeros((ROWS, 1), tl.int64), count.to(tl.int64), (b < B) & (tl.min(d) == 0))
    tl.store(y + b * D + d, acc.to(y.dtype.element_ty), mask)
    if winners is not None:
        tl.store(winners + b * D + d, won.to(tl.int64), mask)


@triton.jit
def _embedding_bag_places_kernel(
    indices, offsets, sizes, per_sample_weights, kept, bags, factors, N, B, L, O, V, padding,
    ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each index: itself (−1 where it belongs to no bag, V where no row has it), its bag, its factor."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    if offsets is None:
        bag = (i // L).to(tl.int32)
    else:
        low, high = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32) + O
        for _ in range(ROUNDS):
            middle = low + (high - low) // 2
            before = tl.load(offsets + middle, inside & (middle < high), other=0) <= i
            some = low < high
            low, high = tl.where(some & before, middle + 1, low), tl.where(some & (before == 0), middle, high)
        bag = low - 1
    index = tl.load(indices + i, inside, other=0).to(tl.int64)
    belongs = (index != padding) & (bag >= 0) & (bag < B)
    bag = tl.where((bag >= 0) & (bag < B), bag, 0)
    index = tl.where((index >= 0) & (index < V), index, V)
    tl.store(kept + i, tl.where(belongs, index, -1).to(tl.int32), inside)
    tl.store(bags + i, bag, inside)
    if sizes is not None:
        size = tl.load(sizes + bag, inside, other=1).to(tl.float32)
        tl.store(factors + i, 1 / tl.maximum(size, 1.0), inside)
    if per_sample_weights is not None:
        tl.store(factors + i, tl.load(per_sample_weights + i, inside).to(tl.float32), inside)


@triton.jit
def _embedding_bag_factors_kernel(
    dy, weight, kept, bags, dfactors, N, D, V, y_b, w_v, w_d,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dfactors[i] = dy[bag] · weight[index]; 0 where the index belongs to no bag."""
    D, y_b, w_v = D * UNIT, y_b * UNIT, w_v * UNIT
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    index = tl.load(kept + i, i < N, other=-1).to(tl.int64)
    bag = tl.load(bags + i, i < N, other=0).to(tl.int64)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)[None, :]
        mask = (index >= 0) & (d < D)
        row = tl.load(weight + index * w_v + d * w_d, mask & (index < V), other=float("nan")).to(tl.float32)
        acc += tl.where(mask, row * tl.load(dy + bag * y_b + d, mask, other=0.0).to(tl.float32), 0.0)
    tl.store(dfactors + i, tl.sum(acc, 1, keep_dims=True).to(dfactors.dtype.element_ty), i < N)


FORWARD = _configs.rows("embedding_bag_forward")
BACKWARD = _configs.rows("embedding_bag_backward")


def _bags(indices: Any, offsets: Any, include_last_offset: bool) -> tuple[int, int]:
    """(bags, indices in each row of a matrix of them)."""
    return (indices.shape[0], indices.shape[1]) if offsets is None else (offsets.shape[0] - include_last_offset, 0)


def embedding_bag_forward(
    weight: Any,
    indices: Any,
    offsets: Any = None,
    per_sample_weights: Any = None,
    *,
    needs: tuple = (),
    mode: str,
    padding_idx: int | None,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
    empty: Any,
) -> tuple[tuple, dict]:
    (rows, width), n, (bags, length) = weight.shape, indices.numel(), _bags(indices, offsets, include_last_offset)
    y = empty((bags, width), weight.dtype)
    saved = {"indices": indices} | ({} if offsets is None else {"offsets": offsets})
    if "per_sample_weights" in needs:
        saved["weight"] = weight
    if per_sample_weights is not None and "weight" in needs:
        saved["per_sample_weights"] = per_sample_weights
    winners = empty((bags, width), "int64") if needs and mode == "max" else None
    sizes = empty((bags,), "int64") if needs and mode == "mean" else None
    saved |= {k: v for k, v in (("winners", winners), ("sizes", sizes)) if v is not None}
    entry, steps = FORWARD(_tile.device(weight), width), weight.stride()
    unit, columns, step = _tile.in_units(width, steps[0]) if steps[1] == 1 else (1, width, steps[0])
    tile = _tile.flat_tile(entry, width)
    grid = (_tile.cdiv(bags, tile["ROWS"]) * _tile.cdiv(width, tile["BLOCK"]),)
    given = (None if x is None else _tile.dense(x, empty) for x in (indices, offsets, per_sample_weights))
    _tile.launch(
        _embedding_bag_forward_kernel, grid, weight, *given, y, winners, sizes, n, bags, length, columns, rows, step, steps[1],
        -1 if padding_idx is None else padding_idx, MODE=mode, LAST=include_last_offset, UNIT=unit, AT_ONCE=2 if mode == "max" else 4, **tile,
    )  # fmt: skip
    return (y,), saved if needs else {}


def embedding_bag_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    mode: str,
    padding_idx: int | None,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
    empty: Any,
) -> tuple:
    (dy,), (rows, width), indices, offsets = dys, inputs[0].shape, saved["indices"], saved.get("offsets")
    n, (bags, length) = indices.numel(), _bags(indices, offsets, include_last_offset)
    kept, bag = empty((n,), "int32"), empty((n,), "int32")
    by, sizes = saved.get("per_sample_weights"), saved.get("sizes")
    factors = None if by is None and sizes is None else empty((n,), "float32")
    given = [None if x is None else _tile.dense(x, empty) for x in (indices, offsets, sizes, by)]
    known = 0 if offsets is None else offsets.shape[0]
    _tile.launch(
        _embedding_bag_places_kernel, (_tile.cdiv(n, 512),), *given, kept, bag, factors, n, bags, length, known, rows,
        -1 if padding_idx is None else padding_idx, ROUNDS=max(known, 1).bit_length(), BLOCK=512, num_warps=4,
    )  # fmt: skip
    dweight = dfactors = None
    if "weight" in needs:
        more = {"bags": bag, "factors": factors, "winners": saved.get("winners")}
        dweight = scattered(dy, kept, inputs[0], None, scale_grad_by_freq, empty, **more)
    if "per_sample_weights" in needs:
        dfactors = empty(indices.shape, inputs[3].dtype)
        (dy, step), steps = rows_of(dy, width, empty), saved["weight"].stride()
        unit, columns, step, across = (
            _tile.in_units(width, step, steps[0]) if steps[1] == 1 else (1, width, step, steps[0])
        )
        tile = _tile.flat_tile(BACKWARD(_tile.device(dy), width), width)
        _tile.launch(
            _embedding_bag_factors_kernel, (_tile.cdiv(n, tile["ROWS"]),), dy, saved["weight"], kept, bag, dfactors, n,
            columns, rows, step, across, steps[1], UNIT=unit, **tile,
        )  # fmt: skip
    return dweight, None, None, dfactors
