"""The command line, and that the README's table is what it prints."""

import gzip
import os
import pathlib
import runpy
import struct
import subprocess
import sys

import numpy as np
import pytest

import gpulayers as gl
from gpulayers import cli, demo, inventory
from gpulayers._console import nearest

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
    assert cli.main(["explain", "softmaxx"]) == 2
    assert "no op 'softmaxx'; there are" in capsys.readouterr().err
    assert cli.main(["explain", "linear", "--shapes", "4,8", "3,9"]) == 2
    assert "linear: " in capsys.readouterr().err


EVERY_OP = {
    "attention": ["2,4,8,16", "2,2,9,16", "2,2,9,16"],
    "attention_decode": ["2,4,1,16", "2,2,9,16", "2,2,9,16", "2:int64"],
    "kv_append": ["2,2,9,16", "2,2,9,16", "2,2,1,16", "2,2,1,16", "2:int64"],
    "rotary_append": ["2,4,1,16", "2,2,1,16", "2,2,1,16", "2,2,9,16", "2,2,9,16", "9,8", "9,8", "2:int64"],
    "conv": ["8,3,32,32", "16,3,3,3"],
    "conv_transpose": ["8,16,32,32", "16,3,3,3"],
    "cross_entropy": ["8,10", "8:int64"],
    "linear_cross_entropy": ["8,16", "10,16", "8:int64"],
    "nll_loss": ["8,10", "8:int64", "10"],
    "dropout": ["8,3", "2:int64"],
    "rrelu": ["8,3", "2:int64"],
    "linear": ["4,8", "3,8", "-"],
    "linears": ["4,8", "3,8", "5,8"],
    "prelu": ["4,8", "8"],
    "mse": ["4,8", "4,8"],
    "ctc_loss": ["8,2,5", "2,3:int64", "2:int64", "2:int64"],
    "multilabel_margin": ["4,8", "4,8:int64"],
    "row_loss": ["4,8", "4,8", "4,8", "--options", "loss='triplet_margin'"],
    "pointwise_loss": ["4,8", "4,8", "--options", "loss='l1'"],
    "batch_norm": ["4,8", "8", "8", "8", "8"],
    "conv_batch_norm": ["8,3,32,32", "16,3,3,3", "-", "16", "16", "16", "16"],
    "group_norm": ["4,8,3", "--options", "num_groups=2"],
    "instance_norm": ["4,8,3", "8", "8", "8", "8"],
    "local_response_norm": ["4,8,3", "--options", "size=5"],
    "layer_norm": ["4,8", "--options", "normalized_shape=[8]"],
    "rms_norm": ["4,8", "--options", "normalized_shape=[8]"],
    "add_layer_norm": ["4,8", "4,8", "--options", "normalized_shape=[8]"],
    "add_rms_norm": ["4,8", "4,8", "--options", "normalized_shape=[8]"],
    "max_pool": ["4,3,8,8", "--options", "kernel_size=[2, 2], stride=1"],
    "avg_pool": ["4,3,8,8", "--options", "kernel_size=2"],
    "fractional_max_pool": ["4,3,8,8", "2:int64", "--options", "kernel_size=2, output_size=4"],
    "max_unpool": ["4,3,8,8", "4,3,8,8:int64", "--options", "output_size=16"],
    "adaptive_max_pool": ["4,3,8,8", "--options", "output_size=2"],
    "lp_pool": ["4,3,8,8", "--options", "kernel_size=2, norm_type=2"],
    "adaptive_avg_pool": ["4,3,8,8", "--options", "output_size=1"],
    "pad": ["4,3,8,8", "--options", "padding=1"],
    "affine_grid": ["4,2,3", "--options", "size=5"],
    "grid_sample": ["4,3,8,8", "4,5,6,2"],
    "interpolate": ["4,3,8,8", "--options", "size=5"],
    "unfold": ["4,3,8,8", "--options", "kernel_size=2"],
    "fold": ["4,12,49", "--options", "output_size=8, kernel_size=2"],
    "pixel_shuffle": ["4,12,8,8", "--options", "upscale_factor=2"],
    "pixel_unshuffle": ["4,3,8,8", "--options", "downscale_factor=2"],
    "channel_shuffle": ["4,6,8,8", "--options", "groups=3"],
    "rotary": ["2,4,6,8", "6,4", "6,4"],
    "matmul": ["4,8", "8,6"],
    "one_hot": ["4,8:int64", "--options", "num_classes=3"],
    "pairwise_distance": ["4,8", "4,8"],
    "cosine_similarity": ["4,8", "4,8"],
    "embedding": ["20,8", "4,6:int64"],
    "embedding_bag": ["20,8", "4,6:int64"],
    "recurrent": ["3,2,8", "8,8", "2,8", "--options", "mode='rnn_tanh'"],
    "threshold": ["4,8", "--options", "threshold=0.0, value=0.0"],
    "sgd_update": ["[8", "3,4]", "[8", "3,4]"],
    "adamw_update": ["[8]", "[8]", "[8]", "[8]"],
    "optimizer_update": ["[8]", "[8]"],
    "layerwise_update": ["[8]", "[8]", "[8]"],
    "grad_norm": ["[8", "3,4]"],
}


@pytest.mark.parametrize("op", list(inventory.ops()), ids=lambda op: op.name)
def test_every_op_is_explained(op, capsys):
    """Its text names what it takes, and --shapes and --options can say any call of it."""
    assert cli.main(["explain", op.name]) == 0
    assert "_empty" not in capsys.readouterr().out
    assert cli.main(["explain", op.name, "--shapes", *EVERY_OP.get(op.name, ["4,8"])]) == 0
    assert "computes it" in capsys.readouterr().out


WRONG = [
    (["explain", "max_pool", "--shapes", "4,3,8,8"], "option kernel_size is required"),
    (["explain", "relu", "--shapes", "4", "--options", "1+"], "--options: the rule is arguments as in"),
    (["explain", "relu", "--shapes", "4", "--options", "1"], "--options: the rule is name=value, …; got '1'"),
    (["explain", "relu", "--shapes", "4:float15"], "unknown dtype 'float15'"),
    (["explain", "softmax", "--shapes", "4,8", "--options", "axis=5"], "axis: the rule is -2 ≤ axis < 2; got 5"),
    (["explain", "softmax", "--shapes=-4,8"], "the rule is a shape of integers ≥ 0, as in 8,3,32,32; got '-4,8'"),
    (["explain", "softmax", "--shapes", "-4,8"], "unrecognized arguments: -4,8"),
    (["explain", "softmax", "--shapes", "4,,8"], "the rule is a shape of integers"),
    (
        ["explain", "softmax", "--shapes", "[4,8]"],
        "softmax: --shapes: the rule is a list only for an input that is one",
    ),
    (["explain", "sgd_update", "--shapes", "[8", "[8]"], "--shapes: the rule is a list as [8 3,4]; got [8 [8]"),
    (["explain", "sgd_update", "--shapes", "[8", "8"], "--shapes: the rule is a list as [8 3,4]; got [8 8"),
    (["explain", "sgd_update", "--shapes", "8]"], "--shapes: the rule is a list as [8 3,4]; got 8]"),
    (["train", "digits", "--epochs", "0"], "--epochs: the rule is an integer ≥ 1; got '0'"),
    (["train", "digits", "--batch-size", "many"], "--batch-size: the rule is an integer ≥ 1; got 'many'"),
    (["train", "digits", "--seed", "-1"], "--seed: the rule is an integer ≥ 0; got '-1'"),
    (["train", "digits", "--device", "tpu", "--out", "{tmp}/run"], "to: the rule is cpu, cuda"),
    (["train", "digits", "--out", "{tmp}/file"], "File exists"),
    (["bench", "softmaxx", "--cpu"], "bench: no family 'softmaxx'; there are activation, "),
    (["bench", "--cpu", "--minutes", "-1"], "--minutes: the rule is a number > 0; got '-1'"),
    (["bench", "--cpu", "--seconds", "nan"], "--seconds: the rule is a number > 0; got 'nan'"),
    (["export", "{tmp}/no", "--out", "{tmp}/out"], "no: no such folder"),
    (["export", "{tmp}", "--out", "{tmp}/out"], "config.json is missing; this is no saved model"),
    (["tune", "softmaxx"], "tune: no family 'softmaxx'"),
    (["audit", "softmaxx"], "audit: no family 'softmaxx'"),
    (["audit", "softmax", "--diff", "no-revision"], "audit: --diff: "),
    (["audit", "softmax", "--json", "{tmp}"], "audit: --json: the rule is a file in a folder that is there; got"),
    (
        ["audit", "softmax", "--json", "{tmp}/no/file"],
        "audit: --json: the rule is a file in a folder that is there; got",
    ),
    (["inform"], "invalid choice: 'inform'"),
    ([], "the following arguments are required: command"),
]


def refused(words: list[str], capsys) -> str:
    """The one line that a command says which cannot run; its exit status is 2, and nothing was printed."""
    try:
        status = cli.main(words)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert status == 2 and not out and err.startswith("gpulayers") and err.count("\n") == 1, out + err
    return err


@pytest.mark.parametrize("words, text", WRONG, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_wrong_arguments_are_one_line(tmp_path, capsys, words, text):
    """… before anything is trained, compiled or measured."""
    (tmp_path / "file").touch()
    assert text in refused([w.replace("{tmp}", str(tmp_path)) for w in words], capsys)


def test_shapes_may_be_written_as_python_does(capsys):
    said = set()
    for shape in ("4,8", "(4,8)", "(4, 8)", "4x8", "4,8,"):
        assert cli.main(["explain", "softmax", "--shapes", shape]) == 0
        said.add(capsys.readouterr().out)
    assert len(said) == 1


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli._info, "_devices", interrupted)
    assert cli.main(["info"]) == 130 and capsys.readouterr().err == "gpulayers: interrupted\n"


# --- terminals -------------------------------------------------------------------------------------------------------


def shell(*words: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "gpulayers", *words], env=os.environ | env, capture_output=True)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_every_encoding_shows_something(encoding):
    done = shell("explain", "softmax", PYTHONIOENCODING=f"{encoding}:strict")
    assert done.returncode == 0 and "exp(x - max x) / sum exp" in done.stdout.decode(encoding), done.stderr


def test_errors_in_every_encoding():
    done = shell(*["explain", "softmax", "--shapes", "4", "--options", "axis=5"], PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 2 and done.stderr == b"gpulayers: softmax: axis: the rule is -1 <= axis < 1; got 5\n"


def test_an_environment_that_names_no_backend():
    """Known before anything runs; an import of the library does not fail of it, its calls do."""
    said = "GPULAYERS_BACKEND: unknown backend 'tritn': expected one of triton, cuda, aten, numpy, definition"
    done = shell("info", GPULAYERS_BACKEND="numpy, tritn")
    assert done.returncode == 2 and done.stderr.decode() == f"gpulayers: {said}\n"
    code = "import numpy, gpulayers as gl; gl.ReLU()(numpy.ones((2, 2), 'f'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"GPULAYERS_BACKEND": "tritn"}, capture_output=True
    )
    assert done.returncode == 1 and done.stderr.decode().endswith(f"ValueError: {said}\n")


def test_a_locale_without_unicode():
    """Files of the package are UTF-8 whatever the locale's encoding is."""
    env = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONWARNDEFAULTENCODING="1")
    done = shell("explain", "softmax", **env, PYTHONWARNINGS="error::EncodingWarning")
    assert done.returncode == 0 and b"kernels: triton" in done.stdout, done.stderr.decode()


def test_what_the_library_prints_is_ascii():
    """Tables are printed by whoever has them, on whatever terminal."""
    model = gl.Sequential(gl.Linear(2, 2))
    history = model.fit(np.ones((4, 2)), np.zeros(4, int), epochs=2, progress=False, metrics=["accuracy"])
    assert (model.summary((None, 2)) + str(history)).isascii()


def test_nearest_ascii():
    assert nearest("x ≥ 2σ · ⌊H/2⌋ × 5 µs … é 2⁶³ → 界") == "x >= 2sigma * floor(H/2) x 5 us ... e 263 -> ?"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a shell's pipes")
def test_a_closed_pipe_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "gpulayers", "explain", "softmax"], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert done.returncode == 1 and done.stderr == b""


# --- the main job ----------------------------------------------------------------------------------------------------


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
    images, labels = (tmp_path / f"{name}.gz" for name in demo.MNIST_FILES[:2])
    whole = images.read_bytes()
    for content, text in (
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x09short"), "no IDX file of bytes, or cut off"),
        (gzip.compress(b"\0"), "no IDX file, or cut off (unpack requires a buffer of 4 bytes)"),
        (whole[:-99], "no IDX file, or cut off (Compressed file ended"),
        (b"plain", "no IDX file, or cut off (Not a gzipped file"),
    ):
        images.write_bytes(content)
        assert text in refused(["train", "mnist", *folder], capsys)
    images.write_bytes(whole)
    write_idx(labels, np.full(64, 10, np.uint8))
    assert "and labels ≤ 9; got (64, 28, 28) and labels up to 10" in refused(["train", "mnist", *folder], capsys)
    assert "MNIST is the four files" in refused(["train", "mnist", "--data", str(tmp_path / "no")], capsys)


def test_readme_table():
    text = (ROOT / "README.md").read_text()
    shown = text.split("<!-- ops -->")[1].split("<!-- /ops -->")[0].strip()
    assert shown == cli.ops_markdown(), f"README.md must show:\n{cli.ops_markdown()}"
