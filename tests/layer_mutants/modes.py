"""Faults of one mode only."""

import numpy as np

import gpulayers as gl
from layer_mutants._bases import Drop, Scale, Standard, Swish
from layer_mutants._kinds import drawn, mutant, slope_differs, wide

F = ((None, 5),)


def _row_alone(make):
    x = drawn(4, 5)
    layer = wide(make, x, training=False)
    assert np.allclose(layer(x)[:1], layer(x[:1]))


@mutant("modes", ((8, 5),), "evaluation uses the batch's statistics", _row_alone)
class EvaluationUsesTheBatch(Standard):
    def forward(self, x):
        wide = x.astype(np.float64 if x.dtype == np.float64 else np.float32)
        if self.training:
            self.statistics(wide)
        r = 1 / np.sqrt(wide.var(0) + 1e-5)
        y = (wide - wide.mean(0)) * r
        self.save(y, r)
        return y

    def backward(self, dy):
        y, r = self.saved
        return r * (dy - dy.mean(0) - y * (dy * y).mean(0))


def _moves_in_evaluation(make):
    layer = wide(make, drawn(4, 5), training=False)
    before = np.array(layer.mean.data)
    layer(drawn(4, 5))
    assert np.array_equal(before, layer.mean.data)


@mutant("modes", ((8, 5),), "forward in evaluation changes mean", _moves_in_evaluation)
class EvaluationMovesTheStatistics(Standard):
    def statistics(self, x):
        found = super().statistics(x)
        if not self.training and len(x):
            self.mean.data = (0.9 * self.mean + 0.1 * x.mean(0)).astype(self.mean.dtype)
        return found


def _random(training):
    def proof(make):
        layer, found = make().train(training), []
        for seed in (1, 2):
            gl.random.seed(seed if not training else 1)
            found.append(layer(drawn(4, 5)))
        assert np.array_equal(*found)

    return proof


@mutant("modes", F, "evaluation must have no randomness", _random(False))
class EvaluationDropsToo(Drop):
    def forward(self, x):
        mask = self.mask(x)
        super().forward(x)
        self.save(mask)
        return x * mask

    def backward(self, dy):
        return dy * self.saved[0]


def _draws(make):
    before = gl.random.get_state()
    make().eval()(drawn(4, 5))
    assert gl.random.get_state() == before


@mutant("modes", F, "evaluation draws random numbers", _draws)
class EvaluationDrawsForNothing(Drop):
    def forward(self, x):
        mask = self.mask(x)
        keep = mask if self.training else np.ones(x.shape)
        super().forward(x)
        self.save(keep)
        return x * keep

    def backward(self, dy):
        return dy * self.saved[0]


@mutant("modes", F, "draw random numbers from gl.random", _random(True))
class DrawsFromNumPy(Drop):
    def mask(self, x):
        return (np.random.default_rng().random(x.shape) >= self.p) / (1 - self.p)


def _mode_changed(make):
    found = []
    for change in (False, True):
        layer = wide(make, drawn(4, 5))
        layer(drawn(4, 5))
        if change:
            layer.eval()
        found.append(layer.backward(drawn(4, 5)))
    assert np.allclose(*found)


@mutant("modes", ((8, 5),), "save the mode in forward", _mode_changed)
class BackwardAsksForTheMode(Standard):
    def backward(self, dy):
        y, r, _ = self.saved_by(Standard)
        if not self.training:
            return dy * r
        return r * (dy - dy.mean(0) - y * (dy * y).mean(0))


@mutant("modes", F, "dx is wrong.* in evaluation", slope_differs((4, 5), training=False))
class NoGradientInEvaluation(Swish):
    def backward(self, dy):
        return super().backward(dy) * (1 if self.training else 0)


@mutant("modes", F, "the gradient of w is .*missing.* in evaluation", slope_differs((4, 5), training=False, weight="w"))
class NoWeightGradientInEvaluation(Scale):
    def backward(self, dy):
        return super().backward(dy) if self.training else dy * self.w
