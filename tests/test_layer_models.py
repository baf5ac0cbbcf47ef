"""Models put together at random: nested, with layers used again, shared weights, frozen and evaluated parts."""

import copy
import random

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.layers._frames import as_data

X = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
LEAVES = [
    lambda: gl.Linear(6, 6),
    lambda: gl.Linear(None, 6, activation="gelu"),
    lambda: gl.BatchNorm1d(6),
    lambda: gl.LayerNorm(6),
    lambda: gl.Dropout(0.3),
    lambda: gl.PReLU(),
    lambda: gl.Flatten(),
    lambda: gl.Tanh(),
]


@gl.register
class Gained(gl.Layer):
    """y = g · f(x) + x for layers f in a list, with a backward of its own that adds what it gets."""

    def __init__(self, *inner):
        self.inner = list(inner)

    def build(self, input_shape):
        self.g = self.add_weight("g", input_shape[1:], "ones")

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        y = x
        for layer in self.inner:
            y = layer(y)
        self.save(y)
        return y * self.g + x

    def backward(self, dy):
        (y,) = self.saved
        self.g.grad += (dy * y).sum(0)
        dx = dy * self.g
        for layer in reversed(self.inner):
            dx = layer.backward(dx)
        return dx + dy


def drawn(draw, known, depth=0):
    if known and draw.random() < 0.2:
        return draw.choice(known)
    if depth > 3 or draw.random() < 0.5:
        known.append(draw.choice(LEAVES)())
        return known[-1]
    inner = [drawn(draw, known, depth + 1) for _ in range(draw.randint(1, 3))]
    kinds = [gl.Sequential, gl.Residual, Gained, lambda *a: gl.Parallel(*a, merge="sum")]
    kinds += [lambda *a: gl.Residual(*a, shortcut=drawn(draw, known, depth + 1))]
    return draw.choice(kinds)(*inner)


def model(seed):
    draw = random.Random(seed)
    gl.random.seed(seed)
    known = []
    made = gl.Sequential(*(drawn(draw, known) for _ in range(3)))
    made.predict(X)
    for layer in list(made.layers())[1:]:
        if draw.random() < 0.15:
            layer.trainable = False
        if draw.random() < 0.1:
            layer.eval()
    for w in made.trainable_weights:
        w.trainable = draw.random() < 0.9
    linear = [layer for layer in made.layers() if isinstance(layer, gl.Linear)]
    if len(linear) > 1:
        one, other = draw.sample(linear, 2)
        one.weight = other.weight
    made[draw.randrange(3)] = gl.Linear(6, 6, activation="tanh")
    return made


def gradients(made, *data):
    state, dice = made.state_dict(), gl.random.get_state()
    made.zero_grad()
    with as_data(*data):
        y = made(X)
    dx = made.backward(np.cos(np.arange(y.size, dtype=np.float32)).reshape(y.shape))
    grads = {n: np.array(w.grad) for n, w in made.named_weights().items() if w.trainable}
    made.load_state_dict(state)
    gl.random.set_state(dice)
    return y, dx, grads


@pytest.mark.parametrize("seed", range(24))
def test_what_is_left_out_changes_no_gradient_and_all_is_saved(seed, tmp_path):
    made = model(seed)
    y, _, whole = gradients(made)
    again, dx, grads = gradients(made, X)
    assert dx is None and np.array_equal(again, y)
    for name, g in whole.items():
        np.testing.assert_allclose(grads[name], g, rtol=1e-4, atol=1e-5, err_msg=name)
    assert not any(layer._waiting.frames for layer in made.layers())
    gl.save(made, tmp_path / "model")
    for other in (gl.load(tmp_path / "model"), copy.deepcopy(made)):
        assert np.array_equal(other.predict(X), made.predict(X)) and other.get_config() == made.get_config()
        assert other.ties() == made.ties()
        flags = [[(n, w.trainable) for n, w in m.named_weights().items()] for m in (other, made)]
        modes = [[(n, part.training, part.trainable) for n, part in m.named_layers()] for m in (other, made)]
        assert flags[0] == flags[1] and modes[0] == modes[1]
