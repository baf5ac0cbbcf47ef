"""The command line, and that the README's table is what it prints."""

import gzip
import pathlib
import runpy
import struct

import numpy as np
import pytest

from gpulayers import cli, demo

ROOT = pathlib.Path(__file__).parents[1]


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(op.name in out for op in cli.ops()) and "ml_dtypes" in out and "cpu" in out


def test_python_m_gpulayers_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpulayers", "explain", "softmax"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("gpulayers", run_name="__main__")
    assert end.value.code == 0 and "softmax" in capsys.readouterr().out


def test_explain(capsys):
    assert cli.main(["explain", "softmax", "--shapes", "4,8"]) == 0
    out = capsys.readouterr().out
    assert "y = exp(x − max x)" in out and "its kernels take CUDA arrays" in out and "computes it" in out
    assert cli.main(["explain", "softmaxx"]) == 1
    assert "no op 'softmaxx'; there are" in capsys.readouterr().err
    assert cli.main(["explain", "linear", "--shapes", "4,8", "3,9"]) == 1
    assert "linear: " in capsys.readouterr().err


def test_check(tmp_path, capsys):
    file = tmp_path / "layers.py"
    file.write_text(
        "import gpulayers as gl\n"
        "class Double(gl.Layer):\n"
        "    def __init__(self, factor=2.0): self.factor = factor\n"
        "    def output_shape(self, s): return s\n"
        "    def forward(self, x): return self.factor * x\n"
        "    def backward(self, dy): return 2 * dy\n"
    )
    assert cli.main(["check", f"{file}:Double", "--input-shape", "4,3"]) == 0
    assert "Double passes" in capsys.readouterr().out
    assert cli.main(["check", f"{file}:Double", "--input-shape", "4,3", "--args", "factor=3.0"]) == 1
    assert "off by a factor of 0.6667" in capsys.readouterr().err
    assert cli.main(["check", f"{file}:Triple", "--input-shape", "4,3"]) == 1
    assert cli.main(["check", str(file), "--input-shape", "4,3"]) == 1
    assert "the rule is FILE.py:Class" in capsys.readouterr().err


def test_train_digits(tmp_path, capsys):
    """One epoch of the main job: a plot, a saved model that predicts the same bits."""
    pytest.importorskip("sklearn")
    assert cli.main(["train", "digits", "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "loaded again, it predicts the same bits" in out and "convolutional" in out
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["history.json", "learning_curve.png", "model"]


def write_idx(path: pathlib.Path, array: np.ndarray) -> None:
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


def test_train_mnist(tmp_path, capsys):
    """The MNIST loader, on files made in its format."""
    random = np.random.default_rng(0)
    for name, n in zip(demo.MNIST_FILES, (64, 64, 32, 32)):
        shape = (n, 28, 28) if "images" in name else (n,)
        write_idx(tmp_path / f"{name}.gz", random.integers(0, 256 if len(shape) == 3 else 10, shape).astype(np.uint8))
    folder = ["--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert cli.main(["train", "mnist", "--epochs", "1", *folder]) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    (tmp_path / f"{demo.MNIST_FILES[0]}.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x09short"))
    assert cli.main(["train", "mnist", *folder]) == 1
    assert "no IDX file of bytes, or cut off" in capsys.readouterr().err
    assert cli.main(["train", "mnist", "--data", str(tmp_path / "no")]) == 1
    assert "MNIST is the four files" in capsys.readouterr().err


def test_readme_table():
    text = (ROOT / "README.md").read_text()
    shown = text.split("<!-- ops -->")[1].split("<!-- /ops -->")[0].strip()
    assert shown == cli.ops_markdown(), f"README.md must show:\n{cli.ops_markdown()}"
