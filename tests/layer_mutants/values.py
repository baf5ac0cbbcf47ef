"""Faults of some values only."""

import numpy as np

import gpulayers as gl
from layer_mutants._bases import Largest, Same, Scale, Swish
from layer_mutants._kinds import drawn, mutant, slope_differs

F = ((None, 5),)


def _hides(value):
    def proof(make):
        x = drawn(4, 5)
        x[1, 2] = value
        assert not np.isfinite(make()(x)).all()

    return proof


@mutant("values", F, "forward hides NaN", _hides(np.nan))
class NaNBecomesZero(Swish):
    def forward(self, x):
        return super().forward(np.nan_to_num(x))


@mutant("values", F, "forward hides NaN", _hides(np.nan))
class NaNIsLeftOutOfTheMean(gl.Layer):
    def output_shape(self, input_shape):
        return input_shape[:-1]

    def forward(self, x):
        self.save(x.shape)
        return np.nansum(x, -1) / x.shape[-1]

    def backward(self, dy):
        (shape,) = self.saved
        return np.broadcast_to(dy[..., None] / shape[-1], shape).copy()


@mutant("values", F, "forward hides Inf", _hides(np.inf))
class InfBecomesTheLargestNumber(Scale):
    def forward(self, x):
        most = np.finfo(np.float64 if x.dtype == np.float64 else np.float16).max
        return super().forward(np.where(np.isinf(x), np.copysign(most, x), x))


def _nan_in_dy(make):
    layer, dy = make(), drawn(4, 5)
    layer(drawn(4, 5))
    dy[1, 2] = np.nan
    assert np.isnan(layer.backward(dy)).any()


@mutant("values", F, "backward hides NaN", _nan_in_dy)
class NaNInDyBecomesZero(Swish):
    def backward(self, dy):
        return super().backward(np.where(np.isnan(dy), 0, dy))


def _not_linear(make):
    layer, found = make(), []
    for scale in (1.0, 1e6):
        layer(drawn(4, 5))
        found.append(layer.backward(scale * drawn(4, 5)) / scale)
    assert np.allclose(*found)


@mutant("values", F, "does not scale with dy", _not_linear)
class LargeGradientsAreClipped(Swish):
    def backward(self, dy):
        return super().backward(np.clip(dy, -1e3, 1e3))


def _finite(x, dtype="float32"):
    def proof(make):
        layer = make()
        y = layer(np.asarray(x, dtype))
        dx = layer.backward(np.ones(y.shape, y.dtype))
        assert np.isfinite(y.astype("float64")).all() and np.isfinite(dx.astype("float64")).all()

    return proof


@mutant("values", F, "overflows in float16", _finite([[300.0, 1.0, 2.0]]))
class NaiveSoftmax(Same):
    def forward(self, x):
        e = np.exp(x)
        y = e / e.sum(-1, keepdims=True)
        self.save(y)
        return y

    def backward(self, dy):
        (y,) = self.saved
        return y * (dy - (dy * y).sum(-1, keepdims=True))


@mutant("values", F, "overflows in float16", _finite([[300.0, 1.0, 2.0]]))
class NaiveSoftplus(Same):
    def forward(self, x):
        self.save(x)
        return np.log(1 + np.exp(x))

    def backward(self, dy):
        return dy / (1 + np.exp(-self.saved[0]))


@mutant("values", F, "NaN .*for (exact zeros|zeros alone)", _finite([[0.0, 0.0, 0.0]]))
class LengthOneWithoutEps(Same):
    def forward(self, x):
        r = np.sqrt((x * x).sum(-1, keepdims=True))
        self.save(x / r, r)
        return x / r

    def backward(self, dy):
        y, r = self.saved
        return (dy - y * (dy * y).sum(-1, keepdims=True)) / r


@mutant("values", F, "with exact zeros: dx is wrong.* not finite", _finite([[0.0, 1.0, 2.0]]))
class SignByDivision(Same):
    def forward(self, x):
        self.save(x)
        return np.abs(x)

    def backward(self, dy):
        (x,) = self.saved
        return dy * x / np.abs(x)


def _shared_twice(make):
    layer = make()
    layer(np.array([[2.0, 2.0, 1.0]]))
    assert layer.backward(np.ones(1)).sum() == 1


@mutant("values", F, "does not share dy among equal values", _shared_twice)
class EveryLargestGetsAll(Largest):
    def forward(self, x):
        y = super().forward(x)
        self.save(x == y[..., None])
        return y

    def backward(self, dy):
        return dy[..., None] * self.saved[0]


def _far(make):
    x = (4096 + drawn(4, 64)).astype("float32")
    true = make()(x.astype("float64"))
    assert np.abs(make()(x) - true).max() < 0.1


@mutant("values", ((None, 8),), "loses its digits in float32", _far)
class NaiveVariance(Same):
    def forward(self, x):
        mean = x.mean(-1, keepdims=True)
        var = np.maximum((x * x).mean(-1, keepdims=True) - mean * mean, 0)
        r = 1 / np.sqrt(var + 1e-5)
        y = (x - mean) * r
        self.save(y, r)
        return y

    def backward(self, dy):
        y, r = self.saved
        return r * (dy - dy.mean(-1, keepdims=True) - y * (dy * y).mean(-1, keepdims=True))


@mutant("values", F, "only where the value is large|with large values", slope_differs((4, 5), scale=6.0))
class SlopeOneWhereLarge(Swish):
    def backward(self, dy):
        x, _ = self.saved_by(Swish)
        return np.where(np.abs(x) > 5, dy, super().backward(dy))


@mutant("values", F, "in bfloat16 dx is wrong", lambda make: _bfloat16(make))
class WrongInBfloat16(Swish):
    def backward(self, dy):
        return super().backward(dy) * (0.75 if dy.dtype == gl.arrays.bfloat16 else 1)


def _bfloat16(make):
    layer, x = make(), drawn(4, 5).astype(gl.arrays.bfloat16)
    layer(x)
    mine = layer.backward(np.ones_like(x)).astype("float64")
    layer(x.astype("float64"))
    assert np.allclose(mine, layer.backward(np.ones((4, 5))), atol=0.05)


def _long_sum(make):
    x = np.ones((1, 4096), np.float16)
    assert abs(float(make()(x)[0]) - 1) < 0.01


@mutant("values", ((None, 64),), "in float16 the output|overflows in float16", _long_sum)
class AddsInSixteenBits(gl.Layer):
    def output_shape(self, input_shape):
        return input_shape[:-1]

    def forward(self, x):
        self.save(x.shape)
        total = np.zeros(x.shape[:-1], x.dtype)
        for i in range(x.shape[-1]):
            total = (total + x[..., i]).astype(x.dtype)
        return total / x.dtype.type(x.shape[-1])

    def backward(self, dy):
        (shape,) = self.saved
        return np.broadcast_to(dy[..., None] / shape[-1], shape).copy()
