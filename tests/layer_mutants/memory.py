"""Faults of some memory layouts only, and writes to what is the caller's."""

import numpy as np

from layer_mutants._bases import Scale, Swish
from layer_mutants._kinds import drawn, mutant, wide

F = ((None, 5),)


def _layout_matters(which, change):
    """x or dy, seen through ``change``, gives another result than a plain copy of the same numbers."""

    def proof(make):
        found = []
        for plain in (True, False):
            x, dy = drawn(4, 5), drawn(4, 5, seed=1)
            if which == "x":
                x = np.ascontiguousarray(change(x)) if plain else change(x)
            else:
                dy = np.ascontiguousarray(change(dy)) if plain else change(dy)
            layer = make()
            layer.ensure_built((None, 5))
            layer.to("float64")
            y = layer(x)
            found.append(np.concatenate([y, layer.backward(dy)]))
        assert np.allclose(*found)

    return proof


def _wide(x):
    return np.repeat(x, 2, -1)[..., ::2]


@mutant("memory", F, "strides of dy: with dy in Fortran order", _layout_matters("dy", np.asfortranarray))
class DyInMemoryOrder(Swish):
    def backward(self, dy):
        return super().backward(dy.ravel("K").reshape(dy.shape))


@mutant("memory", F, "strides of x: with x in Fortran order", _layout_matters("x", np.asfortranarray))
class XInMemoryOrder(Swish):
    def forward(self, x):
        return super().forward(x.ravel("K").reshape(x.shape))


@mutant("memory", F, "strides of dy: with dy reversed", _layout_matters("dy", lambda x: x[::-1, ::-1]))
class StridesWithoutSign(Swish):
    def backward(self, dy):
        strides = [abs(s) for s in dy.strides]
        base = (
            dy
            if min(dy.strides) >= 0
            else dy[tuple(slice(None, None, -1) if s < 0 else slice(None) for s in dy.strides)]
        )
        return super().backward(np.lib.stride_tricks.as_strided(base, dy.shape, strides))


@mutant("memory", F, "strides of dy: with dy gapped", _layout_matters("dy", _wide))
class DyTakenForDense(Swish):
    def backward(self, dy):
        gapped = dy.ndim == 2 and 0 < dy.strides[1] != dy.itemsize and dy.strides[0] > dy.strides[1]
        if gapped:
            row = dy.strides[0] // dy.itemsize
            flat = np.lib.stride_tricks.as_strided(dy, (len(dy) * row - 1,), (dy.itemsize,))
            return super().backward(np.resize(flat, dy.shape))
        return super().backward(dy)


@mutant(
    "memory",
    F,
    "strides of dy: with dy expanded|with one row expanded",
    _layout_matters("dy", lambda x: np.broadcast_to(x[:1], x.shape)),
)
class ExpandedDyIsOneRow(Swish):
    def backward(self, dy):
        return super().backward(dy / len(dy) if dy.strides and dy.strides[0] == 0 and len(dy) > 1 else dy)


def _writes(what):
    def proof(make):
        x, dy = drawn(4, 5), drawn(4, 5)
        layer = wide(make, x)
        layer(x)
        if what != "forward":
            layer.backward(dy)
        assert np.array_equal(x, drawn(4, 5)) and np.array_equal(dy, drawn(4, 5))

    return proof


@mutant("memory", F, "forward modified its input", _writes("forward"))
class ForwardWritesToX(Swish):
    def forward(self, x):
        y = super().forward(x.copy())
        x *= 0.5
        return y


@mutant("memory", F, "backward modified dy", _writes("dy"))
class BackwardWritesToDy(Scale):
    def backward(self, dy):
        dx = super().backward(dy.copy())
        if dy.flags.writeable:
            dy *= self.w.data.astype(dy.dtype)
        return dx


def _writes_in_evaluation(make):
    x = drawn(4, 5)
    make().eval()(x)
    assert np.array_equal(x, drawn(4, 5))


@mutant("memory", F, "forward modified its input.*in evaluation", _writes_in_evaluation)
class EvaluationWorksInPlace(Swish):
    def forward(self, x):
        y = super().forward(x.copy())
        if not self.training and x.flags.writeable:
            x[...] = y
        return y
