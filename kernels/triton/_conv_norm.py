"""Convolution, batch norm and what follows it.

In training the kernels on tiles take the moments of what they write along (``_conv_tiles.py``), which batch norm's kernel
merges: of batch norm's three passes over c, one to read it for them is saved. What takes none leaves them to batch norm's own.
By running statistics, where no gradient is wanted, the whole is a convolution with an epilogue: nothing is normalised after.
Backward is both ops': the normalisation could be applied where dx and dweight load dc, but then each reads dy, c and y for
it, 3 + 3 arrays in the place of the 3 + 1 and 1 + 1 that are moved now.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from .._conv_norm import backward, norms, saved_by_both
from . import _tile
from ._batch_norm import batch_norm_backward, normalised
from .conv import conv_backward, convolved

CHANNELS = 1024
"""That a program of the bias's gradient takes."""
BUDGETS = {
    "_conv_scale_kernel": Budget(registers=40, blocks=8),
    "_conv_bias_kernel": Budget(registers=40, blocks=8),
}


@triton.jit
def _conv_scale_kernel(bias, gamma, beta, mean, var, scale, shift, C, eps, BLOCK: tl.constexpr):
    """scale and shift of (c + bias − mean) / √(var + eps) · gamma + beta = scale · c + shift."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < C
    off = -tl.load(mean + channel, mask, other=0.0).to(tl.float32)
    s = 1.0 / tl.sqrt_rn(tl.load(var + channel, mask, other=1.0).to(tl.float32) + eps)
    if bias is not None:
        off += tl.load(bias + channel, mask, other=0.0).to(tl.float32)
    if gamma is not None:
        s *= tl.load(gamma + channel, mask, other=0.0).to(tl.float32)
    off *= s
    if beta is not None:
        off += tl.load(beta + channel, mask, other=0.0).to(tl.float32)
    tl.store(scale + channel, s, mask)
    tl.store(shift + channel, off, mask)


@triton.jit
def _conv_bias_kernel(total, gamma, rstd, y, C, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """y = total · FACTOR; where that is None, total · gamma · rstd."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < C
    v = tl.load(total + channel, mask, other=0.0)
    if FACTOR is not None:
        v *= FACTOR
    else:
        v *= tl.load(rstd + channel, mask, other=0.0)
        if gamma is not None:
            v *= tl.load(gamma + channel, mask, other=0.0).to(tl.float32)
    tl.store(y + channel, v.to(y.dtype.element_ty), mask)


def _scale(channels: int, vectors: tuple, eps: float, empty: Any) -> tuple[Any, Any]:
    """(scale, shift) in float32, from bias, gamma, beta, mean and variance."""
    scale, shift = (empty((channels,), "float32") for _ in range(2))
    given = [None if v is None else _tile.dense(v, empty) for v in vectors]
    grid = (_tile.cdiv(channels, CHANNELS),)
    _tile.launch(_conv_scale_kernel, grid, *given, scale, shift, channels, eps, BLOCK=CHANNELS, num_warps=4)
    return scale, shift


def conv_batch_norm_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    gamma: Any = None,
    beta: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    residual: Any = None,
    *,
    needs: tuple = (),
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    empty: Any,
) -> tuple[tuple, dict]:
    by_batch, how = training or running_mean is None, (stride, padding, dilation, groups)
    if not by_batch and not needs:
        vectors = bias, gamma, beta, running_mean, running_var
        scale, shift = _scale(weight.shape[0], vectors, eps, empty)
        y, *_ = convolved(x, weight, shift, scale, residual, how, (), activation, empty)
        return (y,), {}
    c, _, moments = convolved(x, weight, bias, None, None, how, (), None, empty, with_moments=by_batch)
    given = c, gamma, beta, running_mean, running_var, residual
    outputs, saved = normalised(*given, moments, norms(needs), training, momentum, eps, activation, empty)
    return outputs, saved_by_both(saved, needs, x, weight, bias) if needs else {}


def conv_batch_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    empty: Any,
) -> tuple:
    how = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, empty=empty)
    then: dict[str, Any] = dict(training=training, eps=eps, activation=activation, empty=empty)

    def norm(kept: dict, specs: tuple, wanted: tuple) -> tuple:
        return batch_norm_backward(dys[:1], kept, inputs=specs, needs=wanted, **then)

    def conv(dc: Any, specs: tuple, wanted: tuple) -> tuple:
        return conv_backward((dc, *dys[1:]), saved, inputs=specs, needs=wanted, **how)

    def of_bias(total: Any, name: str, spec: Any) -> Any:
        if name == "beta" and ("bias" not in needs or spec.dtype == "float32"):
            return total
        gradient, gamma, c = empty(spec.shape, spec.dtype), saved.get("gamma"), spec.shape[0]
        gamma = None if gamma is None else _tile.dense(gamma, empty)
        factor = 1.0 if name == "beta" else 0.0 if training or inputs[5] is None else None
        grid = (_tile.cdiv(c, CHANNELS),)
        _tile.launch(
            _conv_bias_kernel,
            grid,
            total,
            gamma,
            saved["rstd"],
            gradient,
            c,
            FACTOR=factor,
            BLOCK=CHANNELS,
            num_warps=4,
        )
        return gradient

    return backward(norm, conv, of_bias, saved, inputs, needs)
