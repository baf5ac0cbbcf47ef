"""Convolution, batch norm and what follows it.

In training the kernels on tiles take the moments of what they write along (``_conv_tiles.py``), which batch norm's kernel
merges: of batch norm's three passes over c, one to read it for them is saved. What takes none leaves them to batch norm's own.
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

CHANNELS = 128
"""That a program of the bias's gradient takes."""
BUDGETS = {"_conv_bias_kernel": Budget(registers=40, blocks=8)}


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
    by_batch = training or running_mean is None
    how = stride, padding, dilation, groups
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
        return batch_norm_backward(dys, kept, inputs=specs, needs=wanted, **then)

    def conv(dc: Any, specs: tuple, wanted: tuple) -> tuple:
        return conv_backward((dc,), saved, inputs=specs, needs=wanted, **how)

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
