"""The host's part of a launch on a machine without a GPU: Triton's own launch path over a ``libcuda.so.1`` that does nothing.

``with null_driver() as driver:`` torch tensors on the CPU go down the road of CUDA tensors. Kernels are compiled as for the
real thing, by the same calls; each launch is a counted no-op, and ``driver.noted()`` lists what it would have given the GPU:
the bytes of every parameter, grid, block, shared memory and stream.

What it cannot show: the driver's own 2-3 µs a launch, CUDA's caching allocator, what kernels compute.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import struct
import subprocess
import types
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from gpulayers.testing._cache import cached

_HEAD = struct.Struct("QQ3I3III")


class Noted(NamedTuple):
    """What one launch gave the driver."""

    kernel: str
    function: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    parameters: bytes
    """All of them, one after another, as long as the kernel's binary says that each is."""


class NullDriver:
    """The stub, loaded as this process's driver."""

    def __init__(self, path: Path):
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self._launches = ctypes.c_uint64.in_dll(self.library, "null_launches")
        self._device = ctypes.c_int.in_dll(self.library, "null_device")
        self.streams = {0: 0}
        """The current stream of each device."""

    @property
    def launches(self) -> int:
        """How many there were so far."""
        return self._launches.value

    @contextlib.contextmanager
    def current_device(self, index: int) -> Iterator[None]:
        """Another device is the current one; -1: this thread has none."""
        before, self._device.value = self._device.value, index
        try:
            yield
        finally:
            self._device.value = before

    @contextlib.contextmanager
    def noting(self) -> Iterator[list[Noted]]:
        """The list that this yields is filled at the end, with the launches made meanwhile."""
        found: list[Noted] = []
        self.library.null_note(1)
        try:
            yield found
        finally:
            found += self._read()
            self.library.null_note(0)

    def noted(self, call: Callable[[], Any]) -> tuple[Any, list[Noted]]:
        """(what a call gives, its launches)"""
        with self.noting() as found:
            given = call()
        return given, found

    def _read(self) -> Iterator[Noted]:
        used = ctypes.c_uint64.in_dll(self.library, "null_used").value
        address = ctypes.c_void_p.in_dll(self.library, "null_notes").value
        raw, at = ctypes.string_at(address or 0, used) if used else b"", 0
        while at < used:
            function, stream, *sizes, shared, count = _HEAD.unpack_from(raw, at)
            at += _HEAD.size
            name = ctypes.string_at(function + _NAME).decode()
            grid, block = (sizes[0], sizes[1], sizes[2]), (sizes[3], sizes[4], sizes[5])
            yield Noted(name, function, grid, block, shared, stream, raw[at : at + count])
            at += count

    def function(self, cubin: bytes, name: str) -> int:
        """The address of a kernel of a binary, as cuModuleGetFunction gives it."""
        kept = ctypes.create_string_buffer(cubin)
        found = ctypes.c_void_p()
        self.library.cuModuleGetFunction(ctypes.byref(found), kept, name.encode())
        return found.value or 0

    def widths(self, function: int) -> list[int]:
        """Bytes of each parameter of a kernel, as its binary says."""
        count = ctypes.c_uint32.from_address(function).value
        return list((ctypes.c_uint32 * count).from_address(function + 4))


_NAME = 4 * (1 + 256)
"""Bytes before the name in the stub's Function."""


@cache
def load() -> NullDriver:
    """Build the stub, and make it this process's driver; there is no way back.

    Raises RuntimeError where there is a GPU, or no C compiler.
    """
    import torch

    if torch.cuda.is_available():
        raise RuntimeError("null_driver: the rule is a machine without a GPU: its driver would stay the stub")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("null_driver: the rule is a C compiler (gcc, cc or clang, or CC=…); none is here")
    text = files(__package__).joinpath("null_driver.c").read_bytes()

    def make(path: Path) -> None:
        named = "-Wl,-soname,libcuda.so.1"
        flags = ["-O2", "-w", "-shared", "-fPIC", named, "-x", "c", "-", "-o", str(path)]
        subprocess.run([compiler, *flags], input=text, check=True)

    path = cached("null_driver", text, "/libcuda.so.1", make)
    os.environ["TRITON_LIBCUDA_PATH"] = str(path.parent)
    return NullDriver(path)


@contextlib.contextmanager
def null_driver(arch: int = 90, compiled: bool = True) -> Iterator[NullDriver]:
    """Within, Triton and the launchers believe in one GPU of this architecture, whose driver does nothing, and torch
    tensors on the CPU are served by Triton kernels alone. What they hold afterwards is what was there before.

    compiled: kernels are compiled for that GPU. If not, the compiler is left out, and nothing else: a binary is then no
    more than what its signature says of its parameters.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from gpulayers import dispatch, launch
    from gpulayers.kernels.triton import _tile
    from gpulayers.testing.compiling import one

    stub = load()
    before = driver._active, _tile.pretend, JITFunction._do_compile
    driver.set_active(_active(stub, arch, compiled))
    _tile.pretend = one(arch)
    if not compiled:
        JITFunction._do_compile = _hollow
    launch.forget()
    try:
        with launch.on_cpu(stub.streams.__getitem__), dispatch.policy(simulate=("triton",), backends=("triton",)):
            yield stub
    finally:
        driver._active, _tile.pretend, JITFunction._do_compile = before
        launch.forget()


@cache
def _active(stub: NullDriver, arch: int, compiled: bool) -> Any:
    """Triton's driver for NVIDIA GPUs, told about a GPU by us; one for each, or it would compile anew."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    class Null(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: arch + 1000 * (not compiled)  # Triton keeps its kernels by device
            self.get_current_stream = lambda index: stub.streams[0]
            self.get_device_capability = lambda index=0: divmod(arch, 10)

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

        def get_active_torch_device(self) -> Any:
            return torch.device("cpu")

    return Null()


# --- kernels that were not compiled ----------------------------------------------------------------------------------

_WIDTHS = {
    "i1": 1,
    "i8": 1,
    "u1": 1,
    "u8": 1,
    "i16": 2,
    "u16": 2,
    "i32": 4,
    "u32": 4,
    "fp32": 4,
    "i64": 8,
    "u64": 8,
    "fp64": 8,
}


def widths(kind: Any) -> list[int]:
    """Bytes of the parameters that an argument of a Triton type becomes; tensor descriptors as sm_90 takes them."""
    if isinstance(kind, tuple):
        return [w for k in kind for w in widths(k)]
    if kind == "constexpr":
        return []
    if kind.startswith("tensordesc"):
        return [128, *[4] * len(_block(kind)), *[8] * len(_block(kind))]
    return [8 if kind[0] == "*" else _WIDTHS[kind]]


def _block(kind: str) -> list[int]:
    """The block's shape in "tensordesc<bf16[128, 64], …>"."""
    found = re.search(r"\[([\d, ]+)\]", kind)
    assert found is not None
    return [int(n) for n in found[1].split(",")]


def _hollow(
    kernel: Any, key: Any, signature: dict, device: Any, constexprs: dict, options: Any, attrs: dict, _: Any
) -> Any:
    """What Triton's compiler gives, without machine code."""
    from triton.compiler import CompiledKernel

    source = kernel.ASTSource(kernel, signature, constexprs, attrs)
    kinds = list(source.signature.values())
    maps = [
        {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": _block(k), "fp4_padded": False}
        for k in kinds
        if isinstance(k, str) and k.startswith("tensordesc")
    ]
    scratch = dict.fromkeys(("global_scratch_size", "profile_scratch_size", "global_scratch_align"), 0)
    more = scratch | dict(
        profile_scratch_align=0, shared=1024, tmem_size=None, name=kernel.fn.__name__, tensordesc_meta=maps
    )
    made: Any = object.__new__(CompiledKernel)
    sizes = [*widths(tuple(kinds)), 8, 8]
    made.metadata = types.SimpleNamespace(**vars(options) | more)
    made.packed_metadata = (options.num_warps, options.num_ctas, 1024)
    made.kernel = b"NULL" + struct.pack(f"{len(sizes) + 1}I", len(sizes), *sizes)
    made.src, made.name, made.hash, made.metadata_group = source, kernel.fn.__name__, "", {}
    made.module = made.function = made._run = None
    kernel.device_caches[device][0][key] = made
    return made


# --- memory that comes back ------------------------------------------------------------------------------------------


class Memory:
    """Allocations in turn: what launchers are given is kept, and given again to what shall do the same."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.left: list[Any] | None = None

    def keep(self) -> None:
        """Begin anew, with fresh arrays."""
        self.kept, self.left = [], None

    def give(self) -> None:
        """From now on the arrays that were kept come back, in their order."""
        self.left = list(self.kept)

    def empty(self, shape: Any, strides: Any, dtype: Any) -> Any:
        """Raises AssertionError where another array is wanted than the one whose turn it is."""
        import torch

        if self.left is None:
            self.kept.append(torch.empty_strided(shape, strides, dtype=dtype))
            return self.kept[-1]
        turn = self.left.pop(0)
        wanted, comes = (tuple(shape), tuple(strides), dtype), (tuple(turn.shape), turn.stride(), turn.dtype)
        if wanted != comes:
            raise AssertionError(f"an array of {wanted} is allocated where the launcher takes {comes}")
        return turn


@contextlib.contextmanager
def same_memory() -> Iterator[Memory]:
    """Within, launchers and tapes on the CPU take memory from what this yields."""
    from gpulayers import arrays
    from gpulayers.launch import _place

    memory = Memory()
    empty, tensor = type(arrays.TORCH).empty, _place._tensor

    def allocated(self: Any, spec: Any, device: str) -> Any:
        if device != "cpu":
            return empty(self, spec, device)
        return memory.empty(spec.shape, spec.strides, arrays.to_torch_dtype(spec.dtype))

    def allocation(device: str) -> Callable:
        return lambda spec: (memory.empty, spec.shape, spec.strides, arrays.to_torch_dtype(spec.dtype))

    type(arrays.TORCH).empty, _place._tensor = allocated, allocation  # type: ignore[assignment, method-assign]
    try:
        yield memory
    finally:
        type(arrays.TORCH).empty, _place._tensor = empty, tensor  # type: ignore[method-assign]
