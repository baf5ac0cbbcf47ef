"""Activation layers: any shape in, the same shape out. Names, arguments and defaults are torch.nn's."""

from __future__ import annotations

from typing import Any

from gpulayers.layers._layer import OpLayer
from gpulayers.ops import activation as ops


class ReLU(OpLayer):
    """y = max(x, 0). As torch.nn.ReLU."""

    op = ops.relu


class LeakyReLU(OpLayer):
    """y = x where x > 0, else negative_slope x. As torch.nn.LeakyReLU."""

    op = ops.leaky_relu

    def __init__(self, negative_slope: float = 0.01):
        self.negative_slope = negative_slope

    def options(self) -> dict[str, Any]:
        return {"negative_slope": self.negative_slope}


class GELU(OpLayer):
    """y = x Φ(x); approximate="tanh" computes it with tanh. As torch.nn.GELU."""

    op = ops.gelu

    def __init__(self, approximate: str = "none"):
        self.approximate = approximate

    def options(self) -> dict[str, Any]:
        return {"approximate": self.approximate}


class SiLU(OpLayer):
    """y = x σ(x), also called Swish. As torch.nn.SiLU."""

    op = ops.silu


class Sigmoid(OpLayer):
    """y = 1 / (1 + exp(−x)). As torch.nn.Sigmoid."""

    op = ops.sigmoid


class Tanh(OpLayer):
    """y = tanh(x). As torch.nn.Tanh."""

    op = ops.tanh


class Softplus(OpLayer):
    """y = log(1 + exp(beta x)) / beta, x itself where beta x > threshold. As torch.nn.Softplus."""

    op = ops.softplus

    def __init__(self, beta: float = 1.0, threshold: float = 20.0):
        self.beta, self.threshold = beta, threshold

    def options(self) -> dict[str, Any]:
        return {"beta": self.beta, "threshold": self.threshold}


class ELU(OpLayer):
    """y = x where x > 0, else alpha (exp(x) − 1). As torch.nn.ELU."""

    op = ops.elu

    def __init__(self, alpha: float = 1.0):
        self.alpha = alpha

    def options(self) -> dict[str, Any]:
        return {"alpha": self.alpha}


class Hardswish(OpLayer):
    """y = x min(max(x + 3, 0), 6) / 6. As torch.nn.Hardswish."""

    op = ops.hardswish


class Mish(OpLayer):
    """y = x tanh(log(1 + exp(x))). As torch.nn.Mish."""

    op = ops.mish
