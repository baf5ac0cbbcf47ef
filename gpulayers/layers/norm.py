"""Normalisation. Weights are float32 whatever x is, as are the statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpulayers.layers._layer import OpLayer
from gpulayers.layers._weight import Weight
from gpulayers.ops import norm as ops
from gpulayers.ops._op import ArgumentError


class LayerNorm(OpLayer):
    """y = (x − mean) / √(var + eps) · weight + bias over the last axes. As torch.nn.LayerNorm."""

    op = ops.layer_norm

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
    ):
        self.normalized_shape, self.eps = _shape(normalized_shape), eps
        self.weight: Weight | None = None
        self.bias: Weight | None = None
        if elementwise_affine:
            self.weight = self.add_weight("weight", self.normalized_shape, "ones")
            self.bias = self.add_weight("bias", self.normalized_shape, "zeros") if bias else None

    def arguments(self, x: Any) -> tuple:
        return x, self.weight, self.bias

    def options(self) -> dict[str, Any]:
        return {"normalized_shape": self.normalized_shape, "eps": self.eps}


class RMSNorm(OpLayer):
    """y = x / √(mean x² + eps) · weight over the last axes. As torch.nn.RMSNorm."""

    op = ops.rms_norm

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float | None = None, elementwise_affine: bool = True
    ):
        self.normalized_shape, self.eps = _shape(normalized_shape), eps
        self.weight = self.add_weight("weight", self.normalized_shape, "ones") if elementwise_affine else None

    def arguments(self, x: Any) -> tuple:
        return x, self.weight

    def options(self) -> dict[str, Any]:
        return {"normalized_shape": self.normalized_shape, "eps": self.eps}


def _shape(sizes: int | Sequence[int]) -> tuple[int, ...]:
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)


class _BatchNorm(OpLayer):
    """y = (x − mean) / √(var + eps) · weight + bias for each channel: of the batch in training, else the running ones.

    momentum: the share of a new batch in the running statistics; None averages over all batches so far.
    """

    op = ops.batch_norm
    ranks: tuple[int, ...] = ()
    shapes = ""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ):
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        size = (num_features,)
        self.weight = self.add_weight("weight", size, "ones") if affine else None
        self.bias = self.add_weight("bias", size, "zeros") if affine else None
        self.running_mean = self.running_var = self.num_batches_tracked = None
        if track_running_stats:
            self.running_mean = self.add_weight("running_mean", size, "zeros", trainable=False)
            self.running_var = self.add_weight("running_var", size, "ones", trainable=False)
            self.num_batches_tracked = self.add_weight("num_batches_tracked", (), 0, trainable=False, dtype="int64")

    def arguments(self, x: Any) -> tuple:
        if len(x.shape) not in self.ranks:
            raise ArgumentError("x", self.shapes, list(x.shape))
        return x, self.weight, self.bias, self.running_mean, self.running_var

    def options(self) -> dict[str, Any]:
        return {"training": self.training, "momentum": self._factor(), "eps": self.eps}

    def _factor(self) -> float:
        if self.momentum is not None:
            return self.momentum
        return 1 / max(1, int(self.num_batches_tracked.data)) if self.num_batches_tracked is not None else 0.0

    def forward(self, x: Any) -> Any:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.data += 1
        y = super().forward(x)
        for w in (self.running_mean, self.running_var):
            if w is not None and self.training:
                w.changed()
        return y


class BatchNorm1d(_BatchNorm):
    """For x (N, C) or (N, C, L). As torch.nn.BatchNorm1d."""

    ranks, shapes = (2, 3), "x.shape = (N, C) or (N, C, L)"


class BatchNorm2d(_BatchNorm):
    """For x (N, C, H, W). As torch.nn.BatchNorm2d."""

    ranks, shapes = (4,), "x.shape = (N, C, H, W)"
