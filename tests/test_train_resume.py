"""Checkpoints: training goes on from one to the same bits, whatever takes part in it; and loses nothing."""

import json
import math

import numpy as np
import pytest
import torch

import gpulayers as gl
from gpulayers.train import _checkpoint

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((66, 8)).astype(np.float32)
Y = (X[:, :4].sum(1) > X[:, 4:].sum(1)).astype(np.int64)


@gl.register
class Stretched(gl.Layer):
    """The mean squared error of s · prediction; s is a weight of the loss."""

    def build(self, input_shape, target_shape):
        self.s = self.add_weight("s", (), 1.0)

    def output_shape(self, *shapes):
        return ()

    def forward(self, x, target):
        error = self.s * x - target
        self.save(x, error)
        return (error * error).mean()

    def backward(self, dy):
        x, error = self.saved
        g = 2 * dy * error / error.size
        self.s.grad += (g * x).sum()
        return g * self.s, None


def network(seed: int = 1) -> gl.Sequential:
    gl.random.seed(seed)
    return gl.Sequential(gl.Linear(8, 16), gl.BatchNorm1d(16), gl.ReLU(), gl.Dropout(0.3), gl.Linear(16, 2))


def quiet(model, **options):
    defaults = dict(epochs=4, batch_size=16, progress=False, metrics=["accuracy"], optimizer=gl.AdamW(1e-2))
    return model.fit(X, Y, **(defaults | options))


class Falling(gl.Callback):
    """Halves the learning rate after every epoch, unfreezes the first layer after the second."""

    def on_epoch_end(self, run):
        run.optimizer.lr /= 2
        run.model[0].weight.trainable = run.epoch >= 1


TRAININGS = {
    "AdamW": dict(optimizer=lambda: gl.AdamW(1e-2), validation=0.25),
    "SGD": dict(optimizer=lambda: gl.SGD(0.05, momentum=0.9, nesterov=True), drop_last=True),
    "a schedule": dict(optimizer=lambda: gl.SGD(lambda step: 0.1 / (1 + step), momentum=0.9, dampening=0.1)),
    "a falling rate": dict(optimizer=lambda: gl.AdamW(2e-2), more=Falling),
    "float16": dict(optimizer=lambda: gl.AdamW(1e-2), precision="float16", clip_norm=0.5),
    "class weights": dict(optimizer=lambda: gl.AdamW(1e-2), loss=lambda: gl.CrossEntropyLoss([1.0, 3.0])),
    "a weight of the loss": dict(optimizer=lambda: gl.SGD(0.1, momentum=0.9), loss=Stretched, target=X[:, :2]),
    "patience": dict(optimizer=lambda: gl.AdamW(0.1), monitor="val_loss", patience=3, validation=(X, 1 - Y)),
}


def train(
    path, epochs, resume=None, *, optimizer, more=None, monitor="loss", patience=9, target=Y, loss=None, **options
):
    """(history, the model's and the loss's weights) of a training that writes its checkpoint to ``path``."""
    model = network(1 if resume is None else 99)
    if more is Falling:
        model[0].weight.trainable = False
    judge = loss() if loss else None
    callbacks = [gl.Checkpoint(path), gl.EarlyStopping(monitor, patience), *([more()] if more else [])]
    history = model.fit(
        X, target, epochs=epochs, batch_size=16, optimizer=optimizer(), loss=judge, callbacks=callbacks, resume=resume,
        progress=False, **options,
    )  # fmt: skip
    del history["seconds"]
    weights = model.state_dict() | ({f"loss/{n}": a for n, a in judge.state_dict().items()} if judge else {})
    return history, weights


@pytest.mark.parametrize("name", TRAININGS)
def test_resuming_gives_the_same_bits(tmp_path, name):
    """After each epoch: weights, history, random numbers; EarlyStopping's best weights and patience."""
    history, weights = train(tmp_path / "whole", 6, **TRAININGS[name])
    drawn = gl.random.draw()
    assert (history.epochs < 6) == (name == "patience") and ("loss/s" in weights) == ("loss" in name)
    for epoch in (1, 3):
        train(tmp_path / "run", epoch, **TRAININGS[name])
        again, resumed = train(tmp_path / "run", 6, resume=tmp_path / "run", **TRAININGS[name])
        assert again == history and weights.keys() == resumed.keys()
        assert all(np.array_equal(resumed[n], a) for n, a in weights.items()), f"resumed after {epoch}"
        assert np.array_equal(gl.random.draw(), drawn)


def test_a_checkpoint_is_a_saved_model(tmp_path):
    model = network()
    quiet(model, callbacks=[gl.Checkpoint(tmp_path / "run")])
    assert np.array_equal(gl.load(tmp_path / "run").predict(X), model.predict(X))


def test_a_losss_own_weights_are_trained_as_torchs(tmp_path):
    """Zeroed in every step, regularised, clipped together with the model's, and brought back with the best epoch."""
    model, loss, target = gl.Sequential(gl.Linear(8, 2)), Stretched(), X[:, :2]
    w, b = (torch.nn.Parameter(torch.tensor(model.state_dict()[n])) for n in ("0.weight", "0.bias"))
    s = torch.nn.Parameter(torch.tensor(1.0))
    reference = torch.optim.SGD([w, b, s], lr=0.5)
    for _ in range(5):
        reference.zero_grad()
        x = torch.tensor(X)
        ((s * (x @ w.T + b) - torch.tensor(target)) ** 2).mean().backward()
        torch.nn.utils.clip_grad_norm_([w, b, s], 0.3)
        reference.step()
    model[0].weight.grad = np.ones((2, 8), np.float32)  # of an earlier backward
    model.fit(X, target, loss=loss, optimizer=gl.SGD(0.5), epochs=5, batch_size=66, clip_norm=0.3, progress=False)
    assert float(loss.s.data) == pytest.approx(s.item(), rel=1e-5) and not loss.s.has_grad
    np.testing.assert_allclose(model[0].weight.data, w.detach().numpy(), rtol=1e-4, atol=1e-6)

    class Spoil(gl.Callback):
        def on_epoch_end(self, run):
            run.loss.s.data[...] = 9

    kept = float(loss.s.data)
    model.fit(
        X, target, loss=loss, optimizer=gl.SGD(0.0), epochs=3, progress=False,
        callbacks=[gl.EarlyStopping("loss"), Spoil()],
    )  # fmt: skip
    assert float(loss.s.data) == kept


def test_checkpoints_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "run"
    quiet(network(), callbacks=[gl.Checkpoint(path)])
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    written = _checkpoint.write_arrays

    def full(file, state):
        if file.name == "training.safetensors":
            raise OSError("no space left on device")
        written(file, state)

    monkeypatch.setattr(_checkpoint, "write_arrays", full)
    with pytest.raises(OSError, match="no space"):
        quiet(network(), epochs=1, callbacks=[gl.Checkpoint(path)])
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_a_truncated_checkpoint_changes_nothing(tmp_path):
    path = tmp_path / "run"
    quiet(network(), callbacks=[gl.Checkpoint(path)])
    whole = (path / "training.safetensors").read_bytes()
    (path / "training.safetensors").write_bytes(whole[: len(whole) // 2])
    model = network(3)
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"training.safetensors: it is damaged or cut off"):
        quiet(model, resume=path, callbacks=[gl.Checkpoint(path)])
    assert all(np.array_equal(model.state_dict()[k], v) for k, v in before.items())
    (path / "training.safetensors").write_bytes(whole)
    with pytest.raises(
        ValueError, match=r"SGD: the rule is the same optimizer, SGD with .*; the state is that of AdamW"
    ):
        quiet(model, resume=path, optimizer="sgd", callbacks=[gl.Checkpoint(path)])
    with pytest.raises(ValueError, match=r"the rule is the same callbacks, \[\]; the checkpoint has \['Checkpoint'\]"):
        quiet(model, resume=path)
    with pytest.raises(ValueError, match="the rule is the same callbacks"):
        quiet(model, resume=path, callbacks=[gl.EarlyStopping("loss")])
    whole = json.loads((path / "training.json").read_text())
    for name, value in (("random", None), ("scale", 3), ("history", []), ("callbacks", [1])):
        (path / "training.json").write_text(json.dumps(whole | {name: value}))
        with pytest.raises(ValueError, match=r"training.json: it is damaged, or of another version"):
            quiet(model, resume=path, callbacks=[gl.Checkpoint(path)])
    assert all(np.array_equal(model.state_dict()[k], v) for k, v in before.items())


def test_another_state_of_the_optimizer_is_not_resumed(tmp_path):
    quiet(network(), optimizer=gl.SGD(), callbacks=[gl.Checkpoint(tmp_path / "run")])
    with pytest.raises(
        ValueError, match=r"SGD with the state \['momentum'\]; the state is that of SGD with the state \[\]"
    ):
        quiet(network(), optimizer=gl.SGD(momentum=0.9), resume=tmp_path / "run", callbacks=[gl.Checkpoint("x")])


def test_another_monitor_is_not_resumed(tmp_path):
    stopping = lambda monitor, mode=None: [gl.Checkpoint(tmp_path / "run"), gl.EarlyStopping(monitor, mode=mode)]  # noqa: E731
    quiet(network(), epochs=1, callbacks=stopping("loss"))
    model = network(3)
    before = model.state_dict()
    for other in (stopping("accuracy"), stopping("loss", "max")):
        with pytest.raises(
            ValueError, match=r"EarlyStopping: the rule is the same monitor and mode, .*\('loss', 'min'\)"
        ):
            quiet(model, epochs=2, resume=tmp_path / "run", callbacks=other)
    assert all(np.array_equal(model.state_dict()[k], v) for k, v in before.items())


def test_another_model_or_loss_is_not_resumed(tmp_path):
    """By the optimizer's names, and by the weights of the loss; before anything changes."""
    options = dict(callbacks=[gl.Checkpoint(tmp_path / "run")], progress=False, optimizer="sgd")
    model = gl.Sequential(gl.Linear(8, 2))
    model.fit(X, X[:, :2], loss=Stretched(), **options)
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"the rule is the state of 0.weight, 0.bias; it is that of loss/s"):
        model.fit(X, X[:, :2], loss=gl.MSELoss(), resume=tmp_path / "run", **options)
    other = gl.Sequential(gl.Flatten(), gl.Linear(8, 2))
    with pytest.raises(ValueError, match=r"the state of 1.weight, 1.bias, loss/s; it is that of 0.bias, 0.weight"):
        other.fit(X, X[:, :2], loss=Stretched(), resume=tmp_path / "run", **options)
    assert all(np.array_equal(model.state_dict()[k], v) for k, v in before.items())


def test_checkpoints_come_after_all_callbacks(tmp_path):
    """What a callback that stands after Checkpoint changes is in the checkpoint."""

    class Late(gl.Callback):
        def on_epoch_end(self, run):
            run.optimizer.lr = 0.25

    path = tmp_path / "run"
    quiet(network(), epochs=1, callbacks=[gl.Checkpoint(path), Late()])
    assert json.loads((path / "training.json").read_text())["optimizer"]["options"]["lr"] == 0.25
    assert math.isclose(quiet(network(), epochs=2, callbacks=[gl.Checkpoint(path), Late()], resume=path)["lr"][1], 0.25)
