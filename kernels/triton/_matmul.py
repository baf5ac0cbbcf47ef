"""out = f(A B + bias): the matrix product that families share.

One kernel walks output tiles in an order that reuses L2. On sm_90 and newer it is persistent and loads through the
tensor memory accelerator (TMA) where shapes are aligned; elsewhere it loads through pointers, one tile a program. Where
there are too few tiles to fill the GPU, K is split: partial sums in float32, then a second stage, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import _tile
from .activation import value


class Config(NamedTuple):
    BM: int
    BN: int
    BK: int
    warps: int
    stages: int

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory for the stages' tiles."""
        return self.stages * (self.BM + self.BN) * self.BK * itemsize


# The first that is not much wider than the output, gives every SM a tile, and fits the device's shared memory.
HALF_TMA = [Config(128, 256, 64, 8, 3), Config(128, 128, 64, 8, 4), Config(64, 128, 64, 4, 4)]
HALF = [
    Config(128, 256, 64, 8, 3),  # sm_80: 160 KB
    Config(128, 128, 32, 4, 4),  # sm_86, 89, 120: 99 KB
    Config(64, 128, 32, 4, 4),
    Config(32, 64, 64, 4, 4),
    Config(16, 64, 128, 4, 3),
]
SINGLE = [Config(128, 64, 16, 8, 3), Config(64, 64, 16, 4, 3), Config(16, 64, 32, 4, 3)]
"""float32 exact: no tensor cores, so the accumulators and both operands live in registers."""
TF32 = [Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 3), Config(16, 64, 32, 4, 3)]
GROUP = 8
"""Rows of tiles walked together, so that their columns of B stay in L2."""
LEAST_STEPS = 4
"""Steps along K that a split must have, or its partial sums cost more than they bring."""


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a tile in grouped order."""
    width = GROUP_M * tiles_n
    first = tile // width * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % width % size, tile % width // size


@triton.jit
def _load(
    x, row, k, rows, K, x_row, x_k, ROWS: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, TURNED: tl.constexpr
):
    """x[row : row + ROWS, k : k + BK] as (ROWS, BK), zero outside; TURNED: x's descriptor has its K axis first."""
    if TMA:
        if TURNED:
            tile = x.load([k, row]).T
        else:
            tile = x.load([row, k])
    else:
        r = row + tl.arange(0, ROWS).to(tl.int64)[:, None]
        c = k + tl.arange(0, BK).to(tl.int64)[None, :]
        tile = tl.load(x + r * x_row + c * x_k, (r < rows) & (c < K), other=0.0)
    return tile


@triton.jit
def _matmul_kernel(
    a, b, bias, z, out, M, N, K, a_m, a_k, b_n, b_k, k_split, splits, number_a, number_b,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, TMA: tl.constexpr,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    tiles = tiles_m * tiles_n
    for index in tl.range(tl.program_id(0), tiles * splits, tl.num_programs(0), flatten=TMA):
        split = index // tiles
        tile_m, tile_n = _place(index % tiles, tiles_m, tiles_n, GROUP_M)
        row, column = tile_m * BM, tile_n * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(split * k_split, tl.minimum((split + 1) * k_split, K), BK):
            left = _load(a, row, k, M, K, a_m, a_k, BM, BK, TMA, A_TURNED)
            right = _load(b, column, k, N, K, b_n, b_k, BN, BK, TMA, B_TURNED)
            acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
        m = row + tl.arange(0, BM).to(tl.int64)[:, None]
        n = column + tl.arange(0, BN)[None, :]
        mask = (m < M) & (n < N)
        at = (split * M + m) * N + n  # 64-bit, as m is
        if bias is not None:
            acc += tl.load(bias + n, n < N, other=0.0).to(tl.float32)
        if z is not None:
            tl.store(z + at, acc.to(z.dtype.element_ty), mask)
        if ACTIVATION is not None:
            acc = value(acc, ACTIVATION, number_a, number_b)
        tl.store(out + at, acc.to(out.dtype.element_ty), mask)


@triton.jit
def _finish_kernel(
    parts, bias, z, out, S, M, N, number_a, number_b,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = f(Σ parts + bias) over the S parts (S, M, N), in order."""
    row, n, mask = _tile.tile(M, N, ROWS, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for s in range(S):
        total += tl.load(parts + (s * M + row) * N + n, mask, other=0.0)
    if bias is not None:
        total += tl.load(bias + n, n < N, other=0.0).to(tl.float32)
    if z is not None:
        tl.store(z + row * N + n, total.to(z.dtype.element_ty), mask)
    if ACTIVATION is not None:
        total = value(total, ACTIVATION, number_a, number_b)
    tl.store(out + row * N + n, total.to(out.dtype.element_ty), mask)


def finish(
    parts: Any, out: Any, bias: Any = None, z: Any = None, f: str | None = None, numbers: tuple = (0.0, 0.0)
) -> None:
    """out = f(Σ parts + bias): the second stage of a sum whose parts (S, M, N) are float32; z: the sum before f."""
    s, m, n = parts.shape
    block = min(1024, max(16, _tile.next_power_of_2(n)))
    rows = 1024 // block
    grid = (_tile.cdiv(m, rows) * _tile.cdiv(n, block),)
    sizes = dict(ACTIVATION=f, ROWS=rows, BLOCK=block)
    _tile.launch(_finish_kernel, grid, parts, bias, z, out, s, m, n, *numbers, **sizes)


def _unit(x: Any) -> Any:
    """``x`` (2-D) with one of its axes contiguous; a copy where neither is."""
    return x if 1 in x.stride() or x.numel() == 0 else x.contiguous()


def _fits_tma(x: Any) -> bool:
    """Whether a descriptor can describe ``x`` (2-D): 16-bit numbers, one axis contiguous, the other 16-byte aligned."""
    step = max(x.stride())
    aligned = step * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return x.element_size() == 2 and 0 not in x.shape and min(x.stride()) == 1 and step >= min(x.shape) and aligned


def _turned(x: Any) -> bool:
    return x.stride(1) != 1


def _describe(x: Any, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    if _turned(x):
        return TensorDescriptor.from_tensor(x.T, [columns, rows])
    return TensorDescriptor.from_tensor(x, [rows, columns])


def _choose(table: list[Config], m: int, n: int, itemsize: int, device: _tile.Device) -> Config:
    fitting = [c for c in table if c.shared(itemsize) <= device.shared - 2048]
    for c in fitting[:-1]:
        tiles = _tile.cdiv(m, c.BM) * _tile.cdiv(n, c.BN)
        if m > c.BM // 2 and n > c.BN // 2 and tiles >= device.sms:
            return c
    # Too few tiles for every SM: the one that wastes least on the edges, wide ones first; splitting K fills the GPU.
    return min(fitting, key=lambda c: (_tile.cdiv(m, c.BM) * c.BM * _tile.cdiv(n, c.BN) * c.BN, -c.BM * c.BN))


def _precision(itemsize: int) -> str:
    import torch

    return "tf32" if itemsize == 4 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def matmul(
    a: Any,
    b: Any,
    out: Any,
    empty: Callable,
    *,
    bias: Any = None,
    z: Any = None,
    f: str | None = None,
    numbers: tuple[float, float] = (0.0, 0.0),
) -> None:
    """out = f(A Bᵀ + bias), and z = A Bᵀ + bias where asked.

    a: (M, K), b: (N, K), of one dtype and any strides (``b`` is stored as a weight is). bias: (N,) contiguous.
    out, z: (M, N) row-major. f: an activation's name, with its numbers.
    """
    a, b = _unit(a), _unit(b)
    (m, k), n, device = a.shape, b.shape[0], _tile.device(a)
    precision = _precision(a.element_size())
    tma = device.arch >= 90 and m >= 64 and n >= 64 and _fits_tma(a) and _fits_tma(b)
    table = (HALF_TMA if tma else HALF) if a.element_size() == 2 else TF32 if precision == "tf32" else SINGLE
    c = _choose(table, m, n, a.element_size(), device)
    tiles = _tile.cdiv(m, c.BM) * _tile.cdiv(n, c.BN)
    splits = max(1, min(device.sms // max(tiles, 1), k // (c.BK * LEAST_STEPS)))
    k_split = _tile.cdiv(_tile.cdiv(k, splits), c.BK) * c.BK
    splits = max(1, _tile.cdiv(k, max(k_split, 1)))
    programs = min(tiles * splits, device.sms) if tma else tiles * splits
    strides = (a.stride(0), a.stride(1), b.stride(0), b.stride(1))
    sizes = dict(BM=c.BM, BN=c.BN, BK=c.BK, GROUP_M=GROUP, TMA=tma, PRECISION=precision)
    turned = dict(A_TURNED=tma and _turned(a), B_TURNED=tma and _turned(b))
    if tma:
        a, b = _describe(a, c.BM, c.BK), _describe(b, c.BN, c.BK)
    options = dict(num_warps=c.warps, num_stages=c.stages)
    if splits == 1:
        arrays = (a, b, bias, z, out, m, n, k, *strides, k_split, splits, *numbers)
        _tile.launch(_matmul_kernel, (programs,), *arrays, ACTIVATION=f, **sizes, **turned, **options)
        return
    parts = empty((splits, m, n), "float32")
    arrays = (a, b, None, None, parts, m, n, k, *strides, k_split, splits, *numbers)
    _tile.launch(_matmul_kernel, (programs,), *arrays, ACTIVATION=None, **sizes, **turned, **options)
    finish(parts, out, bias, z, f, numbers)
