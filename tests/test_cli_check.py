"""``gpulayers check``: a layer of your own from a file, wherever it lies and whatever it imports."""

import sys

import pytest

from gpulayers import cli
from gpulayers.layers import _config

DOUBLE = """import gpulayers as gl
{imports}
class Double(gl.Layer):
    def __init__(self, factor={factor}): self.factor = factor
    def output_shape(self, s): return s
    def forward(self, x): return self.factor * x
    def backward(self, dy): return {factor} * dy
"""


@pytest.fixture(autouse=True)
def path(monkeypatch, tmp_path):
    """What a check adds to sys.path, sys.modules and the registered layers goes with the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(_config, "_registry", dict(_config._registry))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def write(file, imports="", factor="2.0"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(DOUBLE.format(imports=imports, factor=factor))
    return file


def checked(target, capsys, *more) -> tuple[int, str, str]:
    status = cli.main(["check", str(target), "--input-shape", "4,3", *more])
    return status, *capsys.readouterr()


def test_check(tmp_path, capsys):
    file = write(tmp_path / "layers.py")
    status, out, _ = checked(f"{file}:Double", capsys)
    assert status == 0 and "Double passes" in out
    status, _, err = checked(f"{file}:Double", capsys, "--args", "factor=3.0")
    assert status == 1 and "off by a factor of 0.6667" in err


@pytest.mark.parametrize("name", ["C:\\layers.py", "time 12:30/my layers.py", "my-layers", "numpy.py"])
def test_paths_of_every_kind(tmp_path, capsys, name):
    """Colons, spaces, no suffix, the name of a module that is something else."""
    file = write(tmp_path / name)
    status, out, err = checked(f"{file}:Double", capsys)
    assert status == 0 and "Double passes" in out, err


def test_neighbours_are_imported(tmp_path, capsys):
    """As a script's are."""
    (tmp_path / "factors_here.py").write_text("TWO = 2.0\n")
    file = write(tmp_path / "layers.py", "from factors_here import TWO", "TWO")
    assert checked(f"{file}:Double", capsys)[0] == 0


def test_a_packages_modules_are_imported_relatively(tmp_path, capsys):
    inner = tmp_path / "work" / "mine" / "inner"
    file = write(inner / "layers.py", "from ..numbers import TWO\nimport beside", "TWO")
    for name in ("__init__.py", "../__init__.py"):
        (inner / name).touch()
    (inner / "beside.py").touch()
    (inner.parent / "numbers.py").write_text("TWO = 2.0\n")
    status, out, err = checked(f"{file}:Double", capsys)
    assert status == 0 and "Double passes" in out, err


WRONG = [
    ("def", "layers.py: SyntaxError: invalid syntax (layers.py, line 1)"),
    (
        "import gpulayers\n\nimport nothing_like_it\n",
        "layers.py:3: ModuleNotFoundError: No module named 'nothing_like_it'",
    ),
    ("raise SystemExit('usage: …')", "layers.py:1: SystemExit: usage: …"),
    ("x = 1 / 0", "layers.py:1: ZeroDivisionError: division by zero"),
    ("Double = 3", "layers.py has no layer 'Double'"),
    (
        "import gpulayers as gl\nclass Double(gl.Layer):\n    def __init__(self): assert 0, 'no'",
        "Double(): AssertionError: no",
    ),
]


@pytest.mark.parametrize(
    "text, said", WRONG, ids=[said.split(": ")[1] if ": " in said else "none" for _, said in WRONG]
)
def test_what_cannot_be_checked_is_one_line(tmp_path, capsys, text, said):
    file = tmp_path / "layers.py"
    file.write_text(text)
    status, out, err = checked(f"{file}:Double", capsys)
    assert status == 2 and not out and err.count("\n") == 1 and said in err


def test_targets_and_shapes_that_are_none(tmp_path, capsys):
    file = write(tmp_path / "layers.py")
    for target in (file, f"{file}:", f"{tmp_path}:Double", f"{file}x:Double", "C:\\layers.py"):
        status, _, err = checked(target, capsys)
        assert status == 2 and "the rule is FILE.py:Class; got" in err
    for shape in ("4,-3", "4,three", "4,,3"):
        assert cli.main(["check", f"{file}:Double", "--input-shape", shape]) == 2
        assert f"the rule is a shape of integers ≥ 0, as in 8,3,32,32; got {shape!r}" in capsys.readouterr().err
    for arguments, said in (("x y", "--args: the rule is"), ("speed=3", "Double(speed=3): TypeError: Double(factor)")):
        status, _, err = checked(f"{file}:Double", capsys, "--args", arguments)
        assert status == 2 and said in err and err.count("\n") == 1


def test_a_layer_that_raises_is_a_layer_that_fails(tmp_path, capsys):
    file = tmp_path / "layers.py"
    file.write_text(DOUBLE.format(imports="", factor="2.0").replace("self.factor * x", "x.nothing"))
    status, _, err = checked(f"{file}:Double", capsys)
    assert status == 1 and err.startswith("gpulayers: Double: ") and "AttributeError: " in err and err.count("\n") == 1
