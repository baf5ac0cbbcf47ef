"""Activations: y = f(x), elementwise. Names and arguments are torch.nn's (``inplace`` has no effect: x is the caller's)."""

from __future__ import annotations

from typing import Any

from gpulayers import random, transfer
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


class ReLU6(OpLayer):
    """min(max(x, 0), 6)."""

    op = ops.relu6

    def __init__(self, inplace: bool = False):
        self.inplace = inplace


class ReLUSquared(OpLayer):
    """max(x, 0)²."""

    op = ops.relu_squared


class Hardtanh(OpLayer):
    """min(max(x, min_val), max_val). min_value and max_value are older names of the same."""

    op = ops.hardtanh

    def __init__(
        self,
        min_val: float = -1.0,
        max_val: float = 1.0,
        inplace: bool = False,
        min_value: float | None = None,
        max_value: float | None = None,
    ):
        self.min_val = min_val if min_value is None else min_value
        self.max_val = max_val if max_value is None else max_value
        self.inplace = inplace
        came = f"min_val {self.min_val}, max_val {self.max_val}"
        assert self.max_val > self.min_val, f"Hardtanh: max_val: the rule is max_val > min_val; got {came}"

    def options(self) -> dict[str, Any]:
        return {"min_val": self.min_val, "max_val": self.max_val}


class Hardsigmoid(OpLayer):
    """min(max(x + 3, 0), 6) / 6."""

    op = ops.hardsigmoid

    def __init__(self, inplace: bool = False):
        self.inplace = inplace


class Hardswish(OpLayer):
    """x · min(max(x + 3, 0), 6) / 6."""

    op = ops.hardswish

    def __init__(self, inplace: bool = False):
        self.inplace = inplace


class Hardshrink(OpLayer):
    """x where |x| > lambd, else 0."""

    op = ops.hardshrink

    def __init__(self, lambd: float = 0.5):
        self.lambd = lambd

    def options(self) -> dict[str, Any]:
        return {"lambd": self.lambd}


class Softshrink(Hardshrink):
    """x drawn towards 0 by lambd, and 0 where |x| ≤ lambd."""

    op = ops.softshrink


class Threshold(OpLayer):
    """x where x > threshold, else value."""

    op = ops.threshold

    def __init__(self, threshold: float, value: float, inplace: bool = False):
        self.threshold, self.value, self.inplace = threshold, value, inplace

    def options(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "value": self.value}


class GELU(OpLayer):
    """x Φ(x); approximate: "none" (erf) or "tanh"."""

    op = ops.gelu

    def __init__(self, approximate: str = "none"):
        self.approximate = approximate

    def options(self) -> dict[str, Any]:
        return {"approximate": self.approximate}


class QuickGELU(OpLayer):
    """x σ(1.702 x), near GELU."""

    op = ops.quick_gelu


class SiLU(OpLayer):
    """x σ(x)."""

    op = ops.silu

    def __init__(self, inplace: bool = False):
        self.inplace = inplace


class Sigmoid(OpLayer):
    """1 / (1 + exp(−x))."""

    op = ops.sigmoid


class LogSigmoid(OpLayer):
    """log σ(x)."""

    op = ops.logsigmoid


class Tanh(OpLayer):
    """tanh(x)."""

    op = ops.tanh


class Tanhshrink(OpLayer):
    """x − tanh(x)."""

    op = ops.tanhshrink


class Softsign(OpLayer):
    """x / (1 + |x|)."""

    op = ops.softsign


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


class CELU(ELU):
    """x where x > 0, else alpha (exp(x / alpha) − 1)."""

    op = ops.celu


class SELU(OpLayer):
    """s x where x > 0, else s α (exp(x) − 1), with s = 1.0507… and α = 1.6732…."""

    op = ops.selu

    def __init__(self, inplace: bool = False):
        self.inplace = inplace


class Mish(OpLayer):
    """x tanh(softplus(x))."""

    op = ops.mish

    def __init__(self, inplace: bool = False):
        self.inplace = inplace


class PReLU(OpLayer):
    """x where x > 0, else weight · x, with one learned weight, or one for each channel (axis 1).

    num_parameters: 1, or the number of channels. Weight: ``weight`` (num_parameters,), ``init`` at first.
    """

    op = ops.prelu
    casts_weights = True

    def __init__(self, num_parameters: int = 1, init: float = 0.25):
        self.num_parameters, self.init = num_parameters, init
        self.weight = self.add_weight("weight", (num_parameters,), init)

    def arguments(self, *xs: Any) -> tuple:
        return (*xs, self.weight)


class RReLU(OpLayer):
    """x where x > 0, else a · x: in training a is drawn from [lower, upper) for each element, else it is their mean.

    The slopes are drawn from gl.random: the same on every backend, and again after a checkpoint is resumed.
    """

    op = ops.rrelu

    def __init__(self, lower: float = 1 / 8, upper: float = 1 / 3, inplace: bool = False):
        self.lower, self.upper, self.inplace = lower, upper, inplace

    def arguments(self, *xs: Any) -> tuple:
        return (*xs, transfer.beside(random.draw(), xs[0]) if self.training else None)

    def options(self) -> dict[str, Any]:
        return {"lower": self.lower, "upper": self.upper, "training": self.training}

    def output_shape(self, *input_shapes: Any, **_: Any) -> tuple:
        return input_shapes[0]


class GLU(OpLayer):
    """a σ(b), where a and b are the halves of x along axis ``dim``."""

    op = ops.glu

    def __init__(self, dim: int = -1):
        self.dim = dim

    def options(self) -> dict[str, Any]:
        return {"axis": self.dim}


class SwiGLU(OpLayer):
    """silu(a) b, where a and b are the halves of x along its last axis."""

    op = ops.gated

    def options(self) -> dict[str, Any]:
        return {"activation": "silu"}


class GEGLU(OpLayer):
    """gelu(a) b, where a and b are the halves of x along its last axis; approximate: "none" or "tanh", as GELU's."""

    op = ops.gated

    def __init__(self, approximate: str = "none"):
        rule = 'GEGLU: approximate: the rule is approximate ∈ {"none", "tanh"}'
        assert approximate in ("none", "tanh"), f"{rule}; got {approximate!r}"
        self.approximate = approximate

    def options(self) -> dict[str, Any]:
        return {"activation": "gelu_tanh" if self.approximate == "tanh" else "gelu"}


class ReGLU(OpLayer):
    """max(a, 0) b, where a and b are the halves of x along its last axis."""

    op = ops.gated

    def options(self) -> dict[str, Any]:
        return {"activation": "relu"}
