"""Mean and squared deviations of a row's part, of x or of the sum of x and a residual."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def added(v, residual, h, mask):
    """v + residual as it is in h: rounded."""
    v = (v + tl.load(residual, mask, other=0.0).to(tl.float32)).to(h.dtype.element_ty)
    tl.store(h, v, mask)
    return v.to(tl.float32)


@triton.jit
def moments(x, residual, h, lo, hi, RMS: tl.constexpr, BLOCK: tl.constexpr):
    """(mean, Σ (x − mean)²) of x[lo:hi], lane by lane as Welford did, then merged; for RMS the mean is 0.

    With a residual they are those of h, the sum, which is written.
    """
    lane = tl.arange(0, BLOCK).to(tl.int64)
    mean = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    seen = 0.0
    for start in range(lo, hi, BLOCK):
        mask = start + lane < hi
        v = tl.load(x + start + lane, mask, other=0.0).to(tl.float32)
        if residual is not None:
            v = added(v, residual + start + lane, h + start + lane, mask)
        if RMS:
            squares += v * v
        else:
            seen += 1.0
            d = v - mean
            mean += tl.where(mask, d * (1.0 / seen), 0.0)
            squares += tl.where(mask, d * (v - mean), 0.0)
    if RMS:
        total = 0.0
        spread = tl.sum(squares, 0)
    else:
        count = tl.maximum((hi - lo - lane + BLOCK - 1) // BLOCK, 0).to(tl.float32)
        total = tl.sum(count * mean, 0) / (hi - lo)
        spread = tl.sum(squares + count * (mean - total) * (mean - total), 0)
    return total, spread
