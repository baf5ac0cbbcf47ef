"""A right layer passes; each broken one is caught, with a message that names its fault."""

from types import SimpleNamespace

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.testing import CheckError, check_layer


@gl.register
class Swish(gl.Layer):
    """x σ(βx) with a learned β; the layer that the broken ones below are variants of."""

    def build(self, input_shape):
        self.beta = self.add_weight("beta", (), init="ones")

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        s = 1 / (1 + np.exp(-self.beta * x))
        self.save(x, s)
        return x * s

    def backward(self, dy):
        x, s = self.saved
        slope = x * s * (1 - s)
        self.beta.grad += (dy * x * slope).sum()
        return dy * (s + self.beta * slope)


class TwiceTheGradient(Swish):
    def backward(self, dy):
        return 2 * super().backward(dy)


class NoWeightGradient(Swish):
    def backward(self, dy):
        x, s = self.saved_by(Swish)
        return dy * (s + self.beta * x * s * (1 - s))


class IgnoresStrides(Swish):
    def backward(self, dy):
        base = dy if dy.base is None else dy.base
        dense = np.resize(base.reshape(-1), dy.size).reshape(dy.shape)  # reads memory as if dy were row-major
        return super().backward(dense)


class ModifiesItsInput(Swish):
    def forward(self, x):
        y = super().forward(x.copy())
        x *= 0.5
        return y


class WrongOutputShape(Swish):
    def output_shape(self, input_shape):
        return (*input_shape[:-1], 1)


class LeaksState(Swish):
    def forward(self, x):
        self.kept = x
        return super().forward(x)

    def backward(self, dy):
        x = self.kept
        s = 1 / (1 + np.exp(-self.beta * x))
        slope = x * s * (1 - s)
        self.beta.grad += (dy * x * slope).sum()
        return dy * (s + self.beta * slope)


class NotDeterministic(Swish):
    def forward(self, x):
        return super().forward(x) * (1 + 1e-3 * np.random.default_rng().standard_normal(x.shape))


class WrongForBatchOfOne(Swish):
    def backward(self, dy):
        dx = super().backward(dy)
        return dx if len(dx) != 1 else dx * 0.5


class WrongForBatchOfZero(Swish):
    def forward(self, x):
        return super().forward(x) + 0 * x.max()


class WrongForFloat16(Swish):
    def forward(self, x):
        y = super().forward(x)
        return y + 0 * np.exp(x * x) if x.dtype == np.float16 else y  # overflows


class OverwritesGradient(Swish):
    def backward(self, dy):
        self.beta.zero_grad()
        return super().backward(dy)


class WrongBelowZero(Swish):
    def backward(self, dy):
        x, _ = self.saved_by(Swish)
        return super().backward(dy) * np.where(x < 0, 0.9, 1.0)


class AssumesOnes(Swish):
    def backward(self, dy):
        return super().backward(np.ones_like(dy))


@gl.register
class ByBeta(Swish):
    """x · β: its weight gradient is the sum of dy · x."""

    def forward(self, x):
        self.save(x)
        return x * self.beta

    def weight_gradient(self, dy, x):
        return (dy * x).sum()

    def backward(self, dy):
        (x,) = self.saved
        self.beta.grad += self.weight_gradient(dy, x)
        return dy * self.beta


class ReluInPlace(gl.Layer):
    """Once its input is changed, changing it again changes nothing."""

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        self.save(x)
        return np.maximum(x, 0, out=x)

    def backward(self, dy):
        return dy * (self.saved[0] > 0)


class CountsItsCalls(Swish):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls

    def backward(self, dy):
        return super().backward(dy) * self.calls


class LeaksIntoWeightGradient(ByBeta):
    def forward(self, x):
        self.kept = x
        return super().forward(x)

    def weight_gradient(self, dy, x):
        return (dy * self.kept).sum()


class WeightGradientWrongForBatchOfOne(ByBeta):
    def weight_gradient(self, dy, x):
        return (dy * x).sum() * (2 if len(x) == 1 else 1)


class WeightGradientWrongForBatchOfZero(ByBeta):
    def weight_gradient(self, dy, x):
        return (dy * x).sum() if len(x) else np.nan


class SlightlyWrongForFloat16(Swish):
    def backward(self, dy):
        dx = super().backward(dy)
        return dx + np.float16(0.05) if dy.dtype == np.float16 else dx  # less than the rounding of the largest x


BROKEN = [
    (TwiceTheGradient, "off by a factor of 2"),
    (NoWeightGradient, "the gradient of beta is missing"),
    (IgnoresStrides, "ignores the strides of dy"),
    (ModifiesItsInput, "forward modified its input x in place"),
    (WrongOutputShape, r"y.shape = output_shape\(x.shape\)"),
    (LeaksState, "state leaks between calls: keep what backward needs with self.save"),
    (NotDeterministic, "the same input gave another output"),
    (WrongForBatchOfOne, "wrong for a batch of 1"),
    (WrongForBatchOfZero, "wrong for a batch of 0"),
    (WrongForFloat16, "the output overflows in float16"),
    (OverwritesGradient, "gradient of beta was overwritten"),
    (WrongBelowZero, "wrong only where the value is < 0"),
    (AssumesOnes, "backward does not use dy"),
    (ReluInPlace, "forward modified its input x in place"),
    (CountsItsCalls, "state leaks between calls"),
    (LeaksIntoWeightGradient, "the gradient of beta is wrong: state leaks between calls"),
    (WeightGradientWrongForBatchOfOne, "wrong for a batch of 1: the gradient of beta is wrong"),
    (WeightGradientWrongForBatchOfZero, "wrong for a batch of 0: the gradient of beta is not finite"),
    (SlightlyWrongForFloat16, "in float16 dx is wrong: the root mean square"),
]


def test_right_layer_passes():
    passed = check_layer(Swish(), (None, 5))
    assert {"gradients, training", "memory order of dy", "float16", "bfloat16", "config and weights"} <= set(passed)
    check_layer(Swish(), (3, 4, 5))
    check_layer(gl.Sequential(Swish(), gl.Residual(Swish(), gl.Softmax()), gl.Flatten()), (None, 3, 4))


@pytest.mark.parametrize("broken, text", BROKEN, ids=lambda v: getattr(v, "__name__", ""))
def test_broken_layer_is_caught(broken, text):
    gl.register(broken)
    with pytest.raises(CheckError, match=text):
        check_layer(broken(), (None, 5))


def test_layer_used_twice():
    """The same layer twice in a model, and called twice before the backwards."""
    gl.random.seed(3)
    swish = Swish()
    check_layer(gl.Sequential(swish, gl.Softmax(), swish), (None, 4))


def test_lost_setting_is_caught():
    @gl.register
    class Scaled(gl.Layer):
        def __init__(self, factor):
            self.factor, self.more = factor, SimpleNamespace(factor=1.0)

        def output_shape(self, input_shape):
            return input_shape

        def forward(self, x):
            return x * self.factor * self.more.factor

        def backward(self, dy):
            return dy * self.factor * self.more.factor

    layer = Scaled(2.0)
    check_layer(layer, (None, 3))
    layer.factor = 3.0  # not what __init__ was given, yet saved
    check_layer(layer, (None, 3))
    layer.more.factor = 3.0  # nobody sees that
    with pytest.raises(CheckError, match="made again from its config"):
        check_layer(layer, (None, 3))
