"""Right layers, with what makes a check accuse one that is: kinks, ties, lookups, roundings, modes."""

import numpy as np

import gpulayers as gl
from layer_mutants import _bases as bases
from layer_mutants._kinds import right

F = (None, 5)
NUMBERS = np.array([[1, 0, 3], [3, 3, 2]])

for base, inputs, args in (
    (bases.Swish, F, ()),
    (bases.Scale, F, ()),
    (bases.Shift, F, ()),
    (bases.Dense, F, (3,)),
    (bases.Standard, (8, 5), ()),
    (bases.Drop, F, ()),
    (bases.Pairs, (None, 6), ()),
    (bases.Channels, (None, 2, 4, 4), ()),
    (bases.Largest, F, ()),
    (bases.Table, NUMBERS, (4, 3)),
):
    right((inputs,), *args)(base)


@right((np.array([[0.0, 1.5, -2.0], [0.0, 0.0, np.nan], [3.0, -1.0, 0.0]]),))
class Rectified(bases.Same):
    """max(x, 0), given exact zeros and NaN."""

    def forward(self, x):
        self.save(x > 0)
        return np.maximum(x, 0)

    def backward(self, dy):
        return dy * self.saved[0]


@right((np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]),))
class LargestOfTies(bases.Largest):
    """Given ties alone."""


@right((F, F))
class Distance(bases.Same):
    """|a − b|: a kink where they are equal."""

    def forward(self, a, b):
        self.save(np.sign(a - b))
        return np.abs(a - b)

    def backward(self, dy):
        (sign,) = self.saved
        return dy * sign, -dy * sign


@right((F,))
class Clipped(bases.Same):
    """Between −1 and 1, with the slope of the inside at the ends; a staircase is added, whose slope is zero."""

    def forward(self, x):
        self.save((x >= -1) & (x <= 1))
        return np.clip(x, -1, 1) + np.floor(x)

    def backward(self, dy):
        return dy * self.saved[0]


@right(((None, 64),))
class Halving(gl.Layer):
    """A long mean, each step of which is rounded to the input's own 16 bits."""

    def output_shape(self, input_shape):
        return input_shape[:-1]

    def forward(self, x):
        self.save(x.shape)
        while x.shape[-1] > 1:
            half = x.shape[-1] // 2
            rest = x[..., 2 * half :]
            pairs = x[..., :half] / 2 + x[..., half : 2 * half] / 2
            x = np.concatenate([pairs, rest], -1) if rest.size else pairs
        return x[..., 0]

    def backward(self, dy):
        (shape,) = self.saved
        weights = np.ones((shape[-1], 1)) if shape[-1] == 1 else self.shares(shape[-1])
        return dy[..., None] * weights.reshape(-1)

    def shares(self, size):
        """What each element counts."""
        w = np.eye(size)
        while len(w) > 1:
            half = len(w) // 2
            pairs = w[:half] / 2 + w[half : 2 * half] / 2
            w = np.concatenate([pairs, w[2 * half :]])
        return w


@right(((None, 6),))
class Ordered(bases.Same):
    """Each row sorted."""

    def forward(self, x):
        at = np.argsort(x, -1, kind="stable")
        self.save(at)
        return np.take_along_axis(x, at, -1)

    def backward(self, dy):
        dx = np.empty(dy.shape, dy.dtype)
        np.put_along_axis(dx, self.saved[0], dy, -1)
        return dx


@right(((None, 7),))
class Middle(gl.Layer):
    """The median, which of three equal values is one that does not change it."""

    def output_shape(self, input_shape):
        return input_shape[:-1]

    def forward(self, x):
        at = np.argsort(x, -1, kind="stable")[..., x.shape[-1] // 2, None]
        self.save(at, x.shape)
        return np.take_along_axis(x, at, -1)[..., 0] + 0 * x.sum(-1)

    def backward(self, dy):
        at, shape = self.saved
        dx = np.zeros(shape, dy.dtype)
        np.put_along_axis(dx, at, dy[..., None], -1)
        return dx
