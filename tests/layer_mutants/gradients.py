"""Faults that every call shows."""

import numpy as np

from layer_mutants._bases import Scale, Swish, Table
from layer_mutants._kinds import mutant, slope_differs

F = ((None, 5),)


@mutant("gradients", F, "off by a factor of 2", slope_differs((4, 5)))
class TwiceTheGradient(Swish):
    def backward(self, dy):
        return 2 * super().backward(dy)


@mutant("gradients", F, "has the wrong sign", slope_differs((4, 5), weight="w"))
class WrongSign(Scale):
    def over_rows(self, g):
        return -super().over_rows(g)


@mutant("gradients", F, "the gradient of w is missing", slope_differs((4, 5), weight="w"))
class NoWeightGradient(Scale):
    def backward(self, dy):
        return dy * self.w


@mutant("gradients", F, "backward does not use dy", slope_differs((4, 5)))
class DyIsTakenForOnes(Swish):
    def backward(self, dy):
        return super().backward(np.ones_like(dy))


@mutant("gradients", F, "wrong only where the value is < 0", slope_differs((4, 5)))
class WrongBelowZero(Swish):
    def backward(self, dy):
        x, _ = self.saved_by(Swish)
        return super().backward(dy) * np.where(x < 0, 0.9, 1.0)


@mutant("gradients", F, "wrong only at the first along axis 0", slope_differs((4, 5)))
class WrongInTheFirstRow(Swish):
    def backward(self, dy):
        dx = super().backward(dy)
        if len(dx) > 1:
            dx[:1] *= 0.5
        return dx


def _twice_named(make):
    layer = make()
    layer(np.array([1, 1]))
    layer.backward(np.ones((2, 3), "float32"))
    assert (layer.w.grad[1] == 2).all()


@mutant("gradients", (np.array([[1, 0, 3], [3, 3, 2]]),), "where a number comes more than once", _twice_named, 4, 3)
class ANumberTwiceCountsOnce(Table):
    def backward(self, dy):
        (at,) = self.saved_by(Table)
        self.w.grad[at] += dy
