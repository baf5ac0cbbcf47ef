"""What is reported: of all rows, whatever the batches; which way is better; a history whose rows are the epochs."""

import json
import math

import numpy as np
import pytest
import torch

import gpulayers as gl
from gpulayers.train import accuracy
from gpulayers.train.metrics import mode

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((24, 5)).astype(np.float32)
Y = RANDOM.integers(0, 3, 24)
Y[:9] = -100  # the first batch of four, or of eight, has ignored targets alone
WEIGHT = [1.0, 5.0, 0.2]


def network(seed: int = 1) -> gl.Sequential:
    gl.random.seed(seed)
    return gl.Sequential(gl.Linear(5, 3))


LOSSES = [
    {"ignore_index": -100},
    {"weight": WEIGHT},
    {"weight": WEIGHT, "label_smoothing": 0.1},
    {"reduction": "sum"},
]


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_the_loss_is_that_of_all_rows_at_once(options):
    """torch's, over ignored targets and class weights, for every size of batch; training reports the same."""
    model = network()
    kind = {k: torch.tensor(v) if k == "weight" else v for k, v in options.items()}
    logits = torch.tensor(model.predict(X))
    wanted = float(torch.nn.functional.cross_entropy(logits, torch.tensor(Y), **kind))
    hits = (logits.argmax(1).numpy() == Y).sum() / (Y >= 0).sum()
    loss = gl.CrossEntropyLoss(**options)
    for size in (1, 4, 8, 24, 99):
        found = model.evaluate(X, Y, loss=loss, batch_size=size, metrics=["accuracy"])
        assert found["loss"] == pytest.approx(wanted, rel=1e-6) and found["accuracy"] == pytest.approx(hits, rel=1e-12)
    before = model.state_dict()
    history = model.fit(
        X, Y, loss=loss, batch_size=4, metrics=["accuracy"], progress=False, optimizer=gl.SGD(0.0), validation=(X, Y)
    )
    for prefix in ("", "val_"):
        assert history[f"{prefix}loss"] == [pytest.approx(wanted, rel=1e-6)]
        assert history[f"{prefix}accuracy"] == [pytest.approx(hits, rel=1e-12)]
    assert all(np.array_equal(model.state_dict()[k], v) for k, v in before.items())


def test_the_loss_over_probabilities_and_rows_of_pixels():
    p = RANDOM.random((24, 3)).astype(np.float32)
    model, loss = network(), gl.CrossEntropyLoss(WEIGHT)
    wanted = torch.nn.functional.cross_entropy(torch.tensor(model.predict(X)), torch.tensor(p), torch.tensor(WEIGHT))
    assert model.evaluate(X, p, loss=loss, batch_size=7)["loss"] == pytest.approx(float(wanted), rel=1e-6)
    gl.random.seed(1)
    pixels = gl.Conv2d(1, 3, 1)
    images, labels = X.reshape(6, 1, 4, 5), np.resize(Y, (6, 4, 5))
    wanted = torch.nn.functional.nll_loss(torch.tensor(pixels.predict(images)), torch.tensor(labels))
    found = pixels.evaluate(images, labels, loss=gl.NLLLoss(), batch_size=4, metrics=["accuracy"])
    assert found["loss"] == pytest.approx(float(wanted), rel=1e-5)
    right = pixels.predict(images).argmax(1) == labels
    assert found["accuracy"] == pytest.approx(right[labels >= 0].mean(), rel=1e-12)


def test_nothing_to_judge_is_nan_and_moves_nothing():
    model, nothing = network(), np.full(24, -100)
    before = model.state_dict()
    history = model.fit(X, nothing, optimizer=gl.SGD(0.1), progress=False, metrics=["accuracy"])
    assert math.isnan(history["loss"][0]) and math.isnan(history["accuracy"][0])
    assert all(np.array_equal(model.state_dict()[k], v) for k, v in before.items())


def test_a_loss_may_say_what_it_divides_by():
    class OverPositive(gl.Layer):
        def output_shape(self, *shapes):
            return ()

        def forward(self, x, target):
            return np.float32((x[:, 0] * target).sum() / target.sum())

        def mean_over(self, x, target):
            return target.sum()

    model, target = network(), (Y > 0).astype(np.float32)
    wanted = (model.predict(X)[:, 0] * target).sum() / target.sum()
    assert model.evaluate(X, target, loss=OverPositive(), batch_size=5)["loss"] == pytest.approx(wanted, rel=1e-5)


def test_metrics_may_be_sums_and_counts():
    """A mean over a batch's rows counts by its rows; (sum, count) by what was counted."""
    model = network()
    positive = {
        "share": lambda p, t: ((p[:, 0] > 0).sum(), len(p)),
        "top": lambda p, t: (p[t > 0, 1].sum(), (t > 0).sum()),
    }
    found = model.evaluate(X, Y, metrics=positive, batch_size=7)
    out = model.predict(X)
    assert found["share"] == (out[:, 0] > 0).mean() and found["top"] == pytest.approx(out[Y > 0, 1].mean(), rel=1e-5)


ONE_HOT = np.eye(3, dtype=np.float32)


def test_accuracy_of_every_kind_of_target():
    scores = RANDOM.standard_normal((50, 3, 2)).astype(np.float32)
    labels = RANDOM.integers(0, 3, (50, 2))
    wanted = float((scores.argmax(1) == labels).mean())
    hot = np.moveaxis(ONE_HOT[labels], -1, 1)
    for target in (labels, labels[:, None], hot, hot.astype(np.int64), 0.2 + 0.5 * hot, labels.astype(np.float32)):
        assert float(accuracy(scores, target)) == pytest.approx(wanted, rel=1e-12)
    flat, plain = scores[:, :, 0], labels[:, 0]
    wanted = float((flat.argmax(1) == plain).mean())
    for target in (plain, plain[:, None], ONE_HOT[plain]):
        assert float(accuracy(flat, target)) == pytest.approx(wanted, rel=1e-12)
    kept = plain != 2
    assert float(accuracy(flat, plain, 2)) == pytest.approx((flat.argmax(1) == plain)[kept].mean(), rel=1e-12)
    assert float(accuracy(torch.tensor(flat), torch.tensor(plain))) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    "prediction, target", [((8, 3), (4,)), ((8, 3), (8, 2)), ((8, 1), (8,)), ((8,), (8,)), ((8, 3), (1, 8))]
)
def test_accuracy_refuses_what_would_broadcast(prediction, target):
    rule = r"accuracy: the rule is prediction \(N, C, \*d\) with C ≥ 2, target \(N, \*d\)"
    with pytest.raises(ValueError, match=rule):
        accuracy(np.zeros(prediction), np.zeros(target, int))


@pytest.mark.parametrize("name", ["loss", "lr", "seconds", "val_accuracy", 3])
def test_names_of_metrics_do_not_hide_others(name):
    with pytest.raises(ValueError, match=r"metrics: the rule is a name other than loss, lr, seconds and val_…; got"):
        network().fit(X, Y, metrics={name: lambda p, t: 0.0}, progress=False)


def test_metrics_are_functions():
    with pytest.raises(TypeError, match=r"metrics: f1: the rule is a function of \(prediction, target\); got 'f1'"):
        network().evaluate(X, Y, metrics={"f1": "f1"})


# --- which way is better ---------------------------------------------------------------------------------------------


def test_modes():
    falling = ["loss", "val_loss", "rmse", "val_error_rate", "accuracy_loss", "word-error", "lr", "seconds"]
    rising = ["accuracy", "val_accuracy", "top5accuracy", "f1", "val_f1", "AUC", "mean_iou", "r2_score", "recall@5"]
    assert {mode(name) for name in falling} == {"min"} and {mode(name) for name in rising} == {"max"}
    assert mode("quality", "max") == "max" and mode("accuracy", "min") == "min"
    for name, given in (("quality", None), ("loss", "lowest")):
        with pytest.raises(ValueError, match=f'{name}: mode: the rule is "min" or "max" where the name does not say'):
            mode(name, given)
    with pytest.raises(ValueError, match='quality: mode: the rule is "min" or "max"'):
        gl.EarlyStopping("quality")


def stopped(values: list[float], **options) -> tuple[gl.History, float]:
    """Training whose weight is the epoch, and whose metric has these values, under EarlyStopping(**options)."""
    model, at = gl.Sequential(gl.Linear(1, 2)), iter(values)

    class Counting(gl.Callback):
        def on_epoch_end(self, run):
            model[0].bias.data[...] = run.epoch

    name = options["monitor"]
    history = model.fit(
        np.ones((2, 1)), np.zeros(2, int), epochs=len(values), metrics={name: lambda p, t: next(at)}, progress=False,
        callbacks=[Counting(), gl.EarlyStopping(**options)],
    )  # fmt: skip
    return history, float(model[0].bias.data[0])


def test_early_stopping_knows_what_is_better():
    rises = [0.1, 0.5, 0.9, 0.3, 0.2, 0.1, 0.0]
    for options in ({"monitor": "f1"}, {"monitor": "quality", "mode": "max"}):
        history, best = stopped(rises, patience=2, **options)
        assert history.epochs == 5 and best == 2 and history.best(options["monitor"], "max") == 2
    history, best = stopped([-v for v in rises], monitor="quality", mode="min", patience=2)
    assert history.epochs == 5 and best == 2 and history.best("quality", "min") == 2


def test_the_best_checkpoint(tmp_path):
    model, at = network(), iter([0.2, 0.7, 0.4, 0.6])
    callbacks = [gl.Checkpoint(tmp_path / "best", monitor="f1"), gl.Checkpoint(tmp_path / "last")]
    model.fit(X, Y, epochs=4, metrics={"f1": lambda p, t: next(at)}, batch_size=24, progress=False, callbacks=callbacks)
    epochs = {n: json.loads((tmp_path / n / "training.json").read_text())["epoch"] for n in ("best", "last")}
    assert epochs == {"best": 2, "last": 4}
    with pytest.raises(ValueError, match="Checkpoint: every: the rule is an integer ≥ 1; got 0"):
        gl.Checkpoint("x", every=0)


# --- history ---------------------------------------------------------------------------------------------------------


def test_a_metric_that_comes_later_stands_in_its_epochs(tmp_path):
    """Resumed with others: every column has a number for every epoch, and the plot draws them where they belong."""
    callbacks = [gl.Checkpoint(tmp_path / "run")]
    network().fit(X, Y, epochs=2, progress=False, metrics={"old": lambda p, t: 1.0}, callbacks=callbacks)
    history = network().fit(
        X, Y, epochs=3, progress=False, metrics=["accuracy"], validation=(X, Y), callbacks=callbacks,
        resume=tmp_path / "run",
    )  # fmt: skip
    assert {len(column) for column in history.values()} == {3}
    missing = {name: [math.isnan(v) for v in column] for name, column in history.items()}
    assert missing["accuracy"] == missing["val_loss"] == [True, True, False]
    assert missing["old"] == [False, False, True] and missing["loss"] == [False] * 3
    assert history.best("val_accuracy") == 2 and len(str(history).splitlines()) == 5
    figure = history.plot(tmp_path / "h.png")
    lines = {a.get_title(): [line.get_xydata()[-1].tolist() for line in a.lines] for a in figure.axes}
    assert lines["accuracy"] == [[3.0, history["accuracy"][2]], [3.0, history["val_accuracy"][2]]]
    history.save(tmp_path / "h.json")
    strict = json.loads((tmp_path / "h.json").read_text(), parse_constant=pytest.fail)
    assert strict["accuracy"][:2] == [None, None] and strict["loss"] == history["loss"]


def test_a_monitor_that_is_measured_no_more_is_missed(tmp_path):
    callbacks = lambda *more: [gl.Checkpoint(tmp_path / "run"), *more]  # noqa: E731
    options = dict(progress=False, callbacks=callbacks(gl.EarlyStopping("val_loss")))
    network().fit(X, Y, epochs=1, validation=(X, Y), **options)
    with pytest.raises(KeyError, match="EarlyStopping: monitor: the rule is one of loss, lr, seconds; got 'val_loss'"):
        network().fit(X, Y, epochs=2, resume=tmp_path / "run", **options)


def test_uneven_columns_are_drawn():
    figure = gl.History({"loss": [3.0, 2.0, 1.0], "val_loss": [2.0]}).plot()
    assert [len(line.get_xydata()) for line in figure.axes[0].lines] == [3, 1]


# --- several outputs -------------------------------------------------------------------------------------------------


class Both(gl.Layer):
    """x → (x, 2x)."""

    def output_shape(self, input_shape):
        return (input_shape, input_shape)

    def forward(self, x):
        return x, 2 * x

    def backward(self, a, b):
        return a + 2 * b


class Sum(gl.Layer):
    """Mean squared error of the sum of two outputs."""

    def output_shape(self, *shapes):
        return ()

    def forward(self, a, b, target):
        self.save(error := a + b - target)
        return (error * error).mean()

    def backward(self, dy):
        (error,) = self.saved
        dx = dy * 2 * error / error.size
        return dx, dx, None


def test_several_outputs_are_predicted_judged_and_trained():
    model = gl.Sequential(*network(), Both())
    a, b = model.predict(X, batch_size=7)
    alone = gl.Sequential(model[0]).predict(X)
    assert np.array_equal(a, alone) and np.array_equal(b, 2 * alone)
    target = RANDOM.standard_normal((24, 3)).astype(np.float32)
    metrics = {"first": lambda p, t: p[0].mean()}
    before = model.evaluate(X, target, loss=Sum(), batch_size=7, metrics=metrics)
    assert before["loss"] == pytest.approx(((3 * alone - target) ** 2).mean(), rel=1e-5)
    assert before["first"] == pytest.approx(alone.mean(), rel=1e-4)
    history = model.fit(X, target, loss=Sum(), epochs=30, optimizer=gl.SGD(0.1), progress=False)
    best = np.linalg.lstsq(np.c_[X, np.ones(24)], target, rcond=None)
    assert history["loss"][-1] < before["loss"] and history["loss"][-1] >= best[1].sum() / target.size


def test_an_output_without_rows_is_no_prediction():
    class Total(Both):
        def output_shape(self, input_shape):
            return ()

        def forward(self, x):
            return x.sum()

    with pytest.raises(ValueError, match=r"predict: the rule is outputs of a row for each of 24 rows; got \[\]"):
        gl.Sequential(Total()).predict(X)
