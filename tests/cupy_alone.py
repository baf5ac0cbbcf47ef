"""Calls on CuPy's arrays where neither torch nor Triton is installed, on a GPU that is not there; run by test_cupy_alone.py.

    python cupy_alone.py <the null driver's libcuda.so.1>

Arrays lie in the host's memory, and launches are noted. Prints a line of JSON for each op: who computes, why, the kernels
of a call and its backward, and whether they are taped.
"""

import ctypes
import importlib.util
import json
import struct
import sys
import types

ABSENT = ("torch", "triton")


class Absent:
    """The packages are not installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *where: None if name.partition(".")[0] in ABSENT else find_spec(name, *where)
sys.meta_path.insert(0, Absent)

import cupy  # noqa: E402
import numpy as np  # noqa: E402
from gpulayers.kernels.cuda import _launch  # noqa: E402

import gpulayers as gl  # noqa: E402
from gpulayers.ops import activation, linear, norm, pooling, recurrent  # noqa: E402
from gpulayers.testing.null_driver import NullDriver  # noqa: E402


class Device:
    """A GPU as CuPy shows one."""

    compute_capability, attributes = "90", {"MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": 232448}

    def __init__(self, index):
        self.id = index

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class Kernel:
    """What CuPy launches."""

    def __init__(self, name):
        self.name, self.kernel = name, None

    def __call__(self, grid, block, args, shared_mem):
        if self.kernel is None:
            sizes = [a.itemsize if isinstance(a, np.generic) else 8 for a in args]
            binary = b"NULL" + struct.pack(f"{len(sizes) + 1}I", len(sizes), *sizes)
            self.kernel = types.SimpleNamespace(ptr=driver.function(binary, self.name))
        launched.append(self.name)


def memory(size):
    host = ctypes.create_string_buffer(size + 512)
    start = -(-ctypes.addressof(host) // 512) * 512
    return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(start, size, host, 0), 0)


launched, kernels = [], {}
driver = NullDriver(sys.argv[1])
_launch._kernel = lambda family, only, name, device, shared: kernels.setdefault(name, Kernel(name))
_launch._at_once, _launch._all_at_once = lambda *launch: 132, lambda kernel, *launch: kernel(*launch)
cupy.cuda.Device = Device
cupy.cuda.runtime.getDevice, cupy.cuda.runtime.getDeviceCount = lambda: 0, lambda: 1
cupy.cuda.get_current_stream = lambda: types.SimpleNamespace(ptr=0)
cupy.cuda.set_allocator(memory)


def array(*shape, dtype=np.float32):
    return cupy.ndarray(shape, dtype)


POOL = {"kernel_size": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1), "ceil_mode": False}
CASES = [
    (activation.relu, [array(8, 64)], {}),
    (activation.gelu, [array(20, 64).T], {}),
    (activation.prelu, [array(2, 16, 8, 8), array(16)], {}),
    (activation.rrelu, [array(8, 64), array(2, dtype=np.int64)], {"training": True}),
    (activation.glu, [array(8, 64)], {}),
    (norm.layer_norm, [array(16, 64), array(64), array(64)], {"normalized_shape": (64,)}),
    (pooling.max_pool, [array(2, 16, 8, 8)], POOL),
    (pooling.avg_pool, [array(2, 16, 8, 8)], {"kernel_size": 2}),
    (pooling.adaptive_avg_pool, [array(2, 16, 8, 8)], {"output_size": 3}),
    (recurrent.recurrent, [array(3, 2, 192), array(192, 64), array(2, 64)], {"mode": "gru"}),
    (linear.linear, [array(8, 64), array(8, 64), None], {}),
]
for op, inputs, options in CASES:
    needs = [n for n, x in zip(op.inputs, inputs) if n in op.differentiable and x is not None]
    backend, reasons = gl.explain(op, *inputs, needs=needs, **options)
    found, taped = set(), {}
    if backend == "cuda":
        with gl.strict():
            for _ in range(4):
                y, call = op.record(*inputs, needs=needs, **options)
                ys = y if isinstance(y, tuple) else (y,)
                assert {type(y) for y in ys} == {cupy.ndarray}
                call.backward(*[cupy.ndarray(y.shape, y.dtype) for y in ys])
            found = set(launched)
        with gl.strict():
            taped = gl.explain(op, *inputs, needs=needs, **options).taped
    launched.clear()
    print(json.dumps([op.name, backend, reasons, sorted(found), taped]))
assert not {name.partition(".")[0] for name in sys.modules} & set(ABSENT)
