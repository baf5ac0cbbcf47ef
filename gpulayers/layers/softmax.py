"""Softmax and log-softmax layers."""

from __future__ import annotations

from typing import Any

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
