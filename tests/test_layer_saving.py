"""A model is saved as it is now: settings, layers, flags and modes that were changed after it was made; or it is refused."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

import gpulayers as gl

X = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


def again(model, tmp_path):
    """The model as it comes back: saved and loaded, saved and loaded once more, copied, pickled."""
    gl.save(model, tmp_path / "model")
    loaded = gl.load(tmp_path / "model")
    gl.save(loaded, tmp_path / "again")
    return [loaded, gl.load(tmp_path / "again"), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]


def same(model, tmp_path, x=X):
    """It comes back as the model that it is; returns what was loaded."""
    y, models = model.predict(x), again(model, tmp_path)
    for other in models:
        assert np.array_equal(other.predict(x), y) and list(other.state_dict()) == list(model.state_dict())
    assert models[0].get_config() == models[1].get_config()
    return models[0]


@gl.register
class Block(gl.Layer):
    """y = gain · act(fc(x)) + offset, with settings, layers and a list that ``__init__`` makes."""

    shift = 0.0

    def __init__(self, width=6, *, gain=1.0):
        self.width, self.gain, self.offset, self.sizes = width * 1, gain, 0.0, [1, 2]
        self.pair = (1.0, 1.0)
        self.fc, self.act = gl.Linear(width, width), gl.ReLU()
        self.more = [gl.LeakyReLU(0.1)]
        self.calls = self.last = None

    def build(self, input_shape):
        self.late = gl.Linear(input_shape[-1], 6)
        self.power = 1.0

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        self.calls, self.last = (self.calls or 0) + 1, x
        y = self.late(self.act(self.fc(x)))
        for layer in self.more:
            y = layer(y)
        y = np.sign(y) * abs(y) ** self.power + self.pair[0] * self.pair[1] + sum(self.sizes)
        return y * self.gain + self.offset + self.shift


CHANGES = {
    "argument": lambda b: setattr(b, "gain", 3.0),
    "attribute": lambda b: setattr(b, "offset", np.float32(2)),
    "class attribute": lambda b: setattr(b, "shift", 1.5),
    "tuple": lambda b: setattr(b, "pair", (2.0, 3.0)),
    "list in place": lambda b: b.sizes.append(5),
    "of build": lambda b: setattr(b, "power", 2.0),
    "layer": lambda b: setattr(b, "act", gl.GELU()),
    "layer gone": lambda b: setattr(b, "more", []),
    "layer deleted": lambda b: b.more.pop(),
    "layer added": lambda b: b.more.append(gl.Linear(6, 6)),
    "layers again": lambda b: b.more.extend([b.more[0], b.act]),
    "layer's setting": lambda b: setattr(b.more[0], "negative_slope", 0.7),
    "late layer": lambda b: setattr(b, "late", gl.Linear(6, 6, activation="tanh")),
    "late layer's setting": lambda b: setattr(b.late, "activation", "tanh"),
    "weight gone": lambda b: setattr(b.fc, "bias", None),
    "another name": lambda b: setattr(b.fc, "name", "first"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_saved(change, tmp_path):
    block = Block()
    model = gl.Sequential(block, gl.LayerNorm(6))
    before = model.predict(X)
    CHANGES[change](block)
    loaded = same(model, tmp_path)
    if change != "another name":
        assert not np.array_equal(loaded.predict(X), before)
    else:
        assert loaded[0].fc.name == "first"
    assert loaded[0].get_config().keys() > {"class", "args", "kwargs"}, "it stays changed"


def test_what_was_not_changed_adds_nothing(tmp_path):
    model = gl.Sequential(gl.Linear(None, 6), gl.Dropout(0.2), gl.Residual(gl.BatchNorm1d(6)), gl.Conv2d(1, 1, 3))
    del model[3]
    model.fit(X, X, loss=gl.MSELoss(), progress=False)
    config = model.get_config()
    assert config["args"][1] == {"class": "Dropout", "args": [0.2], "kwargs": {}}
    assert config["args"][0] == {"class": "Linear", "args": [None, 6], "kwargs": {}, "built": [[None, 6]]}
    assert config.keys() == {"class", "args", "kwargs"}
    assert gl.Tanh().get_config() == {"class": "Tanh", "args": [], "kwargs": {}}
    block = Block()
    block.predict(X)
    assert block.get_config() == {"class": "Block", "args": [], "kwargs": {}, "built": [[None, 6]]}


def test_settings_of_built_in_layers(tmp_path):
    model = gl.Sequential(gl.Dropout(0.5), gl.LeakyReLU(0.1), gl.Softmax())
    model[0].p, model[1].negative_slope, model[2].dim = 0.0, 0.5, 0
    assert repr(model) == "Sequential(Dropout(0.0), LeakyReLU(0.5), Softmax())"
    loaded = same(model, tmp_path)
    assert loaded[0].p == 0.0 and loaded[2].dim == 0
    wide = gl.Sequential(gl.Linear(None, 4))
    wide[0].out_features = 8  # before it is built
    assert wide.predict(X).shape == (4, 8)
    same(wide, tmp_path)
    images = np.ones((1, 1, 6, 6), np.float32)
    pool = gl.MaxPool2d(2)
    pool(images)
    pool.kernel_size = 3
    assert pool(images).shape == (1, 1, 2, 2), "no shape is remembered from before"
    assert same(pool, tmp_path, images).kernel_size == 3
    net = gl.Sequential(gl.Linear(6, 6), gl.Residual(gl.Tanh(), shortcut=gl.Linear(6, 6)))
    net(X)
    net[1].shortcut = None
    net[1][0] = gl.Linear(6, 6)
    net[0] = gl.Sequential(gl.Linear(6, 12), gl.Linear(12, 6))
    same(net, tmp_path)


@gl.register
class Net(gl.Sequential):
    """A container whose arguments are no layers."""

    def __init__(self, width):
        super().__init__(gl.Linear(6, width), gl.ReLU(), gl.Linear(width, 6))


def test_a_container_that_makes_its_layers(tmp_path):
    net = Net(5)
    assert same(net, tmp_path).get_config() == {"class": "Net", "args": [5], "kwargs": {}}
    net[0].activation = "tanh"
    same(net, tmp_path)
    net[1] = gl.LeakyReLU(0.5)
    net.append(gl.Linear(6, 4))
    assert [layer.name for layer in same(net, tmp_path)] == ["0.Linear", "1.LeakyReLU", "2.Linear", "3.Linear"]


def test_a_shape_that_changed_is_no_error():
    model = gl.Sequential(gl.Sequential(gl.Linear(6, 4)))
    assert model(X).shape == (4, 4)
    model[0][0] = gl.Linear(6, 3)
    assert model(X).shape == (4, 3)
    many = gl.Sequential(gl.ReLU())
    for rows in range(1, 200):
        many(np.ones((rows, 2), np.float32))
    assert len(many._output_shapes) < 100


def test_what_cannot_be_saved_is_refused(tmp_path):
    for change, text in (
        (lambda b: setattr(b, "offset", np.ones(6)), r"Block.offset was changed, and cannot be saved as it is now"),
        (lambda b: setattr(b, "shift", lambda: 0), r"Block.shift was changed"),
        (lambda b: setattr(b, "forward", lambda x: x), r"Block.forward was changed"),
        (lambda b: setattr(b, "act", type("Unknown", (gl.ReLU,), {})()), r"Block.act was changed.*not registered"),
        (
            lambda b: setattr(b, "_hidden", [type("Unknown", (gl.ReLU,), {})()]),
            r"Block._hidden was changed.*not registered",
        ),
    ):
        block = Block()
        change(block)
        with pytest.raises(TypeError, match=text):
            gl.save(block, tmp_path / "model")
        assert not (tmp_path / "model").exists()
    noted = Block()
    noted.predict(X)  # what calls leave behind, and notes, are no settings
    noted.last, noted.note, noted._cache = None, SimpleNamespace(), np.ones(3)
    same(noted, tmp_path)


def test_dicts_and_numbers_in_settings(tmp_path):
    block = Block()
    block.offset = 0.25
    block.table = {1: "a", "class": (2, None), (1, 2): {"again": 3}}
    loaded = same(block, tmp_path)
    assert loaded.table == {1: "a", "class": (2, None), (1, 2): {"again": 3}}


def test_frozen_flags_and_modes_are_saved(tmp_path):
    model = gl.Sequential(gl.Linear(6, 6), gl.BatchNorm1d(6), gl.Residual(gl.Linear(6, 6)), gl.BatchNorm1d(6))
    model[0].bias.trainable = False
    model[1].trainable = False
    model[2][0].trainable = False
    model[2][0].weight.trainable = True
    model[3].eval()
    model(X)
    for other in again(model, tmp_path):
        flags = [(n, w.trainable) for n, w in model.named_weights().items()]
        assert [(n, w.trainable) for n, w in other.named_weights().items()] == flags
        parts = list(zip(other.layers(), model.layers()))
        assert all((a.trainable, a.training) == (b.trainable, b.training) for a, b in parts)
        assert not other[3].training and not other[1].trainable and other.training
        assert other[1].running_mean.learned is False and other[0].bias.learned is True


def test_regularizers_and_constraints_are_saved_as_they_are(tmp_path):
    model = gl.Sequential(gl.Linear(6, 6), gl.PReLU())
    model[0].weight.regularizer, model[0].weight.constraint = gl.L2(0.1), gl.MaxNorm(2.0)
    model[1].weight.regularizer = gl.L1(0.1)
    model[1].weight.regularizer.rate = 0.7
    for other in again(model, tmp_path):
        assert isinstance(other[0].weight.regularizer, gl.L2) and other[0].weight.constraint.most == 2.0
        assert other[1].weight.regularizer.rate == 0.7
    model[0].weight.regularizer = lambda w: (0, w)
    with pytest.raises(TypeError, match=r"0.weight: regularizer: an argument of type function cannot be saved"):
        gl.save(model, tmp_path / "model")


def test_resuming_keeps_what_is_shared_and_frozen(tmp_path):
    def model():
        gl.random.seed(1)
        made = gl.Sequential(gl.Linear(6, 6), gl.BatchNorm1d(6), gl.Tanh(), gl.Linear(6, 6))
        made[3].weight = made[0].weight
        made[1].trainable = False
        return made

    def fitted(made, epochs, **options):
        return made.fit(X, X, loss=gl.MSELoss(), epochs=epochs, batch_size=2, progress=False, **options)

    whole = model()
    fitted(whole, 4)
    fitted(model(), 2, callbacks=[gl.Checkpoint(tmp_path / "run")])
    resumed = model()
    fitted(resumed, 4, resume=tmp_path / "run", callbacks=[gl.Checkpoint(tmp_path / "run")])
    for other in (resumed, gl.load(tmp_path / "run")):
        assert other[3].weight is other[0].weight and not other[1].trainable
        assert all(np.array_equal(v, other.state_dict()[k]) for k, v in whole.state_dict().items())
