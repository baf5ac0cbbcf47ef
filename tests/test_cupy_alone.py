"""Whom the CUDA C++ kernels serve: CuPy's arrays, where torch or Triton is not installed; elsewhere Triton stands first."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("cupy")

import cupy

import gpulayers as gl
from gpulayers import arrays, dispatch
from gpulayers.inventory import ops
from gpulayers.ops.activation import relu
from gpulayers.ops.norm import layer_norm
from gpulayers.ops.softmax import softmax

SCRIPT = pathlib.Path(__file__).parent / "cupy_alone.py"
BY_CUDA = {op for op in ops() if hasattr(dispatch.kernels("cuda", op), f"{op.name}_forward")}


@pytest.fixture
def gpu(monkeypatch):
    """One GPU, as far as plans ask for it."""
    monkeypatch.setattr(dispatch, "_plans", {})
    monkeypatch.setattr(arrays._CuPy, "capability", lambda self, device: (9, 0))
    monkeypatch.setattr(arrays._CuPy, "is_only", lambda self, device: True)
    dispatch._too_old.cache_clear()
    yield
    dispatch._too_old.cache_clear()


def array(*shape):
    """One of CuPy's arrays, in memory that nobody looks at."""
    host = np.empty(shape, np.float32)
    memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, 0)
    return cupy.ndarray(shape, np.float32, cupy.cuda.MemoryPointer(memory, 0))


@pytest.mark.parametrize("missing", ["", "torch", "triton"])
def test_whom_cupys_arrays_are_served_by(missing, monkeypatch, gpu):
    monkeypatch.setattr(dispatch, "_missing", lambda package: f"no {package}" if package == missing else None)
    for op, inputs, options in (
        (relu, [array(8, 64)], {}),
        (layer_norm, [array(8, 64), array(64), array(64)], {"normalized_shape": (64,)}),
    ):
        backend, reasons = gl.explain(op, *inputs, **options)
        assert (backend, reasons) == (("cuda", {"triton": f"no {missing}"}) if missing else ("triton", {}))
    backend, reasons = gl.explain(softmax, array(8, 64))
    assert (backend, reasons.get("cuda")) == (("definition", "no kernel") if missing else ("triton", None))
    with dispatch.policy(backends=("cuda", "triton", "definition")):
        assert gl.explain(relu, array(8, 64))[0] == "cuda"


def test_an_old_gpu(monkeypatch, gpu):
    monkeypatch.setattr(arrays._CuPy, "capability", lambda self, device: (7, 5))
    reasons = gl.explain(relu, array(8, 64))[1]
    assert reasons["cuda"] == "the GPU is sm_75; the kernels need sm_80 or newer"


def test_capability_is_asked_of_cupy(monkeypatch):
    device = lambda index: type("Device", (), {"compute_capability": {0: "80", 1: "120"}[index]})  # noqa: E731
    monkeypatch.setattr("cupy.cuda.Device", device)
    assert [arrays.CUPY.capability(f"cuda:{i}") for i in (0, 1)] == [(8, 0), (12, 0)]


def test_without_torch_and_triton():
    """Planned, launched and taped, forward and backward, and neither is imported."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("the null driver would stand for the GPU's own")
    from gpulayers.testing.null_driver import load

    command = [sys.executable, str(SCRIPT), str(load().path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = set()
    for line in done.stdout.splitlines():
        name, backend, reasons, kernels, taped = json.loads(line)
        if name != "recurrent":  # CUDA's kernel is asked first
            assert reasons["triton"] == "triton is not installed"
        if backend == "cuda":
            seen.add(name)
            assert any(k.startswith(name) for k in kernels) and taped == {"forward": "taped", "backward": "taped"}
        else:
            assert (name, backend, reasons["cuda"]) == ("linear", "definition", "no kernel")
    families = {op.family: {o.name for o in BY_CUDA if o.family == op.family} for op in BY_CUDA}
    assert all(seen & names for names in families.values())
