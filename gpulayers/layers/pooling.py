"""Pooling over one to three spatial axes."""

from __future__ import annotations

from typing import Any

from gpulayers import random, transfer
from gpulayers.arrays import Spec, float32, int64
from gpulayers.definition import ArgumentError, ShapeError
from gpulayers.layers._layer import OpLayer
from gpulayers.ops import pooling as ops
from gpulayers.ops._window import AXES, numbers


class Pooling(OpLayer):
    """The pooling neuron type: every output sums up a window; no weights. Start here for such a layer of your own.

    A subclass names its ``op``, and its options; ``spatial``: how many spatial axes x has, None for any number.
    """

    neuron_type = "pooling"
    spatial: int | None = None

    def arguments(self, *xs: Any, **_: Any) -> tuple:
        if self.spatial and len(xs[0].shape) != self.spatial + 2:
            rule = f"x.shape = (N, C, {', '.join(AXES[self.spatial])})"
            raise ShapeError(f"{self.name}: x", rule, list(xs[0].shape))
        return xs


class MaxPool(Pooling):
    """What maxima under windows have in common."""

    op = ops.max_pool

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ):
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.dilation, self.return_indices, self.ceil_mode = dilation, return_indices, ceil_mode

    def options(self) -> dict[str, Any]:
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "ceil_mode": self.ceil_mode,
            "return_indices": self.return_indices,
        }


class MaxPool1d(MaxPool):
    """The maximum under a window: (N, C, L) → (N, C, OL), and where it lies. As torch.nn.MaxPool1d."""

    spatial = 1


class MaxPool2d(MaxPool):
    """The maximum under a window: (N, C, H, W) → (N, C, OH, OW), and where it lies. As torch.nn.MaxPool2d."""

    spatial = 2


class MaxPool3d(MaxPool):
    """The maximum under a window: (N, C, D, H, W) → (N, C, OD, OH, OW), and where it lies. As torch.nn.MaxPool3d."""

    spatial = 3


class AvgPool(Pooling):
    """What means under windows have in common."""

    op = ops.avg_pool
    divisor_override: int | None = None

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ):
        self.kernel_size, self.stride, self.padding, self.ceil_mode = kernel_size, stride, padding, ceil_mode
        self.count_include_pad, self.divisor_override = count_include_pad, divisor_override

    def options(self) -> dict[str, Any]:
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "ceil_mode": self.ceil_mode,
            "count_include_pad": self.count_include_pad,
            "divisor_override": self.divisor_override,
        }


class AvgPool1d(AvgPool):
    """The mean under a window: (N, C, L) → (N, C, OL). As torch.nn.AvgPool1d."""

    spatial = 1

    def __init__(
        self, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True
    ):  # fmt: skip
        super().__init__(kernel_size, stride, padding, ceil_mode, count_include_pad)


class AvgPool2d(AvgPool):
    """The mean under a window: (N, C, H, W) → (N, C, OH, OW). As torch.nn.AvgPool2d."""

    spatial = 2


class AvgPool3d(AvgPool):
    """The mean under a window: (N, C, D, H, W) → (N, C, OD, OH, OW). As torch.nn.AvgPool3d."""

    spatial = 3


class AdaptiveAvgPool(Pooling):
    """What means of so many parts have in common."""

    op = ops.adaptive_avg_pool

    def __init__(self, output_size: Any):
        self.output_size = output_size

    def options(self) -> dict[str, Any]:
        return {"output_size": self.output_size}


class AdaptiveAvgPool1d(AdaptiveAvgPool):
    """The means of OL parts of the sequence: (N, C, L) → (N, C, OL). As torch.nn.AdaptiveAvgPool1d."""

    spatial = 1


class AdaptiveAvgPool2d(AdaptiveAvgPool):
    """The means of OH × OW parts of the image: (N, C, H, W) → (N, C, OH, OW). As torch.nn.AdaptiveAvgPool2d."""

    spatial = 2


class AdaptiveAvgPool3d(AdaptiveAvgPool):
    """The means of OD × OH × OW parts: (N, C, D, H, W) → (N, C, OD, OH, OW). As torch.nn.AdaptiveAvgPool3d."""

    spatial = 3


class GlobalAvgPool2d(Pooling):
    """The mean of each channel: (N, C, H, W) → (N, C, 1, 1)."""

    op = ops.adaptive_avg_pool
    spatial = 2

    def options(self) -> dict[str, Any]:
        return {"output_size": 1}


class AdaptiveMaxPool(Pooling):
    """What maxima of so many parts have in common."""

    op = ops.adaptive_max_pool

    def __init__(self, output_size: Any, return_indices: bool = False):
        self.output_size, self.return_indices = output_size, return_indices

    def options(self) -> dict[str, Any]:
        return {"output_size": self.output_size, "return_indices": self.return_indices}


class AdaptiveMaxPool1d(AdaptiveMaxPool):
    """The maxima of OL parts of the sequence, and where they lie: (N, C, L) → (N, C, OL). As torch.nn.AdaptiveMaxPool1d."""

    spatial = 1


class AdaptiveMaxPool2d(AdaptiveMaxPool):
    """The maxima of OH × OW parts, and where they lie: (N, C, H, W) → (N, C, OH, OW). As torch.nn.AdaptiveMaxPool2d."""

    spatial = 2


class AdaptiveMaxPool3d(AdaptiveMaxPool):
    """The maxima of OD × OH × OW parts, and where they lie: (N, C, D, H, W) → (N, C, OD, OH, OW). As
    torch.nn.AdaptiveMaxPool3d."""

    spatial = 3


class LPPool(Pooling):
    """What norms under windows have in common."""

    op = ops.lp_pool

    def __init__(self, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False):
        self.norm_type, self.kernel_size, self.stride, self.ceil_mode = norm_type, kernel_size, stride, ceil_mode

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("norm_type", "kernel_size", "stride", "ceil_mode")}


class LPPool1d(LPPool):
    """The p-norm under a window, p = norm_type: (N, C, L) → (N, C, OL). As torch.nn.LPPool1d."""

    spatial = 1


class LPPool2d(LPPool):
    """The p-norm under a window, p = norm_type: (N, C, H, W) → (N, C, OH, OW). As torch.nn.LPPool2d."""

    spatial = 2


class LPPool3d(LPPool):
    """The p-norm under a window, p = norm_type: (N, C, D, H, W) → (N, C, OD, OH, OW). As torch.nn.LPPool3d."""

    spatial = 3


class FractionalMaxPool(Pooling):
    """What maxima under windows of random steps have in common. In training the steps are drawn from gl.random: the same on
    every backend, and again after a checkpoint is resumed; in evaluation they are those of u = ½ (torch's are random)."""

    op = ops.fractional_max_pool

    def __init__(
        self, kernel_size: Any, output_size: Any = None, output_ratio: Any = None, return_indices: bool = False
    ):
        if (output_size is None) == (output_ratio is None):
            rule = "either output_size or output_ratio"
            raise ArgumentError("output_size", rule, f"{output_size} and {output_ratio}")
        self.kernel_size, self.output_size = kernel_size, output_size
        self.output_ratio, self.return_indices = output_ratio, return_indices

    def _sized(self, shape: Any) -> dict[str, Any]:
        """The op's options for an input of this shape."""
        size, ratio = self.output_size, self.output_ratio
        if size is None:
            each = ratio if isinstance(ratio, list | tuple) else (ratio,) * (len(shape) - 2)
            size = tuple([int(n * r) for n, r in zip(shape[2:], each)])
        return {"kernel_size": self.kernel_size, "output_size": size, "return_indices": self.return_indices}

    def forward(self, x: Any, **_: Any) -> Any:
        seed = transfer.beside(random.draw(), x) if self.training else None
        return self.run(self.op, *self.arguments(x), seed, **self._sized(x.shape))

    def backward(self, dy: Any, *_: Any) -> Any:
        return self.run_backward(dy, *_)

    def output_shape(self, input_shape: Any, **_: Any) -> tuple:
        x = Spec(tuple(input_shape), float32)
        self.arguments(x)
        found = tuple([y.shape for y in self.op.rule(x, **self._sized(input_shape)).outputs.values()])
        return found if len(found) > 1 else found[0]


class FractionalMaxPool2d(FractionalMaxPool):
    """The maximum under windows of random steps, and where it lies: (N, C, H, W) → (N, C, OH, OW). output_size: an integer or
    (OH, OW); or output_ratio: of H and W. As torch.nn.FractionalMaxPool2d."""

    spatial = 2


class FractionalMaxPool3d(FractionalMaxPool):
    """The maximum under windows of random steps, and where it lies: (N, C, D, H, W) → (N, C, OD, OH, OW). output_size: an
    integer or (OD, OH, OW); or output_ratio: of D, H and W. As torch.nn.FractionalMaxPool3d."""

    spatial = 3


class MaxUnpool(Pooling):
    """What layers that put maxima back have in common: of (x, indices), both what max pooling with return_indices gives."""

    op = ops.max_unpool
    skips_input_grad = True

    def __init__(self, kernel_size: Any, stride: Any = None, padding: Any = 0):
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    def _sized(self, shape: Any) -> tuple:
        """The least size that such a pooling makes this one of."""
        kernel, stride, padding = (
            numbers(name, value, least, self.spatial or 0)
            for name, value, least in (
                ("kernel_size", self.kernel_size, 1),
                ("stride", self.kernel_size if self.stride is None else self.stride, 1),
                ("padding", self.padding, 0),
            )
        )
        each = zip(shape[2:], kernel, stride, padding)
        return tuple([None if n is None else (n - 1) * s - 2 * p + k for n, k, s, p in each])

    def forward(self, x: Any, indices: Any, **_: Any) -> Any:
        xs = self.arguments(x, indices)
        return self.run(self.op, *xs, output_size=self._sized(x.shape))

    def backward(self, dy: Any, **_: Any) -> Any:
        return self.run_backward(dy)

    def output_shape(self, input_shape: Any, *_: Any, **__: Any) -> tuple:
        x = Spec(tuple(input_shape), float32)
        self.arguments(x)
        rule = self.op.rule(x, x._replace(dtype=int64), output_size=self._sized(input_shape))
        return rule.outputs["y"].shape


class MaxUnpool1d(MaxUnpool):
    """Maxima where they were, zeros elsewhere: (N, C, OL) and indices → (N, C, L), L = (OL − 1) · stride − 2 · padding +
    kernel_size. As torch.nn.MaxUnpool1d."""

    spatial = 1


class MaxUnpool2d(MaxUnpool):
    """Maxima where they were, zeros elsewhere: (N, C, OH, OW) and indices → (N, C, H, W), H = (OH − 1) · stride − 2 · padding
    + kernel_size, W likewise. As torch.nn.MaxUnpool2d."""

    spatial = 2


class MaxUnpool3d(MaxUnpool):
    """Maxima where they were, zeros elsewhere: (N, C, OD, OH, OW) and indices → (N, C, D, H, W), sizes as MaxUnpool2d's. As
    torch.nn.MaxUnpool3d."""

    spatial = 3
