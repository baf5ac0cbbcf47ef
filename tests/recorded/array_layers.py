"""Layers in the array code that people write: what the exports are held against."""

import math

import numpy as np

import gpulayers as gl
from gpulayers.ops._special import erf


class Same(gl.Layer):
    def output_shape(self, *shapes):
        return shapes[0]


class Swish(Same):
    def build(self, input_shape):
        self.beta = self.add_weight("beta", (), init=1.5)

    def forward(self, x):
        s = 1 / (1 + np.exp(-self.beta * x))
        self.save(x, s)
        return x * s

    def backward(self, dy):
        x, s = self.saved
        slope = x * s * (1 - s)
        self.beta.grad += (dy * x * slope).sum()
        return dy * (s + self.beta * slope)


class Antirectifier(gl.Layer):
    """Keras' example: centre, scale to length one, then both halves of the rectifier."""

    def output_shape(self, input_shape):
        return (*input_shape[:-1], 2 * input_shape[-1])

    def forward(self, x):
        c = x - x.mean(axis=-1, keepdims=True)
        n = np.sqrt((c * c).sum(-1, keepdims=True) + 1e-12)
        u = c / n
        self.save(u, n)
        return np.concatenate([np.maximum(u, 0), np.maximum(-u, 0)], axis=-1)

    def backward(self, dy):
        u, n = self.saved
        k = u.shape[-1]
        du = dy[..., :k] * (u > 0) - dy[..., k:] * (u < 0)
        dc = (du - u * (du * u).sum(-1, keepdims=True)) / n
        return dc - dc.mean(-1, keepdims=True)


class Maxout(gl.Layer):
    def __init__(self, units=3, pieces=2):
        self.units, self.pieces = units, pieces

    def build(self, input_shape):
        self.weight = self.add_weight("weight", (input_shape[-1], self.units * self.pieces), init="normal")
        self.bias = self.add_weight("bias", (self.units * self.pieces,), init="normal")

    def output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def forward(self, x):
        z = (x @ self.weight + self.bias).reshape(len(x), self.units, self.pieces)
        y = z.max(axis=2)
        self.save(x, z == y[:, :, None])
        return y

    def backward(self, dy):
        x, won = self.saved
        dz = (won * dy[:, :, None]).reshape(len(x), self.units * self.pieces)
        self.weight.grad += x.T @ dz
        self.bias.grad += dz.sum(0)
        return dz @ self.weight.data.T


class SqueezeExcite(Same):
    def build(self, input_shape):
        c = input_shape[1]
        self.down = self.add_weight("down", (c, c // 2), init="normal")
        self.up = self.add_weight("up", (c // 2, c), init="normal")

    def forward(self, x):
        s = x.mean(axis=(2, 3))
        h = np.dot(s, self.down)
        a = np.where(h > 0, h, 0)
        g = 1 / (1 + np.exp(-np.matmul(a, self.up)))
        self.save(x, s, h, a, g)
        return x * g[:, :, np.newaxis, np.newaxis]

    def backward(self, dy):
        x, s, h, a, g = self.saved
        dg = (dy * x).sum(axis=(2, 3)) * g * (1 - g)
        self.up.grad += a.T @ dg
        dh = dg @ self.up.data.T * (h > 0)
        self.down.grad += s.T @ dh
        ds = dh @ self.down.data.T / (x.shape[2] * x.shape[3])
        return dy * g[:, :, None, None] + ds[:, :, None, None]


class RBF(gl.Layer):
    def __init__(self, units=3):
        self.units = units

    def build(self, input_shape):
        self.centers = self.add_weight("centers", (self.units, input_shape[-1]), init="normal")
        self.log_gamma = self.add_weight("log_gamma", (self.units,), init=-1.0)

    def output_shape(self, input_shape):
        return (input_shape[0], self.units)

    def forward(self, x):
        d = x[:, None, :] - self.centers[None, :, :]
        r = np.sum(d**2, axis=2)
        gamma = np.exp(self.log_gamma)
        y = np.exp(-gamma * r)
        self.save(d, r, gamma, y)
        return y

    def backward(self, dy):
        d, r, gamma, y = self.saved
        t = dy * y
        self.log_gamma.grad -= (t * r * gamma).sum(axis=0)
        dd = -2 * (t * gamma)[:, :, None] * d
        self.centers.grad -= dd.sum(axis=0)
        return dd.sum(axis=1)


class BlurPool(gl.Layer):
    """Zhang 2019, by strided slices; the backward adds into slices of fresh zeros."""

    taps = (0.25, 0.5, 0.25)

    def output_shape(self, s):
        return (s[0], s[1], (s[2] - 1) // 2 + 1, (s[3] - 1) // 2 + 1)

    def forward(self, x):
        p = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        h, w = (x.shape[2] - 1) // 2 + 1, (x.shape[3] - 1) // 2 + 1
        y = np.zeros_like(x, shape=(*x.shape[:2], h, w))
        for i, a in enumerate(self.taps):
            for j, b in enumerate(self.taps):
                y += a * b * p[:, :, i : i + 2 * h - 1 : 2, j : j + 2 * w - 1 : 2]
        self.save(p.shape, h, w, y)
        return y

    def backward(self, dy):
        shape, h, w, y = self.saved
        dp = np.zeros_like(y, shape=shape)
        for i, a in enumerate(self.taps):
            for j, b in enumerate(self.taps):
                dp[:, :, i : i + 2 * h - 1 : 2, j : j + 2 * w - 1 : 2] += a * b * dy
        return dp[:, :, 1:-1, 1:-1]


class WindowPool(gl.Layer):
    """The mean of sliding windows with a learned profile."""

    def build(self, input_shape):
        self.profile = self.add_weight("profile", (3, 3), init="normal")

    def output_shape(self, s):
        return (s[0], s[1], s[2] - 2, s[3] - 2)

    def forward(self, x):
        v = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
        self.save(v)
        return np.einsum("nchwij,ij->nchw", v, self.profile)

    def backward(self, dy):
        (v,) = self.saved
        self.profile.grad += np.einsum("nchw,nchwij->ij", dy, v)
        p = np.pad(dy, [(0, 0), (0, 0), (2, 2), (2, 2)])
        back = np.lib.stride_tricks.sliding_window_view(p, (3, 3), axis=(2, 3))
        return np.einsum("nchwij,ij->nchw", back, self.profile[::-1, ::-1])


class LayerScale(Same):
    def build(self, input_shape):
        self.scale = self.add_weight("scale", (input_shape[-1],), init=1e-1)

    def forward(self, x):
        self.save(x)
        return x * self.scale

    def backward(self, dy):
        (x,) = self.saved
        self.scale.grad += (dy * x).reshape(-1, x.shape[-1]).sum(0)
        return dy * self.scale


class GatedMerge(Same):
    """Two inputs: a σ(w·b) + b."""

    def build(self, a, b):
        self.w = self.add_weight("w", b[1:], init="normal")

    def forward(self, a, b):
        g = 1 / (1 + np.exp(-(self.w * b)))
        self.save(a, b, g)
        return a * g + b

    def backward(self, dy):
        a, b, g = self.saved
        dz = dy * a * g * (1 - g)
        self.w.grad += (dz * b).sum(axis=0)
        return dy * g, dz * self.w + dy


class Plus(Same):
    """Two inputs, one gradient for both."""

    def forward(self, a, b):
        return a + b

    def backward(self, dy):
        return dy, dy


class Norm(Same):
    """Layer normalisation by mean and var."""

    def build(self, input_shape):
        self.gain = self.add_weight("gain", input_shape[-1:], init="ones")
        self.shift = self.add_weight("shift", input_shape[-1:])

    def forward(self, x):
        mean, var = np.mean(x, -1, keepdims=True), np.var(x, axis=-1, keepdims=True)
        r = (var + np.finfo(x.dtype).eps) ** -0.5
        z = (x - mean) * r
        self.save(z, r)
        return z * self.gain + self.shift

    def backward(self, dy):
        z, r = self.saved
        axes = tuple(range(dy.ndim - 1))
        self.gain.grad += (dy * z).sum(axes)
        self.shift.grad += dy.sum(axes)
        dz = dy * self.gain
        return r * (dz - dz.mean(-1, keepdims=True) - z * (dz * z).mean(-1, keepdims=True))


class BatchCenter(Same):
    """Statistics of the batch, by sums and the batch size; running ones in evaluation."""

    def build(self, input_shape):
        self.running = self.add_weight("running", input_shape[1:], trainable=False)

    def forward(self, x):
        if not self.training:
            return x - self.running
        mean = x.sum(axis=0) / max(x.shape[0], 1)
        self.running.data = 0.9 * self.running.data + 0.1 * mean
        return x - mean

    def backward(self, dy):
        return dy - (1 / max(len(dy), 1)) * dy.sum(0) if self.training else dy


class SoftMax(Same):
    def forward(self, x):
        e = np.exp(x - np.max(x, axis=-1, keepdims=True))
        y = e / np.sum(e, axis=-1, keepdims=True)
        self.save(y)
        return y

    def backward(self, dy):
        (y,) = self.saved
        return y * (dy - np.sum(dy * y, axis=-1, keepdims=True))


class CumulativeMean(Same):
    """The mean of all steps so far."""

    def forward(self, x):
        n = np.arange(1, x.shape[1] + 1)[:, None]
        self.save(n)
        return (np.cumsum(x, axis=1) / n).astype(x.dtype)

    def backward(self, dy):
        (n,) = self.saved
        return np.flip(np.cumsum(np.flip(dy / n, 1), axis=1), 1).astype(dy.dtype)


_erf = np.frompyfunc(math.erf, 1, 1)


class ErfGELU(Same):
    def forward(self, x):
        p = 0.5 * (1 + _erf(x / math.sqrt(2)).astype(x.dtype))
        self.save(x, p)
        return x * p

    def backward(self, dy):
        x, p = self.saved
        return dy * (p + x * np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi))


class CodyGELU(Same):
    """erf in array code (gpulayers' own)."""

    def forward(self, x):
        p = 0.5 * (1 + erf(x / math.sqrt(2)))
        self.save(x, p)
        return x * p

    def backward(self, dy):
        x, p = self.saved
        return dy * (p + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))


class Lookup(gl.Layer):
    def __init__(self, n=5, d=3):
        self.n, self.d = n, d

    def build(self, input_shape):
        self.table = self.add_weight("table", (self.n, self.d), init="normal")

    def output_shape(self, input_shape):
        return (*input_shape, self.d)

    def forward(self, ids):
        self.save(ids)
        return self.table.data[ids]

    def backward(self, dy):
        (ids,) = self.saved
        np.add.at(self.table.grad, ids, dy)


class Attention(Same):
    """Two heads, causal."""

    def build(self, input_shape):
        d = input_shape[-1]
        self.qkv = self.add_weight("qkv", (3, 2, d, d // 2), init="kaiming_uniform")
        self.out = self.add_weight("out", (2, d // 2, d), init="kaiming_uniform")

    def forward(self, x):
        q, k, v = (np.einsum("btd,hde->bhte", x, w) for w in self.qkv.data)
        s = np.einsum("bhqe,bhke->bhqk", q, k) / np.sqrt(q.shape[-1])
        s = np.where(np.tri(x.shape[1], dtype=bool), s, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        o = p @ v
        self.save(x, q, k, v, p, o)
        return np.einsum("bhte,hed->btd", o, self.out)

    def backward(self, dy):
        x, q, k, v, p, o = self.saved
        self.out.grad += np.einsum("bhte,btd->hed", o, dy)
        do = np.einsum("btd,hed->bhte", dy, self.out)
        dp, dv = do @ v.swapaxes(-1, -2), p.swapaxes(-1, -2) @ do
        ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
        dq, dk = ds @ k, ds.transpose(0, 1, 3, 2) @ q
        dx = np.zeros_like(x)
        for i, g in enumerate((dq, dk, dv)):
            self.qkv.grad[i] += np.einsum("btd,bhte->hde", x, g)
            dx += np.einsum("bhte,hde->btd", g, self.qkv[i])
        return dx


class MaskedPReLU(Same):
    """Boolean masks, in place."""

    def build(self, input_shape):
        self.slope = self.add_weight("slope", (), init=0.25)

    def forward(self, x):
        y, low = x.copy(), x < 0
        y[low] *= self.slope
        self.save(x, low)
        return y

    def backward(self, dy):
        x, low = self.saved
        dx = np.empty_like(dy)
        dx[low] = dy[low] * self.slope
        dx[~low] = dy[~low]
        self.slope.grad += (dy[low] * x[low]).sum()
        return dx


class DepthToSpace(gl.Layer):
    def output_shape(self, s):
        return (s[0], s[1] // 4, s[2] * 2, s[3] * 2)

    def forward(self, x):
        n, c, h, w = x.shape
        return x.reshape(n, c // 4, 2, 2, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)

    def backward(self, dy):
        n, c, h, w = dy.shape
        return dy.reshape(n, c, h // 2, 2, w // 2, 2).transpose(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


class Recurrent(gl.Layer):
    """h ← tanh(x w + h u), a loop over a static axis."""

    def build(self, input_shape):
        d = input_shape[-1]
        self.w, self.u = (self.add_weight(n, (d, d), init="kaiming_uniform") for n in "wu")

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        hs = [np.zeros_like(x[:, 0])]
        for t in range(x.shape[1]):
            hs.append(np.tanh(x[:, t] @ self.w + hs[-1] @ self.u))
        self.save(x, hs)
        return np.stack(hs[1:], axis=1)

    def backward(self, dy):
        x, hs = self.saved
        dx, dh = np.empty_like(x), 0
        for t in reversed(range(x.shape[1])):
            dz = (dy[:, t] + dh) * (1 - hs[t + 1] ** 2)
            self.w.grad += x[:, t].T @ dz
            self.u.grad += hs[t].T @ dz
            dx[:, t] = dz @ self.w.data.T
            dh = dz @ self.u.data.T
        return dx


class Shuffle(Same):
    """Channels by a constant permutation, negative steps, roll, a write through a view."""

    order = np.array([2, 0, -1, 1])

    def forward(self, x):
        y = x[:, self.order][..., ::-1]
        y = np.roll(y, 1, axis=-1)
        part = y[:, 1:3]
        part *= 2
        return y

    def backward(self, dy):
        dx = dy.copy()
        dx[:, 1:3] *= 2
        dx = np.roll(dx, -1, axis=-1)[..., ::-1]
        out = np.empty_like(dx)
        out[:, self.order] = dx
        return out


class Polar(gl.Layer):
    """Two outputs of different widths; the batch size under a root and as n / (n − 1)."""

    def output_shape(self, s):
        return s, (s[0], 1)

    def forward(self, x):
        n = max(len(x), 2)
        r = np.linalg.norm(x, axis=1, keepdims=True)
        self.save(x, r, n)
        return x * (n / (n - 1)) / np.sqrt(n), r

    def backward(self, du, dr):
        x, r, n = self.saved
        return du * (n / (n - 1)) / np.sqrt(n) + dr * x / r


CASES: dict[str, tuple[gl.Layer, list[tuple]]] = {
    "Swish": (Swish(), [(None, 5)]),
    "Antirectifier": (Antirectifier(), [(None, 5)]),
    "Maxout": (Maxout(), [(None, 4)]),
    "SqueezeExcite": (SqueezeExcite(), [(None, 4, 3, 5)]),
    "RBF": (RBF(), [(None, 4)]),
    "BlurPool": (BlurPool(), [(None, 2, 6, 7)]),
    "WindowPool": (WindowPool(), [(None, 2, 5, 6)]),
    "LayerScale": (LayerScale(), [(None, 3, 4)]),
    "GatedMerge": (GatedMerge(), [(None, 4), (None, 4)]),
    "Plus": (Plus(), [(None, 4), (None, 4)]),
    "Norm": (Norm(), [(None, 3, 8)]),
    "BatchCenter": (BatchCenter(), [(None, 4)]),
    "SoftMax": (SoftMax(), [(None, 3, 5)]),
    "CumulativeMean": (CumulativeMean(), [(None, 5, 3)]),
    "ErfGELU": (ErfGELU(), [(None, 5)]),
    "CodyGELU": (CodyGELU(), [(None, 5)]),
    "Lookup": (Lookup(), [(None, 4)]),
    "Attention": (Attention(), [(None, 5, 4)]),
    "MaskedPReLU": (MaskedPReLU(), [(None, 5)]),
    "DepthToSpace": (DepthToSpace(), [(None, 8, 2, 3)]),
    "Recurrent": (Recurrent(), [(None, 3, 4)]),
    "Shuffle": (Shuffle(), [(None, 4, 5)]),
    "Polar": (Polar(), [(None, 3)]),
}
DTYPES = {"Lookup": ("int64",)}
"""Of inputs that are not float32."""
