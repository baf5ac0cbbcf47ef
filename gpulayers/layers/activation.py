"""Activations: y = f(x), elementwise. Names and arguments are torch.nn's (``inplace`` has no effect: x is the caller's)."""

from __future__ import annotations

from typing import Any

from gpulayers.layers._layer import OpLayer
from gpulayers.ops import activation as ops


class ReLU(OpLayer):
    """max(x, 0)."""

    op = ops.relu

    def __init__(self, inplace: bool = False):
        self.inplace = inplace


class LeakyReLU(OpLayer):
    """x where x > 0, else negative_slope · x."""

    op = ops.leaky_relu

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False):
        self.negative_slope, self.inplace = negative_slope, inplace

    def options(self) -> dict[str, Any]:
        return {"negative_slope": self.negative_slope}


class GELU(OpLayer):
    """x Φ(x); approximate: "none" (erf) or "tanh"."""

    op = ops.gelu

    def __init__(self, approximate: str = "none"):
        self.approximate = approximate

    def options(self) -> dict[str, Any]:
        return {"approximate": self.approximate}


class SiLU(OpLayer):
    """x σ(x)."""

    op = ops.silu

    def __init__(self, inplace: bool = False):
        self.inplace = inplace


class Sigmoid(OpLayer):
    """1 / (1 + exp(−x))."""

    op = ops.sigmoid


class Tanh(OpLayer):
    """tanh(x)."""

    op = ops.tanh


class Softplus(OpLayer):
    """log(1 + exp(beta x)) / beta, and x where beta x > threshold."""

    op = ops.softplus

    def __init__(self, beta: float = 1.0, threshold: float = 20.0):
        self.beta, self.threshold = beta, threshold

    def options(self) -> dict[str, Any]:
        return {"beta": self.beta, "threshold": self.threshold}


class ELU(OpLayer):
    """x where x > 0, else alpha (exp(x) − 1)."""

    op = ops.elu

    def __init__(self, alpha: float = 1.0, inplace: bool = False):
        self.alpha, self.inplace = alpha, inplace

    def options(self) -> dict[str, Any]:
        return {"alpha": self.alpha}


class Hardswish(OpLayer):
    """x · min(max(x + 3, 0), 6) / 6."""

    op = ops.hardswish

    def __init__(self, inplace: bool = False):
        self.inplace = inplace


class Mish(OpLayer):
    """x tanh(softplus(x))."""

    op = ops.mish

    def __init__(self, inplace: bool = False):
        self.inplace = inplace
