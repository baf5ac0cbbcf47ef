"""Faults in the number, shape and dtype of what is returned."""

import numpy as np

from layer_mutants._bases import Add, Dense, Pairs, Scale, Swish, Table
from layer_mutants._kinds import drawn, mutant, slope_differs, wide

F = ((None, 5),)
TWO = ((None, 5), (None, 5))
NUMBERS = (np.array([[1, 0, 3], [3, 3, 2]]),)


def _backward(*shapes):
    def proof(make):
        xs = [drawn(*s) for s in shapes]
        layer = wide(make, *xs)
        dx = layer.backward(drawn(*layer(*xs).shape))
        dxs = dx if isinstance(dx, tuple) else (dx,)
        assert [g is not None and g.shape for g in dxs] == [x.shape for x in xs]

    return proof


@mutant("contract", F, "dx is flattened", _backward((4, 5)))
class DxIsFlat(Swish):
    def backward(self, dy):
        return super().backward(dy).reshape(-1)


@mutant("contract", ((5, 5),), "dx is wrong.* transposed", slope_differs((5, 5)))
class DxIsTransposed(Swish):
    def backward(self, dy):
        dx = super().backward(dy)
        return dx.T if dx.shape[0] == dx.shape[1] else dx


@mutant("contract", TWO, r"backward returns 1 gradient: the rule is a tuple of 2", _backward((4, 5), (4, 5)))
class OneGradientForTwoInputs(Add):
    def backward(self, dy):
        return (dy,)


@mutant("contract", TWO, "backward returns a list of 2: the rule is a tuple of 2", _backward((4, 5), (4, 5)))
class AListOfGradients(Add):
    def backward(self, dy):
        return [dy, 2 * dy]


@mutant("contract", TWO, r"dx\[1\] is missing", slope_differs((4, 5), (4, 5), of=1))
class NoneForTheSecondInput(Add):
    def backward(self, dy):
        return dy, None


def _integers(make):
    layer = make()
    y = layer(NUMBERS[0])
    assert layer.backward(np.ones_like(y)) is None


@mutant("contract", NUMBERS, "integers have none", _integers, 4, 3)
class AGradientOfIntegers(Table):
    def backward(self, dy):
        super().backward(dy)
        return np.zeros(self.saved_by(Table)[0].shape)


def _grad_fits(make):
    layer = wide(make, drawn(4, 5))
    layer.backward(drawn(*layer(drawn(4, 5)).shape))
    for w in layer.weights:
        assert (w.grad.shape, w.grad.dtype) == (w.shape, w.dtype)


@mutant("contract", F, "the gradient of b is float64.*: the rule is the weight's own shape", _grad_fits, 3)
class BiasGradientForEachRow(Dense):
    def backward(self, dy):
        (x,) = self.saved_by(Dense)
        self.w.grad += x.T @ dy
        self.b.grad = self.b.grad + dy
        return dy @ self.w.T


@mutant("contract", F, "the gradient of w is float32.*: the rule is the weight's own shape and dtype", _grad_fits)
class WeightGradientInFloat32(Scale):
    def backward(self, dy):
        (x,) = self.saved_by(Scale)
        self.w.grad = (self.w.grad + self.over_rows(dy * x)).astype("float32")
        return dy * self.w


def _precise(make):
    x = drawn(4, 5)
    assert np.allclose(make()(x), x / (1 + np.exp(-x)), rtol=1e-12)


@mutant("contract", F, "computes float64 in float32", _precise)
class Float64InFloat32(Swish):
    def forward(self, x):
        return super().forward(x.astype("float32"))


def _shape_of_odd(make):
    layer = make()
    assert layer(drawn(4, 7)).shape == layer.output_shape((4, 7))


@mutant("contract", ((None, 6),), "output_shape is wrong for other sizes", lambda make: _shape_of_odd(make))
class OutputShapeRoundsUp(Pairs):
    def output_shape(self, input_shape):
        return (*input_shape[:-1], -(-input_shape[-1] // 2))


@mutant("contract", ((None, 6),), r"y.shape = output_shape", lambda make: make()(drawn(4, 6)))
class OutputShapeForgetsAnAxis(Pairs):
    def output_shape(self, input_shape):
        return (input_shape[0],)


@mutant("contract", F, "computes float64 in float16", _precise)
class Float64InFloat16(Swish):
    def forward(self, x):
        return super().forward(x.astype("float16")).astype(x.dtype)
