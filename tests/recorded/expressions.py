"""One line each of what NumPy offers: what is recorded, and what is refused."""

import math
import struct

import numpy as np

import gpulayers as gl

erf = np.frompyfunc(math.erf, 1, 1)


class Computes(gl.Layer):
    """Several functions of x side by side, each an output; a backward that gives every dy its part."""

    def __init__(self, functions):
        self.functions = functions

    def output_shape(self, input_shape):
        x = np.ones((3, *input_shape[1:]), np.float32)
        with np.errstate(all="ignore"):
            shapes = [np.shape(f(x)) for f in self.functions]
        return tuple((input_shape[0], *shape[1:]) for shape in shapes)

    def forward(self, x):
        self.save(x)
        return tuple(f(x).astype(np.float32) for f in self.functions)

    def backward(self, *dys):
        (x,) = self.saved
        return sum((k + 1) * dy.sum() for k, dy in enumerate(dys)) * x


def _in_place(x):
    y = x.copy()
    y += 1
    y[:, 0] *= 2
    y[:, :, 1] = x[:, :, 0]
    y[..., -1] -= y[..., 0]
    return y


def _through_views(x):
    y = np.zeros_like(x)
    part = y[:, 1:]
    part += x[:, 1:]
    rows = y.reshape(len(x), -1)
    rows[:, 0] = 5
    turned = y.transpose(2, 0, 1)
    turned[0] *= 3
    return y + part.sum()


def _masked(x):
    y = x.copy()
    y[x > 0] *= 2
    y[x < -1] = 0
    np.copyto(y, 7, where=x > 1)
    np.multiply(y, 2, out=y, where=x < 0)
    return y


def _blocks(x):
    """Sums into blocks: each is the whole and a padded summand."""
    y = x + 0
    y[:, 1:, :2] += x[:, :2, 2:]
    y[:, 1] += x[:, 0]
    y[:, :, 1:3][...] += x[:, :1, :2]
    part = y[:, 1:]
    part += 1
    return y


def _every_other(x):
    y = np.ones_like(x)
    y[:, ::2, 1:3] = x[:, ::2, 1:3]
    y[:, [0, 2]] += x[:, [2, 0]]
    return y[:, ::-1, ::-2]


def _where_written(x):
    y = np.full_like(x, 2, shape=(len(x), 5))
    y[:, 1:4] = x[:, :, 0]
    return y


def _scalars_stay(x):
    total = x.sum()
    before, first = total, x[0, 0, 0]
    total += 1
    first *= 2
    y = x.reshape(-1)[:3] + 0
    y[0] += first
    return x * (total - before) + y[0] + y[1:].sum()


def _summed(x):
    count = np.zeros_like(x, shape=(4,))
    np.add.at(count, (x[:, 0, 0] > 0).astype(np.int64) + 1, 1.0)
    return x[:, 0] * count


def _of_each_row(x):
    """One column of each row, read and written by its computed number; the last of several that are equal stays."""
    rows, best = np.arange(len(x)), x.sum(2).argmax(1)
    y = np.zeros_like(x)
    y[rows, best] = x[rows, best] + (x > 0)[rows, best]
    y[rows, best] += 1
    places = np.stack([x.argmax(2), x.argmin(2), x.argmax(2) // 2], 2)
    np.put_along_axis(y, places, np.take_along_axis(x, places, 2) * 2, axis=2)
    np.put_along_axis(y, best[:, None, None], 7, axis=1)
    return y + np.take_along_axis(x, x.argmax(1, keepdims=True), axis=1)


def _stays_recorded(x):
    """NumPy's makers of arrays give the recorded one; a copy is one."""
    y = np.array(x)
    y += np.asarray(x, dtype=np.float32) + np.ascontiguousarray(x).astype(np.asanyarray(x).dtype)
    np.asarray(x[:, :1])
    return y - np.array([1, 2, 3, 4], np.float32)


ELEMENTWISE = [
    lambda x: np.exp(x) + np.expm1(x) + np.exp2(x),
    lambda x: np.log(np.abs(x)) + np.log1p(x * x) + np.log2(x * x + 1) + np.log10(x * x + 2),
    lambda x: np.sin(x) + np.cos(x) * np.tan(x / 4) - np.sinh(x) + np.cosh(x) * np.tanh(x),
    lambda x: np.arctan(x) + np.arcsin(np.tanh(x)) + np.arccos(np.tanh(x)) + np.arcsinh(x) + np.arctanh(np.tanh(x)),
    lambda x: np.floor(x) + np.ceil(2 * x) + np.rint(3 * x) + np.sign(x) + np.trunc(x * 4) + np.arccosh(x * x + 1),
    lambda x: x // 0.75 + x % 0.75 + (-x) // 2 + np.remainder(x, -0.5) + 1 / (x * x + 1) + np.reciprocal(x * x + 1),
    lambda x: np.power(np.abs(x) + 1, 1.5) + x**2 + np.abs(x) ** 0.5 + x**3 + 2.0**x + np.square(x),
    lambda x: np.maximum(x, 0.5) + np.minimum(x, x.mean()) + np.hypot(x, 1) + np.logaddexp(x, 0) + +x - -x,
    lambda x: np.where((x > 0) & ~(x > 1) | (x <= -1) ^ (x >= 2), x, np.nan_to_num(x / 0, posinf=3, neginf=-3)),
    lambda x: np.logical_and(x > 0, x < 1) + 2 * np.logical_or(x == 0, x != 0) + np.logical_not(x > 0),
    lambda x: np.isnan(np.log(x)) * 2 + np.isinf(x / 0) + np.isfinite(1 / x),
    lambda x: np.clip(x, -0.5, 1) + x.clip(0) + np.fabs(x) + erf(x).astype(x.dtype) + np.float32(0.1) * x,
    lambda x: (x * 10).astype(np.int64) // 3 + (x * 10).astype(int) % 3 + (x > 0).astype(np.int32) * 2,
    lambda x: np.sign(np.log(x)) + np.maximum(np.log(x), 0),
    lambda x: ((x > 0) + (x > 1)) * 2.0 + (x * 1e11) // 3 * 1e-11,
]
ARRAYS = [
    lambda x: x.sum(1) + x.mean((1,)) + x.max(axis=1) - x.min(1) * x.prod(1) + np.linalg.norm(x, axis=1),
    lambda x: x.var(1) + np.std(x, axis=1, ddof=1) + np.amax(x, 1) + np.argmax(x.reshape(len(x), -1), 1)[:, None],
    lambda x: np.sum(x, axis=(0, 2), keepdims=True) + x + x.sum() + np.add.reduce(x, axis=1, keepdims=True),
    lambda x: (x > 0).any(2) + 2 * np.all(x < 2, axis=2) + x.argmax(1)[:, :3] + np.argmin(x, axis=2) + (x > 0).sum(2),
    lambda x: np.cumsum(x, axis=-1) + np.cumsum(x[:, ::-1], 1)[:, ::-1] + np.add.accumulate(x, axis=1),
    lambda x: x.reshape(len(x), -1).T.reshape(4, 3, -1).transpose(2, 1, 0) + np.moveaxis(x, 1, 2).swapaxes(1, -1),
    lambda x: np.concatenate([x, x[:, :1]], axis=1)[:, 1:] + np.stack([x[:, 0], x[:, 1], x[:, 2]], 1),
    lambda x: np.expand_dims(x, 2).squeeze(2) + np.broadcast_to(x[:, :1], x.shape) + np.tile(x[:, :, :2], 2),
    lambda x: np.pad(x, ((0, 0), (1, 0), (0, 1)))[:, :3, 1:] + np.pad(x, ((0, 0), (1, 1), (0, 0)), "edge")[:, 2:],
    lambda x: np.zeros_like(x) + x[:, :1] + x.reshape(len(x), 1, 3, 1, 4)[:, :, ::2, :, ::-3][:, 0, :, 0].sum(),
    lambda x: np.pad(x[:, :, None, None], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 2)))[:, 1:, 0, 0, 2:] + x,
    lambda x: np.flip(x, 1) + np.roll(x, 1, axis=2) + np.repeat(x[:, :, ::2], 2, axis=2) + np.diff(x, axis=2).sum(),
    lambda x: np.split(x, 2, axis=2)[1] + x[:, :, [0, -1]] + np.take(x, [1, 0], axis=2) + x[..., None, :2][:, :, 0],
    lambda x: np.lib.stride_tricks.sliding_window_view(x, 2, axis=2).max(-1),
    lambda x: x[:, [0, 1], [2, 3]] + np.outer(x[:, 0, 0], np.ones(2)) + np.vstack([x[:, 0], x[:, 1]])[: len(x), :2],
    lambda x: np.tril(x, 1) + np.triu(x) * np.round(x, 1) + x.round() + np.average(x, 2)[..., None],
    lambda x: np.select([x > 1, x > 0], [x * 2, -x], 0.5) + np.inner(x, np.eye(4, dtype=np.float32))[..., 0, None],
    lambda x: np.count_nonzero(x > 0, axis=1) + np.broadcast_arrays(x[:, 0], x[:1, 1])[1] + np.ones(3)[0],
    lambda x: x / np.sqrt(len(x)) + x * (1 / (len(x) + 1)) + x.size + x.sum(0) / max(len(x) - 1, 1),
]
PRODUCTS = [
    lambda x: x @ x.swapaxes(1, 2) + np.matmul(x, x.mT) + np.einsum("nik,njk->nij", x, x),
    lambda x: np.einsum("nij,nj->ni", x, x[:, 0]) + np.einsum("...j->...", x) + x @ np.ones(4, np.float32),
    lambda x: np.ones((1, 2, 3), np.float32) @ x + np.ones((2, 3), np.float32) @ x,
    lambda x: np.tensordot(x, np.eye(4, dtype=np.float32), 1) + np.dot(x, np.eye(4)[::-1].astype(np.float32)),
    lambda x: np.einsum("nij,kj,k->ni", x, np.ones((2, 4), np.float32), np.array([1, 2], np.float32)),
    lambda x: np.einsum("ni,mi->nm", x[:, 0], x[:, 1]) @ x[:, 0] + (x[:, 0] > 0) @ np.ones((4, 4), np.float32),
]
WRITES = [
    _in_place,
    _blocks,
    _through_views,
    _masked,
    _every_other,
    _where_written,
    _scalars_stay,
    _summed,
    _of_each_row,
]
WRITES += [_stays_recorded]
RECORDED = {"elementwise": ELEMENTWISE, "arrays": ARRAYS, "products": PRODUCTS, "writes": WRITES}
SHAPE = (None, 3, 4)

COUNT, STATE = [], []


def _or_one(function):
    try:
        return function()
    except ValueError:
        return 1


REFUSED = [
    (lambda x: x if x.max() > 0 else -x, "a branch", "np.where"),
    (lambda x: max(x[0, 0, 0], 0) + x, "a branch", "np.maximum"),
    (lambda x: x * float(x.sum()), "a Python number", "NumPy's functions"),
    (lambda x: x * x.sum().item(), "a Python number", "NumPy's functions"),
    (lambda x: x * math.exp(x[0, 0, 0]), "a Python number", "NumPy's functions"),
    (lambda x: np.array([x[:, 0], x[:, 1]]), "a plain NumPy array", "np.stack([x, y])"),
    (lambda x: x + x[:, x[0, :, 0].argmax(), x[0, :3].argmax(0)], "that are computed", "np.take_along_axis"),
    (lambda x: x.copy().put(x[0, :, 0].argmax(), 1), "the array's put", ""),
    (lambda x: x.copy().__setitem__((slice(None), x[0, :, 0].argmax()), 1), "computed indices", "np.arange(n) == i"),
    (lambda x: np.vectorize(lambda v: v + 1)(x), "a plain NumPy array", "the array itself"),
    (lambda x: np.add(x, 1, out=np.empty(x.shape, np.float32)), "plain NumPy array", "np.zeros_like"),
    (lambda x: np.stack([row * 2 for row in x]), "follows the batch size", "the whole batch"),
    (lambda x: x * 2 if len(x) > 8 else x, "follows the batch size", "the whole batch"),
    (lambda x: np.einsum("nm,mij->nij", np.eye(len(x), dtype=np.float32), x), "constant array follows", "from x"),
    (lambda x: x + x[np.arange(len(x)), 0][:, None], "constant array follows", "from x"),
    (lambda x: x * (len(x) ** 2), "in another way", "(a + b N) / (d + c N)"),
    (lambda x: x + np.random.default_rng().standard_normal(4).astype(np.float32), "random", "gl.random.generator()"),
    (lambda x: (COUNT.append(1), x * len(COUNT))[1], "hidden state", "trainable=False"),
    (lambda x: np.sort(x, axis=1), "np.sort", "np.max"),
    (lambda x: np.median(x, axis=1, keepdims=True) + x, "np.median", "x.mean"),
    (lambda x: np.fft.fft(x).real, "np.fft", ""),
    (lambda x: np.linalg.inv(x), "np.linalg.inv", ""),
    (lambda x: x * round(x[0, 0, 0]), "a Python number", "NumPy's functions"),
    (lambda x: x * _or_one(lambda: float(x.max())), "a Python number", "NumPy's functions"),
    (lambda x: np.multiply(x, 2, out=x), "forward writes into x", "x = x.copy()"),
    (lambda x: np.fmax(x, 0), "np.fmax", "np.maximum"),
    (lambda x: np.arctan2(x, 1), "np.arctan2", "np.arctan"),
    (lambda x: x[x > 0].mean() + x, "a mask selected", "mask.sum()"),
    (lambda x: x + len(x[x > 0]), "how many a mask selected", "mask.sum()"),
    (lambda x: x * (np.random.default_rng().random() + 1), "random numbers", "gl.random.generator()"),
    (lambda x: (STATE.append(x), x + STATE[0].mean())[1], "kept from another call", "self.save"),
    (lambda x: np.average(x, weights=x), "np.average with weights", "weights.sum()"),
    (lambda x: np.sqrt(x[x > 0]).reshape(-1), "a mask selected", "np.where"),
    (lambda x: x.view(np.int32), "the array's view", ""),
    (lambda x: x + (x * 8).astype(np.int64) * 1j, "dtype", "real numbers"),
    (lambda x: np.einsum("nii->ni", x[:, :3, :3]), "a letter twice", "np.where"),
    (lambda x: x + struct.pack("f", x), "own arrays, too, it raises error", "gpulayers check"),
    (lambda x: x[x], "own arrays, too, it raises IndexError", "gpulayers check"),
    (lambda x: x + memoryview(x), "it raised TypeError: memoryview", "NumPy's functions"),
    (lambda x: np.lib.stride_tricks.as_strided(x, x.shape), "it raised AttributeError", "NumPy's functions"),
]
"""(layer, words of the reason, words of the advice)"""
