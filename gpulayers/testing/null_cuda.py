"""CUDA C++ kernels over the null driver: NVRTC compiles them, and what CuPy would hand to the driver is noted.

CuPy itself loads no binary without a GPU, so its part of a launch is written anew here, after its documentation: an array
is its address, a NumPy scalar its bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gpulayers.testing.null_driver import NullDriver


class Kernel:
    """A kernel as ``_launch.py`` gets it from CuPy."""

    def __init__(self, driver: NullDriver, cubin: bytes, name: str):
        self.driver, self.name = driver, name
        self.kernel = types.SimpleNamespace(ptr=driver.function(cubin, name))
        self.widths = driver.widths(self.kernel.ptr)

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], shared_mem: int = 0) -> None:
        given = [a.tobytes() if isinstance(a, np.generic) else _address(a).to_bytes(8, "little") for a in args]
        if [*map(len, given)] != self.widths:
            raise TypeError(f"{self.name}: its parameters are {self.widths} bytes wide; got {[*map(len, given)]}")
        kept = [ctypes.create_string_buffer(raw, len(raw)) for raw in given]
        params = (ctypes.c_void_p * len(kept))(*map(ctypes.addressof, kept))
        sizes = [*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3], shared_mem]
        stream = ctypes.c_void_p(self.driver.streams[0])
        self.driver.library.cuLaunchKernel(ctypes.c_void_p(self.kernel.ptr), *sizes, stream, params, None)


def _address(x: np.ndarray) -> int:
    """Of an array without elements it is 0, as CuPy's is."""
    return x.ctypes.data if x.size else 0


@contextlib.contextmanager
def cuda_kernels(driver: NullDriver, arch: int = 90) -> Iterator[None]:
    """Within ``null_driver()``: torch tensors on the CPU are served by CUDA C++ kernels alone, over that driver."""
    import cupy

    from gpulayers import dispatch
    from gpulayers.kernels.cuda import _launch
    from gpulayers.testing.nvrtc import compile_source

    known: dict[tuple, Kernel] = {}

    def kernel(family: Any, only: str, name: str, device: int, shared: int) -> Kernel:
        key = _launch.source(family), only, name
        if key not in known:
            known[key] = Kernel(driver, compile_source(key[0], arch, only), name)
        return known[key]

    runtime = cupy.cuda.runtime

    def all_at_once(kernel: Any, grid: Any, block: Any, args: Any, shared: int) -> None:
        given = [a.tobytes() if isinstance(a, np.generic) else _address(a).to_bytes(8, "little") for a in args]
        kept = [ctypes.create_string_buffer(raw, len(raw)) for raw in given]
        params = (ctypes.c_void_p * len(kept))(*map(ctypes.addressof, kept))
        sizes, stream = [*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3], shared], ctypes.c_void_p(driver.streams[0])
        driver.library.cuLaunchCooperativeKernel(ctypes.c_void_p(kernel.kernel.ptr), *sizes, stream, params)

    own = {
        "_kernel": kernel, "_sms": lambda device: 132, "_at_once": lambda *launch: 132,
        "_shared_a_block": lambda device: 232448, "_all_at_once": all_at_once,
    }  # fmt: skip
    before = {name: getattr(_launch, name) for name in own}, runtime.getDevice
    vars(_launch).update(own)
    runtime.getDevice = lambda: 0
    try:
        with dispatch.policy(simulate=("cuda",), backends=("cuda",)):
            yield
    finally:
        vars(_launch).update(before[0])
        runtime.getDevice = before[1]
