"""A layer of your own: what ``gpulayers new`` writes is right, and what ``gpulayers check`` finds is said in words."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from test_cli import refused

import gpulayers as gl
from gpulayers import cli
from gpulayers.authoring import new, subject
from gpulayers.authoring.new import KERNELS, NEURONS
from gpulayers.layers import _config
from gpulayers.testing import CheckError, check_layer, check_op

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """What a check adds to sys.path, sys.modules and the registered layers goes with the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(_config, "_registry", dict(_config._registry))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


# --- new -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.names[0])
def test_every_template_is_right(neuron, tmp_path):
    """As its own test says; its kernels are those of the library's ops, which have tests of their own."""
    file, test = new("MyLayer", neuron.names[-1], tmp_path)
    cls, arguments = subject.found(f"{file}:MyLayer"), eval(f"({neuron.arguments})") or ()
    assert check_layer(cls(*arguments), eval(neuron.input_shape), backends=(), dtypes=("float16",))
    assert f"check_layer(MyLayer({neuron.arguments}), {neuron.input_shape})" in test.read_text()
    lines = file.read_text().splitlines()
    assert len(lines) < 40 and max(map(len, lines)) <= 120


@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.names[0])
def test_every_template_can_be_checked_by_its_name_alone(neuron, tmp_path):
    file, _ = new("MyLayer", neuron.names[0], tmp_path)
    layer, call = subject.made(subject.found(f"{file}:MyLayer"), (), {})
    y = layer(*(np.ones(shape, "f") for shape in subject.input_shapes(layer)))
    assert neuron.names[0] in ("elementwise", layer.neuron_type) and call.startswith("MyLayer(") and len(y) == 4


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernels_template_is_right(kernel, tmp_path):
    pytest.importorskip({"triton": "triton", "cuda": "cupy"}[kernel])
    file, _ = new("MyLayer", "none", tmp_path, kernel)
    layer, _ = subject.made(subject.found(f"{file}:MyLayer"), (), {})
    assert check_layer(layer, (None, 3), backends=(), dtypes=())
    op = subject.found(f"{file}:my_layer")
    assert kernel in check_op(op, np.random.default_rng(0).standard_normal((3, 5)), dtypes=["float32", "bfloat16"])
    assert max(map(len, file.read_text().splitlines())) <= 120


@pytest.mark.parametrize("place, name", [("docs/kernels.md", "Square"), ("examples/custom_kernel.py", "SignedSquare")])
def test_the_kernel_that_is_shown_elsewhere_is_the_templates(place, name, tmp_path):
    file, _ = new(name, "none", tmp_path, "triton")
    written = re.sub("  # .*", "", file.read_text())
    assert written[written.index("def forward") :].strip() in (ROOT / place).read_text()


def test_the_road(tmp_path, capsys):
    """new, its test under pytest, an edit that is wrong, check."""
    assert cli.main(["new", "HalfLife"]) == 0
    assert "gpulayers check half_life.py:HalfLife" in capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_half_life.py"],
        env=os.environ | {"PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
    assert cli.main(["check", "half_life.py:HalfLife"]) == 0
    assert "HalfLife passes" in capsys.readouterr().out
    file = tmp_path / "half_life.py"
    file.write_text(file.read_text().replace("(dy * x * slope).sum()", "(dy * x * slope).mean()"))
    assert cli.main(["check", "half_life.py:HalfLife"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("HalfLife() on [4, 6]\nok  output shape\n") and "the gradient of beta is wrong" in err


NAMES = {"MyLayer": "my_layer", "RBFLayer": "rbf_layer", "Conv3x3Block": "conv3x3_block", "Étage": "étage"}


@pytest.mark.parametrize("name, module", NAMES.items())
def test_names_of_files(name, module, tmp_path):
    assert [path.name for path in new(name, folder=tmp_path)] == [f"{module}.py", f"test_{module}.py"]
    assert f"class {name}(gl.Layer)" in (tmp_path / f"{module}.py").read_text(encoding="utf-8")


WRONG = [
    (["new", "My Layer"], "new: the rule is the name of a class, as MyLayer; got 'My Layer'"),
    (["new", "class"], "the rule is the name of a class"),
    (["new", "my_layer"], "the rule is the name of a class"),
    (["new", "_Layer"], "the rule is the name of a class"),
    (["new", "../Layer"], "the rule is the name of a class"),
    (["new", ""], "the rule is the name of a class"),
    (["new", "Linear"], "new: the rule is a name that gpulayers does not have; got 'Linear'"),
    (["new", "Random"], "random.py would hide the module random"),
    (
        ["new", "Mine", "--neuron", "conv", "--kernel", "cuda"],
        "--kernel: the rule is triton or cuda, with an elementwise",
    ),
    (["new", "Mine", "--neuron", "quantum"], 'the rule is "fully connected", "convolutional", "pooling" or "elementw'),
]


@pytest.mark.parametrize("words, text", WRONG, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_names_that_are_none(tmp_path, capsys, words, text):
    assert text in refused(words, capsys) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", ["mine.py", "test_mine.py"])
def test_nothing_is_overwritten(tmp_path, capsys, there):
    (tmp_path / there).write_text("mine\n")
    assert f"new: {there} exists, and is not overwritten" in refused(["new", "Mine"], capsys)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine\n"]


def test_both_files_or_none(tmp_path, monkeypatch):
    """A disk that is full at the second file."""
    path, opened = type(tmp_path), open

    def full(file, *rest, **options):
        if path(file).name.startswith("test_"):
            raise OSError(28, "No space left on device")
        return opened(file, *rest, **options)

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match="No space"):
        new("Mine", folder=tmp_path)
    assert not list(tmp_path.iterdir())


# --- check: what a class is tried on ---------------------------------------------------------------------------------


class Wide(gl.Layer):
    def __init__(self, units, heads=2, *, kernel_size):
        self.units, self.heads, self.kernel_size = units, heads, kernel_size

    def forward(self, x):
        return x


class Sum(gl.Layer):
    def output_shape(self, a, b):
        return a

    def forward(self, a, b):
        return a + b


class Sequence(gl.Layer):
    def output_shape(self, shape):
        return shape

    def forward(self, x):
        _n, _length, _features = x.shape
        return x


def test_arguments_are_guessed_by_their_names():
    assert subject.made(Wide, (), {})[1] == "Wide(units=5, kernel_size=2)"
    assert subject.made(Wide, (9,), {"kernel_size": 3})[1] == "Wide(9, kernel_size=3)"


def test_arguments_that_cannot_be_guessed():
    class Odd(gl.Layer):
        def __init__(self, speed, in_features, colour):
            pass

    with pytest.raises(ValueError, match=r"Odd: its arguments must be said, as in --args 'speed=…, colour=…'"):
        subject.made(Odd, (), {})


SHAPES = [
    (lambda: gl.Linear(7, 3), [(4, 7)]),
    (lambda: gl.Linear(None, 3), [(4, 6)]),
    (lambda: gl.Conv2d(3, 5, 3), [(4, 3, 8, 6)]),
    (lambda: gl.Conv1d(3, 5, 3), [(4, 3, 6)]),
    (lambda: gl.ConvTranspose3d(3, 5, 3), [(4, 3, 5, 8, 6)]),
    (lambda: gl.MaxPool2d(2), [(4, 4, 8, 6)]),
    (Sum, [(4, 6), (4, 6)]),
    (Sequence, [(4, 5, 6)]),
]


@pytest.mark.parametrize("make, shapes", SHAPES, ids=lambda v: getattr(v, "__name__", ""))
def test_shapes_follow_from_the_neuron_type(make, shapes):
    assert subject.input_shapes(make()) == shapes


# --- check: likely causes --------------------------------------------------------------------------------------------

SQUARE = """import gpulayers as gl
@gl.register
class Square(gl.Layer):
    def build(self, input_shape):
        self.gain = self.add_weight("gain", (input_shape[-1],), init="ones")
    def output_shape(self, input_shape):
        return input_shape
    def forward(self, x):
        self.save(x)
        return self.gain * x * x
    def backward(self, dy):
        (x,) = self.saved
        self.gain.grad += (dy * x * x).sum(0)
        return 2 * dy * self.gain * x
"""
MISTAKES = {
    "self.save(x)\n": ("pass\n", "(at square.py:12: (x,) = self.saved); the likely cause: nothing was kept for it: forward"),
    "self.save(x)": ("self.save(x, x)", "another number of arrays from self.saved than forward gave"),
    "self.gain * x * x": ("self.gian * x * x", "(at square.py:10: return self.gian * x * x); the likely cause: it is called gain"),
    "(dy * x * x).sum(0)": ("dy * x * x", "sum over the batch, and over all that shares the weight"),
    "return self.gain * x": ("self.gain * x", "forward returned None; the likely cause: a return is missing"),
    "(input_shape[-1],)": ("input_shape", "the batch is not known in build: leave input_shape[0] out"),
    "build(self, input_shape)": ("build(self)", "it is build(self, input_shape)"),
    "forward(self, x)": ("forward(self)", "it is forward(self, x) and backward(self, dy)"),
    "2 * dy * self.gain * x": ("dy * self.gain * x", "everywhere it is off by a factor of 0.5"),
    "        self.gain.grad += (dy * x * x).sum(0)\n": ("", "the gradient of gain"),
}  # fmt: skip


@pytest.mark.parametrize("right", MISTAKES, ids=lambda s: s.strip())
def test_likely_causes_are_said(tmp_path, capsys, right):
    wrong, said = MISTAKES[right]
    (tmp_path / "square.py").write_text(SQUARE.replace(right, wrong))
    assert cli.main(["check", "square.py:Square"]) == 1
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1, err


def test_a_wrong_name_of_the_class(tmp_path, capsys):
    (tmp_path / "square.py").write_text(SQUARE)
    assert "square.py has no layer 'Sqare'; it has Square" in refused(["check", "square.py:Sqare"], capsys)
    assert "unknown dtype 'float15'" in refused(["check", "square.py:Square", "--dtypes", "float15"], capsys)


# --- reports ---------------------------------------------------------------------------------------------------------


class Doubled(gl.Layer):
    def output_shape(self, shape):
        return shape

    def forward(self, x):
        return x + x

    def backward(self, dy):
        return dy if self.training else 2 * dy


def test_a_report_is_a_table():
    report = check_layer(gl.Flatten(), (None, 2, 3), backends=(), dtypes=())
    assert report and report.fault is None and report.title.startswith("Flatten passes 30 checks, on [None, 2, 3]")
    assert str(report).isascii() and str(report).count("  ok ") == len(report) == len(report.rows())
    shown = report._repr_html_()
    assert shown.startswith("<table><caption>Flatten passes") and shown.count("<tr>") == shown.count("✓") == len(report)
    assert "Forward runs, and gives what output_shape says" in shown


def test_a_report_of_a_fault():
    report = check_layer(Doubled(), (None, 3), backends=(), raises=False)
    assert not report and report.title.startswith(f"Doubled is wrong; it passed {len(report)} of 33 checks")
    states = [state for _, state, _ in report.rows()]
    assert states == ["ok"] * len(report) + ["wrong"] + [""] * (32 - len(report))
    name, _, text = report.rows()[len(report)]
    assert name == "gradients, training" and text == str(report.fault) and "off by a factor of 0.5" in text
    with pytest.raises(CheckError) as failed:
        check_layer(Doubled(), (None, 3), backends=())
    assert failed.value.report == report and "✗" in failed.value._repr_html_()
    assert CheckError("x < 1")._repr_html_() is None


def test_the_line_that_is_named_is_the_callers_own():
    """Not one of the kernels or of NumPy, which it went through."""

    class Odd(gl.Layer):
        def output_shape(self, shape):
            return shape

        def forward(self, x):
            return self.run(gl.Conv2d.op, x, x[:, :, :2], stride=object())

        def backward(self, dy):
            return dy

    report = check_layer(Odd(), (None, 3, 4, 4), raises=False)
    assert "(at test_authoring.py:" in str(report.fault) and "stride=object())" in str(report.fault)
