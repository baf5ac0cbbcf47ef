"""Calls of layers are independent of each other: repeated use, modes, threads."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.layers._frames import as_data, mode
from gpulayers.testing import check_layer

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((8, 6)).astype(np.float32)
Y = RANDOM.standard_normal((8, 6)).astype(np.float32)


def again(kind):
    """A model that uses one layer first, and again; and the same model with two layers of equal weights."""
    gl.random.seed(2)
    one, other = gl.Linear(6, 6, activation="tanh"), gl.Linear(6, 6, activation="tanh")
    other.load_state_dict(one.state_dict())
    return (
        {
            "sequential": lambda a, b: gl.Sequential(a, gl.LayerNorm(6), b),
            "residual": lambda a, b: gl.Sequential(gl.Residual(a, gl.LayerNorm(6)), b),
            "shortcut": lambda a, b: gl.Residual(a, gl.LayerNorm(6), shortcut=b),
            "parallel": lambda a, b: gl.Sequential(gl.Parallel(a, gl.Sequential(gl.LayerNorm(6), b), merge="sum")),
            "nested": lambda a, b: gl.Sequential(gl.Sequential(a), gl.Residual(gl.Parallel(b, merge="sum"))),
            "three": lambda a, b: gl.Sequential(a, a, gl.Sequential(b)),
        }[kind],
        one,
        other,
    )


@pytest.mark.parametrize("kind", ["sequential", "residual", "shortcut", "parallel", "nested", "three"])
def test_a_layer_used_first_and_again_gets_both_gradients(kind):
    make, one, other = again(kind)
    shared, apart = make(one, one), make(one, other)
    losses = []
    for model in (shared, apart):
        model.zero_grad()
        with as_data(X):
            y = model(X)
        assert model.backward(y) is None
        losses.append(y)
    assert np.array_equal(*losses)
    wants = [a.grad + b.grad for a, b in zip(one.weights, other.weights)]
    shared.zero_grad()
    with as_data(X):
        shared.backward(shared(X))
    for w, want in zip(one.weights, wants):
        np.testing.assert_allclose(w.grad, want, rtol=1e-5, atol=1e-6)
    assert not shared._waiting.frames and not one._waiting.frames


@pytest.mark.parametrize("kind", ["sequential", "parallel", "three"])
def test_fit_trains_a_layer_used_first_and_again(kind):
    """One step of plain SGD is the step that the whole gradient gives."""
    make, one, _ = again(kind)
    model = make(one, one)
    before = [w.data.copy() for w in one.weights]
    y = model(X)
    model.backward((2 / y.size * (y - Y)).astype(np.float32))
    grads = [w.grad.copy() for w in one.weights]
    model.fit(X, Y, loss=gl.MSELoss(), optimizer=gl.SGD(0.5), batch_size=8, shuffle=False, progress=False)
    for w, start, g in zip(one.weights, before, grads):
        np.testing.assert_allclose(w.data, start - 0.5 * g, rtol=1e-4, atol=1e-6)


@gl.register
class Squares(gl.OpLayer):
    """relu(x²) with a backward of its own that needs the op's dx, and a layer inside that is called twice."""

    op = gl.ops.activation.relu

    def __init__(self):
        self.inner = gl.Linear(6, 6)

    def forward(self, x):
        self.save(x)
        return super().forward(x * x) + self.inner(self.inner(x))

    def backward(self, dy):
        (x,) = self.saved
        through = self.inner.backward(self.inner.backward(dy))
        return 2 * x * super().backward(dy) + through


def test_a_backward_of_ones_own_always_gets_gradients():
    """fit asks for no gradient of the data, and leaves it out only where that is safe."""
    check_layer(Squares(), (None, 6), dtypes=())
    for model in (Squares(), gl.Sequential(Squares()), gl.Sequential(gl.Residual(Squares()), gl.Linear(6, 6))):
        before = model.state_dict()
        model.fit(X, Y, loss=gl.MSELoss(), optimizer=gl.SGD(0.1), progress=False)
        assert all((value != before[name]).any() for name, value in model.state_dict().items())


def backwards(model, x=X):
    """Which of the model's layers computed a backward, and the model's dx."""
    called = []
    for layer in model:
        layer.backward = lambda *dys, layer=layer: called.append(layer) or type(layer).backward(layer, *dys)
    with as_data(x):
        y = model(x)
    dx = model.backward(np.ones_like(y))
    return [layer.name for layer in reversed(called)], dx


def test_gradients_that_nobody_asks_for_are_not_computed(monkeypatch):
    """Neither those of data, nor of what only layers without trained weights made of it."""
    model = gl.Sequential(gl.Flatten(), gl.Linear(6, 6), gl.ReLU(), gl.Linear(6, 6))
    assert backwards(model) == (["1.Linear", "2.ReLU", "3.Linear"], None)
    model[1].trainable = False
    model.zero_grad()
    assert backwards(model) == (["3.Linear"], None) and not model[1].weight.has_grad
    conv, needs = gl.ops.conv.conv, []
    record = conv.record
    monkeypatch.setattr(conv, "record", lambda *xs, **o: needs.append(o["needs"]) or record(*xs, **o))
    for layer, shape in ((gl.Conv2d, (1, 1, 4, 4)), (gl.Conv3d, (1, 1, 4, 4, 4))):
        padded = gl.Sequential(layer(1, 2, 3, padding=1, padding_mode="reflect"))
        _, dx = backwards(padded, np.ones(shape, np.float32))
        assert dx is None and padded[0].weight.has_grad and needs.pop() == ["weight", "bias"] and not needs
    y = model(X)
    assert model.backward(y) is not None  # outside of fit everything is asked for


def test_what_has_no_backward_leaves_nothing_behind():
    @gl.register
    class Rounded(gl.Layer):
        def output_shape(self, input_shape):
            return input_shape

        def forward(self, x):
            return x.round()

        def backward(self, dy):
            return None

    model = gl.Sequential(gl.Linear(6, 6), Rounded(), gl.Linear(6, 6))
    for _ in range(3):
        model.backward(model(X))
    assert not any(layer._waiting.frames for layer in model.layers())
    with pytest.raises(RuntimeError, match="backward without a forward before it"):
        model[0].backward(X)


def test_a_failed_backward_is_not_taken_up_again():
    model, broken = gl.Sequential(gl.Linear(6, 6)), [True]
    inner = model[0].backward
    model[0].backward = lambda dy: 1 / 0 if broken else inner(dy)
    y = model(X)
    with pytest.raises(ZeroDivisionError):
        model.backward(y)
    broken.clear()
    with pytest.raises(RuntimeError, match="Sequential: backward without a forward"):
        model.backward(y)
    model.backward(model(X))


def test_saved_is_for_calls():
    layer = gl.Flatten()
    layer(X)
    with pytest.raises(RuntimeError, match="Flatten: saved is what forward kept, inside backward"):
        layer.saved  # noqa: B018
    with pytest.raises(RuntimeError, match=r"ReLU: run\(…\) is for forward"):
        gl.ReLU().run(gl.ops.activation.relu, X)


# --- modes -----------------------------------------------------------------------------------------------------------


def normed():
    gl.random.seed(3)
    return gl.Sequential(gl.Linear(6, 6), gl.BatchNorm1d(6), gl.Dropout(0.5), gl.Linear(6, 6))


def fitted(model, **options):
    return model.fit(X, Y, loss=gl.MSELoss(), optimizer=gl.SGD(0.1), progress=False, **options)


def statistics(model):
    return model[1].running_mean.data.copy()


@pytest.mark.parametrize(
    "freeze", [lambda bn: bn.eval(), lambda bn: setattr(bn, "trainable", False)], ids=["eval", "frozen"]
)
def test_a_frozen_batch_norm_stays_so_in_fit(freeze):
    model = normed()
    freeze(model[1])
    before, weight = statistics(model), model[1].weight.data.copy()
    fitted(model, epochs=2, validation=0.25)
    assert np.array_equal(statistics(model), before) and model[1].num_batches_tracked.data == 0
    assert np.array_equal(model[1].weight.data, weight) == (not model[1].trainable)
    model[1].train().trainable = True
    assert model[1].weight.trainable and not model[1].running_mean.trainable
    fitted(model)
    assert not np.array_equal(statistics(model), before)


def test_a_model_in_evaluation_mode_trains_as_a_whole():
    """``model.eval()`` for a look at it, then ``fit``: as if it had not been."""
    models = [normed(), normed()]
    models[1].eval()
    histories = []
    for model in models:
        gl.random.seed(4)
        histories.append(fitted(model, epochs=2)["loss"])
    assert histories[0] == histories[1]
    assert models[0].training and not any(layer.training for layer in models[1].layers()), "flags are the user's"


def test_the_mode_is_the_calls():
    model = normed()
    alone = model.predict(X)
    seen = []
    model[2].forward = lambda x, forward=model[2].forward: seen.append(model[2].training) or forward(x)
    assert np.array_equal(model.predict(X), alone) and seen == [False] and model.training
    with mode(True):
        assert not model.eval()._training and model.training
    assert not model.training and not np.array_equal(statistics(model), np.ones(6))


def test_freezing_a_layer_freezes_all_inside():
    model = gl.Sequential(gl.Linear(None, 6), gl.Residual(gl.BatchNorm1d(6)))
    model.trainable = False
    model(X)  # builds the first layer
    assert not model.trainable_weights and not model[1][0].trainable
    before = {k: v for k, v in model.state_dict().items() if k.startswith("0")}
    model.append(gl.Linear(6, 6))
    fitted(model)
    assert all(np.array_equal(model.state_dict()[k], v) for k, v in before.items())
    model.trainable = True
    assert [n for n, w in model.named_weights().items() if not w.trainable] == [
        f"1.0.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")
    ]


# --- threads ---------------------------------------------------------------------------------------------------------


def at_once(count, work):
    """``work(i)`` in ``count`` threads that begin together; their results, in order."""
    barrier = threading.Barrier(count)

    def begin(i):
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def test_predictions_in_a_pool_are_those_alone():
    model = normed()
    xs = [RANDOM.standard_normal((5, 6)).astype(np.float32) for _ in range(8)]
    alone = [model.predict(x) for x in xs]
    for found in at_once(4, lambda i: [model.predict(x, batch_size=2) for x in xs]):
        assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(found, alone))
    assert all(layer.training for layer in model.layers())


def test_forward_and_backward_in_threads_keep_to_themselves():
    model = gl.Sequential(gl.Residual(gl.LayerNorm(6), gl.SiLU()), gl.Softmax())
    xs = [RANDOM.standard_normal((3 + i, 6)).astype(np.float32) for i in range(4)]
    alone = [model.backward(model(x)) for x in xs]
    steps = threading.Barrier(4)

    def work(i):
        found = []
        for _ in range(3):
            y = model(xs[i])
            steps.wait()  # all have been forward before any goes back
            found.append(model.backward(y))
        return found

    for found, want in zip(at_once(4, work), alone):
        assert all(np.array_equal(dx, want) for dx in found)
    assert not model._waiting.frames


def test_predict_beside_fit_changes_nothing():
    alone, model = normed(), normed()
    gl.random.seed(5)
    want = fitted(alone, epochs=30)["loss"]
    stop, seen = threading.Event(), []

    def watch():
        while not stop.is_set():
            seen.append(np.isfinite(model.predict(X)).all())

    watcher = threading.Thread(target=watch)
    gl.random.seed(5)
    watcher.start()
    try:
        got = fitted(model, epochs=30)["loss"]
    finally:
        stop.set()
        watcher.join()
    assert got == want and all(seen)
    assert all(np.array_equal(v, alone.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_layer_is_built_once_whoever_calls_first():
    class Slow(gl.Linear):
        def build(self, input_shape):
            time.sleep(0.02)  # the others come in the meantime
            super().build(input_shape)

    for model in (Slow(None, 6), gl.Sequential(Slow(None, 6), Slow(None, 4))):
        ys = at_once(4, lambda i, model=model: model.predict(X))
        assert all(np.array_equal(y, ys[0]) for y in ys)


def test_random_numbers_are_drawn_once():
    gl.random.seed(6)
    seen = [int(seed[0]) for seeds in at_once(4, lambda i: [gl.random.draw() for _ in range(200)]) for seed in seeds]
    assert len(set(seen)) == 800 and gl.random.get_state()["count"] == 800


def test_building_that_fails_leaves_nothing_behind():
    @gl.register
    class Shy(gl.Layer):
        first = True

        def build(self, input_shape):
            self.w = self.add_weight("w", input_shape[1:])
            if input_shape[1] > 6:
                raise ValueError("too wide")

        def output_shape(self, input_shape):
            return input_shape

        def forward(self, x):
            return x * self.w

    layer = Shy()
    with pytest.raises(ValueError, match="too wide"):
        layer(np.ones((2, 7), np.float32))
    assert layer.waits() and not layer.weights
    assert layer(X).shape == X.shape
    with pytest.raises(ValueError, match="it has a weight 'w' already"):
        layer.build((None, 5))
    assert layer.w.shape == (6,) and layer._input_shapes == ((None, 6),) and layer(X).shape == X.shape
