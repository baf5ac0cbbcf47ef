"""Faults that a weight at its start hides."""

import numpy as np

from layer_mutants._bases import Scale, Shift
from layer_mutants._kinds import drawn, mutant, slope_differs, wide

F = ((None, 5),)


@mutant("weights", F, "dx is wrong", slope_differs((4, 5)))
class InputGradientLacksTheWeight(Scale):
    def backward(self, dy):
        super().backward(dy)
        return dy


@mutant("weights", F, "the gradient of w is wrong", slope_differs((4, 5), weight="w"))
class WeightGradientLacksTheWeight(Scale):
    """w² x, whose slope 2 w x is taken for 2 x."""

    def forward(self, x):
        return super().forward(x) * self.w

    def backward(self, dy):
        (x,) = self.saved_by(Scale)
        self.w.grad += self.over_rows(2 * dy * x)
        return dy * self.w * self.w


@mutant("weights", F, "dx is wrong", slope_differs((4, 5)))
class ForgetsTheBias(Shift):
    def backward(self, dy):
        (x,) = self.saved_by(Shift)
        super().backward(dy)
        return 2 * dy * x


def _not_finite_at_zero(make):
    layer = wide(make, drawn(4, 5))
    layer.w.data = layer.w.data * [0, 1, 1, 1, 1]
    layer(drawn(4, 5))
    layer.backward(drawn(4, 5))
    assert np.isfinite(layer.w.grad).all()


@mutant("weights", F, "where an element of w is zero: the gradient of w .* not finite", _not_finite_at_zero)
class DividesByTheWeight(Scale):
    def backward(self, dy):
        (x,) = self.saved_by(Scale)
        self.w.grad += self.over_rows(dy * (x * self.w) / self.w)
        return dy * self.w


def _goes_on_with_the_old(make):
    layer, x = wide(make, drawn(4, 5)), drawn(4, 5)
    before = layer(x)
    layer.w.data = 2 * layer.w.data
    assert np.allclose(layer(x), 2 * before)


@mutant("weights", F, "does not reach the next", _goes_on_with_the_old)
class KeepsACopyOfTheFirstCall(Scale):
    def forward(self, x):
        if not hasattr(self, "_copy") or self._copy.dtype != x.dtype:
            self._copy = np.array(self.w.data, dtype=x.dtype)
        self.save(x)
        super().forward(x)
        return x * self._copy

    def backward(self, dy):
        super().backward(dy)
        return dy * self._copy


@mutant("weights", F, "uses a copy from before the weights were changed", _goes_on_with_the_old)
class KeepsACopyFromBuild(Scale):
    def build(self, input_shape):
        super().build(input_shape)
        self._copy = np.array(self.w.data)

    def forward(self, x):
        super().forward(x)
        return x * self._copy

    def backward(self, dy):
        super().backward(dy)
        return dy * self._copy


def _frozen_differs(make):
    found = []
    for trainable in (True, False):
        layer = wide(make, drawn(4, 5))
        layer.w.trainable = trainable
        layer(drawn(4, 5))
        found.append(layer.backward(drawn(4, 5)))
    assert np.allclose(*found)


@mutant("weights", F, "with w frozen dx is wrong", _frozen_differs)
class FrozenStopsTheGradient(Scale):
    def backward(self, dy):
        return super().backward(dy) if self.w.trainable else np.zeros(dy.shape, dy.dtype)


def _wrong_for_negative(make):
    layer, x = wide(make, drawn(4, 5)), drawn(4, 5)
    layer.w.data = -np.abs(layer.w.data)
    layer(x)
    assert np.allclose(layer.backward(np.ones((4, 5))), np.ones((4, 5)) * layer.w.data)


@mutant("weights", F, "dx is wrong", _wrong_for_negative)
class TakesTheWeightForPositive(Scale):
    def backward(self, dy):
        super().backward(dy)
        return dy * abs(self.w)
