"""Activations: the classes of ``torch.nn`` and the functions of ``torch.nn.functional``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import activation as ops
from gpulayers.ops._op import Op
from gpulayers.torch import _autocast
from gpulayers.torch._epilogue import BY_Y, TWINS
from gpulayers.torch._inplace import InPlace
from gpulayers.torch._op import TorchOp
from gpulayers.torch.dropout import draw_seed


def _op(op: Op, twin: Callable, pointwise: bool = True, **rules: Any) -> TorchOp:
    def again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
        return [BY_Y[op.name](dys[0], saved["y"])]

    schema = ", ".join(f"float {name}" for name in op.options)
    return TorchOp(op, twin, schema, again=again if op.name in BY_Y else None, pointwise=pointwise, **rules)


_relu = _op(ops.relu, F.relu)
_leaky_relu = _op(ops.leaky_relu, F.leaky_relu)
_relu_squared = _op(ops.relu_squared, TWINS["relu_squared"])
_hardtanh = _op(ops.hardtanh, F.hardtanh)
_hardsigmoid = _op(ops.hardsigmoid, F.hardsigmoid)
_hardswish = _op(ops.hardswish, F.hardswish)
_hardshrink = _op(ops.hardshrink, F.hardshrink)
_softshrink = _op(ops.softshrink, F.softshrink)
_threshold = _op(ops.threshold, F.threshold)
_sigmoid = _op(ops.sigmoid, torch.sigmoid)
_logsigmoid = _op(ops.logsigmoid, F.logsigmoid)
_silu = _op(ops.silu, F.silu)
_quick_gelu = _op(ops.quick_gelu, TWINS["quick_gelu"])
_tanh = _op(ops.tanh, torch.tanh)
_tanhshrink = _op(ops.tanhshrink, F.tanhshrink)
_softsign = _op(ops.softsign, F.softsign)
_softplus = _op(ops.softplus, F.softplus, cast=_autocast.ON_CUDA)
_elu = _op(ops.elu, F.elu)
_celu = _op(ops.celu, F.celu)
_selu = _op(ops.selu, F.selu)
_mish = _op(ops.mish, F.mish)
_prelu = _op(ops.prelu, F.prelu, pointwise=False, cast=_autocast.LOWER)
_gelu = TorchOp(ops.gelu, lambda x, approximate: F.gelu(x, approximate=approximate), "str approximate", pointwise=True)
_glu = TorchOp(ops.glu, F.glu, "int axis", pointwise=True)


def _rrelu_twin(x: Tensor, seed: Any, lower: float, upper: float, training: bool, inplace: bool = False) -> Tensor:
    return F.rrelu(x, lower, upper, training, inplace)


def _rrelu_again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    """The slopes are drawn again, as the op's values at 1 and −1; NaN has that of 1 in training, as in torch."""
    x, seed = saved["x"].detach(), saved.get("seed")
    passes = ~(x <= 0) if options["training"] else x > 0
    with torch.no_grad():
        ones = torch.where(passes, 1, -torch.ones_like(x))
        slopes = ones * _rrelu.library((ones, seed, *options.values()), False)
    return [dys[0] * slopes, None]


_rrelu = TorchOp(ops.rrelu, _rrelu_twin, "float lower, float upper, bool training", again=_rrelu_again)

for _made in (_relu, _hardtanh, _hardsigmoid, _hardswish, _threshold, _silu, _elu, _celu, _selu, _mish):
    _made.in_place = InPlace(_made)
# y has the sign of x.
_leaky_relu.in_place = InPlace(_leaky_relu, lambda slope: slope >= 0)
_rrelu.in_place = InPlace(_rrelu, lambda lower, upper, training: lower > 0)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.relu``."""
    return (_relu.in_place if inplace else _relu)(input)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.relu6``."""
    # Not ops.relu6, which saves y: with torch's, y may be changed before the backward.
    return (_hardtanh.in_place if inplace else _hardtanh)(input, 0.0, 6.0)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.leaky_relu``."""
    return (_leaky_relu.in_place if inplace else _leaky_relu)(input, negative_slope)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.hardtanh``."""
    return (_hardtanh.in_place if inplace else _hardtanh)(input, min_val, max_val)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.hardsigmoid``."""
    return (_hardsigmoid.in_place if inplace else _hardsigmoid)(input)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.hardswish``."""
    return (_hardswish.in_place if inplace else _hardswish)(input)


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """As ``torch.nn.functional.hardshrink``."""
    return _hardshrink(input, lambd)


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """As ``torch.nn.functional.softshrink``."""
    return _softshrink(input, lambd)


def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.threshold``."""
    return (_threshold.in_place if inplace else _threshold)(input, threshold, value)


def sigmoid(input: Tensor) -> Tensor:
    """As ``torch.nn.functional.sigmoid``."""
    return _sigmoid(input)


def logsigmoid(input: Tensor) -> Tensor:
    """As ``torch.nn.functional.logsigmoid``."""
    return _logsigmoid(input)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.silu``."""
    return (_silu.in_place if inplace else _silu)(input)


def tanh(input: Tensor) -> Tensor:
    """As ``torch.nn.functional.tanh``."""
    return _tanh(input)


def tanhshrink(input: Tensor) -> Tensor:
    """As ``torch.nn.functional.tanhshrink``."""
    return _tanhshrink(input)


def quick_gelu(input: Tensor) -> Tensor:
    """input · σ(1.702 input), in one pass forward and one backward."""
    return _quick_gelu(input)


def relu_squared(input: Tensor) -> Tensor:
    """max(input, 0)², in one pass forward and one backward."""
    return _relu_squared(input)


def softsign(input: Tensor) -> Tensor:
    """As ``torch.nn.functional.softsign``."""
    return _softsign(input)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """As ``torch.nn.functional.softplus``."""
    return _softplus(input, beta, threshold)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.elu``."""
    return (_elu.in_place if inplace else _elu)(input, alpha)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.celu``."""
    return (_celu.in_place if inplace else _celu)(input, alpha)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.selu``."""
    return (_selu.in_place if inplace else _selu)(input)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.mish``."""
    return (_mish.in_place if inplace else _mish)(input)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """As ``torch.nn.functional.gelu``."""
    return _gelu(input, approximate)


def _gated_twin(x: Tensor, gain: Tensor | None, activation: str) -> Tensor:
    a, b = x.chunk(2, -1) if gain is None else (x, gain)
    return TWINS[activation](a) * b


_gated = TorchOp(ops.gated, _gated_twin, "str activation", pointwise=True)


def gated(input: Tensor, gain: Tensor | None = None, activation: str = "silu") -> Tensor:
    """f(input) · gain; or f(a) · b for input = [a, b] along its last axis, in one pass forward and one backward.

    activation: f, a name in ``gpulayers.ops.activation.ACTIVATIONS``: "silu", "gelu", "gelu_tanh", "relu", "sigmoid", …
    """
    return _gated(input, gain, activation)


def swiglu(input: Tensor, gain: Tensor | None = None) -> Tensor:
    """silu(input) · gain, or silu(a) · b for input = [a, b] along its last axis."""
    return _gated(input, gain, "silu")


def geglu(input: Tensor, gain: Tensor | None = None, approximate: str = "none") -> Tensor:
    """gelu(input) · gain, or gelu(a) · b for input = [a, b] along its last axis; approximate: "none" or "tanh"."""
    return _gated(input, gain, "gelu_tanh" if approximate == "tanh" else "gelu")


def reglu(input: Tensor, gain: Tensor | None = None) -> Tensor:
    """relu(input) · gain, or relu(a) · b for input = [a, b] along its last axis."""
    return _gated(input, gain, "relu")


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """As ``torch.nn.functional.glu``."""
    return _glu(input, dim)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """As ``torch.nn.functional.prelu``."""
    return _prelu(input, weight)


def rrelu(
    input: Tensor, lower: float = 1.0 / 8, upper: float = 1.0 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    """As ``torch.nn.functional.rrelu``; the slopes are Philox's, the same on every device for the same seed."""
    if not isinstance(input, Tensor):
        return F.rrelu(input, lower, upper, training, inplace)  # raises, or records itself
    return (_rrelu.in_place if inplace else _rrelu)(
        input, draw_seed(input) if training else None, lower, upper, training
    )


class ReLU(nn.ReLU):
    """``torch.nn.ReLU`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return relu(input, inplace=self.inplace)


class ReLU6(nn.ReLU6):
    """``torch.nn.ReLU6`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return relu6(input, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """``torch.nn.LeakyReLU`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return leaky_relu(input, self.negative_slope, self.inplace)


class Hardtanh(nn.Hardtanh):
    """``torch.nn.Hardtanh`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return hardtanh(input, self.min_val, self.max_val, self.inplace)


class Hardsigmoid(nn.Hardsigmoid):
    """``torch.nn.Hardsigmoid`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return hardsigmoid(input, self.inplace)


class Hardswish(nn.Hardswish):
    """``torch.nn.Hardswish`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return hardswish(input, self.inplace)


class Hardshrink(nn.Hardshrink):
    """``torch.nn.Hardshrink`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return hardshrink(input, self.lambd)


class Softshrink(nn.Softshrink):
    """``torch.nn.Softshrink`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return softshrink(input, self.lambd)


class Threshold(nn.Threshold):
    """``torch.nn.Threshold`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return threshold(input, self.threshold, self.value, self.inplace)


class Sigmoid(nn.Sigmoid):
    """``torch.nn.Sigmoid`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return sigmoid(input)


class LogSigmoid(nn.LogSigmoid):
    """``torch.nn.LogSigmoid`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return logsigmoid(input)


class SiLU(nn.SiLU):
    """``torch.nn.SiLU`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return silu(input, inplace=self.inplace)


class Tanh(nn.Tanh):
    """``torch.nn.Tanh`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return tanh(input)


class Tanhshrink(nn.Tanhshrink):
    """``torch.nn.Tanhshrink`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return tanhshrink(input)


class QuickGELU(nn.Module):
    """x σ(1.702 x) over gpulayers' kernels. torch.nn has none, so that it is no drop-in: fused chains know it."""

    def forward(self, input: Tensor) -> Tensor:
        return quick_gelu(input)


class ReLUSquared(nn.Module):
    """max(x, 0)² over gpulayers' kernels. torch.nn has none, so that it is no drop-in: fused chains know it."""

    def forward(self, input: Tensor) -> Tensor:
        return relu_squared(input)


class Softsign(nn.Softsign):
    """``torch.nn.Softsign`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return softsign(input)


class Softplus(nn.Softplus):
    """``torch.nn.Softplus`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return softplus(input, self.beta, self.threshold)


class ELU(nn.ELU):
    """``torch.nn.ELU`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return elu(input, self.alpha, self.inplace)


class CELU(nn.CELU):
    """``torch.nn.CELU`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return celu(input, self.alpha, self.inplace)


class SELU(nn.SELU):
    """``torch.nn.SELU`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return selu(input, self.inplace)


class Mish(nn.Mish):
    """``torch.nn.Mish`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return mish(input, inplace=self.inplace)


class GELU(nn.GELU):
    """``torch.nn.GELU`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, approximate=self.approximate)


class GLU(nn.GLU):
    """``torch.nn.GLU`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return glu(input, self.dim)


class PReLU(nn.PReLU):
    """``torch.nn.PReLU`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return prelu(input, self.weight)


class RReLU(nn.RReLU):
    """``torch.nn.RReLU`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return rrelu(input, self.lower, self.upper, self.training, self.inplace)
