"""Dropout."""

from __future__ import annotations

from typing import Any

from gpulayers import arrays, random
from gpulayers.arrays import Spec
from gpulayers.layers._layer import OpLayer
from gpulayers.ops import dropout as ops
from gpulayers.ops._op import ArgumentError


class Dropout(OpLayer):
    """In training, each element is 0 with probability p, the others are divided by 1 − p; in evaluation y = x.

    As torch.nn.Dropout. The mask is drawn from gpulayers.random, so gl.random.seed(…) repeats it, on any device.
    """

    op = ops.dropout

    def __init__(self, p: float = 0.5):
        if not 0 <= p <= 1:
            error = ArgumentError("p", "0 ≤ p ≤ 1", p)
            error.where = type(self).__name__
            raise error
        self.p = p

    def arguments(self, *xs: Any) -> tuple:
        (x,) = xs
        if isinstance(x, Spec):
            return x, Spec((2,), arrays.int64)
        return x, arrays.beside(random.draw(), x)

    def options(self) -> dict[str, Any]:
        return {"p": self.p}

    def forward(self, x: Any) -> Any:
        return super().forward(x) if self.training and self.p else x

    def backward(self, dy: Any) -> Any:
        grads = super().backward(dy)  # of x and of the seed; None where nothing was drawn
        return dy if grads is None else grads[0]
