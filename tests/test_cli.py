"""The command line, and that the README's table is what it prints."""

import gzip
import pathlib
import runpy
import struct

import numpy as np
import pytest

from gpulayers import cli, demo, inventory

ROOT = pathlib.Path(__file__).parents[1]


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(op.name in out for op in inventory.ops()) and "ml_dtypes" in out and "cpu" in out


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


EVERY_OP = {
    "conv2d": ["8,3,32,32", "16,3,3,3"],
    "cross_entropy": ["8,10", "8:int64"],
    "nll_loss": ["8,10", "8:int64", "10"],
    "dropout": ["8,3", "2:int64"],
    "rrelu": ["8,3", "2:int64"],
    "linear": ["4,8", "3,8", "-"],
    "prelu": ["4,8", "8"],
    "mse": ["4,8", "4,8"],
    "batch_norm": ["4,8", "8", "8", "8", "8"],
    "layer_norm": ["4,8", "--options", "normalized_shape=[8]"],
    "rms_norm": ["4,8", "--options", "normalized_shape=[8]"],
    "max_pool2d": ["4,3,8,8", "--options", "kernel_size=[2, 2], stride=1"],
    "avg_pool2d": ["4,3,8,8", "--options", "kernel_size=2"],
    "adaptive_avg_pool2d": ["4,3,8,8", "--options", "output_size=1"],
    "pad2d": ["4,3,8,8", "--options", "padding=1"],
    "threshold": ["4,8", "--options", "threshold=0.0, value=0.0"],
    "sgd_update": ["[8", "3,4]", "[8", "3,4]"],
    "adamw_update": ["[8]", "[8]", "[8]", "[8]"],
}


@pytest.mark.parametrize("op", inventory.ops(), ids=lambda op: op.name)
def test_every_op_is_explained(op, capsys):
    """Its text names what it takes, and --shapes and --options can say any call of it."""
    assert cli.main(["explain", op.name]) == 0
    assert "_empty" not in capsys.readouterr().out
    assert cli.main(["explain", op.name, "--shapes", *EVERY_OP.get(op.name, ["4,8"])]) == 0
    assert "computes it" in capsys.readouterr().out


def test_wrong_arguments(tmp_path, capsys):
    """A message in one line, before anything is trained."""
    (tmp_path / "file").touch()
    (tmp_path / "layers.py").write_text("import gpulayers as gl\nclass Mine(gl.ReLU): pass\n")
    for words, text in (
        (["explain", "max_pool2d", "--shapes", "4,3,8,8"], "option kernel_size is required"),
        (["explain", "relu", "--shapes", "4", "--options", "1+"], "--options: the rule is arguments as in"),
        (["explain", "relu", "--shapes", "4:float15"], "unknown dtype 'float15'"),
        (["check", f"{tmp_path}/layers.py:Mine", "--input-shape", "4,3", "--args", "x y"], "--args: the rule is"),
        (["train", "digits", "--epochs", "0"], "the rule is epochs ≥ 1"),
        (["train", "digits", "--batch-size", "0"], "batch size ≥ 1"),
        (["train", "digits", "--device", "tpu", "--out", str(tmp_path / "run")], "to: the rule is cpu, cuda"),
        (["train", "digits", "--out", str(tmp_path / "file")], "File exists"),
    ):
        assert cli.main(words) == 1
        out, err = capsys.readouterr()
        assert text in err and "epoch" not in out and "Traceback" not in err


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
