"""out = f(A B + bias): the matrix product that families share.

One kernel walks output tiles in an order that reuses L2. On sm_90 and newer it is persistent and loads through the
tensor memory accelerator (TMA) where shapes are aligned; elsewhere it loads through pointers, one tile a program. Where
there are too few tiles to fill the GPU, K is split: partial sums in float32, then a second stage, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import _invariance
from .._budget import Budget
from . import _configs, _tile
from ._configs import Tile
from ._tile import rows_tile
from .activation import value

GROUP = 8
"""Rows of tiles walked together, so that their columns of B stay in L2."""
PART = 64
"""Columns of a part of a tile that descriptors store: so few that its copy in shared memory stays small."""
ALIKE = 64
"""Rows that a batch-invariant product is cut for, whatever it has, without splits of K: of many rows it takes, by ``cost``, up
to 1.9 times as long, of few, where K is long, up to 4 times; cut for more rows, few would take 9 times as long."""
LEAST_STEPS = 4
"""Steps along K that a split must have, or its partial sums cost more than they bring."""


def _narrow(c: dict[str, Any]) -> str:
    """Rows of a length that 16 does not divide; TF32 is multiplied with K neighbouring, so what lies along the other axis
    is read number by number."""
    loads = c["odd"] & {"M", "N", "K", "a_m", "a_k", "b_n", "b_k"} or c.get("PRECISION") == "tf32"
    return ("loads " if loads else "") + ("stores" if c["odd"] & {"M", "N"} else "")


BUDGETS = {
    # Before and after sm_90 a few registers are put aside in some tiles.
    "_matmul_kernel": Budget(registers=255, blocks=1, narrow=_narrow, spills=8),
    "_matmul_tma_kernel": Budget(registers=255, blocks=1, narrow=_narrow),
    "_finish_kernel": Budget(registers=48, blocks=10, narrow=_narrow),
}


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a tile in grouped order."""
    width = GROUP_M * tiles_n
    first = tile // width * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % width % size, tile % width // size


@triton.jit
def _store(
    acc, split, row, column, bias, z, out, M, N, number_a, number_b,
    BM: tl.constexpr, BN: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The epilogue for one tile (BM, BN) at (row, column)."""
    m = row + tl.arange(0, BM).to(tl.int64)[:, None]
    n = column + tl.arange(0, BN)[None, :]
    mask = (m < M) & (n < N)
    at = (split * M + m) * N + n  # 64-bit, as m is
    if ADD:
        acc += tl.load(out + at, mask, other=0.0).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + n, n < N, other=0.0).to(tl.float32)
    if z is not None:
        tl.store(z + at, acc.to(z.dtype.element_ty), mask)
    if ACTIVATION is not None:
        acc = value(acc, ACTIVATION, number_a, number_b)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask)


@triton.jit
def _put(
    acc, split, row, column, bias, z, out, N, number_a, number_b,
    BM: tl.constexpr, BN: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The same through descriptors: of z (M, N), of out (splits, M, N)."""
    if bias is not None:
        n = column + tl.arange(0, BN)[None, :]
        acc += tl.load(bias + n, n < N, other=0.0).to(tl.float32)
    if z is not None:
        z.store([row, column], acc.to(z.dtype))
    if ACTIVATION is not None:
        acc = value(acc, ACTIVATION, number_a, number_b)
    out.store([split, row, column], acc.to(out.dtype).reshape(1, BM, BN))


@triton.jit
def _finish_tile(
    acc, split, row, column, bias, z, out, M, N, number_a, number_b,
    BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, STORED: tl.constexpr, ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile in PARTS, one after the other: the temporaries of a whole one would spill, and its copy in
    shared memory would take the room of the next one's loads. STORED: z and out are descriptors."""
    if PARTS > 1:
        HALF: tl.constexpr = BN // 2
        end = (bias, z, out, M, N, number_a, number_b)
        left, right = tl.split(acc.reshape(BM, 2, HALF).permute(0, 2, 1))
        _finish_tile(left, split, row, column, *end, BM, HALF, PARTS // 2, STORED, ACTIVATION, ADD)
        _finish_tile(right, split, row, column + HALF, *end, BM, HALF, PARTS // 2, STORED, ACTIVATION, ADD)
    elif STORED:
        _put(acc, split, row, column, bias, z, out, N, number_a, number_b, BM, BN, ACTIVATION)
    else:
        _store(acc, split, row, column, bias, z, out, M, N, number_a, number_b, BM, BN, ACTIVATION, ADD)


@triton.jit
def _matmul_kernel(
    a, b, bias, z, out, M, N, K, a_m, a_k, b_n, b_k, k_split, number_a, number_b,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, EVEN: tl.constexpr,
    PARTS: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one split. EVEN: every step along K is whole."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    split = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = _place(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    row, column = tile_m * BM, tile_n * BN
    m = row + tl.arange(0, BM)[:, None]  # (BM, 1)
    n = column + tl.arange(0, BN)[None, :]  # (1, BN)
    k = split * k_split + tl.arange(0, BK)
    end = tl.minimum((split + 1) * k_split, K)
    left = a + m.to(tl.int64) * a_m + k.to(tl.int64)[None, :] * a_k  # (BM, BK)
    right = b + n.to(tl.int64) * b_n + k.to(tl.int64)[:, None] * b_k  # (BK, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(split * k_split, end, BK):
        if EVEN:
            x = tl.load(left, m < M, other=0.0)
            y = tl.load(right, n < N, other=0.0)
        else:
            inside = start + tl.arange(0, BK) < end
            x = tl.load(left, (m < M) & inside[None, :], other=0.0)
            y = tl.load(right, inside[:, None] & (n < N), other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
        left += BK * a_k
        right += BK * b_k
    end = (bias, z, out, M, N, number_a, number_b)
    _finish_tile(acc, split, row, column, *end, BM, BN, PARTS, False, ACTIVATION, ADD)


@triton.jit
def _matmul_tma_kernel(
    a, b, bias, z, out, sums, M, N, K, k_split, splits, number_a, number_b,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, PARTS: tl.constexpr, STORED: tl.constexpr,
    ACTIVATION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Every program walks many tiles, so that one tile's epilogue overlaps the next one's loads.

    a, b: descriptors, which give zeros outside; TURNED: with the K axis first. sums (splits, 1, M): of a along K. STORED: z
    and out are descriptors.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    tiles = tiles_m * tiles_n
    steps = tl.cdiv(k_split, BK)  # as many for each tile, or the loops would not become one
    for index in tl.range(tl.program_id(0), tiles * splits, tl.num_programs(0), flatten=True):
        split = index // tiles
        tile_m, tile_n = _place(index % tiles, tiles_m, tiles_n, GROUP_M)
        row, column = tile_m * BM, tile_n * BN
        acc = tl.zeros((BM, BN), tl.float32)
        if sums is not None:
            total = tl.zeros((BM, BK), tl.float32)
        tl.assume(steps > 0)
        for step in range(steps):
            k = split * k_split + step * BK
            left = a.load([k, row]).T if A_TURNED else a.load([row, k])
            right = b.load([k, column]) if B_TURNED else b.load([column, k]).T
            acc = tl.dot(left, right, acc)
            if sums is not None:
                total += left.to(tl.float32)
        if sums is not None:  # of every tile of these rows alike: a branch in the loop would cost more than it saves
            m = row + tl.arange(0, BM)
            tl.store(sums + split.to(tl.int64) * M + m, tl.sum(total, 1), (m < M) & (tile_n == 0))
        end = (bias, z, out, M, N, number_a, number_b)
        _finish_tile(acc, split, row, column, *end, BM, BN, PARTS, STORED, ACTIVATION, ADD)


@triton.jit
def _finish_kernel(
    parts, bias, z, out, sums, total, S, M, N, number_a, number_b,
    ACTIVATION: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = f(Σ parts + bias) over the S parts (S, M, N), and total = Σ sums over (S, 1, M), in order."""
    row, n, mask = rows_tile(M, N, ROWS, BLOCK)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for s in range(S):
        acc += tl.load(parts + (s * M + row) * N + n, mask, other=0.0)
    if sums is not None:
        first = (row < M) & (tl.program_id(0) % ((N - 1) // BLOCK + 1) == 0)  # of the programs of these rows
        added = tl.zeros((ROWS, 1), tl.float32)
        for s in range(S):
            added += tl.load(sums + s * M + row, first, other=0.0)
        tl.store(total + row, added.to(total.dtype.element_ty), first)
    if ADD:
        acc += tl.load(out + row * N + n, mask, other=0.0).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + n, n < N, other=0.0).to(tl.float32)
    if z is not None:
        tl.store(z + row * N + n, acc.to(z.dtype.element_ty), mask)
    if ACTIVATION is not None:
        acc = value(acc, ACTIVATION, number_a, number_b)
    tl.store(out + row * N + n, acc.to(out.dtype.element_ty), mask)


FINISH = _configs.rows("matmul_finish")


def finish(
    parts: Any, out: Any, bias: Any = None, z: Any = None, f: str | None = None, numbers: tuple = (0.0, 0.0),
    add: bool = False, sums: Any = None, total: Any = None,
) -> None:  # fmt: skip
    """out = f(Σ parts + bias): the second stage of a sum whose parts (S, M, N) are float32; z: the sum before f; add: to out.
    total: Σ sums over (S, 1, M), where there are any."""
    s, m, n = parts.shape
    tile = _tile.flat_tile(FINISH(_tile.device(out), n), max(16, n))
    grid = (_tile.cdiv(m, tile["ROWS"]) * _tile.cdiv(n, tile["BLOCK"]),)
    _tile.launch(
        _finish_kernel, grid, parts, bias, z, out, sums, total, s, m, n, *numbers, ACTIVATION=f, ADD=add, **tile
    )


def zero(out: Any, empty: Callable) -> None:
    """out (M, N) = 0: a sum of no parts."""
    if out.numel():
        finish(empty((0, *out.shape), "float32"), out)


def _unit(x: Any, empty: Callable) -> Any:
    """``x`` (2-D) with one of its axes contiguous; a copy where neither is."""
    return x if 1 in x.stride() or x.numel() == 0 else _tile.copied(x, None, empty)


def _fits_tma(x: Any) -> bool:
    """Whether a descriptor can describe ``x`` (2-D): 16-bit numbers, one axis contiguous, the other 16-byte aligned."""
    step = max(x.stride())
    aligned = step * x.element_size() % 16 == 0 and _tile.begins_aligned(x)
    return x.element_size() == 2 and 0 not in x.shape and min(x.stride()) == 1 and step >= min(x.shape) and aligned


def _turned(x: Any) -> bool:
    return x.stride(1) != 1


def _describe(x: Any, rows: int, columns: int) -> Any:
    return _tile.described(x.T, [columns, rows]) if _turned(x) else _tile.described(x, [rows, columns])


class Plan(NamedTuple):
    """How a product is cut."""

    tile: Tile
    splits: int
    """Of K, each summed on its own."""


def _fitting(
    entries: Sequence[Tile], device: _tile.Device, itemsize: int, aligned: bool, tma: bool
) -> list[tuple[int, Tile]]:
    """Those whose operands fit shared memory beside a part of the epilogue, and their addresses the registers."""
    room = device.shared - 2048
    beside = 4 * PART if tma else 0
    fitting = [(i, c) for i, c in enumerate(entries) if c.shared(itemsize) + beside * c.BM <= room]
    if not aligned and not tma:  # the addresses of single elements would take the registers of a large tile's sums
        fitting = [(i, c) for i, c in fitting if c.BM * c.BN // c.warps * itemsize <= 4096]
    return fitting


def _widest(
    entries: Sequence[Tile], device: _tile.Device, m: int, n: int, k: int, itemsize: int, aligned: bool, tma: bool
) -> tuple[int, Plan] | None:
    """The first that is not much wider than the output, gives every SM a tile, and fits the device's shared memory."""
    fitting = _fitting(entries, device, itemsize, aligned, tma)
    for i, c in fitting[:-1]:
        tiles = _tile.cdiv(m, c.BM) * _tile.cdiv(n, c.BN)
        if m > c.BM // 2 and n > c.BN // 2 and tiles >= device.sms:
            return i, Plan(c, 1)

    # Too few tiles for every SM: the one that wastes least on the edges, wide ones first; splitting K fills the GPU.
    def waste(entry: tuple[int, Tile]) -> tuple[int, int]:
        c = entry[1]
        return _tile.cdiv(m, c.BM) * c.BM * _tile.cdiv(n, c.BN) * c.BN, -c.BM * c.BN

    if not fitting:
        return None
    i, c = min(fitting, key=waste)
    tiles = _tile.cdiv(m, c.BM) * _tile.cdiv(n, c.BN)
    return i, Plan(c, max(1, min(device.sms // max(tiles, 1), k // (c.BK * LEAST_STEPS))))


LOADED, MOVED, SECOND = 80, 0.67, 8e6
"""What stands beside a multiprocessor's multiply-adds on an H200, in as many of them: an element of an operand that it loads
from L2, a byte that the whole GPU moves in memory, a second stage's launch."""
MOST_ROUNDS = 6
"""Of the GPU's tiles, up to which splitting K evens out the last one."""


def cost(tile: Tile, splits: int, sms: int, m: int, n: int, k: int) -> float:
    """How long a product of 16-bit numbers takes: rounds of the GPU's tiles, and the partial sums of what is split."""
    rounds = _tile.cdiv(_tile.cdiv(m, tile.BM) * _tile.cdiv(n, tile.BN) * splits, sms)
    step = max(tile.BM * tile.BN, LOADED * (tile.BM + tile.BN)) * tile.BK
    second = 0 if splits == 1 else SECOND + 8 * splits * m * n * MOVED
    return rounds * _tile.cdiv(_tile.cdiv(k, tile.BK), splits) * step + second


def _quickest(
    entries: Sequence[Tile], device: _tile.Device, m: int, n: int, k: int, itemsize: int, aligned: bool, tma: bool
) -> tuple[int, Plan] | None:
    """The tile, and the splits of K, of the least cost."""
    found = []
    for i, c in _fitting(entries, device, itemsize, aligned, tma):
        tiles = _tile.cdiv(m, c.BM) * _tile.cdiv(n, c.BN)
        most = max(1, min(MOST_ROUNDS * device.sms // max(tiles, 1), k // (c.BK * LEAST_STEPS)))
        found += [(cost(c, s, device.sms, m, n, k), s, i, c) for s in range(1, most + 1)]
    if not found:
        return None
    _, splits, i, c = min(found)
    return i, Plan(c, splits)


HALF_TMA = _configs.tiles("matmul.half_tma", _quickest, inner=(32, 64, 128))
HALF = _configs.tiles("matmul.half", _quickest, inner=(32, 64, 128))
TF32 = _configs.tiles("matmul.tf32", _widest, inner=(16, 32, 64))
SINGLE = _configs.tiles("matmul.single", _widest, inner=(16, 32))
"""float32 exact: no tensor cores, so the accumulators and both operands live in registers."""


def _precision(itemsize: int) -> str:
    return "tf32" if itemsize == 4 and _tile.tf32("cuda.matmul") else "ieee"


def by_tma(a: Any, b: Any, m: int | None = None) -> bool:
    """Whether the product A Bᵀ, of ``m`` rows where A's own do not count, is loaded through descriptors."""
    m = a.shape[0] if m is None else m
    return _tile.device(a).arch >= 90 and m >= 64 and b.shape[0] >= 64 and _fits_tma(a) and _fits_tma(b)


def _laid_out(a: Any, empty: Callable) -> Any:
    """``a`` (M, K) as it lies for any M: row-major, its one row or column too, and aligned."""
    a = _tile.dense(a, empty)
    a = a if _tile.begins_aligned(a) else _tile.copied(a, None, empty)
    return a if a.stride() == (a.shape[1], 1) else a.as_strided(a.shape, (a.shape[1], 1), a.storage_offset())


NOTHING = dict(bias=None, z=None, number_a=0.0, number_b=0.0, ACTIVATION=None, ADD=False)
"""The epilogue of partial sums: that of the product comes with their second stage."""


def matmul(
    a: Any, b: Any, out: Any, empty: Callable, *, bias: Any = None, z: Any = None, f: str | None = None,
    numbers: tuple[float, float] = (0.0, 0.0), add: bool = False, sums: Any = None, weights: bool = False,
) -> None:  # fmt: skip
    """out = f(A Bᵀ + bias), and z = A Bᵀ + bias where asked; add: out is added to the product. weights: the rows of out are a
    weight's, else they are the batch's, of which each is computed alike in batch-invariant mode.

    a: (M, K), b: (N, K), of one dtype and any strides (``b`` is stored as a weight is). bias: (N,) contiguous.
    out, z: (M, N) row-major. f: an activation's name, with its numbers. sums: (M,), A's along K, where ``by_tma``.
    """
    alike = ALIKE if _invariance.on() and not weights else None
    a, b = _laid_out(a, empty) if alike else _unit(a, empty), _unit(b, empty)
    (m, k), n, device = a.shape, b.shape[0], _tile.device(a)
    precision = _precision(a.element_size())
    if precision == "tf32" and device.arch >= 90:  # these tensor cores take float32 operands along K only
        a, b = _tile.dense(a, empty), _tile.dense(b, empty)
    tma = by_tma(a, b, alike)
    choice = (HALF_TMA if tma else HALF) if a.element_size() == 2 else TF32 if precision == "tf32" else SINGLE
    aligned = all(size % 16 == 0 for size in (n, max(a.stride()), max(b.stride())))
    c, splits = choice(device, alike or m, n, k, a.element_size(), aligned, tma)
    splits = 1 if alike else splits
    k_split = _tile.cdiv(_tile.cdiv(k, splits), c.BK) * c.BK
    splits = max(1, _tile.cdiv(k, max(k_split, 1)))
    whole = dict(bias=bias, z=z, number_a=numbers[0], number_b=numbers[1], ACTIVATION=f, ADD=add)
    target, end = (out, whole) if splits == 1 else (empty((splits, m, n), "float32"), NOTHING)
    parts = sums if sums is None or splits == 1 else empty((splits, 1, m), "float32")
    sizes = dict(M=m, N=n, K=k, k_split=k_split, BM=c.BM, BN=c.BN, BK=c.BK, GROUP_M=GROUP)
    sizes |= dict(num_warps=c.warps, num_stages=c.stages)
    programs = _tile.cdiv(m, c.BM) * _tile.cdiv(n, c.BN) * splits
    if tma:
        turned = dict(A_TURNED=_turned(a), B_TURNED=_turned(b))
        a, b = _describe(a, c.BM, c.BK), _describe(b, c.BN, c.BK)
        grid = (min(programs, device.sms),)
        end = _in_parts(target.view(splits, m, n), c, **end)
        _tile.launch(_matmul_tma_kernel, grid, a, b, sums=parts, splits=splits, **turned, **end, **sizes)
    else:
        steps = dict(a_m=a.stride(0), a_k=a.stride(1), b_n=b.stride(0), b_k=b.stride(1))
        even = type(k) is int and k % c.BK == 0
        in_parts = c.BM * c.BN >= 4096 and (end["ACTIVATION"] is not None or end["ADD"])
        end = end | dict(out=target, PARTS=4 if in_parts else 1, EVEN=even, PRECISION=precision)
        _tile.launch(_matmul_kernel, (programs,), a, b, **steps, **end, **sizes)
    if splits > 1:
        finish(target, out, bias, z, f, numbers, add, parts, sums)


def _in_parts(out: Any, tile: Tile, z: Any, ADD: bool, **end: Any) -> dict[str, Any]:
    """The epilogue's arguments for a tile of out (splits, M, N): descriptors, where they can be."""
    stored = out.shape[2] * out.element_size() % 16 == 0 and _tile.begins_aligned(out) and not ADD
    wide = min(PART if stored else PART // 2, tile.BN)  # addresses take registers
    if stored:
        out = _tile.described(out, [1, tile.BM, wide])
        z = z if z is None else _tile.described(z, [tile.BM, wide])
    return end | dict(out=out, z=z, ADD=ADD, STORED=stored, PARTS=tile.BN // wide)
