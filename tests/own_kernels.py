"""Triton kernels that tests of own ops launch: they must be in a file."""

import triton
import triton.language as tl


@triton.jit
def double_kernel(x, y, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, at < N, other=0.0), at < N)


@triton.jit
def double_too_far_kernel(x, y, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, at <= N, other=0.0), at < N)


FACTOR = tl.constexpr(2)


@triton.jit
def scale_kernel(x, y, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, FACTOR * tl.load(x + at, at < N, other=0.0), at < N)
