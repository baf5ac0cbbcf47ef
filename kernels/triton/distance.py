"""Distances, cosine similarity and rows of length 1, bound by memory: what is summed along an axis is read once (twice
where y has x's shape), what has x's shape is written once. pdist reads its rows from the cache, and its backward gathers.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .._budget import Budget
from . import _configs, _tile

BUDGETS = {
    "_pairwise_distance_kernel": Budget(registers=72, blocks=5),
    "_pairwise_distance_backward_kernel": Budget(registers=96, blocks=5),
    "_cosine_kernel": Budget(registers=96, blocks=4, narrow="stores"),  # a number a row
    "_cosine_backward_kernel": Budget(registers=144, blocks=3),
    "_normalize_kernel": Budget(registers=72, blocks=5),
    "_normalize_backward_kernel": Budget(registers=128, blocks=4),
    # Of rows it reads one column, which the cache has; of pairs above the diagonal it writes what is one row.
    "_pdist_kernel": Budget(registers=72, blocks=5, narrow="loads, stores"),
    "_pdist_backward_kernel": Budget(registers=72, blocks=5),
}


# --- norms ------------------------------------------------------------------------------------------------------------


@triton.jit
def _more(total, v, p, KIND: tl.constexpr):
    """What v adds to a norm so far, of one element in each place."""
    if KIND == "zero":
        return total + tl.where(v != 0, 1.0, 0.0)
    elif KIND == "one":
        return total + tl.abs(v)
    elif KIND == "two":
        return total + v * v
    elif KIND == "most":
        return tl.maximum(total, tl.abs(v), propagate_nan=tl.PropagateNan.ALL)
    else:
        return total + libdevice.pow(tl.abs(v), tl.zeros_like(v) + p)


@triton.jit
def _root(total, p, KIND: tl.constexpr):
    if KIND == "two":
        return tl.sqrt(total)
    elif KIND == "any":
        return tl.where(total == 0, 0.0, libdevice.pow(total, tl.zeros_like(total) + 1 / p))
    else:
        return total


@triton.jit
def _norm(total, p, KIND: tl.constexpr, AXIS: tl.constexpr):
    """The norm of what has been gathered in all places along AXIS."""
    if KIND == "most":
        bad = tl.sum((total != total).to(tl.int32), AXIS, keep_dims=True) > 0
        found = tl.max(tl.where(total == total, total, 0.0), AXIS, keep_dims=True)
        return tl.where(bad, float("nan"), found)
    else:
        return _root(tl.sum(total, AXIS, keep_dims=True), p, KIND)


@triton.jit
def _slope(v, norm, p, KIND: tl.constexpr):
    """∂norm/∂v; of the largest, all of it."""
    sign = tl.where(v > 0, 1.0, tl.where(v < 0, -1.0, 0.0))
    if KIND == "zero":
        return v * 0
    elif KIND == "one":
        return sign
    elif KIND == "two":
        return tl.where((norm == 0) | (v == 0), v * 0, v / norm)
    elif KIND == "most":
        return tl.where((tl.abs(v) == norm) | (v != v), sign, 0.0)
    else:
        ratio = tl.abs(v) / norm
        power = libdevice.pow(ratio, tl.zeros_like(ratio) + (p - 1))
        return tl.where((norm == 0) | (v == 0), v * 0, sign * power)


# --- rows -------------------------------------------------------------------------------------------------------------


@triton.jit
def _rows(M, N, C, LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(where rows begin, their numbers, whether they are, places along a row): rows lie along the last axis, M of them
    (LAST: ROWS × BLOCK), or C neighbours are N numbers deep (BLOCK × ROWS)."""
    if LAST:
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        return row * N, row, row < M, tl.arange(0, BLOCK)[None, :].to(tl.int64)
    else:
        blocks = (C - 1) // ROWS + 1
        outer = (tl.program_id(0) // blocks).to(tl.int64)
        c = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :]
        return outer * N * C + c, outer * C + c, c < C, tl.arange(0, BLOCK)[:, None].to(tl.int64)


@triton.jit
def _load(x, at, mask):
    return tl.load(x + at, mask, other=0.0).to(tl.float32)


@triton.jit
def _pairwise_distance_kernel(
    x1, x2, y, norm, M, N, C, p, eps,
    KIND: tl.constexpr, SAVES: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, row, there, places = _rows(M, N, C, LAST, ROWS, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, N, BLOCK):
        n = start + places
        mask = there & (n < N)
        d = _load(x1, first + n, mask) - _load(x2, first + n, mask) + eps
        total = _more(total, tl.where(mask, d, 0.0), p, KIND)
    found = _norm(total, p, KIND, 1)
    tl.store(y + row, found.to(y.dtype.element_ty), there)
    if SAVES:
        tl.store(norm + row, found, there)


@triton.jit
def _pairwise_distance_backward_kernel(
    dy, x1, x2, norm, dx1, dx2, M, N, C, p, eps,
    KIND: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, row, there, places = _rows(M, N, C, LAST, ROWS, BLOCK)
    g, found = _load(dy, row, there), _load(norm, row, there)
    if KIND == "most":
        ties = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, N, BLOCK):
            n = start + places
            mask = there & (n < N)
            d = _load(x1, first + n, mask) - _load(x2, first + n, mask) + eps
            ties += tl.where(mask & ((tl.abs(d) == found) | (d != d)), 1.0, 0.0)
        g = g / tl.sum(ties, 1, keep_dims=True)
    for start in range(0, N, BLOCK):
        n = start + places
        mask = there & (n < N)
        d = _load(x1, first + n, mask) - _load(x2, first + n, mask) + eps
        out = g * _slope(d, found, p, KIND)
        if dx1 is not None:
            tl.store(dx1 + first + n, out.to(dx1.dtype.element_ty), mask)
        if dx2 is not None:
            tl.store(dx2 + first + n, (-out).to(dx2.dtype.element_ty), mask)


@triton.jit
def _cosine_kernel(
    x1, x2, y, norm1, norm2, cosine, M, N, C, eps,
    SAVES: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, row, there, places = _rows(M, N, C, LAST, ROWS, BLOCK)
    AXIS: tl.constexpr = 1 if LAST else 0
    one = tl.zeros((ROWS, BLOCK) if LAST else (BLOCK, ROWS), tl.float32)
    two, both = one, one
    for start in range(0, N, BLOCK):
        n = start + places
        mask = there & (n < N)
        a, b = _load(x1, first + n * C, mask), _load(x2, first + n * C, mask)
        one += a * a
        two += b * b
        both += a * b
    n1, n2 = (tl.sqrt(tl.sum(one, AXIS, keep_dims=True)), tl.sqrt(tl.sum(two, AXIS, keep_dims=True)))
    found = tl.sum(both, AXIS, keep_dims=True) / tl.maximum(n1, eps) / tl.maximum(n2, eps)
    tl.store(y + row, found.to(y.dtype.element_ty), there)
    if SAVES:
        tl.store(norm1 + row, n1, there)
        tl.store(norm2 + row, n2, there)
        tl.store(cosine + row, found, there)


@triton.jit
def _cosine_backward_kernel(
    dy, x1, x2, norm1, norm2, cosine, dx1, dx2, M, N, C, eps,
    LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, row, there, places = _rows(M, N, C, LAST, ROWS, BLOCK)
    g, y = _load(dy, row, there), _load(cosine, row, there)
    one, two = _load(norm1, row, there), _load(norm2, row, there)
    n1, n2 = tl.maximum(one, eps), tl.maximum(two, eps)
    for start in range(0, N, BLOCK):
        n = start + places
        mask = there & (n < N)
        at = first + n * C
        a, b = _load(x1, at, mask), _load(x2, at, mask)
        if dx1 is not None:
            out = g / n1 * (b / n2 - y * _slope(a, one, 2.0, "two"))
            tl.store(dx1 + at, out.to(dx1.dtype.element_ty), mask)
        if dx2 is not None:
            out = g / n2 * (a / n1 - y * _slope(b, two, 2.0, "two"))
            tl.store(dx2 + at, out.to(dx2.dtype.element_ty), mask)


@triton.jit
def _normalize_kernel(
    x, y, norm, M, N, C, p, eps,
    KIND: tl.constexpr, SAVES: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, row, there, places = _rows(M, N, C, LAST, ROWS, BLOCK)
    total = tl.zeros((ROWS, BLOCK) if LAST else (BLOCK, ROWS), tl.float32)
    for start in range(0, N, BLOCK):
        n = start + places
        total = _more(total, _load(x, first + n * C, there & (n < N)), p, KIND)
    found = _norm(total, p, KIND, 1 if LAST else 0)
    if SAVES:
        tl.store(norm + row, found, there)
    found = tl.maximum(found, eps, propagate_nan=tl.PropagateNan.ALL)
    for start in range(0, N, BLOCK):
        n = start + places
        mask = there & (n < N)
        tl.store(y + first + n * C, (_load(x, first + n * C, mask) / found).to(y.dtype.element_ty), mask)


@triton.jit
def _normalize_backward_kernel(
    dy, x, norm, dx, M, N, C, p, eps,
    KIND: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, row, there, places = _rows(M, N, C, LAST, ROWS, BLOCK)
    AXIS: tl.constexpr = 1 if LAST else 0
    found = _load(norm, row, there)
    dots = tl.zeros((ROWS, BLOCK) if LAST else (BLOCK, ROWS), tl.float32)
    ties = dots
    for start in range(0, N, BLOCK):
        n = start + places
        mask = there & (n < N)
        v = _load(x, first + n * C, mask)
        dots += _load(dy, first + n * C, mask) * v
        if KIND == "most":
            ties += tl.where(mask & ((tl.abs(v) == found) | (v != v)), 1.0, 0.0)
    clamped = tl.maximum(found, eps, propagate_nan=tl.PropagateNan.ALL)
    dot = tl.where(found >= eps, tl.sum(dots, AXIS, keep_dims=True) / clamped / clamped, 0.0)
    if KIND == "most":
        dot = dot / tl.sum(ties, AXIS, keep_dims=True)
    for start in range(0, N, BLOCK):
        n = start + places
        mask = there & (n < N)
        at = first + n * C
        out = _load(dy, at, mask) / clamped - dot * _slope(_load(x, at, mask), found, p, KIND)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask)


# --- all pairs --------------------------------------------------------------------------------------------------------


@triton.jit
def _place(i, j, N):
    """Of a pair i < j among all, row after row."""
    return i * (2 * N - i - 1) // 2 + j - i - 1


@triton.jit
def _pdist_kernel(
    x, y, norm, N, D, p, KIND: tl.constexpr, SAVES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program has BLOCK × BLOCK pairs, of which those above the diagonal count."""
    blocks = (N - 1) // BLOCK + 1
    i = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    j = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, D):
        d = _load(x, i * D + k, i < N) - _load(x, j * D + k, j < N)
        total = _more(total, d, p, KIND)
    found = _root(total, p, KIND)
    pair = (i < j) & (j < N)
    tl.store(y + _place(i, j, N), found.to(y.dtype.element_ty), pair)
    if SAVES:
        tl.store(norm + _place(i, j, N), found, pair)


@triton.jit
def _pdist_backward_kernel(
    dy, x, norm, dx, N, D, p, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    blocks = (D - 1) // BLOCK + 1
    i = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    k = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (i < N) & (k < D)
    mine = _load(x, i * D + k, mask)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for j in range(0, N):
        pair = (i < N) & (i != j)
        at = _place(tl.minimum(i, j), tl.maximum(i, j), N)
        d = mine - _load(x, j.to(tl.int64) * D + k, k < D)
        g = _load(dy, at, pair) * _slope(d, _load(norm, at, pair), p, KIND)
        total += tl.where(pair, g, 0.0)
    tl.store(dx + i * D + k, total.to(dx.dtype.element_ty), mask)


# --- launchers --------------------------------------------------------------------------------------------------------

ROWS = _configs.rows("distance")
COLUMNS = 64
"""Neighbouring rows across an axis that a program has, at most: whole cache lines."""
PAIRS = 32
_KINDS = {0.0: "zero", 1.0: "one", 2.0: "two", math.inf: "most"}


def _kind(p: float) -> tuple[float, dict]:
    """(p as a number that a kernel takes, the constant by which it knows the norm)"""
    return (2.0 if p == math.inf else p), {"KIND": _KINDS.get(p, "any")}


def _walk(x: Any, axis: int, share: int = 1) -> tuple[tuple, tuple, dict]:
    """(grid, (M, N, C), constants) for rows of ``x``, row-major, along an axis. share: of a full tile across it, one in so
    many elements, where a program keeps much of each row."""
    shape = tuple(x.shape) or (1,)
    outer, n, inner = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    entry = ROWS(_tile.device(x), n)
    if inner == 1:
        block = _tile.next_power_of_2(max(n, 1), entry.elements)
        rows = entry.elements // block
        grid = (_tile.cdiv(outer, rows),)
    else:
        rows = _tile.next_power_of_2(inner, COLUMNS)
        block = min(max(1, entry.elements // rows // share), _tile.next_power_of_2(max(n, 1)))
        grid = (outer * _tile.cdiv(inner, rows),)
    return grid, (outer, n, inner), {"LAST": inner == 1, "ROWS": rows, "BLOCK": block, "num_warps": entry.warps}


def _float32(shape: Any, saves: bool, empty: Any) -> Any:
    return empty(shape, "float32") if saves else None


def pairwise_distance_forward(
    x1: Any, x2: Any, *, needs: tuple = (), p: float = 2.0, eps: float = 1e-6, empty: Any
) -> tuple[tuple, dict]:
    pair = _tile.dense(x1, empty), _tile.dense(x2, empty)
    y, norm = empty(x1.shape[:-1], x1.dtype), _float32(x1.shape[:-1], bool(needs), empty)
    grid, sizes, tile = _walk(x1, x1.ndim - 1)
    power, kind = _kind(p)
    _tile.launch(_pairwise_distance_kernel, grid, *pair, y, norm, *sizes, power, eps, SAVES=bool(needs), **kind, **tile)
    return (y,), {"x1": x1, "x2": x2, "norm": norm} if needs else {}


def pairwise_distance_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 2.0, eps: float = 1e-6, empty: Any
) -> tuple:
    dy, x1, x2 = (_tile.dense(a, empty) for a in (dys[0], saved["x1"], saved["x2"]))
    dxs = [empty(x1.shape, x1.dtype) if name in needs else None for name in ("x1", "x2")]
    grid, sizes, tile = _walk(x1, x1.ndim - 1)
    power, kind = _kind(p)
    arrays = dy, x1, x2, saved["norm"], *dxs
    _tile.launch(_pairwise_distance_backward_kernel, grid, *arrays, *sizes, power, eps, **kind, **tile)
    return tuple(dxs)


def cosine_similarity_forward(
    x1: Any, x2: Any, *, needs: tuple = (), axis: int = 1, eps: float = 1e-8, empty: Any
) -> tuple[tuple, dict]:
    pair = _tile.dense(x1, empty), _tile.dense(x2, empty)
    shape = (*x1.shape[:axis], *x1.shape[axis + 1 :])
    y, rows = empty(shape, x1.dtype), [_float32(shape, bool(needs), empty) for _ in range(3)]
    grid, sizes, tile = _walk(x1, axis)
    _tile.launch(_cosine_kernel, grid, *pair, y, *rows, *sizes, eps, SAVES=bool(needs), **tile)
    return (y,), {"x1": x1, "x2": x2, **dict(zip(("norm1", "norm2", "cosine"), rows))} if needs else {}


def cosine_similarity_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, axis: int = 1, eps: float = 1e-8, empty: Any
) -> tuple:
    dy, x1, x2 = (_tile.dense(a, empty) for a in (dys[0], saved["x1"], saved["x2"]))
    dxs = [empty(x1.shape, x1.dtype) if name in needs else None for name in ("x1", "x2")]
    grid, sizes, tile = _walk(x1, axis, share=2)
    rows = (saved[name] for name in ("norm1", "norm2", "cosine"))
    _tile.launch(_cosine_backward_kernel, grid, dy, x1, x2, *rows, *dxs, *sizes, eps, **tile)
    return tuple(dxs)


def normalize_forward(
    x: Any, *, needs: tuple = (), p: float = 2.0, axis: int = 1, eps: float = 1e-12, empty: Any
) -> tuple[tuple, dict]:
    y = empty(x.shape, x.dtype)
    norm = _float32((*x.shape[:axis], *x.shape[axis + 1 :]), bool(needs), empty)
    grid, sizes, tile = _walk(x, axis)
    power, kind = _kind(p)
    arrays = _tile.dense(x, empty), y, norm
    _tile.launch(_normalize_kernel, grid, *arrays, *sizes, power, eps, SAVES=bool(needs), **kind, **tile)
    return (y,), {"x": x, "norm": norm} if needs else {}


def normalize_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    p: float = 2.0,
    axis: int = 1,
    eps: float = 1e-12,
    empty: Any,
) -> tuple:
    dy, x = (_tile.dense(a, empty) for a in (dys[0], saved["x"]))
    dx = empty(x.shape, x.dtype)
    grid, sizes, tile = _walk(x, axis)
    power, kind = _kind(p)
    _tile.launch(_normalize_backward_kernel, grid, dy, x, saved["norm"], dx, *sizes, power, eps, **kind, **tile)
    return (dx,)


def pdist_forward(x: Any, *, needs: tuple = (), p: float = 2.0, empty: Any) -> tuple[tuple, dict]:
    n, d = x.shape
    pairs = n * (n - 1) // 2
    y, norm = empty((pairs,), x.dtype), _float32((pairs,), bool(needs), empty)
    power, kind = _kind(p)
    grid = (_tile.cdiv(n, PAIRS) ** 2 if pairs else 0,)
    arrays = _tile.dense(x, empty), y, norm
    _tile.launch(_pdist_kernel, grid, *arrays, n, d, power, SAVES=bool(needs), BLOCK=PAIRS, num_warps=4, **kind)
    return (y,), {"x": x, "norm": norm} if needs else {}


def pdist_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 2.0, empty: Any) -> tuple:
    dy, x = _tile.dense(dys[0], empty), _tile.dense(saved["x"], empty)
    n, d = x.shape
    dx = empty(x.shape, x.dtype)
    power, kind = _kind(p)
    block = _tile.next_power_of_2(max(d, 1), COLUMNS)
    tile = dict(ROWS=1024 // block, BLOCK=block, num_warps=4)
    grid = (_tile.cdiv(n, tile["ROWS"]) * _tile.cdiv(d, block),)
    _tile.launch(_pdist_backward_kernel, grid, dy, x, saved["norm"], dx, n, d, power, **kind, **tile)
    return (dx,)
