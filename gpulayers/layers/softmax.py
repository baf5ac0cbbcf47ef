"""Softmax, softmin and log-softmax layers."""

from __future__ import annotations

from typing import Any

from gpulayers.definition import ArgumentError
from gpulayers.layers._layer import OpLayer
from gpulayers.ops import softmax as ops


class Softmax(OpLayer):
    """y = softmax(x) over axis ``dim``; any shape. As torch.nn.Softmax."""

    op = ops.softmax

    def __init__(self, dim: int = -1):
        self.dim = dim

    def options(self) -> dict[str, Any]:
        return {"axis": self.dim}


class LogSoftmax(Softmax):
    """y = log softmax(x) over axis ``dim``; any shape. As torch.nn.LogSoftmax."""

    op = ops.log_softmax


class Softmin(Softmax):
    """y = softmax(−x) over axis ``dim``; any shape. As torch.nn.Softmin."""

    op = ops.softmin


class Softmax2d(OpLayer):
    """Softmax over the channels at each place of an image, (N, C, H, W) or (C, H, W). As torch.nn.Softmax2d."""

    op = ops.softmax

    def arguments(self, *xs: Any) -> tuple:
        (x,) = xs
        if len(x.shape) not in (3, 4):
            error = ArgumentError("x", "a 3-dim or 4-dim array", list(x.shape))
            error.where = self.name
            raise error
        return xs

    def options(self) -> dict[str, Any]:
        return {"axis": -3}
