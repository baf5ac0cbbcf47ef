"""A convolution, the batch norm of what comes out, and what may follow that, as one call and one autograd Function."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gpulayers.ops import norm as ops
from gpulayers.torch import _autocast
from gpulayers.torch._arguments import held
from gpulayers.torch._batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    batch_norm_again,
    batch_norm_twin,
)
from gpulayers.torch._joined import Joined
from gpulayers.torch._layout import CHANNELS_LAST
from gpulayers.torch._op import TorchOp, in_dynamo
from gpulayers.torch.conv import Conv1d, Conv2d, Conv3d, _conv_twin, _flops, gradients, walks

NORMS: dict[type, type] = {Conv1d: BatchNorm1d, Conv2d: BatchNorm2d, Conv3d: BatchNorm3d}
"""The norm that one call can compute with a convolution."""
_HOW = ("stride", "padding", "dilation", "groups")
_any_autocast = torch._C._is_any_autocast_enabled


def _twin(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    var: Any,
    residual: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    *then: Any,
) -> Tensor:
    c = _conv_twin(x, weight, bias, None, None, stride, padding, dilation, groups)
    return batch_norm_twin(c, gamma, beta, mean, var, residual, *then)


def _again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    """c, as the forward saved it, depends on what it was made of."""
    x, weight, bias, c = saved.get("x"), saved.get("weight"), saved.get("bias"), saved["conv"]
    how: list[Any] = [options[k] for k in _HOW]
    if x is not None:
        with torch.enable_grad():
            made = _conv_twin(x, weight, bias, None, None, *how)
            c = made + (c - made).detach()
    theirs = {"conv": "x", "gamma": "weight", "beta": "bias"}
    norms = {theirs.get(k, k): t for k, t in saved.items() if k not in ("x", "weight", "bias")} | {"x": c}
    dc, dgamma, dbeta, _, _, dresidual = batch_norm_again(dys, norms, (None, *inputs[3:]), options)
    kept = {k: saved[k] for k in ("x", "weight") if k in saved}
    dx, dweight, dbias, *_ = gradients(_conv_twin, how, 5, dc, kept, (*inputs[:3], None, None), None)
    if dbias is not None and (options["training"] or inputs[5] is None):
        dbias = dbias * 0
    return [dx, dweight, dbias, dgamma, dbeta, None, None, dresidual]


_conv_batch_norm = TorchOp(
    ops.conv_batch_norm,
    _twin,
    "int[] stride, int[] padding, int[] dilation, int groups, bool training, float momentum, float eps, str? activation",
    buffers=("conv", "mean", "rstd"),
    cast=_autocast.LOWER,
    casts=3,
    again=_again,
    updating="training",
    flops=_flops,
)


_joined = Joined(_conv_batch_norm)


def conv_norm(
    conv: Any,
    norm: Any,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    op: TorchOp = _conv_batch_norm,
) -> Any:
    """f(norm(conv(x)) + residual) of two drop-ins that belong together, by ``NORMS``; NotImplemented for x without a batch,
    padding that torch refuses, and a residual of another shape or dtype."""
    weight = held(conv, "weight")
    axes = weight.dim() - 2
    how = walks(axes, weight, conv.stride, conv.padding, conv.dilation) if x.dim() == axes + 2 else None
    if how is None:
        return NotImplemented
    if residual is not None and not is_alike(residual, x, weight, how):
        return NotImplemented
    x, _ = conv.ready(x, weight)
    if conv.padding_mode != "zeros":  # it is done
        how = (how[0], (0,) * axes, how[2])
    gamma, beta, mean, var, by_batch, momentum = norm.counted()
    tensors = x, weight, held(conv, "bias"), gamma, beta, mean, var, residual
    return op(*tensors, *how, conv.groups, by_batch, momentum, norm.eps, activation)


def conv_norm_joined(conv: Any, norm: Any, x: Tensor, residual: Tensor | None, activation: str | None) -> Any:
    """(conv_norm(…), x for all others that read it); NotImplemented as there, and where autograd records nothing for x, and
    for images that do not lie channels last: kernels of those that do add to dx at no cost."""
    if type(x) is not Tensor or not x.requires_grad or not torch.is_grad_enabled() or in_dynamo():
        return NotImplemented
    if x.dim() not in CHANNELS_LAST or not x.is_contiguous(memory_format=CHANNELS_LAST[x.dim()]):
        return NotImplemented
    if conv.padding_mode != "zeros" or x.dtype != _cast(x):
        return NotImplemented
    found = conv_norm(conv, norm, x, residual, activation, _joined)
    return found if found is NotImplemented or type(found) is tuple else (found, x)


def is_alike(residual: Tensor, x: Tensor, weight: Tensor, how: tuple) -> bool:
    """Whether a residual has the shape and the dtype of what comes out of the convolution."""
    return residual.dtype == _cast(x) and residual.shape == _shape(x.shape, weight.shape, *how)


def _cast(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution takes x."""
    if _any_autocast() and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


@lru_cache(maxsize=1024)
def _shape(x: torch.Size, weight: torch.Size, stride: tuple, padding: tuple, dilation: tuple) -> tuple[int, ...]:
    axes = len(stride)
    around = [2 * p for p in padding] if len(padding) == axes else [a + b for a, b in zip(padding[::2], padding[1::2])]
    sizes = zip(x[2:], around, weight[2:], stride, dilation)
    return x[0], weight[0], *[(n + p - d * (k - 1) - 1) // s + 1 for n, p, k, s, d in sizes]
