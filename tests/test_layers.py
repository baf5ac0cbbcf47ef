"""Layers made of layers, weights, config, saved models."""

import copy
import json
import pickle

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.layers import _files
from gpulayers.layers._config import from_config
from gpulayers.testing import check_layer


@gl.register
class Scale(gl.Layer):
    """y = w x; the smallest layer with a weight."""

    def __init__(self, start=2.0, regularizer=None, constraint=None):
        self.start, self.regularizer, self.constraint = start, regularizer, constraint

    def build(self, input_shape):
        shape = input_shape[1:]
        self.w = self.add_weight("w", shape, self.start, regularizer=self.regularizer, constraint=self.constraint)

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        self.save(x)
        return x * self.w

    def backward(self, dy):
        (x,) = self.saved
        self.w.grad += (dy * x).sum(0)
        return dy * self.w


X = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


def test_containers():
    check_layer(gl.Sequential(Scale(), gl.Softmax()), (None, 6))
    check_layer(gl.Residual(Scale(), Scale(0.5)), (None, 6))
    check_layer(gl.Residual(Scale(), shortcut=Scale(3.0)), (None, 6))
    check_layer(gl.Parallel(Scale(), gl.Sequential(Scale(), Scale()), axis=1), (None, 6))
    check_layer(gl.Parallel(Scale(), Scale(), merge="sum"), (None, 6))
    check_layer(gl.Sequential(gl.Reshape(2, -1), gl.Flatten()), (None, 6))
    check_layer(gl.Flatten(0, 1), (2, 3, 4))
    assert gl.Sequential()(X) is X


def test_a_container_sums_what_its_parts_give():
    model = gl.Parallel(Scale(2.0), Scale(3.0), axis=1)
    y = model(X)
    assert np.array_equal(y, np.concatenate([X * 2, X * 3], 1))
    assert np.array_equal(model.backward(np.ones_like(y)), np.full_like(X, 5))


def test_a_layer_used_twice_has_one_weight():
    scale = Scale()
    model = gl.Sequential(scale, gl.Softmax(), scale)
    model(X)
    assert list(model.named_weights()) == ["0.w"] and len(model.weights) == 1
    again = gl.layers._config.from_config(model.get_config())
    assert again[0] is again[2]


def test_shapes_are_checked():
    with pytest.raises(
        RuntimeError, match=r"Residual: the rule is f\(x\).shape = shortcut\(x\).shape; got \[4, 12\] and \[4, 6\]"
    ):
        gl.Residual(gl.Parallel(Scale(), Scale()))(X)
    with pytest.raises(RuntimeError, match=r"Parallel: the rule is equal shapes from every branch"):
        gl.Parallel(Scale(), gl.Reshape(3, 2), merge="sum")(X)
    with pytest.raises(
        RuntimeError, match=r"Reshape: the rule is the product of \[4\] = that of x.shape\[1:\]; got \[4, 6\]"
    ):
        gl.Reshape(4)(X)
    with pytest.raises(ValueError, match=r"the rule is sizes ≥ 0, at most one of them −1"):
        gl.Reshape(-1, -1)
    with pytest.raises(TypeError, match=r"Sequential: argument 1: the rule is a Layer; got 'relu'"):
        gl.Sequential(Scale(), "relu")
    with pytest.raises(
        TypeError, match=r"Scale\(start, regularizer, constraint\): got an unexpected keyword argument 'begin'"
    ):
        Scale(begin=1)


def test_calls_are_checked():
    layer = Scale()
    with pytest.raises(RuntimeError, match=r"Scale: backward without a forward before it"):
        layer.backward(X)
    layer(X)
    with pytest.raises(
        RuntimeError, match=r"Scale: dy: the rule is dy.shape, dtype = float32\[4, 6\]; got float64\[4, 6\]"
    ):
        layer.backward(X.astype(np.float64))
    assert layer.backward(X).shape == X.shape  # the frame was not lost
    with gl.no_grad():
        layer(X)
    with pytest.raises(RuntimeError, match=r"or the forward ran under no_grad"):
        layer.backward(X)
    with pytest.raises(TypeError, match=r"Scale: x: expected a NumPy, CuPy or torch array, got builtins.list"):
        layer([1.0])
    with pytest.raises(RuntimeError, match=r"save\(…\) keeps arrays for backward"):
        layer.save("model")
    with pytest.raises(NotImplementedError, match=r"Bare must say its output_shape"):
        type("Bare", (gl.Layer,), {"forward": lambda self, x: x})()(X)


def test_forgotten_backwards_are_named():
    layer = Scale()
    with pytest.warns(RuntimeWarning, match=r"1000 forwards wait for their backward; use `with gl.no_grad"):
        for _ in range(1000):
            layer(X)


def test_modes_and_freezing():
    model = gl.Sequential(Scale(), gl.Residual(Scale()))
    assert not any(layer.training for layer in model.eval().layers())
    assert all(layer.training for layer in model.train().layers())
    model(X)
    model[0].w.trainable = False
    assert [w.trainable for w in model.weights] == [False, True] and len(model.trainable_weights) == 1


def test_weights_in_array_code():
    layer = Scale()
    layer(X)
    w = layer.w
    assert np.array_equal(np.exp(w) + 1 - w * 2, np.exp(w.data) + 1 - w.data * 2)
    assert np.sum(w) == 12 and (X @ w).shape == (4,) and w[0] == 2
    with pytest.raises(ValueError, match=r"the rule is shape = \[6\]; got \[5\]"):
        w.data = np.zeros(5)
    with pytest.raises(ValueError, match=r"it has a weight 'w' already"):
        layer.add_weight("w")
    with pytest.raises(ValueError, match=r"init: the rule is one of zeros, ones"):
        layer.add_weight("v", (2,), init="he")


def test_initial_weights_follow_the_seed():
    def draw():
        gl.random.seed(7)
        return gl.Sequential(Scale("kaiming_normal")), gl.random.draw()

    (a, s), (b, t) = draw(), draw()
    a.build((None, 6)), b.build((None, 6))
    assert np.array_equal(s, t) and a[0].w.shape == (6,)


def test_state_dict():
    model = gl.Sequential(Scale(), gl.Residual(Scale(), shortcut=Scale()))
    with pytest.raises(RuntimeError, match=r"is not built: call the model once"):
        model.state_dict()
    model.build((None, 6))
    state = model.state_dict()
    assert list(state) == ["0.w", "1.0.w", "1.shortcut.w"]
    with pytest.raises(KeyError, match=r"lacks \['1.0.w'\] and has unknown \['x'\]"):
        model.load_state_dict({k: v for k, v in state.items() if k != "1.0.w"} | {"x": X})
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"equal shapes; got 1.0.w: \[6\] ← \[5\]"):
        model.load_state_dict({k: np.zeros(5) if k == "1.0.w" else v + 1 for k, v in state.items()})
    assert all(np.array_equal(before[k], v) for k, v in model.state_dict().items())
    torch = pytest.importorskip("torch")
    model.load_state_dict({k: torch.full((6,), 5.0) for k in state})
    assert model[0].w.data.tolist() == [5.0] * 6


def test_save_and_load(tmp_path):
    model = gl.Sequential(Scale(1.5, gl.L2(0.1), gl.NonNegative()), gl.Softmax(dim=1))
    y = model(X)
    gl.save(model, tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "weights.safetensors"]
    again = gl.load(tmp_path / "model")
    assert np.array_equal(again(X), y)
    assert again[0].w.regularizer.rate == 0.1 and isinstance(again[0].w.constraint, gl.NonNegative)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(copied(X), y)


def test_a_failed_save_loses_nothing(tmp_path, monkeypatch):
    model = gl.Sequential(Scale())
    y = model(X)
    gl.save(model, tmp_path / "model")

    def full(*_):
        raise OSError("no space left on device")

    model[0].w.data = model[0].w.data * 7
    monkeypatch.setattr(_files, "write_arrays", full)
    with pytest.raises(OSError, match=r"no space"):
        gl.save(model, tmp_path / "model")
    assert np.array_equal(gl.load(tmp_path / "model")(X), y)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_damaged_models(tmp_path):
    model = gl.Sequential(Scale())
    model(X)
    path = tmp_path / "model"
    with pytest.raises(FileNotFoundError, match=r"no such folder"):
        gl.load(path)
    gl.save(model, path)
    whole = (path / "weights.safetensors").read_bytes()
    (path / "weights.safetensors").write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"weights.safetensors: it is damaged or cut off"):
        gl.load(path)
    (path / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights.safetensors is missing"):
        gl.load(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(ValueError, match=r"format 1; got 99"):
        gl.load(path)
    (path / "config.json").write_text('{"format": 1,')
    with pytest.raises(ValueError, match=r"config.json: it is damaged or cut off"):
        gl.load(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"is a file"):
        gl.save(model, tmp_path / "file")


def test_only_registered_classes_are_saved():
    class Unknown(Scale):
        pass

    with pytest.raises(TypeError, match=r"Unknown is not registered: write @gl.register above the class"):
        Unknown().get_config()
    with pytest.raises(TypeError, match=r"Scale: an argument of type function cannot be saved"):
        Scale(lambda shape, random: np.ones(shape)).get_config()
    with pytest.raises(KeyError, match=r"Nowhere is not registered here"):
        gl.layers._config.from_config({"class": "Nowhere", "args": [], "kwargs": {}})
    with pytest.raises(ValueError, match=r"'Scale' is already"):
        gl.register(Unknown, name="Scale")


def test_summary():
    model = gl.Sequential(Scale(), gl.Residual(Scale()), gl.Softmax())
    text = model.summary((None, 6))
    assert "0.Scale" in text and "  0.Scale" in text and "(N, 6)" in text
    assert "12 parameters (12 trainable), 48 B; outputs 72 B a row" in text


def test_sixteen_bit_in_sixteen_bit_out():
    layer = Scale()
    for dtype in (np.float16, gl.arrays.bfloat16):
        y = layer(X.astype(dtype))
        dx = layer.backward(y)
        assert y.dtype == dx.dtype == dtype and layer.w.grad.dtype == np.float32
    assert Scale().to("float64")(X).dtype == np.float32


def test_neuron_types_bring_weights_and_op(forgotten):
    """A layer of one of the three types writes only what differs."""

    @gl.register
    class WithGain(gl.FullyConnected):
        def __init__(self, in_features, out_features):
            super().__init__(in_features, out_features)
            self.gain = self.add_weight("gain", (), 2.0)

        def forward(self, x):
            y = super().forward(x)
            self.save(y)
            return y * self.gain

        def backward(self, dy):
            (y,) = self.saved
            self.gain.grad += (dy * y).sum()
            return super().backward(dy * self.gain)

    @gl.register
    class Doubled(gl.Convolutional):
        def forward(self, x):
            return 2 * super().forward(x)

        def backward(self, dy):
            return super().backward(2 * dy)

    @gl.register
    class SquaredMean(gl.Pooling):
        op = gl.ops.pooling.avg_pool

        def __init__(self, size):
            self.size = size

        def options(self):
            return {"kernel_size": self.size}

        def forward(self, x):
            self.save(x)
            return super().forward(x * x)

        def backward(self, dy):
            (x,) = self.saved
            return 2 * x * super().backward(dy)

    check_layer(WithGain(5, 3), (None, 5))
    check_layer(Doubled(2, 3, 3), (None, 2, 5, 5))
    check_layer(SquaredMean(2), (None, 2, 4, 4))
    types = [layer.neuron_type for layer in (WithGain(5, 3), Doubled(2, 3, 3), SquaredMean(2))]
    assert types == ["fully connected", "convolutional", "pooling"]
    assert issubclass(gl.Linear, gl.FullyConnected) and issubclass(gl.Conv2d, gl.Convolutional)
    assert issubclass(gl.MaxPool2d, gl.Pooling)


@pytest.mark.parametrize(
    "mine, theirs, shape",
    [
        (lambda: gl.Linear(6, 4), lambda nn: nn.Linear(6, 4), (5, 6)),
        (lambda: gl.Conv2d(4, 6, 3, 2, 1, groups=2), lambda nn: nn.Conv2d(4, 6, 3, 2, 1, groups=2), (2, 4, 7, 7)),
        (lambda: gl.BatchNorm2d(4), lambda nn: nn.BatchNorm2d(4), (3, 4, 5, 5)),
        (lambda: gl.GroupNorm(2, 4), lambda nn: nn.GroupNorm(2, 4), (3, 4, 5)),
        (
            lambda: gl.InstanceNorm2d(4, affine=True, track_running_stats=True),
            lambda nn: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            (3, 4, 5, 5),
        ),
        (lambda: gl.LayerNorm((4, 5)), lambda nn: nn.LayerNorm((4, 5)), (3, 4, 5)),
        (lambda: gl.RMSNorm(6), lambda nn: nn.RMSNorm(6), (3, 6)),
    ],
)
def test_weights_move_freely_to_and_from_torch(mine, theirs, shape):
    """Names, layouts and results are torch.nn's, both ways."""
    torch = pytest.importorskip("torch")
    layer, module = mine(), theirs(torch.nn)
    assert {k: v.shape for k, v in layer.state_dict().items()} == {
        k: tuple(v.shape) for k, v in module.state_dict().items()
    }
    layer.load_state_dict(module.state_dict())
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.testing.assert_allclose(layer(x), module(torch.tensor(x)).detach().numpy(), rtol=1e-4, atol=1e-5)
    module.load_state_dict({k: torch.tensor(v) for k, v in layer.state_dict().items()})


def test_axes_are_counted_from_the_end_too():
    check_layer(gl.Parallel(gl.Linear(6, 3), gl.Linear(6, 2), axis=-1), (None, 4, 6))
    with pytest.raises(IndexError, match=r"Parallel: axis: the rule is -2 ≤ axis < 2; got 5"):
        gl.Parallel(gl.ReLU(), gl.Tanh(), axis=5)(X)
    with pytest.raises(IndexError, match=r"Flatten: start_dim: the rule is -2 ≤ start_dim < 2; got 3"):
        gl.Flatten(3)(X)


@gl.register
class Halves(gl.Layer):
    """The columns in two parts."""

    def output_shape(self, input_shape):
        return ((input_shape[0], 2), (input_shape[0], input_shape[1] - 2))

    def forward(self, x):
        return x[:, :2], x[:, 2:]

    def backward(self, *dys):
        return np.concatenate(dys, 1)


@gl.register
class Times(gl.Layer):
    def output_shape(self, *input_shapes):
        return input_shapes[0]

    def forward(self, a, b):
        self.save(a, b)
        return a * b

    def backward(self, dy):
        a, b = self.saved
        return dy * b, dy * a


def test_several_outputs_go_on_as_several_inputs():
    model = gl.Sequential(Halves(), Times(), gl.Linear(2, 3))
    check_layer(model, (None, 4))
    assert "(N, 2) (N, 2)" in model.summary((None, 4))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_model_of_another_dtype_comes_back_in_it(tmp_path, dtype):
    model = gl.Sequential(gl.Linear(6, 5), gl.BatchNorm1d(5)).to(dtype)
    x = X.astype(model[0].weight.dtype)
    gl.save(model.eval(), tmp_path / "model")
    again = gl.load(tmp_path / "model").eval()
    assert again[0].weight.dtype == x.dtype and np.array_equal(again(x), model(x))
    with pytest.raises(TypeError, match=r"Sequential: to: the rule is .* a dtype ∈ .*; got 'int32'"):
        model.to("int32")


def test_save_removes_nothing_but_models(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"one with a saved model alone; it holds thesis.txt"):
        gl.save(gl.ReLU(), tmp_path / "notes")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"
    gl.save(gl.ReLU(), tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for _ in range(2):
        gl.save(gl.Tanh(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and isinstance(gl.load(tmp_path / "model"), gl.Tanh)


def test_numpy_numbers_are_arguments():
    layer = gl.Sequential(gl.Linear(np.int64(6), 4), gl.LayerNorm(np.int64(4)), gl.Softmax(np.int64(1)))
    assert from_config(layer.get_config())(X).shape == (4, 4)


def of(**methods):
    """A layer whose forward and output_shape are x and its shape, but for ``methods``."""
    plain = dict(forward=lambda self, x: x, output_shape=lambda self, shape: shape)
    return type("Mine", (gl.Layer,), plain | methods)()


def test_faults_of_a_layer_name_it():
    for wrong, error, text in (
        (dict(output_shape=lambda self, s: None), TypeError, r"output_shape: the rule is a tuple of sizes.*; got None"),
        (dict(forward=lambda self, x: [x]), TypeError, r"forward returned no array: .*builtins.list"),
        (
            dict(output_shape=lambda self, s: (s, (s[0], 3)), forward=lambda self, x: (x, x)),
            RuntimeError,
            r"= \[4, 6\] and \[4, 3\]; got \[4, 6\] and \[4, 6\]",
        ),
    ):
        with pytest.raises(error, match=f"Mine: .*{text}"):
            of(**wrong)(X)
    for wrong, text in (
        (("w", (-1,)), r"Mine: w: the rule is a shape of integers ≥ 0; got \(-1,\)"),
        (("w", (2.0,)), r"Mine: w: the rule is a shape of integers ≥ 0"),
        (("w", (4,), lambda shape, random: np.ones(3)), r"Mine: w: the rule is init\(…\).shape = \[4\]; got \[3\]"),
        (("a.b", (4,)), r"Mine: add_weight: the rule is a name without dots; got 'a.b'"),
    ):
        with pytest.raises(ValueError, match=text):
            of().add_weight(*wrong)
    with pytest.raises(TypeError, match=r"check_layer: layer: the rule is a Layer, as MyLayer\(\); got <class"):
        check_layer(gl.ReLU, (None, 4))
    with pytest.raises(TypeError, match=r"check_layer: inputs: the rule is a shape or an array for each input; got"):
        check_layer(gl.ReLU(), 4)
