"""Models in TensorFlow.js: what is exported predicts, differentiates and trains there as here."""

import copy
import json
import pathlib
import subprocess
from collections.abc import Callable

import numpy as np
from gallery import ENTRIES, importable
from npm import linked, node, node_modules
from stacks import Stack

import gpulayers as gl
from gpulayers import arrays, demo
from gpulayers.testing import tolerance

HERE = pathlib.Path(__file__).parent
TFJS = "@tensorflow/tfjs"
EPS = 2.0**-23


class Case:
    """A model, exported, with inputs and gradients of its outputs; all of them multiples of 1/8.

    shapes: of the inputs; a list is one of integers. training: None leaves each layer in the mode that it is in.
    """

    def __init__(self, folder: pathlib.Path, model: gl.Layer, *shapes: tuple, training=False, fit=None, seed=0):
        self.random = np.random.default_rng(seed)
        self.model, self.training, self.fit = model, training, fit
        self.folder, self.xs = folder, [self.draw(s) for s in shapes]
        self.ys = self.outputs()
        self.dys = [self.draw(y.shape) for y in self.ys]
        self.before = model.state_dict()
        model.export(folder)

    def draw(self, shape: tuple | list) -> np.ndarray:
        if isinstance(shape, list):
            return self.random.integers(0, 5, shape)
        return (self.random.integers(-16, 17, shape) / 8).astype(np.float32)

    def outputs(self) -> tuple:
        if self.training is not None:
            self.model.train(self.training)
        y = self.model(*self.xs)
        return y if isinstance(y, tuple) else (y,)

    def gradients(self) -> dict:
        """As predict.mjs says them."""
        self.model.load_state_dict(self.before)
        self.model.zero_grad()
        self.ys = self.outputs()
        dx = self.model.backward(*self.dys)
        dx = np.zeros(self.xs[0].shape) if dx is None else dx  # of integers
        several = lambda v: v if len(v) > 1 else v[0]  # noqa: E731
        weights = {name: w.grad for name, w in self.model.named_weights().items() if w.trainable}
        return {"y": several(self.ys), "dx": dx, "weights": weights}

    def elsewhere(self, dtype: str, move: Callable[[np.ndarray], np.ndarray]) -> dict:
        """The gradients of a copy in this dtype, weights and dys moved; inputs stay, for the sake of those that are equal."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model).to(dtype)
        for layer in other.model.layers():
            if isinstance(layer, gl.RMSNorm) and layer.eps is None:
                layer.eps = float(np.finfo(np.float32).eps)
        same = lambda a: a  # noqa: E731
        placed = lambda a, move=same: move(a).astype(dtype) if a.dtype.kind == "f" else a  # noqa: E731
        other.xs, other.dys = [placed(x) for x in self.xs], [placed(dy, move) for dy in self.dys]
        other.before = {name: placed(w, move) for name, w in self.before.items()}
        return other.gradients()

    def truth(self) -> dict:
        return self.elsewhere("float64", lambda a: a)

    def moved(self) -> list[dict]:
        """The gradients in float32 when weights and dys are a rounding away, four times."""
        rng = np.random.default_rng(0)
        return [self.elsewhere("float32", lambda a: a * (1 + rng.choice([-EPS, EPS], a.shape))) for _ in range(4)]

    def trained(self) -> dict:
        """The weights when TF.js's ``fit`` is through, after ``gradients``, for the loss sum(dy y); running state, too."""
        for _ in range(self.fit["epochs"]):
            self.model.zero_grad()
            self.model(*self.xs)
            self.model.backward(*self.dys)
            for w in self.model.trainable_weights:
                w -= self.fit["rate"] * w.grad
        return self.model.state_dict()

    def asked(self) -> dict:
        arrays = {"xs": [x.tolist() for x in self.xs], "dys": [dy.tolist() for dy in self.dys]}
        return {"folder": str(self.folder), **arrays, "training": self.training is not False, "fit": self.fit}


def run(cases: list[Case], modules: pathlib.Path, folder: pathlib.Path, backend: str = "cpu") -> list[dict]:
    """What each model does in TF.js."""
    for case in cases:
        linked(case.folder, modules)
    asked = {"backend": backend, "modules": str(modules.parent), "cases": [case.asked() for case in cases]}
    (folder / "cases.json").write_text(json.dumps(asked))
    return json.loads(node(HERE / "node" / "models.mjs", folder / "cases.json"))


def worst(got, want) -> float:
    """The largest difference, by the larger of 1 and the value."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        return max([0.0, *(worst(got[k], want[k]) for k in want)])
    if isinstance(want, tuple):
        assert len(got) == len(want)
        return max(worst(g, w) for g, w in zip(got, want))
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    return float((abs(got - want) / np.maximum(1, abs(want))).max(initial=0))


def flat(found) -> dict[str, np.ndarray]:
    """{"weights.0.bias": array} of nested dicts and tuples."""
    items = found.items() if isinstance(found, dict) else enumerate(found)
    parts = {str(k): {"": np.asarray(v)} if isinstance(v, np.ndarray) else flat(v) for k, v in items}
    return {f"{k}.{rest}".rstrip("."): a for k, inner in parts.items() for rest, a in inner.items()}


def strays(case: Case, got: dict, want: dict, bound: float) -> dict[str, str]:
    """What is further from NumPy's float32 than ``bound`` (of 1, or of the value) and from the truth than rounding explains.

    A gradient is a sum. Where its terms are large and cancel, as behind a norm of three rows, another order of summation
    alone is off by more than ``bound``, NumPy's too; so those are held to the bound of the kernels: E is what float32 is
    off by when weights and dys are a rounding away.
    """
    off = {key: worst(got[key], want[key]) for key in want}
    if all(value < bound for value in off.values()):
        return {}
    true, plain, moved = flat(case.truth()), flat(want), [flat(found) for found in case.moved()]
    wrong = {}
    for key, a in flat(arrays_like(want, got)).items():
        limit = tolerance.bound(true[key], plain[key], arrays.float32, [found[key] for found in moved])
        excess = abs(a - true[key]) / np.maximum(limit, bound * np.maximum(1, abs(true[key])))
        if not excess.max(initial=0) <= 1:
            wrong[key] = f"{excess.max():.2g} times what is allowed"
    return wrong


def arrays_like(want, got):
    """Nested lists as arrays where ``want`` has arrays."""
    if isinstance(want, dict):
        return {k: arrays_like(v, got[k]) for k, v in want.items()}
    if isinstance(want, tuple):
        return tuple(arrays_like(v, g) for v, g in zip(want, got))
    return np.asarray(got, np.float64)


def faults(cases: list[Case], found: list[dict], bound: float = 1e-5, after: float = 1e-5) -> dict[str, object]:
    """What differs, by the model; ``after``: of the weights when ``fit`` is through."""
    wrong: dict[str, object] = {}
    for case, got in zip(cases, found):
        if "error" in got:
            wrong[repr(case.model)] = got["error"]
            continue
        want = case.gradients()
        off: dict[str, object] = dict(strays(case, got, want, bound))
        if case.fit and not (moved := worst(got["after"], case.trained())) < after:
            off["after"] = moved
        if off or got["leaked"]:
            wrong[repr(case.model)] = off | {"leaked": got["leaked"]}
    return wrong


IMAGES = (2, 3, 7, 6)
ALONE = [  # layers that TF.js has, each with what it has its own way to say
    (gl.Conv2d(3, 4, 3), IMAGES),
    (gl.Conv2d(3, 4, 4, padding="same", activation="silu"), IMAGES),
    (gl.Conv2d(3, 4, (2, 3), padding=(1, 0), stride=(1, 2), bias=False), IMAGES),
    (gl.Conv2d(3, 4, 3, padding=1, stride=2), (2, 3, 8, 8)),
    (gl.Conv2d(3, 6, 3, padding=1, stride=2, groups=3, activation="relu"), IMAGES),
    (gl.MaxPool2d(2), IMAGES),
    (gl.MaxPool2d(3, 2, 1), (2, 3, 7, 5)),
    (gl.MaxPool2d(2, ceil_mode=True), (2, 3, 7, 5)),
    (gl.AvgPool2d(3, 2, 1), (2, 3, 7, 5)),
    (gl.GlobalAvgPool2d(), IMAGES),
    (gl.AdaptiveAvgPool2d((7, 3)), IMAGES),
    (gl.ZeroPad2d((1, 2, 0, 3)), IMAGES),
    (gl.LayerNorm((3, 6)), (4, 3, 6)),
    (gl.Linear(6, 3), IMAGES),
    (gl.Reshape(6, -1), IMAGES),
    (gl.Softmax(1), IMAGES),
    (gl.Softmax2d(), IMAGES),
    (gl.LogSoftmax(), (3, 4)),
    (gl.PReLU(), (3, 4)),
    (gl.PReLU(3), IMAGES),
    (gl.LeakyReLU(0.2), (3, 40)),
    *[(gl.Linear(4, 6, activation=f), (3, 4)) for f in ("relu", "tanh", "softsign", "softplus", "selu", "silu")],
    *[(f, (3, 40)) for f in (gl.Sigmoid(), gl.ELU(), gl.GELU(), gl.Mish())],
]
TOGETHER = [  # where images change between channels first and last, and where the model branches
    (gl.Sequential(gl.Conv2d(3, 4, 3), gl.Flatten(), gl.Linear(80, 4)), IMAGES),
    (gl.Sequential(gl.Conv2d(3, 4, 3), gl.GlobalAvgPool2d(), gl.Flatten(), gl.Linear(4, 4)), IMAGES),
    (gl.Sequential(gl.Conv2d(3, 3, 1), gl.LayerNorm((3, 7, 6)), gl.PReLU(3), gl.Linear(6, 2)), IMAGES),
    (gl.Sequential(gl.ReLU(), gl.MaxPool2d(2), gl.LogSoftmax(-1)), IMAGES),
    (gl.Residual(gl.Conv2d(3, 3, 3, padding=1), gl.ReLU(), shortcut=gl.Conv2d(3, 3, 1)), IMAGES),
    (gl.Residual(gl.Linear(4, 4), gl.ReLU()), (3, 4)),
    (gl.Parallel(gl.Conv2d(3, 2, 1), gl.MaxPool2d(1), gl.Sequential(gl.Flatten(2), gl.Reshape(3, 7, 6))), IMAGES),
    (gl.Parallel(gl.Conv2d(3, 2, 1), gl.Conv2d(3, 2, 1), merge="sum"), IMAGES),
    (gl.Parallel(gl.Conv2d(3, 2, 1), gl.Conv2d(3, 2, 1), axis=-2), IMAGES),
    (gl.Sequential(shared := gl.Linear(4, 4), gl.Tanh(), shared), (3, 4)),
    (gl.Sequential(), (3, 4)),
]


RECORDED = [  # … and what it has not, or has wrong: classes of their own in custom_layers.js
    (gl.Sequential(gl.Conv2d(3, 4, 3), demo.Swish(), gl.MaxPool2d(2), demo.Swish()), IMAGES),
    (
        gl.Sequential(
            *(gl.BatchNorm1d(4), gl.Hardswish(), gl.Linear(4, 3, activation="hardswish")),
            gl.BatchNorm1d(3, momentum=None),
        ),
        (5, 4),
    ),
]


class SumAndProduct(gl.Layer):
    """Two inputs, two outputs."""

    def output_shape(self, a, b):
        return a, b

    def forward(self, a, b):
        self.save(a, b)
        return a + b, a * b

    def backward(self, ds, dp):
        a, b = self.saved
        return ds + dp * b, ds + dp * a


class Block(gl.Layer):
    """Layers in a layer that has code of its own."""

    def __init__(self, size):
        self.inner, self.norms = gl.Linear(size, size), [gl.BatchNorm1d(size)]

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        return x + self.norms[0](self.inner(x))

    def backward(self, dy):
        return dy + self.inner.backward(self.norms[0].backward(dy))


class Lookup(gl.Layer):
    """Integers in."""

    def build(self, input_shape):
        self.table = self.add_weight("table", (5, 3), init="normal")

    def output_shape(self, input_shape):
        return (*input_shape, 3)

    def forward(self, ids):
        self.save(ids)
        return self.table.data[ids]

    def backward(self, dy):
        (ids,) = self.saved
        np.add.at(self.table.grad, ids, dy)


OWN = [
    (gl.Sequential(SumAndProduct()), (3, 4), (3, 4)),
    (gl.Sequential(gl.ReLU(), Block(4), gl.Linear(4, 2)), (5, 4)),
    (gl.Sequential(Lookup(), gl.Flatten(), gl.Linear(12, 2)), [2, 4]),
]


def partly_frozen() -> gl.Sequential:
    """Each in another way: a layer, one weight, statistics that stay, and dropout that is off while the rest trains."""
    model = gl.Sequential(
        gl.Linear(4, 4), gl.Linear(4, 4), gl.BatchNorm1d(4), gl.BatchNorm1d(4), gl.Dropout(), gl.Linear(4, 2)
    )
    model[0].trainable = model[2].trainable = False
    model[3].eval(), model[4].eval()
    model[1].bias.trainable = False
    return model


def exported(folder: pathlib.Path, models: list, epochs: int = 3, rate: float = 0.01) -> list[Case]:
    found = []
    for i, (model, *shapes) in enumerate(models):
        model.train()
        fit = {"epochs": epochs, "rate": rate} if model.trainable_weights else None
        found.append(Case(folder / str(i), model, *shapes, training=True, fit=fit))
    return found


def test_layers_and_containers(tmp_path):
    """What TF.js has computes the same there, forwards, backwards and through ``fit``; no tensor is left behind."""
    modules = node_modules(TFJS)
    cases = exported(tmp_path, ALONE + TOGETHER)
    assert not any("extends tf.layers.Layer" in (case.folder / "custom_layers.js").read_text() for case in cases)
    assert not faults(cases, run(cases, modules, tmp_path))


def test_recorded_layers(tmp_path):
    """… and those of one's own. Parts that do not train, or always evaluate, do so in TF.js's ``fit``, too."""
    modules = node_modules(TFJS)
    parts = Case(tmp_path / "parts", partly_frozen(), (5, 4), training=None, fit={"epochs": 3, "rate": 0.01})
    cases = [*exported(tmp_path, [*RECORDED, *OWN]), parts]
    assert not faults(cases, run(cases, modules, tmp_path))
    assert set(parts.gradients()["weights"]) == {"1.weight", "3.weight", "3.bias", "5.weight", "5.bias"}


def test_gallery(tmp_path):
    """Each of examples/custom_layers in its model: ten steps of SGD end at NumPy's weights."""
    modules = node_modules(TFJS)
    with importable():
        cases = exported(tmp_path, [(entry.model(), (2, 1, 8, 8)) for entry in ENTRIES], epochs=10, rate=1e-3)
        assert not faults(cases, run(cases, modules, tmp_path))


def test_random_stacks(tmp_path):
    """Fifty of the library's layers, one behind the other."""
    modules = node_modules(TFJS)
    models = []
    for seed in range(50):
        model, shape = Stack(seed).model(6)
        models.append((model, (3, *shape)))
    cases = exported(tmp_path, models, epochs=10, rate=1e-3)
    assert not faults(cases, run(cases, modules, tmp_path), after=1e-4)


def test_wasm(tmp_path):
    """… and on wasm, which by itself cannot train convolutions, and gives maxima that are equal another gradient."""
    modules = node_modules(TFJS, f"{TFJS}-backend-wasm")
    slopes = gl.PReLU(3)
    slopes.weight[...] = (0.5, 0.25, 0.125)
    sizes = [
        (gl.Sequential(gl.Conv1d(3, 2, 3, 2, 1), gl.MaxPool1d(2)), (2, 3, 7)),
        (gl.ConvTranspose2d(3, 2, 3, 2, 1, 1), (2, 3, 2, 3)),
    ]
    cases = exported(tmp_path, [*ALONE[:8], *TOGETHER[:3], RECORDED[0], (slopes, IMAGES), *sizes])
    assert not faults(cases, run(cases, modules, tmp_path, "wasm"))


def test_a_first_model(tmp_path):
    """npm install && node predict.mjs input.json, as the folder's reader does it."""
    modules = node_modules(TFJS)
    case = Case(tmp_path / "out", gl.Sequential(gl.Linear(64, 32), gl.ReLU(), gl.Linear(32, 10), gl.Softmax()), (5, 64))
    early = subprocess.run(["node", case.folder / "predict.mjs", "input.json"], capture_output=True, text=True)
    assert early.returncode == 1 and early.stderr.endswith(f"is not installed for {case.folder}: npm install\n")
    linked(case.folder, modules)
    for name, (array,) in {"input.json": case.xs, "dy.json": case.dys}.items():
        (tmp_path / name).write_text(json.dumps(array.tolist()))
    assert worst(json.loads(node("out/predict.mjs", "input.json", cwd=tmp_path)), case.ys[0]) < 1e-6
    (tmp_path / "few.json").write_text(json.dumps(case.dys[0][:1].tolist()))
    few = subprocess.run(
        ["node", "out/predict.mjs", "input.json", "--dy", "few.json"], cwd=tmp_path, capture_output=True
    )
    assert (
        few.stderr == b"predict.mjs: few.json: the rule is a row for each of 5 inputs; got 1\n" and few.returncode == 1
    )
    found = json.loads(node("predict.mjs", "../input.json", "--dy", "../dy.json", cwd=case.folder))
    want = case.gradients()
    assert all(worst(found[key], want[key]) < 1e-5 for key in want)
