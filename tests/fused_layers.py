"""Layers that tests fuse, and the same in array code as functions, for ops by hand."""

import numpy as np

import gpulayers as gl


class Swish(gl.Layer):
    """y = x σ(βx), β learned; any shape."""

    def build(self, input_shape):
        self.beta = self.add_weight("beta", (), init=1.5)

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        s = 1 / (1 + np.exp(-self.beta * x))
        self.save(x, s)
        return x * s

    def backward(self, dy):
        x, s = self.saved
        slope = x * s * (1 - s)
        self.beta.grad += (dy * x * slope).sum()
        return dy * (s + self.beta * slope)


@gl.register
class Centred(gl.Layer):
    """(x − mean(x)) g along the last axis; scaled by what its setting says."""

    def __init__(self, scale=2.0):
        self.scale = scale

    def build(self, input_shape):
        self.gain = self.add_weight("gain", input_shape[-1:], init=0.5)

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        d = x - x.mean(-1, keepdims=True)
        self.save(d)
        return d * self.gain * self.scale

    def backward(self, dy):
        (d,) = self.saved
        self.gain.grad += self.scale * (dy * d).reshape(-1, d.shape[-1]).sum(0)
        g = dy * self.gain * self.scale
        return g - g.mean(-1, keepdims=True)


class Product(gl.Layer):
    """A fully connected layer, written out."""

    def build(self, input_shape):
        self.w = self.add_weight("w", (input_shape[-1], 3), init="ones")

    def output_shape(self, input_shape):
        return (*input_shape[:-1], 3)

    def forward(self, x):
        self.save(x)
        return x @ self.w

    def backward(self, dy):
        (x,) = self.saved
        self.w.grad += x.T @ dy
        return dy @ self.w.T


class Gated(gl.Layer):
    """A gated unit with its products, and a mean over the batch: silu(x V) (x W) less what it is on average."""

    def build(self, input_shape):
        features = input_shape[-1]
        self.v, self.w = (self.add_weight(n, (features, 6), init="fan_in_uniform") for n in "vw")

    def output_shape(self, input_shape):
        return (*input_shape[:-1], 6)

    def forward(self, x):
        a, b = x @ self.v, x @ self.w
        s = 1 / (1 + np.exp(-a))
        y = a * s * b
        self.save(x, a, b, s)
        return y - y.mean(0)

    def backward(self, dy):
        x, a, b, s = self.saved
        g = dy - dy.mean(0)
        da, db = g * b * (s + a * s * (1 - s)), g * a * s
        self.v.grad += x.T @ da
        self.w.grad += x.T @ db
        return da @ self.v.T + db @ self.w.T


class Placed(gl.Layer):
    """Tokens with a table of positions, at rest: (N, T, C) → z − mean(z), z = x + table."""

    def build(self, input_shape):
        self.table = self.add_weight("table", input_shape[1:], init="fan_in_uniform")

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        z = x + self.table
        return z - z.mean(-1, keepdims=True)

    def backward(self, dy):
        dx = dy - dy.mean(-1, keepdims=True)
        self.table.grad += dx.sum(0)
        return dx


class Moments(gl.Layer):
    """Two outputs of two inputs: (a − mean(b), the largest of each row), through masks and cumulative sums."""

    def output_shape(self, a, b):
        return a, (*a[:-1], 1)

    def forward(self, a, b):
        mean = np.where(b > 0, b, 0.5 * a).mean(-1, keepdims=True)
        self.save(a, b)
        return np.cumsum(a - mean, -1), np.maximum(a, b).max(-1, keepdims=True)

    def backward(self, dy, dlargest):
        a, b = self.saved
        won = a == a.max(-1, keepdims=True)
        da = np.cumsum(dy * (b > 0), -1) + won * dlargest
        return da, (dy * a).sum(-1, keepdims=True) * np.ones_like(b) - dlargest * (a < b)


class SwiGLU(gl.Layer):
    """The half a of x, gated: a σ(a) b."""

    def output_shape(self, input_shape):
        return (*input_shape[:-1], input_shape[-1] // 2)

    def forward(self, x):
        a, b = np.split(x, 2, -1)
        s = 1 / (1 + np.exp(-a))
        self.save(a, b, s)
        return a * s * b

    def backward(self, dy):
        a, b, s = self.saved
        return np.concatenate([dy * b * (s + a * s * (1 - s)), dy * a * s], -1)


class ChannelNorm(gl.Layer):
    """(N, C, *sizes): each pixel's channels with mean 0 and variance 1, times g, plus what its place adds."""

    def build(self, input_shape):
        self.g = self.add_weight("g", (input_shape[1], *[1] * (len(input_shape) - 2)), init=0.75)
        self.place = self.add_weight("place", (1, *input_shape[2:]), init=0.25)

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        d = x - x.mean(1, keepdims=True)
        r = 1 / np.sqrt((d * d).mean(1, keepdims=True) + 1e-5)
        self.save(d, r)
        return d * r * self.g + self.place

    def backward(self, dy):
        d, r = self.saved
        y, g = d * r, dy * self.g
        pixels = tuple(range(2, dy.ndim))
        self.g.grad += (dy * y).sum((0, *pixels)).reshape(self.g.shape)
        self.place.grad += dy.sum((0, 1))[None]
        return r * (g - g.mean(1, keepdims=True) - y * (g * y).mean(1, keepdims=True))


class OfChannels(gl.Layer):
    """(N, C, H, W): x g + tanh(b x), with a number for each channel."""

    def build(self, input_shape):
        self.g = self.add_weight("g", (input_shape[1],), init=0.5)
        self.b = self.add_weight("b", (input_shape[1], 1, 1), init=0.25)

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        self.save(x)
        return x * self.g[:, None, None] + np.tanh(self.b * x)

    def backward(self, dy):
        (x,) = self.saved
        slope = 1 - np.tanh(self.b * x) ** 2
        self.g.grad += (dy * x).sum((0, 2, 3))
        self.b.grad += (dy * x * slope).sum((0, 2, 3))[:, None, None] * 0.5
        return dy * self.g[:, None, None] + dy * slope * self.b


class Masked(gl.Layer):
    """Dropout in array code, its mask kept."""

    def __init__(self, p=0.4):
        self.p = p

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        if not self.training:
            return x * 1.0
        keep = gl.random.uniform(x.shape, like=x) >= self.p
        self.save(keep)
        return np.where(keep, x, 0) * (1 / (1 - self.p))

    def backward(self, dy):
        if not self.training:
            return dy * 1.0
        (keep,) = self.saved
        return np.where(keep, dy, 0) * (1 / (1 - self.p))


class Backwards(Swish):
    """A cumulative sum, whose gradient is one from the end; rows that are too wide for it are refused."""

    def forward(self, x):
        return np.cumsum(x, -1) * self.beta

    def backward(self, dy):
        return np.flip(np.cumsum(np.flip(dy, -1), -1), -1) * self.beta


def swish(x, beta):
    return x / (1 + np.exp(-beta * x))


def swish_gradient(dy, x, beta):
    s = 1 / (1 + np.exp(-beta * x))
    slope = x * s * (1 - s)
    return dy * (s + beta * slope), (dy * x * slope).sum()


def centred(x, gain):
    return 2 * (x - x.mean(-1, keepdims=True)) * gain


def centred_gradient(dy, x, gain):
    d, g = x - x.mean(-1, keepdims=True), dy * gain * 2
    return g - g.mean(-1, keepdims=True), 2 * (dy * d).reshape(-1, d.shape[-1]).sum(0)


def gated(x):
    a, b = np.split(x, 2, -1)
    return a / (1 + np.exp(-a)) * b


def gated_gradient(dy, x):
    a, b = np.split(x, 2, -1)
    s = 1 / (1 + np.exp(-a))
    return np.concatenate([dy * b * (s + a * s * (1 - s)), dy * a * s], -1)


def of_channels(x, g, b):
    return x * g[:, None, None] + np.tanh(b * x)


def of_channels_gradient(dy, x, g, b):
    slope = 1 - np.tanh(b * x) ** 2
    dg, db = (dy * x).sum((0, 2, 3)), (dy * x * slope).sum((0, 2, 3))[:, None, None] * 0.5
    return dy * g[:, None, None] + dy * slope * b, dg, db
