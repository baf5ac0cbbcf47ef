"""Training: it learns, it resumes to the same bits, it loses nothing, and its errors say what is wrong."""

import json
import math

import numpy as np
import pytest

import gpulayers as gl
from gpulayers import arrays
from gpulayers.train._precision import LossScale
from gpulayers.train._run import Run
from gpulayers.train.data import batches

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((96, 8)).astype(np.float32)
Y = (X[:, :4].sum(1) > X[:, 4:].sum(1)).astype(np.int64)


def network(seed: int = 1) -> gl.Sequential:
    gl.random.seed(seed)
    return gl.Sequential(gl.Linear(8, 16), gl.ReLU(), gl.Dropout(0.1), gl.Linear(16, 2))


def quiet(model, **options):
    defaults = dict(epochs=4, batch_size=16, progress=False, metrics=["accuracy"], optimizer=gl.AdamW(1e-2))
    return model.fit(X, Y, **(defaults | options))


def test_it_learns():
    model = network()
    history = quiet(model, epochs=25, validation=0.25)
    assert history["accuracy"][-1] > 0.9 > history["accuracy"][0]
    assert set(history) == {"loss", "accuracy", "val_loss", "val_accuracy", "lr", "seconds"} and history.epochs == 25
    scores = model.evaluate(X, Y, metrics=["accuracy"])
    assert scores["accuracy"] == (model.predict(X).argmax(1) == Y).mean()
    assert all(layer.training for layer in model.layers()), "evaluation leaves the mode as it was"
    assert not model._waiting.frames and not any(w.has_grad for w in model.weights)


def test_data_of_any_dtype_is_computed_in_the_weights():
    """NumPy's own dtype is float64: what is read from a file trains, is judged and predicted in float32 all the same."""
    wide, target = X.astype(np.float64), X[:, :2].astype(np.float64)
    losses = []
    for x, y in ((X, target.astype(np.float32)), (wide, target)):
        gl.random.seed(1)
        model = gl.Sequential(gl.Linear(8, 4), gl.BatchNorm1d(4), gl.LayerNorm(4), gl.Linear(4, 2))
        history = model.fit(x, y, loss=gl.MSELoss(), epochs=2, validation=0.25, progress=False)
        losses.append([*history["loss"], *history["val_loss"], model.evaluate(x, y, loss=gl.MSELoss())["loss"]])
        assert model.predict(x).dtype == np.float32
    assert losses[0] == losses[1]
    assert model.to("float64").predict(wide).dtype == np.float64


def test_the_same_seed_gives_the_same_bits():
    a, b = (quiet(network(5)) for _ in range(2))
    assert a["loss"] == b["loss"]
    assert quiet(network(6))["loss"] != a["loss"]


def test_early_stopping_restores_the_best():
    model = network()
    flips = 1 - Y
    history = quiet(model, epochs=30, validation=(X, flips), callbacks=[gl.EarlyStopping(patience=2)])
    assert history.epochs < 30 and history.best() == history.epochs - 3
    assert model.evaluate(X, flips)["loss"] == pytest.approx(min(history["val_loss"]), rel=1e-6)
    with pytest.raises(KeyError, match="monitor: the rule is one of loss, accuracy, lr, seconds; got 'val_loss'"):
        quiet(network(), epochs=1, callbacks=[gl.EarlyStopping()])


def test_a_callback_starts_afresh_in_another_training():
    early = gl.EarlyStopping("loss", patience=2)
    quiet(network(), epochs=10, callbacks=[early])
    model = network(1)
    quiet(model, epochs=1, optimizer=gl.SGD(1e-4), callbacks=[early])
    alone = network(1)
    quiet(alone, epochs=1, optimizer=gl.SGD(1e-4))
    assert all(np.array_equal(model.state_dict()[k], v) for k, v in alone.state_dict().items())


def test_a_failed_step_leaves_nothing_behind():
    model = network()
    with pytest.raises(IndexError):
        model.fit(X, Y + 7, progress=False)
    assert not any(layer._waiting.frames for layer in model.layers())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision(precision):
    model = network()
    seen = []
    metric = {"kind": lambda prediction, target: seen.append(model[0].weight.dtype) or np.float32(0)}
    history = quiet(model, epochs=25, precision=precision)
    assert history["accuracy"][-1] > 0.85
    quiet(model, epochs=1, precision=precision, metrics=metric)
    assert set(seen) == {np.dtype(np.float32)}, "weights stay float32"
    assert model.predict(X[:4], precision=precision).dtype == arrays.dtype(precision)


def test_loss_scale():
    """It leaves a step out and halves where a gradient overflows, and grows back."""
    scale = LossScale(True)
    scale.update(False)
    assert scale.value == 2.0**15
    for _ in range(2000):
        scale.update(True)
    assert scale.value == 2.0**16
    model = network()
    before = model.state_dict()
    run = Run(model, gl.CrossEntropyLoss(), gl.AdamW(), {}, [], "float16", None)
    x = X.copy()
    x[0, 0] = np.inf
    run.step([x], Y)
    assert run.scale.value == 2.0**15 and run.optimizer.steps == 0
    assert all(np.array_equal(model.state_dict()[k], v) for k, v in before.items())


class PlainSGD(gl.Optimizer):
    """It knows of no scale on the device."""

    def __init__(self, lr=1.0):
        self.lr = lr

    def update(self, data, grads, *buffers, lr, step, grad_scale):
        for w, g in zip(data, grads):
            w -= lr * grad_scale * g


@pytest.mark.parametrize("optimizer", [gl.SGD, PlainSGD])
def test_clipping(optimizer):
    model = network()
    run = Run(model, gl.CrossEntropyLoss(), optimizer(1.0), {}, [], None, 1e-3)
    before = model.state_dict()
    run.step([X], Y)
    moved = math.sqrt(sum(float(((model.state_dict()[k] - v) ** 2).sum()) for k, v in before.items()))
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_regularizers_and_constraints():
    @gl.register
    class Held(gl.Layer):
        def build(self, input_shape):
            self.w = self.add_weight("w", (8,), 1.0, regularizer=gl.L2(0.5), constraint=gl.NonNegative())

        def output_shape(self, input_shape):
            return input_shape

        def forward(self, x):
            self.save(x)
            return x * self.w

        def backward(self, dy):
            (x,) = self.saved
            self.w.grad += (dy * x).sum(0)
            return dy * self.w

    model = gl.Sequential(Held(), gl.Linear(8, 2))
    run = Run(model, gl.CrossEntropyLoss(), gl.SGD(10.0), {}, [], None, None)
    model.build((None, 8))
    plain = float(gl.CrossEntropyLoss()(model(X), Y))
    found = run.step([X], Y)
    assert float(found["loss"].value) == pytest.approx(plain + 0.5 * 8, rel=1e-5)
    assert (model[0].w.data >= 0).all() and (model[0].w.data == 0).any()


def test_learning_rate_schedules():
    history = quiet(network(), epochs=2, optimizer=gl.SGD(lr=lambda step: 1.0 / (1 + step)))
    assert history["lr"] == [1 / 7, 1 / 13]


def test_batches_are_the_rows_in_order():
    seen = [(x[0].shape, y.tolist()) for x, y in batches([X], Y, 40, "cpu", np.arange(96)[::-1])]
    assert [s for s, _ in seen] == [(40, 8), (40, 8), (16, 8)]
    assert [label for _, y in seen for label in y] == Y[::-1].tolist()


WRONG_ARGUMENTS = [
    ({"epochs": -1}, "epochs ≥ 0; got 96 rows and -1 epochs"),
    ({"clip_norm": -1.0}, "clip_norm: the rule is clip_norm > 0; got -1.0"),
    ({"optimizer": gl.AdamW}, "optimizer: the rule is one of sgd, adamw, .* or an Optimizer; got <class"),
    ({"optimizer": gl.SGD(-0.1)}, "SGD: lr: the rule is lr ≥ 0; got -0.1"),
    ({"optimizer": gl.AdamW(lambda step: math.nan)}, "AdamW: lr: the rule is lr ≥ 0; got nan"),
    ({"loss": "mse"}, r"loss: the rule is a layer of \(prediction, target\).*; got 'mse'"),
    ({"loss": gl.CrossEntropyLoss(reduction="none")}, r"CrossEntropyLoss: the rule is one loss a batch.*; got \["),
    ({"metrics": {"wide": lambda p, t: p}}, r"wide: the rule is one number a batch, shape \[\]; got \["),
    ({"callbacks": [gl.EarlyStopping]}, r"callbacks\[0\]: the rule is a Callback; got <class"),
    ({"validation": (X, Y, Y)}, r"validation: the rule is \(x, y\) or a share between 0 and 1; got tuple of 3"),
    ({"validation": (X[:0], Y[:0])}, "validation: the rule is at least one row; got 0 rows"),
    ({"precision": "int32"}, "precision: the rule is bfloat16, float16, float32 or float64; got 'int32'"),
]


def test_metrics_may_be_plain_numbers():
    history = quiet(network(), epochs=1, metrics={"half": lambda p, t: 0.5, "rows": lambda p, t: len(t)})
    assert history["half"] == [0.5] and history["rows"][0] > 1


def test_predictions_of_no_rows_have_the_shape_of_rows():
    model = network()
    assert model.predict(X[:0]).shape == (0, *model.predict(X[:3]).shape[1:])


def test_wrong_data():
    model = network()
    with pytest.raises(ValueError, match=r"data: the rule is len\(x\) = len\(y\); got shapes \[\[96, 8\], \[95\]\]"):
        model.fit(X, Y[:-1])
    with pytest.raises(ValueError, match="batch_size: the rule is an integer ≥ 1; got 0"):
        model.fit(X, Y, batch_size=0)
    for wrong, text in WRONG_ARGUMENTS:
        with pytest.raises((ValueError, TypeError), match=text):
            model.fit(X, Y, progress=False, **wrong)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="batch_size: the rule is an integer ≥ 1"):
            model.predict(X, batch_size=wrong)
    with pytest.raises(ValueError, match="evaluate: the rule is at least one row; got 0 rows"):
        model.evaluate(X[:0], Y[:0])
    with pytest.raises(ValueError, match="a share between 0 and 1; got 2"):
        model.fit(X, Y, validation=2)
    with pytest.raises(ValueError, match="optimizer: the rule is one of sgd, adamw"):
        model.fit(X, Y, optimizer="adamm")
    with pytest.raises(ValueError, match="metrics: the rule is one of accuracy"):
        model.fit(X, Y, metrics=["f1"])
    with pytest.raises(RuntimeError, match=r"0.Linear: x: the rule is x.shape = "):
        model.fit(X[:, :5], Y, progress=False)
    with pytest.raises(IndexError, match="CrossEntropyLoss"):
        model.fit(X, Y + 7, progress=False)


def test_history(tmp_path):
    history = quiet(network(), epochs=3, validation=0.2)
    text = str(history)
    assert "epoch" in text and "val_accuracy" in text and len(text.splitlines()) == 5
    assert gl.History({"loss": [np.nan, 2.0, 1.0, np.nan]}).best("loss") == 2
    history.save(tmp_path / "h.json")
    assert json.loads((tmp_path / "h.json").read_text())["loss"] == history["loss"]
    history.plot(tmp_path / "h.png")
    assert (tmp_path / "h.png").read_bytes()[:4] == b"\x89PNG"


# --- batches ---------------------------------------------------------------------------------------------------------


def test_drop_last_leaves_the_rest_out():
    assert [len(y) for _, y in batches([X], Y, 40, "cpu", drop_last=True)] == [40, 40]
    seen = []
    quiet(network(), epochs=2, batch_size=40, drop_last=True, metrics={"rows": lambda p, t: seen.append(len(t)) or 0.0})
    assert seen == [40] * 4
    assert len(network().predict(X, batch_size=40)) == 96, "evaluation is of all rows"
    with pytest.raises(ValueError, match="fit: drop_last: the rule is at least batch_size = 97 rows; got 96"):
        quiet(network(), batch_size=97, drop_last=True)


def test_a_last_batch_of_one_is_refused_before_training():
    """Batch norm has no statistics over one row: that is said before an epoch is spent, with what helps."""
    model = gl.Sequential(gl.Linear(8, 4), gl.BatchNorm1d(4), gl.Linear(4, 2))
    before = model.state_dict()
    rule = (
        r"fit: the last batch has 1 of 96 rows, which drop_last=True leaves out: .*1.BatchNorm1d.*more than one value"
    )
    with pytest.raises(ValueError, match=rule):
        quiet(model, batch_size=19)
    assert all(np.array_equal(model.state_dict()[k], v) for k, v in before.items())
    assert np.isfinite(quiet(model, batch_size=19, drop_last=True)["loss"]).all()
    with pytest.raises(ValueError, match=r"^1.BatchNorm1d.*more than one value"):
        quiet(model, batch_size=1)
    images = gl.Sequential(gl.Reshape(2, 2, 2), gl.BatchNorm2d(2), gl.Flatten(), gl.Linear(8, 2))
    assert np.isfinite(quiet(images, batch_size=19)["loss"]).all(), "an image of its own has statistics"


class Lookup(gl.Layer):
    """x → a row of a table for the sign of each x: no gradient goes below it."""

    def build(self, input_shape):
        self.table = self.add_weight("table", (2, 3), "normal")

    def output_shape(self, input_shape):
        return (*input_shape, 3)

    def forward(self, x):
        self.save(x)
        return self.table.data[x]

    def backward(self, dy):
        np.add.at(self.table.grad, self.saved[0], dy)


class Sign(gl.Layer):
    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        return (x > 0).astype(np.int64)


def test_what_no_backward_reaches_is_not_kept():
    """Layers below an integer see no backward; what their forward kept goes with the step."""
    model = gl.Sequential(gl.Linear(8, 5), gl.ReLU(), Sign(), Lookup(), gl.Flatten(), gl.Linear(15, 2))
    seen = []
    kept = {"kept": lambda p, t: seen.append(sum(len(layer._waiting.frames) for layer in model.layers())) or 0.0}
    model(X[:4])  # waits for a backward of its own, which fit leaves alone
    waiting = sum(len(layer._waiting.frames) for layer in model.layers())
    quiet(model, metrics=kept)
    assert set(seen) == {waiting} and sum(len(layer._waiting.frames) for layer in model.layers()) == waiting


def test_rows_that_are_drawn():
    rows = np.arange(6, dtype=np.float32)[:, None]
    seen = []

    class See(gl.Layer):
        def output_shape(self, input_shape):
            return input_shape

        def forward(self, x):
            seen.extend(x[:, 0].tolist())
            return x

        def backward(self, dy):
            return dy

    gl.random.seed(0)
    gl.Sequential(See(), gl.Linear(1, 1)).fit(
        rows, rows, epochs=2, steps_per_epoch=5, batch_size=4, loss=gl.MSELoss(), progress=False
    )
    assert len(seen) == 40 and seen[:20] != seen[20:] and set(seen) == set(range(6))
    with pytest.raises(ValueError, match="steps_per_epoch: the rule is shuffle=True"):
        gl.Sequential(gl.Linear(1, 1)).fit(rows, rows, steps_per_epoch=5, shuffle=False, loss=gl.MSELoss())
    with pytest.raises(ValueError, match="steps_per_epoch: the rule is an integer ≥ 1"):
        gl.Sequential(gl.Linear(1, 1)).fit(rows, rows, steps_per_epoch=0, loss=gl.MSELoss())
