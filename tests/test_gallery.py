"""Every layer of the gallery is right, short, learns from real data, and runs as a script."""

import importlib
import runpy

import gallery
import numpy as np
import pytest

import gpulayers as gl
from gpulayers import demo
from gpulayers.arrays import Spec, bfloat16
from gpulayers.authoring import subject
from gpulayers.testing import audit_op, check_layer, check_op


@pytest.fixture(autouse=True)
def importable():
    with gallery.importable():
        yield


entries = pytest.mark.parametrize("entry", gallery.ENTRIES, ids=lambda e: e.module)


def test_every_file_is_listed():
    assert [e.path for e in gallery.ENTRIES] == sorted(gallery.FOLDER.glob("[!_]*.py"))


@entries
def test_it_is_right(entry):
    assert check_layer(entry.layer(), entry.input_shape, backends=(), dtypes=("float16",))


@entries
def test_it_is_short_and_says_what_it_is(entry):
    lines = entry.path.read_text().splitlines()
    assert len(lines) < 60 and lines[0].startswith('"""')
    cls = type(entry.layer())
    assert "→" in cls.__doc__ or "any shape" in cls.__doc__


def test_the_triton_kernel():
    """Interpreted, and compiled with tensor cores; two tiles, the second one in part."""
    pytest.importorskip("triton")
    op = importlib.import_module("_product").linear_attention
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 35, 5))
    assert "triton" in check_op(op, q, k, v, dtypes=["bfloat16"])
    assert "triton" in check_op(op, *(x[:1, :3, :2] for x in (q, k, v)), dtypes=["float32"], numeric=True)
    specs = [Spec((64, 1024, 64), bfloat16)] * 3
    assert all(report.tensor_core and report.loads == 128 for report in audit_op(op, *specs, archs=[90]))


def test_the_cuda_kernel():
    """Emulated, and compiled by NVRTC."""
    pytest.importorskip("cupy_backends")
    op = importlib.import_module("symlog").symlog
    x = np.random.default_rng(0).standard_normal((3, 7))
    assert "cuda" in check_op(op, x, dtypes=["float32", "bfloat16"], numeric=True)
    reports = audit_op(op, Spec((64, 1024), bfloat16), archs=[90], backend="cuda")
    assert [report.kernel for report in reports] == ["forward_bfloat16", "backward_bfloat16"]


@entries
def test_it_is_checked_by_its_name_alone(entry):
    """``gpulayers check examples/custom_layers/swish.py:Swish`` needs no more."""
    layer, _ = subject.made(subject.found(f"{entry.path}:{entry.name}"), (), {})
    layer(*(np.ones(shape, "f") for shape in subject.input_shapes(layer)))


@entries
def test_it_learns(entry, tmp_path):
    pytest.importorskip("sklearn")
    gl.random.seed(1)
    x, y = gallery.digits(256)
    model = entry.model()
    layer = next(inner for inner in model.layers() if type(inner).__name__ == entry.name)
    model.ensure_built((None, 1, 8, 8))
    start = {name: w.data.copy() for name, w in layer.named_weights().items()}
    history = model.fit(x, y, epochs=3, batch_size=32, optimizer=gl.AdamW(1e-2), progress=False)
    assert history["loss"][-1] < 0.9 * history["loss"][0]
    moved = {name for name, w in layer.named_weights().items() if not np.array_equal(w.data, start[name])}
    assert moved == {name for name, w in layer.named_weights().items() if w.trainable}
    gl.save(model, tmp_path / "model")
    assert np.array_equal(gl.load(tmp_path / "model").predict(x), model.predict(x))


@entries
def test_it_runs_as_a_script(entry, monkeypatch, capsys):
    x, y = np.zeros((8, 1, 8, 8), "f"), np.zeros(8, int)
    monkeypatch.setattr(demo, "digits", lambda: (x, y, x, y))
    runpy.run_path(str(entry.path), run_name="__main__")
    assert "val_accuracy" in capsys.readouterr().out
