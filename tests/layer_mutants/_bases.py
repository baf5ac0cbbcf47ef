"""Right layers that mutants are variants of."""

import numpy as np

import gpulayers as gl


class Same(gl.Layer):
    """The output has the input's shape."""

    def output_shape(self, *input_shapes):
        return input_shapes[0]


class Swish(Same):
    """x σ(x)."""

    def forward(self, x):
        s = 1 / (1 + np.exp(-x))
        self.save(x, s)
        return x * s

    def backward(self, dy):
        x, s = self.saved_by(Swish)
        return dy * (s + x * s * (1 - s))


class Scale(Same):
    """w x, a weight for each feature."""

    def build(self, input_shape):
        self.w = self.add_weight("w", (input_shape[-1],), init="ones")

    def forward(self, x):
        self.save(x)
        return x * self.w

    def over_rows(self, g):
        return g.reshape(-1, g.shape[-1]).sum(0)

    def backward(self, dy):
        (x,) = self.saved_by(Scale)
        self.w.grad += self.over_rows(dy * x)
        return dy * self.w


class Shift(Same):
    """(x + b)², b zero at first."""

    def build(self, input_shape):
        self.b = self.add_weight("b", (input_shape[-1],))

    def forward(self, x):
        self.save(x)
        return (x + self.b) ** 2

    def backward(self, dy):
        (x,) = self.saved_by(Shift)
        g = 2 * dy * (x + self.b)
        self.b.grad += g.sum(0)
        return g


class Dense(gl.Layer):
    """x W + b, (N, F) → (N, size)."""

    def __init__(self, size):
        self.size = size

    def build(self, input_shape):
        self.w = self.add_weight("w", (input_shape[-1], self.size), init="xavier_uniform")
        self.b = self.add_weight("b", (self.size,))

    def output_shape(self, input_shape):
        return (*input_shape[:-1], self.size)

    def forward(self, x):
        self.save(x)
        return x @ self.w + self.b

    def backward(self, dy):
        (x,) = self.saved_by(Dense)
        self.w.grad += x.T @ dy
        self.b.grad += dy.sum(0)
        return dy @ self.w.T


class Add(Same):
    """a + 2 b."""

    def forward(self, a, b):
        return a + 2 * b

    def backward(self, dy):
        return dy, 2 * dy


class Standard(Same):
    """(x − mean) / √(var + 1e-5) over the batch, with running statistics for evaluation."""

    def build(self, input_shape):
        self.mean = self.add_weight("mean", input_shape[-1:], trainable=False)
        self.var = self.add_weight("var", input_shape[-1:], "ones", trainable=False)

    def statistics(self, x):
        if not self.training:
            return self.mean.data, self.var.data
        mean, var = x.mean(0), x.var(0)
        if len(x):
            self.mean.data = (0.9 * self.mean + 0.1 * mean).astype(self.mean.dtype)
            self.var.data = (0.9 * self.var + 0.1 * var).astype(self.var.dtype)
        return mean, var

    def forward(self, x):
        wide = x.astype(np.float64 if x.dtype == np.float64 else np.float32)
        mean, var = self.statistics(wide)
        r = 1 / np.sqrt(var + 1e-5)
        y = (wide - mean) * r
        self.save(y, r, self.training)
        return y

    def backward(self, dy):
        y, r, training = self.saved_by(Standard)
        if not training:
            return dy * r
        return r * (dy - dy.mean(0) - y * (dy * y).mean(0))


class Drop(Same):
    """Zero with probability p in training, else divided by 1 − p."""

    def __init__(self, p=0.3):
        self.p = p

    def mask(self, x):
        return (gl.random.generator().random(x.shape) >= self.p) / (1 - self.p)

    def forward(self, x):
        mask = self.mask(x) if self.training else np.ones(x.shape)
        self.save(mask)
        return x * mask

    def backward(self, dy):
        return dy * self.saved_by(Drop)[0]


class Largest(gl.Layer):
    """The largest of each row, the first of equal ones: (N, F) → (N,)."""

    def output_shape(self, input_shape):
        return input_shape[:-1]

    def forward(self, x):
        at = x.argmax(-1)[..., None]
        self.save(at, x.shape)
        return np.take_along_axis(x, at, -1)[..., 0]

    def backward(self, dy):
        at, shape = self.saved_by(Largest)
        dx = np.zeros(shape, dy.dtype)
        np.put_along_axis(dx, at, dy[..., None], -1)
        return dx


class Pairs(gl.Layer):
    """The mean of each two neighbours, an odd last one left out: (N, L) → (N, L // 2)."""

    def output_shape(self, input_shape):
        return (*input_shape[:-1], input_shape[-1] // 2)

    def forward(self, x):
        half = x.shape[-1] // 2
        self.save(x.shape)
        return (x[..., : 2 * half : 2] + x[..., 1 : 2 * half : 2]) / 2

    def backward(self, dy):
        (shape,) = self.saved_by(Pairs)
        dx = np.zeros(shape, dy.dtype)
        dx[..., : 2 * dy.shape[-1]] = np.repeat(dy / 2, 2, -1)
        return dx


class Channels(gl.Layer):
    """The mean of each channel: (N, C, H, W) → (N, C)."""

    def output_shape(self, input_shape):
        return input_shape[:2]

    def forward(self, x):
        self.save(x.shape)
        return x.mean((2, 3))

    def backward(self, dy):
        n, c, h, w = self.saved_by(Channels)[0]
        return np.broadcast_to(dy[:, :, None, None] / (h * w), (n, c, h, w)).copy()


class Table(gl.Layer):
    """Rows of a table by their numbers: integers of any shape → (…, size)."""

    def __init__(self, count, size):
        self.count, self.size = count, size
        self.w = self.add_weight("w", (count, size), "normal")

    def output_shape(self, input_shape):
        return (*input_shape, self.size)

    def forward(self, at):
        self.save(at)
        return self.w[at]

    def backward(self, dy):
        (at,) = self.saved_by(Table)
        np.add.at(self.w.grad, at, dy)
