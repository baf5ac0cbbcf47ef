"""y = q (kᵀ v): an op with a Triton kernel of its own, which linear_attention.py runs."""

import triton
import triton.language as tl

import gpulayers as gl


def product(q, k, v):
    """y = q (kᵀ v), all (N, T, D)."""
    return q @ (k.swapaxes(1, 2) @ v)


@triton.jit
def _product_kernel(q, k, v, y, T, D: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    column = tl.arange(0, WIDE)[None, :]  # a program has a sequence, and kᵀ v in registers
    first, sums = tl.program_id(0).to(tl.int64) * T * D, tl.zeros((WIDE, WIDE), tl.float32)
    for start in range(0, T, TILE):
        row = start + tl.arange(0, TILE)[:, None]
        at, inside = first + row * D + column, (row < T) & (column < D)
        keys, values = tl.load(k + at, inside, other=0.0), tl.load(v + at, inside, other=0.0)
        sums = tl.dot(tl.trans(keys), values, sums, input_precision="ieee")
    for start in range(0, T, TILE):
        row = start + tl.arange(0, TILE)[:, None]
        at, inside = first + row * D + column, (row < T) & (column < D)
        asked = tl.load(q + at, inside, other=0.0).to(tl.float32)
        tl.store(y + at, tl.dot(asked, sums, input_precision="ieee").to(y.dtype.element_ty), inside)


def launch(q, k, v, *, empty):
    y, wide = empty(q.shape, q.dtype), max(16, triton.next_power_of_2(q.shape[2]))
    _product_kernel[(len(q),)](q, k, v, y, q.shape[1], D=q.shape[2], TILE=32, WIDE=wide)
    return y


def gradients(dy, q, k, v):
    return product(dy, v, k), product(v, dy, q), product(k, q, dy)


def launch_gradients(dy, q, k, v, *, empty):
    return launch(dy, v, k, empty=empty), launch(v, dy, q, empty=empty), launch(k, q, dy, empty=empty)


linear_attention = gl.op("linear_attention", product, gradients, triton=(launch, launch_gradients))
