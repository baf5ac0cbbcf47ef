"""Group norm of row-major samples by a program for each group, which it reads twice, the second time from the cache."""

from __future__ import annotations

import triton
import triton.language as tl

from .._budget import Budget
from ._moments import moments
from ._pixels import step_to
from .activation import gradient, value

BUDGETS = {
    "_group_norm_forward_kernel": Budget(registers=88, blocks=5),
    "_group_norm_backward_kernel": Budget(registers=96, blocks=5),
}


@triton.jit
def parameter(p, channel, inside, default):
    if p is None:
        return default + tl.zeros(channel.shape, tl.float32)
    else:
        return tl.load(p + channel, inside, other=0.0).to(tl.float32)


@triton.jit
def _group_norm_forward_kernel(
    x, weight, bias, residual, y, mean, var, rstd, G, D, S, eps,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    S = S * UNIT
    row = tl.program_id(0).to(tl.int64)
    first = (tl.program_id(0) % G) * D
    size = S.to(tl.int64) * D
    x += row * size
    y += row * size
    if residual is not None:
        residual += row * size
    m, spread = moments(x, None, None, 0, size, False, ROWS * COLS)
    r = 1.0 / tl.sqrt_rn(spread / size + eps)
    if mean is not None:
        tl.store(mean + row, m)
        tl.store(rstd + row, r)
    if var is not None:
        tl.store(var + row, spread / size)
    for d in range(0, D, ROWS):
        channel = d + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
        w = parameter(weight, first + channel, channel < D, 1.0)
        b = parameter(bias, first + channel, channel < D, 0.0)
        for s in range(0, S, COLS):
            pixel = s + tl.arange(0, COLS)[None, :]  # (1, COLS)
            at = step_to(channel, S, WIDE) + pixel
            mask = (channel < D) & (pixel < S)
            z = (tl.load(x + at, mask, other=0.0).to(tl.float32) - m) * r * w + b
            if residual is not None:
                z += tl.load(residual + at, mask, other=0.0).to(tl.float32)
            if ACTIVATION is not None:
                z = value(z, ACTIVATION, NUMBER_A, NUMBER_B)
            tl.store(y + at, z.to(y.dtype.element_ty), mask)


@triton.jit
def activated_gradient(
    g, z, residual, at, mask, ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr
):
    """dz = g f'(z + residual) of a tile."""
    if residual is not None:
        z += tl.load(residual + at, mask, other=0.0).to(tl.float32)
    if ACTIVATION == "sigmoid" or ACTIVATION == "tanh":  # theirs is computed from y
        z = value(z, ACTIVATION, NUMBER_A, NUMBER_B)
    return tl.where(mask, gradient(g, z, ACTIVATION, NUMBER_A, NUMBER_B), 0.0)


@triton.jit
def _group_norm_backward_kernel(
    dy, x, weight, bias, residual, mean, rstd, dx, dresidual, sums, dots, G, D, S,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx and dresidual = dz of a group, and Σ dz and Σ dz x̂ of each of its channels."""
    S = S * UNIT
    row = tl.program_id(0).to(tl.int64)
    first = (tl.program_id(0) % G) * D
    size = S.to(tl.int64) * D
    dy += row * size
    x += row * size
    if residual is not None:
        residual += row * size
    if dresidual is not None:
        dresidual += row * size
    m = tl.load(mean + row)
    r = tl.load(rstd + row)
    total = 0.0
    dot = 0.0
    for d in range(0, D, ROWS):
        channel = d + tl.arange(0, ROWS)  # (ROWS,)
        a = tl.zeros((ROWS, COLS), tl.float32)
        b = tl.zeros((ROWS, COLS), tl.float32)
        w = parameter(weight, first + channel, channel < D, 1.0)
        shift = parameter(bias, first + channel, channel < D, 0.0)
        for s in range(0, S, COLS):
            pixel = s + tl.arange(0, COLS)[None, :]
            at = step_to(channel[:, None], S, WIDE) + pixel
            mask = (channel < D)[:, None] & (pixel < S)
            g = tl.load(dy + at, mask, other=0.0).to(tl.float32)
            xhat = (tl.load(x + at, mask, other=0.0).to(tl.float32) - m) * r
            if ACTIVATION is not None:
                z = xhat * w[:, None] + shift[:, None]
                g = activated_gradient(g, z, residual, at, mask, ACTIVATION, NUMBER_A, NUMBER_B)
            if dresidual is not None:
                tl.store(dresidual + at, g.to(dresidual.dtype.element_ty), mask)
            a += g
            b += g * xhat
        each = tl.sum(a, 1)
        along = tl.sum(b, 1)
        if sums is not None:
            tl.store(sums + row * D + channel, each, channel < D)
        if dots is not None:
            tl.store(dots + row * D + channel, along, channel < D)
        total += tl.sum(tl.fma(each, w, 0.0), 0)
        dot += tl.sum(tl.fma(along, w, 0.0), 0)
    if dx is not None:
        dx += row * size
        for d in range(0, D, ROWS):
            line = d + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
            scale = parameter(weight, first + line, line < D, 1.0)
            offset = parameter(bias, first + line, line < D, 0.0)
            for s in range(0, S, COLS):
                pixel = s + tl.arange(0, COLS)[None, :]
                at = step_to(line, S, WIDE) + pixel
                mask = (line < D) & (pixel < S)
                g = tl.load(dy + at, mask, other=0.0).to(tl.float32)
                xhat = (tl.load(x + at, mask, other=0.0).to(tl.float32) - m) * r
                if ACTIVATION is not None:
                    z = xhat * scale + offset
                    g = activated_gradient(g, z, residual, at, mask, ACTIVATION, NUMBER_A, NUMBER_B)
                g = tl.fma(g, scale, 0.0)  # as it is in the sum: rounded
                tl.store(dx + at, (r * (g - total / size - xhat * (dot / size))).to(dx.dtype.element_ty), mask)
