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
from gpulayers.torch._batch_norm import BatchNorm1d as BatchNorm1d
from gpulayers.torch._batch_norm import BatchNorm2d as BatchNorm2d
from gpulayers.torch._batch_norm import BatchNorm3d as BatchNorm3d
from gpulayers.torch._batch_norm import LazyBatchNorm1d as LazyBatchNorm1d
from gpulayers.torch._batch_norm import LazyBatchNorm2d as LazyBatchNorm2d
from gpulayers.torch._batch_norm import LazyBatchNorm3d as LazyBatchNorm3d
from gpulayers.torch._batch_norm import _batch_norm as _batch_norm
from gpulayers.torch._batch_norm import alike as alike
from gpulayers.torch._batch_norm import as_given, batch_norm_again
from gpulayers.torch._batch_norm import batch_norm as batch_norm
from gpulayers.torch._conv_norm import _conv_batch_norm as _conv_batch_norm
from gpulayers.torch._op import TorchOp


def _layer_norm_twin(x: Tensor, weight: Any, bias: Any, shape: Sequence[int], eps: float) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def _rms_norm_twin(x: Tensor, weight: Any, shape: Sequence[int], eps: float | None) -> Tensor:
    return F.rms_norm(x, shape, weight, eps)


def _add_layer_norm_twin(
    x: Tensor, residual: Tensor, weight: Any, bias: Any, shape: Sequence[int], eps: float, dtype: str | None
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rounded(F.layer_norm(total, shape, weight, bias, eps), dtype), total


def _add_rms_norm_twin(
    x: Tensor, residual: Tensor, weight: Any, shape: Sequence[int], eps: float | None, dtype: str | None
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rounded(F.rms_norm(total, shape, weight, eps), dtype), total


def _rounded(y: Tensor, dtype: str | None) -> Tensor:
    return y if dtype is None else y.to(getattr(torch, dtype))


def _group_norm_twin(
    x: Tensor, weight: Any, bias: Any, residual: Any, num_groups: int, eps: float, activation: str | None
) -> Tensor:
    z = F.group_norm(x, num_groups, weight, bias, eps)
    return _epilogue.applied(activation, z if residual is None else z + residual)


def _instance_norm_twin(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, residual: Any, use_input_stats: bool, momentum: float,
    eps: float, activation: str | None,
) -> Tensor:  # fmt: skip
    z = F.instance_norm(x, mean, var, weight, bias, use_input_stats, momentum, eps)
    return _epilogue.applied(activation, z if residual is None else z + residual)


def _local_response_norm_twin(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return F.local_response_norm(x, size, alpha, beta, k)


def _group_norm_again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    """As the definition; the statistics depend on x. torch's own gradient of a gradient takes no batch of dys."""
    x, weight, groups, activation = saved["x"], saved.get("weight"), options["num_groups"], options["activation"]
    wide = x.to(saved["mean"].dtype).reshape(x.shape[0], groups, x.shape[1] // groups, math.prod(x.shape[2:]))
    var, mean = torch.var_mean(wide, (2, 3), correction=0, keepdim=True)
    rstd = (var + options["eps"]).rsqrt()
    xhat, g = (wide - mean) * rstd, dys[0].to(wide.dtype).reshape(wide.shape)
    if activation is not None:
        kept = xhat if weight is None else xhat * weight.to(wide.dtype).view(groups, -1, 1)
        kept = kept if saved.get("bias") is None else kept + saved["bias"].to(wide.dtype).view(groups, -1, 1)
        kept = kept if saved.get("residual") is None else kept + saved["residual"].to(wide.dtype).reshape(wide.shape)
        kept = _epilogue.applied(activation, kept) if activation in _epilogue.BY_Y else kept
        g = _epilogue.gradient(activation, g, kept)
    dweight, dbias, dz = (g * xhat).sum((0, 3)).reshape(-1), g.sum((0, 3)).reshape(-1), g
    if weight is not None:
        g = g * weight.to(wide.dtype).view(groups, -1, 1)
    dx = rstd * (g - g.mean((2, 3), keepdim=True) - xhat * (g * xhat).mean((2, 3), keepdim=True))
    dresidual = None if inputs[3] is None else dz.reshape(x.shape).to(x.dtype)
    return [dx.reshape(x.shape).to(x.dtype), *as_given(x, inputs, dweight, dbias), dresidual]


def _instance_norm_again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    if options["use_input_stats"]:
        own = options | {"num_groups": saved["x"].shape[1]}
        *grads, dresidual = _group_norm_again(dys, saved, (*inputs[:3], inputs[5]), own)
        return [*grads, None, None, dresidual]
    return batch_norm_again(dys, saved, inputs, options | {"training": False})


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
    "SymInt[] normalized_shape, float eps, str? dtype",
    outputs=("y", "sum"),
    buffers=("mean", "rstd"),
    cast=_layer_norm.cast,
)
_add_rms_norm = TorchOp(
    ops.add_rms_norm,
    _add_rms_norm_twin,
    "SymInt[] normalized_shape, float? eps, str? dtype",
    outputs=("y", "sum"),
    buffers=("rstd",),
    cast=_rms_norm.cast,
)
_group_norm = TorchOp(
    ops.group_norm,
    _group_norm_twin,
    "int num_groups, float eps, str? activation",
    buffers=("mean", "rstd"),
    cast=_autocast.ON_CUDA,
    again=_group_norm_again,
)
_instance_norm = TorchOp(
    ops.instance_norm,
    _instance_norm_twin,
    "bool use_input_stats, float momentum, float eps, str? activation",
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
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, sum): sum = input + residual, y = layer_norm(sum, …), in one pass over memory. torch has no such function.

    One of the two may be float32 where the other has 16 bits, and dtype a 16-bit one for y of a float32 sum.
    """
    return _add_layer_norm(input, residual, weight, bias, tuple(normalized_shape), eps, _name(dtype))


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, sum): sum = input + residual, y = rms_norm(sum, …), in one pass over memory. torch has no such function.

    One of the two may be float32 where the other has 16 bits, and dtype a 16-bit one for y of a float32 sum.
    """
    return _add_rms_norm(input, residual, weight, tuple(normalized_shape), eps, _name(dtype))


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """As ``torch.nn.functional.group_norm``; and, what torch's has not, f(that + residual) in the same pass: ``residual`` and
    ``activation`` as in ``batch_norm``."""
    if residual is not None and not alike(residual, input):
        return _epilogue.applied(activation, group_norm(input, num_groups, weight, bias, eps) + residual)
    return _group_norm(input, weight, bias, residual, num_groups, eps, activation)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """As ``torch.nn.functional.instance_norm``: running statistics are updated in place where ``use_input_stats``. And
    f(that + residual) in the same pass: ``residual`` and ``activation`` as in ``batch_norm``."""
    tensors, options = (input, weight, bias, running_mean, running_var), (use_input_stats, momentum, eps)
    if residual is not None and not alike(residual, input):
        return _epilogue.applied(activation, _instance_norm(*tensors, None, *options, None) + residual)
    return _instance_norm(*tensors, residual, *options, activation)


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """As ``torch.nn.functional.local_response_norm``."""
    if isinstance(input, Tensor) and input.is_cpu and input.dim() == 3 and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):  # autocast's rule is for what torch pools images and volumes with
            return _local_response_norm(input, size, alpha, beta, k)
    return _local_response_norm(input, size, alpha, beta, k)


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, held(self, "weight"), held(self, "bias"), self.eps)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` over gpulayers' kernels."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, held(self, "weight"), self.eps)


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return self.fused(input)

    def fused(self, input: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """y = f(forward(input) + residual) in one pass, as the function ``group_norm`` has it; residual: of input's shape and
        dtype."""
        weights = held(self, "weight"), held(self, "bias")
        return _group_norm(input, *weights, residual, self.num_groups, self.eps, activation)


class LocalResponseNorm(nn.LocalResponseNorm):
    """``torch.nn.LocalResponseNorm`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k)


class _InstanceNorm(nn.modules.instancenorm._InstanceNorm):
    def fused(self, input: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """y = f(forward(input) + residual), in one pass for samples in a batch, as the function ``instance_norm`` has it;
        residual: of input's shape and dtype."""
        if input.dim() == self._get_no_batch_dim() or input.shape[1] != self.num_features:
            z = self.forward(input)
            return _epilogue.applied(activation, z if residual is None else z + residual)
        self._check_input_dim(input)
        return self._apply_instance_norm(input, residual, activation)

    def _apply_instance_norm(
        self, input: Tensor, residual: Tensor | None = None, activation: str | None = None
    ) -> Tensor:  # type: ignore[override]
        running = held(self, "running_mean"), held(self, "running_var")
        by_input = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        weights = held(self, "weight"), held(self, "bias")
        return _instance_norm(input, *weights, *running, residual, by_input, momentum, self.eps, activation)


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
