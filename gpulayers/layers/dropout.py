"""Dropout."""

from __future__ import annotations

from typing import Any

from gpulayers import random, transfer
from gpulayers.definition import ArgumentError
from gpulayers.layers._layer import OpLayer
from gpulayers.ops import dropout as ops


class Dropout(OpLayer):
    """In training, each element is 0 with probability p, and else divided by 1 − p; in evaluation, y = x.

    The mask is drawn from gl.random: the same on every backend, and again after a checkpoint is resumed.
    """

    op = ops.dropout
    skips_input_grad = True

    def __init__(self, p: float = 0.5, inplace: bool = False):
        if not 0 <= p <= 1:
            raise ArgumentError("Dropout: p", "0 ≤ p ≤ 1", p)
        self.p, self.inplace = p, inplace

    def arguments(self, x: Any) -> tuple:
        return x, transfer.beside(random.draw(), x)

    def options(self) -> dict[str, Any]:
        return {"p": self.p}

    def output_shape(self, *input_shapes: tuple) -> tuple:
        return input_shapes[0]

    def forward(self, x: Any) -> Any:
        on = self.training and self.p > 0
        self.save(on)
        return super().forward(x) if on else x

    def backward(self, dy: Any) -> Any:
        (on,) = self.saved
        return super().backward(dy) if on else dy
