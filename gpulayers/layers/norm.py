"""Layer norm, RMS norm and batch norm layers."""

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


class _BatchNorm(OpLayer):
    """y = (x − mean) / √(var + eps) · weight + bias for each channel.

    In training mean and var are the batch's, and move the running ones by ``momentum`` (None: to the average of all
    batches so far); in evaluation, and where it is frozen (``trainable = False``), they are the running ones, or the
    batch's without track_running_stats.
    """

    op = ops.batch_norm
    skips_input_grad = True
    ranks: tuple[int, ...] = ()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ):
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

    def options(self) -> dict[str, Any]:
        return {"training": self.training and self.trainable, "eps": self.eps}

    def forward(self, x: Any) -> Any:
        if x.ndim not in self.ranks:
            ranks = " or ".join(f"{r}-dim" for r in self.ranks)
            error = ArgumentError("x", f"a {ranks} array", list(x.shape))
            error.where = self.name
            raise error
        factor: Any = 0.0
        options = self.options()
        if options["training"] and self.num_batches_tracked is not None:
            tracked = self.num_batches_tracked
            tracked.data = tracked.data + 1
            factor = 1 / transfer.to_numpy(tracked.data) if self.momentum is None else self.momentum
        return self.run(self.op, *self.arguments(x), **options, momentum=factor)

    def backward(self, dy: Any) -> Any:
        return self.run_backward(dy)


class BatchNorm1d(_BatchNorm):
    """Batch norm of (N, C) or (N, C, L). As torch.nn.BatchNorm1d."""

    ranks = (2, 3)


class BatchNorm2d(_BatchNorm):
    """Batch norm of images, (N, C, H, W), channels-last in memory or not. As torch.nn.BatchNorm2d."""

    ranks = (4,)
