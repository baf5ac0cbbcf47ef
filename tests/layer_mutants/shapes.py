"""Faults of some shapes only."""

import numpy as np

from layer_mutants._bases import Channels, Dense, Pairs, Scale, Swish
from layer_mutants._kinds import drawn, mutant, slope_differs, wide

F = ((None, 5),)


@mutant("shapes", F, "mean over the batch", slope_differs((4, 5), weight="b"), 3)
class BiasGradientIsTheMean(Dense):
    def backward(self, dy):
        (x,) = self.saved_by(Dense)
        self.w.grad += x.T @ dy
        self.b.grad += dy.mean(0)
        return dy @ self.w.T


@mutant("shapes", ((None, 6),), "for other sizes: dx .* the last along axis 1", slope_differs((4, 7)))
class OddSizesGiveTheLastOneAGradient(Pairs):
    def backward(self, dy):
        dx = super().backward(dy)
        if dx.shape[-1] % 2:
            dx[..., -1:] = dy[..., -1:] / 2
        return dx


def _backward_fails(make):
    layer = wide(make, drawn(4, 7))
    layer.backward(drawn(*layer(drawn(4, 7)).shape))


@mutant("shapes", ((None, 6),), "for other sizes|sizes: .*(shape|flattened)", _backward_fails)
class OddSizesLoseAColumn(Pairs):
    def backward(self, dy):
        return np.repeat(dy / 2, 2, -1)


@mutant("shapes", ((None, 2, 4, 4),), "for other sizes: dx is wrong", slope_differs((2, 2, 4, 6)))
class TakesImagesForSquare(Channels):
    def backward(self, dy):
        n, c, h, w = self.saved_by(Channels)[0]
        return np.broadcast_to(dy[:, :, None, None] / (h * h), (n, c, h, w)).copy()


@mutant("shapes", F, "elements.*: dx is wrong", slope_differs((300, 5)))
class TheLastBlockIsLeftOut(Swish):
    def backward(self, dy):
        dx = super().backward(dy)
        whole = dx.size // 1024 * 1024
        if whole:
            dx.reshape(-1)[whole:] = 0
        return dx


def _rows_differ(make):
    x = drawn(300, 5)
    layer = wide(make, x)
    assert np.allclose(layer(x)[250:], layer(x[250:]))


@mutant("shapes", F, "the output of row", _rows_differ)
class ForwardLeavesOutTheLastBlock(Swish):
    def forward(self, x):
        y = super().forward(x)
        whole = x.size // 1024 * 1024
        if whole:
            y.reshape(-1)[whole:] = 0
        self.save(whole)
        return y

    def backward(self, dy):
        dx, (whole,) = super().backward(dy), self.saved
        if whole:
            dx.reshape(-1)[whole:] = 0
        return dx


@mutant("shapes", F, "a batch of 20", slope_differs((20, 5), weight="w"))
class MoreThanSixteenRows(Scale):
    def over_rows(self, g):
        return g[:16].sum(0)


@mutant("shapes", F, "a batch of 1", slope_differs((1, 5), weight="b"), 3)
class OneRowIsSqueezed(Dense):
    def backward(self, dy):
        (x,) = self.saved_by(Dense)
        self.w.grad += x.T @ dy
        self.b.grad += dy.squeeze().sum(0)
        return dy @ self.w.T


def _unknown(make):
    layer = make()
    layer.ensure_built((None, 5))
    assert layer.output_shape((None, 5))[0] is None


@mutant("shapes", F, "output_shape for an unknown batch", _unknown)
class TheUnknownBatchIsOne(Scale):
    def output_shape(self, input_shape):
        return (input_shape[0] or 1, *input_shape[1:]) if input_shape[0] != 0 else input_shape


def _empty(make):
    make()(np.zeros((0, 5)))


@mutant("shapes", F, "a batch of 0", _empty)
class NothingHasNoMaximum(Swish):
    def forward(self, x):
        return super().forward(x) + 0 * np.abs(x).max()
