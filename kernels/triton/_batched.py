"""out = α A B + C for batches of matrices, any of whose axes may be broadcast or turned: read where they lie.

A batch of one matrix on the right is one product of more rows, which ``_matmul.py`` has. On sm_90 and newer what is aligned
is loaded through descriptors by persistent programs; elsewhere a program has one tile of one product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl

from .. import _invariance
from .._budget import Budget
from .._linears import broadcast
from . import _matmul, _tile
from ._matmul import GROUP, _place

BUDGETS = {
    "_batched_kernel": Budget(registers=255, blocks=1, narrow=_matmul._narrow, spills=8),
    "_batched_tma_kernel": Budget(registers=255, blocks=1, narrow=_matmul._narrow),
}


@triton.jit
def _finish(acc, batch, row, column, c, out, M, N, alpha, BM: tl.constexpr, BN: tl.constexpr):
    m = row + tl.arange(0, BM).to(tl.int64)[:, None]
    n = column + tl.arange(0, BN)[None, :]
    mask = (m < M) & (n < N)
    at = (batch * M + m) * N + n
    acc *= alpha
    if c is not None:
        acc += tl.load(c + at, mask, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask)


@triton.jit
def _batched_kernel(
    a, b, c, out, n1, n2, a_0, a_1, a_2, b_0, b_1, b_2, M, N, K, a_m, a_k, b_k, b_n, alpha,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one product of a batch (n0, n1, n2). EVEN: every step along K is whole."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    batch = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    tile_m, tile_n = _place(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    i0, i1, i2 = batch // n2 // n1, batch // n2 % n1, batch % n2
    a += i0 * a_0 + i1 * a_1 + i2 * a_2
    b += i0 * b_0 + i1 * b_1 + i2 * b_2
    row, column = tile_m * BM, tile_n * BN
    m = row + tl.arange(0, BM)[:, None]
    n = column + tl.arange(0, BN)[None, :]
    k = tl.arange(0, BK)
    x = a + m.to(tl.int64) * a_m + k.to(tl.int64)[None, :] * a_k  # (BM, BK)
    y = b + n.to(tl.int64) * b_n + k.to(tl.int64)[:, None] * b_k  # (BK, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        if EVEN:
            p, q = tl.load(x, m < M, other=0.0), tl.load(y, n < N, other=0.0)
        else:
            inside = start + k < K
            p = tl.load(x, (m < M) & inside[None, :], other=0.0)
            q = tl.load(y, inside[:, None] & (n < N), other=0.0)
        acc = tl.dot(p, q, acc, input_precision=PRECISION)
        x += BK * a_k
        y += BK * b_k
    _finish(acc, batch, row, column, c, out, M, N, alpha, BM, BN)


@triton.jit
def _batched_tma_kernel(
    a, b, c, out, batches, M, N, K, alpha,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, A_MANY: tl.constexpr,
    B_MANY: tl.constexpr, A_TURNED: tl.constexpr, B_TURNED: tl.constexpr,
):  # fmt: skip
    """a, b: descriptors of (batches, rows, columns), MANY, or of one matrix for all; TURNED: with the K axis first (A), or
    last (B)."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    tiles = tiles_m * tiles_n
    steps = tl.cdiv(K, BK)
    for index in tl.range(tl.program_id(0), tiles * batches, tl.num_programs(0), flatten=True):
        batch = index // tiles
        tile_m, tile_n = _place(index % tiles, tiles_m, tiles_n, GROUP_M)
        row, column = tile_m * BM, tile_n * BN
        i, j = batch if A_MANY else 0, batch if B_MANY else 0
        acc = tl.zeros((BM, BN), tl.float32)
        tl.assume(steps > 0)
        for step in range(steps):
            k = step * BK
            left = a.load([i, k, row]).reshape(BK, BM).T if A_TURNED else a.load([i, row, k]).reshape(BM, BK)
            right = b.load([j, column, k]).reshape(BN, BK).T if B_TURNED else b.load([j, k, column]).reshape(BK, BN)
            acc = tl.dot(left, right, acc)
        _finish(acc, batch.to(tl.int64), row, column, c, out, M, N, alpha, BM, BN)


def _axes(batch: Sequence[int], *steps: Sequence[int]) -> list[tuple[int, ...]]:
    """(size, step of each array) of the batch's axes, from the last; those that are one in all arrays count once."""
    axes: list[tuple[int, ...]] = []
    for n, *each in zip(reversed(batch), *(reversed(s) for s in steps)):
        if n == 1:
            continue
        if axes and all(step == inner * axes[-1][0] for step, inner in zip(each, axes[-1][1:])):
            axes[-1] = (axes[-1][0] * n, *axes[-1][1:])
        else:
            axes.append((n, *each))
    return axes or [(1, *(0 for _ in steps))]


def _spread(x: Any, batch: Sequence[int], empty: Callable) -> Any:
    """``x`` with one axis of each matrix contiguous, and the whole batch's axes."""
    x = x if 1 in x.stride()[-2:] or not x.numel() else _tile.copied(x, None, empty)
    return x.expand(*batch, *x.shape[-2:])


def _fits_tma(x: Any, step: int) -> bool:
    """Whether a descriptor can describe matrices (2-D, of 16-bit numbers) that lie ``step`` elements apart."""
    return _matmul._fits_tma(x) and step * x.element_size() % 16 == 0


def _described(x: Any, many: int, step: int, turned: bool, rows: int, columns: int) -> Any:
    """Of ``many`` matrices ``step`` apart, blocks of rows × columns, or turned."""
    x = x.T if turned else x
    block = [columns, rows] if turned else [rows, columns]
    return _tile.described(x.as_strided((many, *x.shape), (step or x.stride(0) * x.shape[0], *x.stride())), [1, *block])


def product(a: Any, b: Any, out: Any, empty: Callable, *, c: Any = None, alpha: float = 1.0) -> None:
    """out = α a b + c. a: (…, M, K), b: (…, K, N), of one dtype and any strides; out, c: (…, M, N), row-major."""
    if not out.numel():
        return
    batch, (m, n), k = out.shape[:-2], out.shape[-2:], a.shape[-1]
    a, b = _spread(a, batch, empty), _spread(b, batch, empty)
    axes = _axes(batch, a.stride()[:-2], b.stride()[:-2])
    if len(axes) > 3:  # a rare batch
        a, b = (_tile.copied(x, None, empty) for x in (a, b))
        axes = _axes(batch, a.stride()[:-2], b.stride()[:-2])
    count = math.prod(batch)
    if alpha == 1 and (rows := _as_rows(a, axes, count)) is not None:
        if c is not None:
            _tile.copy(c, out)
        _matmul.matmul(rows, b[(0,) * len(batch)].T, out.view(count * m, n), empty, add=c is not None)
        return
    one, other = a[(0,) * len(batch)], b[(0,) * len(batch)]
    device, size = _tile.device(a), a.element_size()
    precision = _matmul._precision(size)
    high = _matmul.ALIKE if _invariance.on() else m  # of its own rows alone, or of all that there are
    regular = len(axes) == 1 and k > 0 and high >= 64 and n >= 64
    tma = device.arch >= 90 and regular and _fits_tma(one, axes[0][1]) and _fits_tma(other, axes[0][2])
    choice = _matmul.HALF_TMA if tma else _matmul.HALF
    if size == 4:
        choice = _matmul.TF32 if precision == "tf32" else _matmul.SINGLE
    aligned = all(s % 16 == 0 for s in (n, max(one.stride()), max(other.stride()), *axes[0][1:]))
    # By the rows of all products, where a tile's are no more than a product's.
    rows = high if high < 128 or _invariance.on() else m * count
    t, _ = choice(device, rows, n, k, size, aligned, tma)
    sizes: dict[str, Any] = dict(M=m, N=n, K=k, alpha=alpha, BM=t.BM, BN=t.BN, BK=t.BK, GROUP_M=GROUP)
    sizes |= dict(num_warps=t.warps, num_stages=t.stages)
    programs = _tile.cdiv(m, t.BM) * _tile.cdiv(n, t.BN) * count
    if tma:
        turned = one.stride(1) != 1, other.stride(1) != 1
        many = [count if step else 1 for step in axes[0][1:]]
        left = _described(one, many[0], axes[0][1], turned[0], t.BM, t.BK)
        right = _described(other, many[1], axes[0][2], turned[1], t.BK, t.BN)
        flags = dict(A_MANY=many[0] > 1, B_MANY=many[1] > 1, A_TURNED=turned[0], B_TURNED=turned[1])
        grid = (min(programs, device.sms),)
        _tile.launch(_batched_tma_kernel, grid, left, right, c, out, count, **sizes, **flags)
        return
    steps = dict(a_m=one.stride(0), a_k=one.stride(1), b_k=other.stride(0), b_n=other.stride(1))
    _, (n1, a_1, b_1), (n2, a_2, b_2) = three = [(1, 0, 0)] * (3 - len(axes)) + axes[::-1]
    places = n1, n2, three[0][1], a_1, a_2, three[0][2], b_1, b_2
    how = dict(EVEN=type(k) is int and k % t.BK == 0, PRECISION=precision)
    _tile.launch(_batched_kernel, (programs,), a, b, c, out, *places, **steps, **sizes, **how)


def _as_rows(a: Any, axes: list, count: int) -> Any:
    """``a`` as one matrix of the rows of all, where b is one matrix for all of them; else None."""
    if any(axis[2] for axis in axes) or len(axes) != 1:
        return None
    m, k = a.shape[-2:]
    step = axes[0][1]
    if count > 1 and m > 1 and step != m * a.stride(-2):
        return None
    return a.as_strided((count * m, k), (a.stride(-2) if m > 1 else step or k, a.stride(-1)), a.storage_offset())


def _gradient(x: Any, y: Any, shape: Sequence[int], dtype: Any, alpha: float, empty: Callable) -> Any:
    """α x y, (…, rows, columns), added up to ``shape`` where its batch was broadcast."""
    out = empty(shape, dtype)
    if not out.numel():
        return out
    batch = broadcast(x.shape[:-2], y.shape[:-2])
    mine = (1,) * (len(batch) - len(shape) + 2) + tuple(shape[:-2])
    over = [i for i, (n, own) in enumerate(zip(batch, mine)) if own != n]
    if not over:
        product(x, y, out, empty, alpha=alpha)
        return out
    kept = [i for i in range(len(batch)) if i not in over]
    order = [*over, *kept, len(batch), len(batch) + 1]
    x, y = (t.expand(*batch, *t.shape[-2:]).permute(order) for t in (x, y))
    parts = empty((*(batch[i] for i in over), *(batch[i] for i in kept), *shape[-2:]), "float32")
    count = math.prod(batch[i] for i in over)
    if parts.numel():
        product(x, y, parts, empty, alpha=alpha)
    _matmul.finish(parts.view(count, math.prod(shape[:-1]), shape[-1]), out.view(-1, shape[-1]))
    return out


def matmul_forward(
    a: Any, b: Any, c: Any = None, *, needs: tuple = (), alpha: float = 1.0, empty: Any
) -> tuple[tuple, dict]:
    y = empty((*broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), a.dtype)
    product(a, b, y, empty, c=c if c is None else _tile.dense(c, empty), alpha=alpha)
    return (y,), {name: x for name, x, of in (("a", a, "b"), ("b", b, "a")) if of in needs}


def matmul_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, alpha: float = 1.0, empty: Any) -> tuple:
    (dy,), (a, b) = dys, inputs[:2]
    da = db = None
    if "a" in needs:
        da = _gradient(dy, saved["b"].mT, a.shape, dy.dtype, alpha, empty)
    if "b" in needs:
        flat = None
        if len(b.shape) == 2:
            flat = _of_all_rows(saved["a"], dy, alpha, empty)
        db = flat if flat is not None else _gradient(saved["a"].mT, dy, b.shape, dy.dtype, alpha, empty)
    return da, db, _tile.copied(dy, None, empty) if "c" in needs else None


def _of_all_rows(a: Any, dy: Any, alpha: float, empty: Callable) -> Any:
    """α aᵀ dy added up over the batch: one product whose K are all rows; None where they do not lie evenly."""
    if alpha != 1 or a.shape[:-2] != dy.shape[:-2] or not a.numel() or not dy.numel():
        return None
    try:
        left, right = a.view(-1, a.shape[-1]), dy.view(-1, dy.shape[-1])
    except RuntimeError:
        return None
    out = empty((a.shape[-1], dy.shape[-1]), dy.dtype)
    _matmul.matmul(left.T, right.T, out, empty, weights=True)
    return out
