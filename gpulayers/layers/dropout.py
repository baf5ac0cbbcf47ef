"""Dropout."""

from __future__ import annotations

from typing import Any

from gpulayers import random, transfer
from gpulayers.definition import ArgumentError, ShapeError
from gpulayers.layers._layer import OpLayer
from gpulayers.ops import dropout as ops


class _Masked(OpLayer):
    """What the classes share: in evaluation, and for p = 0, y = x."""

    op = ops.dropout
    skips_input_grad = True
    alpha, features = False, 0
    axes: int | None = None
    """Of x behind [N, C], where the class says how many."""

    def __init__(self, p: float = 0.5, inplace: bool = False):
        if not 0 <= p <= 1:
            raise ArgumentError(f"{type(self).__name__}: p", "0 ≤ p ≤ 1", p)
        self.p, self.inplace = p, inplace

    def arguments(self, x: Any) -> tuple:
        return x, transfer.beside(random.draw(), x)

    def options(self) -> dict[str, Any]:
        return {"p": self.p, "alpha": self.alpha, "features": self.features}

    def output_shape(self, *input_shapes: tuple) -> tuple:
        (shape,) = input_shapes
        if self.features and (len(shape) < 2 if self.axes is None else len(shape) != 2 + self.axes):
            rule = "[N, C, …]" if self.axes is None else f"[N, C, {', '.join('DHW'[-self.axes :])}]"
            raise ShapeError(f"{type(self).__name__}: x", f"samples and features, {rule}", list(shape))
        return shape

    def forward(self, x: Any) -> Any:
        self.output_shape(x.shape)
        on = self.training and self.p > 0
        self.save(on)
        return super().forward(x) if on else x

    def backward(self, dy: Any) -> Any:
        (on,) = self.saved
        return super().backward(dy) if on else dy


class Dropout(_Masked):
    """In training, each element is 0 with probability p, and else divided by 1 − p; in evaluation, y = x.

    The mask is drawn from gl.random: the same on every backend, and again after a checkpoint is resumed.
    """


class Dropout1d(_Masked):
    """Dropout of whole features: x [N, C, L]."""

    features, axes = 2, 1


class Dropout2d(_Masked):
    """Dropout of whole features: x [N, C, H, W] (Tompson et al., "Efficient object localization", 2015)."""

    features, axes = 2, 2


class Dropout3d(_Masked):
    """Dropout of whole features: x [N, C, D, H, W]."""

    features, axes = 2, 3


class AlphaDropout(_Masked):
    """Dropout to −1.7581, the value that SELU tends to, and a scale and a shift that keep mean 0 and variance 1.

    Klambauer et al., "Self-normalizing neural networks" (2017).
    """

    alpha = True


class FeatureAlphaDropout(_Masked):
    """AlphaDropout of whole features: x [N, C, …]."""

    alpha, features = True, 2
