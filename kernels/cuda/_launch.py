"""What CUDA launchers share: kernel sources, their compilation by NVRTC through CuPy, and the launch itself."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from .. import _multiprocessors
from . import _nvrtc

DEFAULT_SHARED = 48 * 1024
"""Bytes of dynamic shared memory that a block may have without asking for more."""

launched: set[tuple[str, str]] = set()
"""(kernel, dtypes of its arrays separated by spaces) of every launch on a GPU, while ``recording``."""
recording = False

told: Callable[..., None] | None = None
"""Hears of each launch: (kernel, grid, block, arguments, bytes of shared memory)."""

emulate: Callable[..., None] | None = None
"""Runs launches on NumPy arrays, while gpulayers.testing.emulator is at work."""


class Source:
    """CUDA C++ of your own. It may begin with ``#include "_common.cuh"``, whose head says how a kernel serves all dtypes."""

    def __init__(self, text: str):
        self.text = _whole(text)

    def launch(
        self, name: str, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], shared: int = 0
    ) -> None:
        """Launch the kernel called ``name``; see ``launch``."""
        launch(self, name, grid, block, args, shared)


@cache
def source(family: str | Source) -> str:
    """The CUDA C++ of `<family>.cu`, or of one's own, what it includes from this folder put in its place."""
    if isinstance(family, Source):
        return family.text
    return _whole(files(__package__).joinpath(f"{family}.cu").read_text(encoding="utf-8"))


def _whole(text: str) -> str:
    return "".join(map(_included, text.splitlines(keepends=True)))


def _included(line: str) -> str:
    name = line.strip().removeprefix('#include "').removesuffix('"')
    if line.startswith('#include "_'):
        return files(__package__).joinpath(name).read_text(encoding="utf-8") + '\n#line 2 "kernel"\n'
    return line


@cache
def _module(family: str | Source, only: str, device: int) -> Any:
    """The compiled family, or one part of it, on one device."""
    import cupy

    return _nvrtc.module(source(family), only, cupy.cuda.Device(device).compute_capability)


@cache
def _kernel(family: str | Source, only: str, name: str, device: int, shared: int) -> Any:
    kernel = _module(family, only, device).get_function(name)
    if shared > DEFAULT_SHARED:
        kernel.max_dynamic_shared_size_bytes = shared
    return kernel


@cache
def _at_once(kernel: Any, threads: int, shared: int, device: int) -> int:
    """How many blocks of a kernel the device runs at once."""
    from cupy_backends.cuda.api import driver

    return _sms(device) * driver.occupancyMaxActiveBlocksPerMultiprocessor(kernel.kernel.ptr, threads, shared)


def launch(
    family: str | Source,
    name: str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    shared: int = 0,
    only: str = "",
    cooperative: bool = False,
) -> None:
    """Launch kernel `name` of `<family>.cu` on the current device and stream, unless the grid is empty.

    args: CuPy arrays; NumPy scalars as they are; a Python int is passed as int64, a float as float (32 bits).
    shared: bytes of dynamic shared memory a block. only: the part of the file that has the kernel; others wait.
    cooperative: all blocks run at once, and may wait for one another. Raises ValueError where the GPU cannot run so many.
    """
    if 0 in grid:
        return
    args = [_scalar(a) for a in args]
    if emulate is not None and any(isinstance(a, np.ndarray) for a in args):
        emulate(source(family), name, tuple(grid), tuple(block), args, shared, cooperative)
        return
    import cupy

    device = cupy.cuda.runtime.getDevice()
    kernel = _kernel(family, only, name, device, shared)
    if cooperative:
        if math.prod(grid) > (most := _at_once(kernel, math.prod(block), shared, device)):
            raise ValueError(f"{name}: {math.prod(grid)} blocks must run at once, and this GPU runs {most}")
        _all_at_once(kernel, grid, block, args, shared)
    else:
        kernel(tuple(grid), tuple(block), tuple(args), shared_mem=shared)
    if told is not None:
        told(kernel, grid, block, args, shared, cooperative)
    if recording:
        launched.add((name, " ".join(str(a.dtype) for a in args if isinstance(a, cupy.ndarray))))


def _all_at_once(kernel: Any, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], shared: int) -> None:
    """A cooperative launch by the driver itself: CuPy's own wants CUDA's device runtime linked to the kernel."""
    import cupy
    from cupy_backends.cuda.api import driver

    given = [a.tobytes() if isinstance(a, np.generic) else pointer(a).to_bytes(8, "little") for a in args]
    kept = [ctypes.create_string_buffer(raw, len(raw)) for raw in given]
    params = (ctypes.c_void_p * len(kept))(*map(ctypes.addressof, kept))
    sizes = *(*grid, 1, 1)[:3], *(*block, 1, 1)[:3], shared
    driver.launchCooperativeKernel(
        kernel.kernel.ptr, *sizes, cupy.cuda.get_current_stream().ptr, ctypes.addressof(params)
    )


def pointer(x: Any) -> int:
    """The address of an array's first element."""
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr


@cache
def _sms(device: int) -> int:
    import cupy

    return cupy.cuda.Device(device).attributes["MultiProcessorCount"]


EMULATED_BLOCKS = 3
EMULATED_SHARED = 232448


def figures() -> tuple[int, int]:
    """(multiprocessors that launches may fill, bytes of shared memory that a block may have) of the current device."""
    if emulate is not None:
        return _multiprocessors.left(EMULATED_BLOCKS), EMULATED_SHARED
    import cupy

    device = cupy.cuda.runtime.getDevice()
    return _multiprocessors.left(_sms(device)), _shared_a_block(device)


@cache
def _shared_a_block(device: int) -> int:
    import cupy

    return cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"]


def resident_blocks(x: Any, threads: int) -> int:
    """Blocks of so many threads that fill the GPU that ``x`` is on, but for the multiprocessors to be left free."""
    if isinstance(x, np.ndarray):
        return _multiprocessors.left(EMULATED_BLOCKS)
    return _multiprocessors.left(_sms(x.device.id)) * min(8, 1024 // threads)


def _scalar(arg: Any) -> Any:
    if isinstance(arg, bool):
        return np.bool_(arg)
    if isinstance(arg, int):
        return np.int64(arg)
    return np.float32(arg) if isinstance(arg, float) else arg
