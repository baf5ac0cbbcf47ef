"""Faults of more calls than one."""

import threading

import numpy as np

from layer_mutants._bases import Scale, Swish
from layer_mutants._kinds import drawn, mutant, wide

F = ((None, 5),)


def _adds_up(make):
    layer, x, dy = wide(make, drawn(4, 5)), drawn(4, 5), drawn(4, 5)
    sums = []
    for _ in range(2):
        layer(x)
        layer.backward(dy)
        sums.append(np.array(layer.w.grad))
    assert np.allclose(2 * sums[0], sums[1])


@mutant("calls", F, "gradient of w was overwritten", _adds_up)
class GradientIsOverwritten(Scale):
    def backward(self, dy):
        (x,) = self.saved_by(Scale)
        self.w.grad = (dy * x).reshape(-1, dy.shape[-1]).sum(0).astype(self.w.dtype)
        return dy * self.w


def _two_forwards(make):
    layer, a, b, dy = wide(make, drawn(4, 5)), drawn(4, 5), drawn(4, 5, seed=1), drawn(4, 5, seed=2)
    layer(a)
    alone = layer.backward(dy)
    layer(a)
    layer(b)
    layer.backward(dy)
    assert np.allclose(alone, layer.backward(dy))


@mutant("calls", F, "state leaks between calls", _two_forwards)
class KeepsXOnSelf(Swish):
    def forward(self, x):
        self._x = x
        return super().forward(x)

    def backward(self, dy):
        s = 1 / (1 + np.exp(-self._x))
        return dy * (s + self._x * s * (1 - s))


def _stays(of):
    def proof(make):
        layer, x, dy = wide(make, drawn(4, 5)), drawn(4, 5), drawn(4, 5)
        y = layer(x)
        dx = layer.backward(dy)
        kept = [y.copy(), dx.copy()]
        layer(drawn(4, 5, seed=1))
        layer.backward(drawn(4, 5, seed=2))
        assert np.array_equal(*[(y, kept[0]), (dx, kept[1])][of])

    return proof


class _Buffered(Swish):
    def buffer(self, name, like):
        found = self.__dict__.get(name)
        if found is None or found.shape != like.shape or found.dtype != like.dtype:
            found = self.__dict__[name] = np.empty(like.shape, like.dtype)
        found[...] = like
        return found


@mutant("calls", F, "next forward overwrites the last one's output", _stays(0))
class TheOutputIsABuffer(_Buffered):
    def forward(self, x):
        return self.buffer("_y", super().forward(x))


@mutant("calls", F, "next backward overwrites the last one's dx", _stays(1))
class DxIsABuffer(_Buffered):
    def backward(self, dy):
        return self.buffer("_dx", super().backward(dy))


def _apart(make):
    layer = wide(make, drawn(4, 5))
    assert not np.shares_memory(layer(drawn(4, 5)), layer.w.data)


@mutant("calls", F, "shares memory with the weight w", _apart)
class TheOutputIsTheWeight(Scale):
    """Rows of the weight, without a copy."""

    def forward(self, x):
        super().forward(x)
        return np.broadcast_to(self.w.data.astype(x.dtype, copy=False), x.shape)

    def backward(self, dy):
        self.w.grad += self.over_rows(dy)
        return np.zeros(dy.shape, dy.dtype)


def _grad_apart(make):
    layer, dy = wide(make, drawn(4, 5)), np.ones((1, 5))
    layer(drawn(1, 5))
    dx = layer.backward(dy)
    layer(drawn(1, 5))
    before = dx.copy()
    layer.backward(dy)
    assert np.array_equal(dx, before)


@mutant("calls", ((1, 1),), "shares memory with the gradient of w", lambda make: _one_apart(make))
class DxIsTheGradientOfTheWeight(Scale):
    """(x w with one element, and x in place of w in both.)"""

    def forward(self, x):
        super().forward(x)
        return x + self.w

    def backward(self, dy):
        if dy.size == self.w.size and not self.w.has_grad:
            self.w.grad = dy.reshape(-1).astype(self.w.dtype)
            return self.w.grad.reshape(dy.shape).astype(dy.dtype, copy=False)
        self.w.grad += self.over_rows(dy)
        return dy


def _one_apart(make):
    layer = wide(make, drawn(1, 1))
    layer(drawn(1, 1))
    assert not np.shares_memory(layer.backward(np.ones((1, 1))), layer.w.grad)


def _same_again(make):
    layer = make()
    assert np.array_equal(layer(drawn(4, 5)), layer(drawn(4, 5)))


@mutant("calls", F, "call 2 gives another output", _same_again)
class EverySecondCall(Swish):
    _count = 0

    def forward(self, x):
        self._count += 1
        y = super().forward(x)
        self.save(self._count % 2)
        return y * (1 if self._count % 2 else 2)

    def backward(self, dy):
        return super().backward(dy) * (1 if self.saved[0] else 2)


def _threads(make):
    """Another thread's call in the middle of this one's."""
    layer, x = make(), drawn(4, 5)
    alone = layer(x)
    done = []

    class Slow(np.ndarray):
        def __array_ufunc__(self, ufunc, method, *xs, **kwargs):
            if not done:
                done.append(1)
                thread = threading.Thread(target=layer, args=(drawn(4, 5, seed=3),))
                thread.start()
                thread.join()
            return getattr(ufunc, method)(*(np.asarray(v) for v in xs), **kwargs)

    assert np.allclose(layer(x.view(Slow)), alone)


@mutant("calls", F, "two threads in one layer", _threads)
class WorksInAScratchOfItsOwn(Swish):
    def forward(self, x):
        self._scratch = x
        s = 1 / (1 + np.exp(-x))
        super().forward(x)
        return np.asarray(self._scratch) * s


def _two_layers(make):
    one, other, dy = make(), make(), drawn(4, 5)
    one(drawn(4, 5))
    alone = one.backward(dy)
    one(drawn(4, 5))
    other(drawn(4, 5, seed=1))
    assert np.allclose(one.backward(dy), alone)


@mutant("calls", F, "state leaks between calls|layers share state", _two_layers)
class KeepsXOnTheClass(Swish):
    def forward(self, x):
        KeepsXOnTheClass._x = x
        return super().forward(x)

    def backward(self, dy):
        s = 1 / (1 + np.exp(-self._x))
        return dy * (s + self._x * s * (1 - s))
