"""Layers that normalise: over the last axes, over a batch, over each sample, over neighbouring channels."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from gpulayers import transfer
from gpulayers.definition import ArgumentError
from gpulayers.layers._layer import OpLayer
from gpulayers.ops import norm as ops


def _sizes(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else (operator.index(normalized_shape),)


class LayerNorm(OpLayer):
    """y = (x − mean) / √(var + eps) · weight + bias over the last axes, normalized_shape. As torch.nn.LayerNorm.

    Input and output: (*lead, *normalized_shape).
    """

    op = ops.layer_norm

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
    ):
        self.normalized_shape = _sizes(normalized_shape)
        self.eps = eps
        self.weight = self.add_weight("weight", self.normalized_shape, "ones") if elementwise_affine else None
        self.bias = self.add_weight("bias", self.normalized_shape) if elementwise_affine and bias else None

    def arguments(self, *xs: Any) -> tuple:
        return (*xs, self.weight, self.bias)

    def options(self) -> dict[str, Any]:
        return {"normalized_shape": self.normalized_shape, "eps": self.eps}


class RMSNorm(OpLayer):
    """y = x / √(mean x² + eps) · weight over the last axes, normalized_shape. As torch.nn.RMSNorm.

    Input and output: (*lead, *normalized_shape). eps None: the machine epsilon of float32 (of float64
    in float64).
    """

    op = ops.rms_norm

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float | None = None, elementwise_affine: bool = True
    ):
        self.normalized_shape = _sizes(normalized_shape)
        self.eps = eps
        self.weight = self.add_weight("weight", self.normalized_shape, "ones") if elementwise_affine else None

    def arguments(self, *xs: Any) -> tuple:
        return (*xs, self.weight)

    def options(self) -> dict[str, Any]:
        return {"normalized_shape": self.normalized_shape, "eps": self.eps}


class AddLayerNorm(LayerNorm):
    """(y, x + residual): LayerNorm of the sum of two inputs, (*lead, *normalized_shape) each, and the sum, in one pass."""

    op = ops.add_layer_norm


class AddRMSNorm(RMSNorm):
    """(y, x + residual): RMSNorm of the sum of two inputs, (*lead, *normalized_shape) each, and the sum, in one pass."""

    op = ops.add_rms_norm


class _OfChannels(OpLayer):
    """A norm with weights, and running statistics, of one number for each channel."""

    skips_input_grad = True
    ranks: tuple[int, ...] = ()

    def __init__(self, num_features: int, eps: float, momentum: float | None, affine: bool, track_running_stats: bool):
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        shape = (num_features,)
        self.weight = self.add_weight("weight", shape, "ones") if affine else None
        self.bias = self.add_weight("bias", shape) if affine else None
        self.running_mean = self.running_var = self.num_batches_tracked = None
        if track_running_stats:
            self.running_mean = self.add_weight("running_mean", shape, trainable=False)
            self.running_var = self.add_weight("running_var", shape, "ones", trainable=False)
            self.num_batches_tracked = self.add_weight("num_batches_tracked", (), trainable=False, dtype="int64")

    def arguments(self, *xs: Any) -> tuple:
        return (*xs, self.weight, self.bias, self.running_mean, self.running_var)

    def forward(self, x: Any) -> Any:
        if x.ndim not in self.ranks:
            ranks = " or ".join(f"{r}-dim" for r in self.ranks)
            error = ArgumentError("x", f"a {ranks} array", list(x.shape))
            error.where = self.name
            raise error
        factor: Any = 0.0
        if self.training and self.trainable and self.num_batches_tracked is not None:
            factor = self.factor(self.num_batches_tracked)
        return self.run(self.op, *self.arguments(x), **self.options(), momentum=factor)

    def factor(self, tracked: Any) -> Any:
        """How far this call moves the running statistics."""
        return 0.0 if self.momentum is None else self.momentum

    def backward(self, dy: Any) -> Any:
        return self.run_backward(dy)


class _BatchNorm(_OfChannels):
    """y = (x − mean) / √(var + eps) · weight + bias for each channel.

    In training mean and var are the batch's, and move the running ones by ``momentum`` (None: to the average of all
    batches so far); in evaluation, and where it is frozen (``trainable = False``), they are the running ones, or the
    batch's without track_running_stats.
    """

    op = ops.batch_norm

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats)

    def options(self) -> dict[str, Any]:
        return {"training": self.training and self.trainable, "eps": self.eps}

    def factor(self, tracked: Any) -> Any:
        tracked.data = tracked.data + 1
        return 1 / transfer.to_numpy(tracked.data) if self.momentum is None else self.momentum


class BatchNorm1d(_BatchNorm):
    """Batch norm of (N, C) or (N, C, L). As torch.nn.BatchNorm1d."""

    ranks = (2, 3)


class BatchNorm2d(_BatchNorm):
    """Batch norm of images, (N, C, H, W), channels-last in memory or not. As torch.nn.BatchNorm2d."""

    ranks = (4,)


class BatchNorm3d(_BatchNorm):
    """Batch norm of volumes, (N, C, D, H, W), channels-last in memory or not. As torch.nn.BatchNorm3d."""

    ranks = (5,)


class GroupNorm(OpLayer):
    """y = (x − mean) / √(var + eps) · weight + bias over each group of channels of each sample. As torch.nn.GroupNorm.

    Input and output: (N, num_channels, *), of any rank; its channels make num_groups groups of neighbours.
    """

    op = ops.group_norm

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True, bias: bool = True):
        if num_groups < 1 or num_channels % num_groups:
            raise ArgumentError("num_groups", "num_groups ≥ 1 divides num_channels", f"{num_groups}, {num_channels}")
        self.num_groups, self.num_channels, self.eps = num_groups, num_channels, eps
        self.weight = self.add_weight("weight", (num_channels,), "ones") if affine else None
        self.bias = self.add_weight("bias", (num_channels,)) if affine and bias else None

    def arguments(self, *xs: Any) -> tuple:
        return (*xs, self.weight, self.bias)

    def options(self) -> dict[str, Any]:
        return {"num_groups": self.num_groups, "eps": self.eps}


class LocalResponseNorm(OpLayer):
    """y = x / (k + alpha / size · Σ x²)^beta, over ``size`` neighbouring channels. As torch.nn.LocalResponseNorm.

    Input and output: (N, C, *spatial), with a spatial axis at least.
    """

    op = ops.local_response_norm

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0):
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def options(self) -> dict[str, Any]:
        return {"size": self.size, "alpha": self.alpha, "beta": self.beta, "k": self.k}


class _InstanceNorm(_OfChannels):
    """y = (x − mean) / √(var + eps) · weight + bias for each channel of each sample.

    mean and var are those of the input, and with track_running_stats move the running ones by ``momentum`` in training;
    in evaluation they are then the running ones.
    """

    op = ops.instance_norm

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats)

    def options(self) -> dict[str, Any]:
        by_input = (self.training and self.trainable) or self.running_mean is None
        return {"use_input_stats": by_input, "eps": self.eps}


class InstanceNorm1d(_InstanceNorm):
    """Instance norm of sequences, (N, C, L). As torch.nn.InstanceNorm1d."""

    ranks = (3,)


class InstanceNorm2d(_InstanceNorm):
    """Instance norm of images, (N, C, H, W), channels-last in memory or not. As torch.nn.InstanceNorm2d."""

    ranks = (4,)


class InstanceNorm3d(_InstanceNorm):
    """Instance norm of volumes, (N, C, D, H, W), channels-last in memory or not. As torch.nn.InstanceNorm3d."""

    ranks = (5,)
