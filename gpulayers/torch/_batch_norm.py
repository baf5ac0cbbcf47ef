"""Batch norm, and what may follow it in the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import norm as ops
from gpulayers.torch import _epilogue
from gpulayers.torch._arguments import held
from gpulayers.torch._op import TorchOp


def batch_norm_twin(
    x: Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    residual: Any,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
) -> Tensor:
    z = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return _epilogue.applied(activation, z if residual is None else z + residual)


def batch_norm_again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    """By what the forward saved: running statistics are constants, the batch's depend on x; f'(z) by y, or by z computed
    again from all that it depends on."""
    x, weight, kept, activation = saved["x"], saved.get("weight"), saved.get("y"), options["activation"]
    axes, across = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
    wide = x.to(saved["mean"].dtype)
    if options["training"] or inputs[3] is None:
        var, mean = torch.var_mean(wide, axes, correction=0)
        rstd = (var + options["eps"]).rsqrt()
    else:
        mean, rstd = saved["mean"], saved["rstd"]
    xhat = (wide - mean.view(across)) * rstd.view(across)
    if activation is not None and kept is None:
        kept = xhat if weight is None else xhat * weight.view(across)
        bias, residual = saved.get("bias"), saved.get("residual")
        kept = kept if bias is None else kept + bias.view(across)
        kept = kept if residual is None else kept + residual
    g = dx = _epilogue.gradient(activation, dys[0].to(wide.dtype), kept)
    dbias, dweight = g.sum(axes), (g * xhat).sum(axes)
    if options["training"] or inputs[3] is None:
        count = x.numel() // x.shape[1]
        dx = g - (dbias / count).view(across) - xhat * (dweight / count).view(across)
    scale = rstd if weight is None else rstd * weight.to(wide.dtype)
    return [
        (dx * scale.view(across)).to(x.dtype),
        *as_given(x, inputs, dweight, dbias),
        None,
        None,
        None if inputs[5] is None else g.to(x.dtype),
    ]


def as_given(x: Tensor, inputs: tuple, *grads: Tensor) -> list:
    """The gradients of weight and bias, of those that there are, in their dtypes."""
    given = [None if s is None else str(s.dtype) for s in inputs[1:3]]
    return [None if d is None else g.to(torch.float32 if d == "float32" else x.dtype) for d, g in zip(given, grads)]


_batch_norm = TorchOp(
    ops.batch_norm,
    batch_norm_twin,
    "bool training, float momentum, float eps, str? activation",
    buffers=("mean", "rstd"),
    again=batch_norm_again,
    updating="training",
    direct=True,
)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """As ``torch.nn.functional.batch_norm``: the running statistics are updated in place where ``training``.

    What torch's has not, in the same pass: y = f(bn(input) + residual).

    residual: is added; one of another shape or dtype than input's in a pass of its own, by torch's rules.
    activation: f, by its name in ``gpulayers.ops.activation.ACTIVATIONS`` with torch's default numbers; None for none.
    """
    if not training and running_mean is None:
        raise RuntimeError("batch_norm: running_mean: the rule is running_mean given where training = False; got None")
    if residual is not None and not alike(residual, input):
        y = batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return _epilogue.applied(activation, y + residual)
    return _batch_norm(input, weight, bias, running_mean, running_var, residual, training, momentum, eps, activation)


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether a sum of the two is no broadcast and no promotion."""
    return a.shape == b.shape and a.dtype == b.dtype


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return self.fused(input)

    def fused(self, input: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """y = f(forward(input) + residual) in one pass, as the function ``batch_norm`` has it."""
        if residual is not None and not alike(residual, input):
            return _epilogue.applied(activation, self.fused(input) + residual)
        self._check_input_dim(input)
        weight, bias, *running, by_batch, momentum = self.counted()
        return _batch_norm(input, weight, bias, *running, residual, by_batch, momentum, self.eps, activation)

    def counted(self) -> tuple[Any, Any, Any, Any, bool, float]:
        """(weight, bias, running_mean, running_var, whether by the batch's statistics, momentum) of a call, which counts."""
        momentum = 0.0 if self.momentum is None else self.momentum
        mean, var = held(self, "running_mean"), held(self, "running_var")
        by_batch = self.training or (mean is None and var is None)
        if self.training and self.track_running_stats:
            batches = held(self, "num_batches_tracked")
            if batches is not None:
                batches.add_(1)
                if self.momentum is None:  # a cumulative average
                    momentum = 1.0 / float(batches)
        if self.training and not self.track_running_stats:
            mean = var = None
        return held(self, "weight"), held(self, "bias"), mean, var, by_batch, momentum


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` over gpulayers' kernels."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` over gpulayers' kernels."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` over gpulayers' kernels."""


class LazyBatchNorm1d(_BatchNorm, nn.LazyBatchNorm1d):
    """``torch.nn.LazyBatchNorm1d``: its first call makes it a BatchNorm1d over gpulayers' kernels."""

    cls_to_become = BatchNorm1d  # type: ignore[assignment]


class LazyBatchNorm2d(_BatchNorm, nn.LazyBatchNorm2d):
    """``torch.nn.LazyBatchNorm2d``: its first call makes it a BatchNorm2d over gpulayers' kernels."""

    cls_to_become = BatchNorm2d  # type: ignore[assignment]


class LazyBatchNorm3d(_BatchNorm, nn.LazyBatchNorm3d):
    """``torch.nn.LazyBatchNorm3d``: its first call makes it a BatchNorm3d over gpulayers' kernels."""

    cls_to_become = BatchNorm3d  # type: ignore[assignment]
