"""Tapes of CUDA C++ kernels, and of CuPy's arrays."""

from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("cupy")

from gpulayers import arrays, dispatch, launch  # noqa: E402
from gpulayers.arrays import Spec  # noqa: E402
from gpulayers.launch import _tape  # noqa: E402
from gpulayers.launch._record import Recorder  # noqa: E402
from gpulayers.ops import activation, norm, pooling, recurrent  # noqa: E402
from gpulayers.testing.check_tape import check_tape  # noqa: E402
from gpulayers.testing.null_cuda import cuda_kernels  # noqa: E402
from gpulayers.testing.null_driver import null_driver, same_memory  # noqa: E402
from gpulayers.testing.nvrtc import compile_source  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the null driver would stand for the GPU's own")
ROWS, IMAGE = Spec((16, 64), arrays.float32), Spec((2, 16, 8, 8), arrays.float32, (0, 2, 3, 1))
WEIGHT = Spec((64,), arrays.float32)
POOL = {"kernel_size": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1), "ceil_mode": False}
CASES = {
    "relu": (activation.relu, [ROWS], {}),
    "relu, strided": (activation.relu, [torch.empty(64, 20)[:, :16].t()], {}),
    "prelu": (activation.prelu, [IMAGE, Spec((16,), arrays.float32)], {}),
    "glu": (activation.glu, [ROWS], {}),
    "layer_norm": (norm.layer_norm, [ROWS, WEIGHT, WEIGHT], {"normalized_shape": (64,)}),
    "layer_norm, strided": (norm.layer_norm, [torch.empty(64, 16).t(), WEIGHT, WEIGHT], {"normalized_shape": (64,)}),
    "max_pool": (pooling.max_pool, [IMAGE], POOL),
    "recurrent": (
        recurrent.recurrent,
        [Spec(s, arrays.float32) for s in ((3, 2, 64), (64, 64), (2, 64))],
        {"mode": "rnn_tanh"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_tape_gives_the_driver_what_the_launcher_gives_it(name, monkeypatch):
    monkeypatch.setattr(dispatch, "_plans", {})
    op, inputs, options = CASES[name]
    needs = tuple(n for n, _ in zip(op.inputs, inputs))
    with null_driver(compiled=False) as driver, cuda_kernels(driver), same_memory() as memory:
        states = check_tape(driver, memory, op, inputs, needs, **options)
    assert states == {"forward": "taped", "backward": "taped"}


def test_what_is_audited_is_what_runs(monkeypatch, tmp_path):
    """The same options and the same binary, from disk the second time; numbers under 2⁻¹²⁶ are not flushed to 0."""
    import cupy
    from gpulayers.kernels.cuda import _launch, _nvrtc

    device = SimpleNamespace(compute_capability="90")
    loaded = lambda path: Path(path).read_bytes()  # noqa: E731
    monkeypatch.setattr(cupy.cuda, "Device", lambda index: device)
    monkeypatch.setattr(cupy, "RawModule", loaded)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    source = _launch.Source('extern "C" __global__ void twice(float* x) { x[0] *= 2; }')
    found = _launch._module.__wrapped__(source, "", 0)
    assert found == compile_source(source.text, 90) and len(list(tmp_path.iterdir())) == 1
    flushed = _nvrtc.compiled(source.text, ("--gpu-architecture=sm_90", *_nvrtc.options(), "-ftz=true"))
    assert found != flushed
    monkeypatch.setattr(_nvrtc, "compiled", None)
    assert _launch._module.__wrapped__(source, "", 0) == found


def test_own_cuda_kernels_are_not_taped(monkeypatch):
    monkeypatch.setattr(dispatch, "_plans", {})
    monkeypatch.setattr(activation.relu, "kernels", {"cuda": "gpulayers.kernels.cuda.activation"})
    with null_driver(compiled=False) as driver, cuda_kernels(driver), same_memory() as memory:
        states = check_tape(driver, memory, activation.relu, [ROWS])
    assert states == {"forward": f"not taped: {launch.UNTAPED['own_cuda']}"}


class Array:
    """An array whose address is where CuPy's arrays have theirs."""

    class Memory:
        def __init__(self, ptr):
            self.ptr = ptr

    def __init__(self, shape, dtype):
        self.tensor = torch.empty(shape, dtype=dtype)
        self.shape, self.dtype, self.size = shape, dtype, self.tensor.numel()
        self.itemsize = self.tensor.element_size()
        self.strides = tuple(s * self.itemsize for s in self.tensor.stride())
        self.data = Array.Memory(self.tensor.data_ptr())


@pytest.mark.parametrize("by", ["C", "Python"])
def test_cupys_arrays(by):
    """Recorded and played by their addresses; results are arrays of the same library, by its own allocation."""
    from gpulayers.launch._place import Place

    with null_driver(compiled=False) as driver:
        function = driver.function(b"NULL" + (2).to_bytes(4, "little") + 2 * (8).to_bytes(4, "little"), "copy")
        kernel = type("Kernel", (), {"kernel": type("Function", (), {"ptr": function})})
        allocated = lambda spec: (Array, spec.shape, torch.float32)  # noqa: E731
        recorder = Recorder(Place(None, 0, driver.streams.__getitem__, allocated))
        recorder.inputs = [x := Array((4, 4), torch.float32)]
        y = recorder._empty(lambda shape, dtype, order: Array(shape, torch.float32), (4, 4), "float32")
        recorder.cuda(kernel, (3,), (64,), [x, y], 128)
        player = _tape.player() if by == "C" else _tape.PythonTape
        tape = player(*recorder.parts([y], ()))
        assert (type(tape) is _tape.PythonTape) == (by == "Python")
        other = Array((4, 4), torch.float32)
        ((z,), (noted,)) = driver.noted(lambda: tape(other))
    assert type(z) is Array and z is not y
    assert noted.parameters == b"".join(a.data.ptr.to_bytes(8, "little") for a in (other, z))
    assert (noted.grid, noted.block, noted.shared) == ((3, 1, 1), (64, 1, 1), 128)
