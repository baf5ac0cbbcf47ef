"""Normalisation: layer norm, RMS norm, batch norm, group norm, instance norm, local response norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import norm as ops
from gpulayers.torch import _autocast, _epilogue
from gpulayers.torch._arguments import held
from gpulayers.torch._op import TorchOp


def _layer_norm_twin(x: Tensor, weight: Any, bias: Any, shape: Sequence[int], eps: float) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def _rms_norm_twin(x: Tensor, weight: Any, shape: Sequence[int], eps: float | None) -> Tensor:
    return F.rms_norm(x, shape, weight, eps)


def _add_layer_norm_twin(
    x: Tensor, residual: Tensor, weight: Any, bias: Any, shape: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, shape, weight, bias, eps), total


def _add_rms_norm_twin(
    x: Tensor, residual: Tensor, weight: Any, shape: Sequence[int], eps: float | None
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, shape, weight, eps), total


def _batch_norm_twin(
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


def _group_norm_twin(x: Tensor, weight: Any, bias: Any, num_groups: int, eps: float) -> Tensor:
    return F.group_norm(x, num_groups, weight, bias, eps)


def _instance_norm_twin(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, use_input_stats: bool, momentum: float, eps: float
) -> Tensor:
    return F.instance_norm(x, mean, var, weight, bias, use_input_stats, momentum, eps)


def _local_response_norm_twin(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return F.local_response_norm(x, size, alpha, beta, k)


def _batch_norm_again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
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
        *_as_given(x, inputs, dweight, dbias),
        None,
        None,
        None if inputs[5] is None else g.to(x.dtype),
    ]


def _as_given(x: Tensor, inputs: tuple, *grads: Tensor) -> list:
    """The gradients of weight and bias, of those that there are, in their dtypes."""
    given = [None if s is None else str(s.dtype) for s in inputs[1:3]]
    return [None if d is None else g.to(torch.float32 if d == "float32" else x.dtype) for d, g in zip(given, grads)]


def _group_norm_again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    """As the definition; the statistics depend on x. torch's own gradient of a gradient takes no batch of dys."""
    x, weight, groups = saved["x"], saved.get("weight"), options["num_groups"]
    wide = x.to(saved["mean"].dtype).reshape(x.shape[0], groups, x.shape[1] // groups, math.prod(x.shape[2:]))
    var, mean = torch.var_mean(wide, (2, 3), correction=0, keepdim=True)
    rstd = (var + options["eps"]).rsqrt()
    xhat, g = (wide - mean) * rstd, dys[0].to(wide.dtype).reshape(wide.shape)
    dweight, dbias = (g * xhat).sum((0, 3)).reshape(-1), g.sum((0, 3)).reshape(-1)
    if weight is not None:
        g = g * weight.to(wide.dtype).view(groups, -1, 1)
    dx = rstd * (g - g.mean((2, 3), keepdim=True) - xhat * (g * xhat).mean((2, 3), keepdim=True))
    return [dx.reshape(x.shape).to(x.dtype), *_as_given(x, inputs, dweight, dbias)]


def _instance_norm_again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    if options["use_input_stats"]:
        return [*_group_norm_again(dys, saved, inputs, options | {"num_groups": saved["x"].shape[1]}), None, None]
    by_running = options | {"training": False, "activation": None}
    return _batch_norm_again(dys, saved, (*inputs, None), by_running)[:5]


_layer_norm = TorchOp(
    ops.layer_norm,
    _layer_norm_twin,
    "SymInt[] normalized_shape, float eps",
    buffers=("mean", "rstd"),
    cast=_autocast.ON_CUDA,
)
_has_rule = torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")  # not in torch 2.11
_rms_norm = TorchOp(
    ops.rms_norm,
    _rms_norm_twin,
    "SymInt[] normalized_shape, float? eps",
    buffers=("rstd",),
    cast=_autocast.ON_CUDA if _has_rule else None,
)
_add_layer_norm = TorchOp(
    ops.add_layer_norm,
    _add_layer_norm_twin,
    "SymInt[] normalized_shape, float eps",
    outputs=("y", "sum"),
    buffers=("mean", "rstd"),
    cast=_layer_norm.cast,
)
_add_rms_norm = TorchOp(
    ops.add_rms_norm,
    _add_rms_norm_twin,
    "SymInt[] normalized_shape, float? eps",
    outputs=("y", "sum"),
    buffers=("rstd",),
    cast=_rms_norm.cast,
)
_batch_norm = TorchOp(
    ops.batch_norm,
    _batch_norm_twin,
    "bool training, float momentum, float eps, str? activation",
    buffers=("mean", "rstd"),
    again=_batch_norm_again,
    updating="training",
    direct=True,
)
_group_norm = TorchOp(
    ops.group_norm,
    _group_norm_twin,
    "int num_groups, float eps",
    buffers=("mean", "rstd"),
    cast=_autocast.ON_CUDA,
    again=_group_norm_again,
)
_instance_norm = TorchOp(
    ops.instance_norm,
    _instance_norm_twin,
    "bool use_input_stats, float momentum, float eps",
    buffers=("mean", "rstd"),
    again=_instance_norm_again,
    updating="use_input_stats",
)
_local_response_norm = TorchOp(
    ops.local_response_norm,
    _local_response_norm_twin,
    "int size, float alpha, float beta, float k",
    buffers=("scale",),
    cast=_autocast.FLOAT32,
)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """As ``torch.nn.functional.layer_norm``."""
    return _layer_norm(input, weight, bias, tuple(normalized_shape), eps)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """As ``torch.nn.functional.rms_norm``."""
    return _rms_norm(input, weight, tuple(normalized_shape), eps)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(y, sum): sum = input + residual, y = layer_norm(sum, …), in one pass over memory. torch has no such function."""
    return _add_layer_norm(input, residual, weight, bias, tuple(normalized_shape), eps)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, sum): sum = input + residual, y = rms_norm(sum, …), in one pass over memory. torch has no such function."""
    return _add_rms_norm(input, residual, weight, tuple(normalized_shape), eps)


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


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """As ``torch.nn.functional.group_norm``."""
    return _group_norm(input, weight, bias, num_groups, eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As ``torch.nn.functional.instance_norm``: running statistics are updated in place where ``use_input_stats``."""
    return _instance_norm(input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps)


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """As ``torch.nn.functional.local_response_norm``."""
    if isinstance(input, Tensor) and input.is_cpu and input.dim() == 3 and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):  # autocast's rule is for what torch pools images and volumes with
            return _local_response_norm(input, size, alpha, beta, k)
    return _local_response_norm(input, size, alpha, beta, k)


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether a sum of the two is no broadcast and no promotion."""
    return a.shape == b.shape and a.dtype == b.dtype


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, held(self, "weight"), held(self, "bias"), self.eps)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` over gpulayers' kernels."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, held(self, "weight"), self.eps)


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return self.fused(input)

    def fused(self, input: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """y = f(forward(input) + residual) in one pass, as the function ``batch_norm`` has it."""
        if residual is not None and not alike(residual, input):
            return _epilogue.applied(activation, self.fused(input) + residual)
        self._check_input_dim(input)
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
        weight, bias = held(self, "weight"), held(self, "bias")
        return _batch_norm(input, weight, bias, mean, var, residual, by_batch, momentum, self.eps, activation)


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


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return group_norm(input, self.num_groups, held(self, "weight"), held(self, "bias"), self.eps)


class LocalResponseNorm(nn.LocalResponseNorm):
    """``torch.nn.LocalResponseNorm`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k)


class _InstanceNorm(nn.modules.instancenorm._InstanceNorm):
    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        running = held(self, "running_mean"), held(self, "running_var")
        by_input = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        weights = held(self, "weight"), held(self, "bias")
        return instance_norm(input, *running, *weights, by_input, momentum, self.eps)


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d`` over gpulayers' kernels."""


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d`` over gpulayers' kernels."""


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d`` over gpulayers' kernels."""


class LazyInstanceNorm1d(_InstanceNorm, nn.LazyInstanceNorm1d):
    """``torch.nn.LazyInstanceNorm1d``: its first call makes it an InstanceNorm1d over gpulayers' kernels."""

    cls_to_become = InstanceNorm1d  # type: ignore[assignment]


class LazyInstanceNorm2d(_InstanceNorm, nn.LazyInstanceNorm2d):
    """``torch.nn.LazyInstanceNorm2d``: its first call makes it an InstanceNorm2d over gpulayers' kernels."""

    cls_to_become = InstanceNorm2d  # type: ignore[assignment]


class LazyInstanceNorm3d(_InstanceNorm, nn.LazyInstanceNorm3d):
    """``torch.nn.LazyInstanceNorm3d``: its first call makes it an InstanceNorm3d over gpulayers' kernels."""

    cls_to_become = InstanceNorm3d  # type: ignore[assignment]
