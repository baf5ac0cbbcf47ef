"""What a tape is made of, and who plays it: the C type, or where there is no compiler, Python over ctypes."""

from __future__ import annotations

import ctypes
import logging
import struct
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from gpulayers.launch._build import built

log = logging.getLogger("gpulayers")

LAUNCH, PATCH, OFFSET = struct.Struct("Q8I"), struct.Struct("qIIII"), struct.Struct("I")
COOPERATIVE = 1 << 31
"""A bit of a launch's shared memory: all its blocks run at once."""
POINTER, MAP, FLOAT, DOUBLE = range(4)
"""Kinds of patch: an address, a tensor map's address, a number that changes from call to call."""


class Parts(NamedTuple):
    """Everything that a tape does, in the order in which the C type takes it."""

    address: Callable[[Any], int] | None
    """(array) → its address; None: array.data.ptr, as CuPy's have it."""
    stream: Callable[[int], int] | None
    """(device) → its current stream; None: the default one."""
    device: int
    """The index of the device that must be the current one."""
    allocations: tuple[tuple, ...]
    """(function, *its arguments) of each: the slots after the inputs'."""
    returned: tuple[int | None, ...]
    """Slots of the arrays to give back."""
    kept: tuple
    """Compiled kernels: one that is let go may be unloaded."""
    same: tuple
    """(dict, key, value, …) that must be as they were, by identity; a missing key is None."""
    asked: tuple
    """(question, answer, …) that must be answered as they were."""
    quiet: tuple[list, ...]
    """Lists that must be empty: hooks."""
    numbers: int
    """How many numbers follow the inputs."""
    block: bytes
    """Arguments of all launches."""
    params: bytes
    """Where in the block each begins."""
    launches: bytes
    """Function, grid, block, shared memory, and the first of its parameters."""
    patches: bytes
    """Offset, place in the block, slot (or which number), kind."""
    modulo: bytes
    """Each slot's address modulo 16."""

    @property
    def sameness(self) -> tuple:
        """Equal for two recordings that do the same; addresses are left open in ``block``."""
        return self[2:5] + self[9:]


@cache
def player() -> Any:
    """What makes a tape from its parts: the C type; PythonTape, with a line in the log, where it cannot be built."""
    try:
        return built("gpulayers_tape", files(__package__).joinpath("tape.c").read_text(encoding="utf-8")).Tape
    except Exception as error:  # no compiler, no headers of Python, a driver of another kind: Python can do it, too
        log.info("launch tapes are played by Python (%s: %s)", type(error).__name__, error)
        return PythonTape


@cache
def driver() -> Any:
    """The functions of the driver that the Python tape calls."""
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernel.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
    library.cuLaunchCooperativeKernel.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 2]
    if hasattr(library, "cuTensorMapReplaceAddress"):  # since CUDA 12.0
        library.cuTensorMapReplaceAddress.argtypes = [ctypes.c_void_p] * 2
    return library


class PythonTape:
    """A tape as the C type plays it."""

    def __init__(self, *parts: Any):
        self.parts = Parts(*parts)
        self.kept = self.parts.kept
        self._launches = list(LAUNCH.iter_unpack(self.parts.launches))
        self._patches = list(PATCH.iter_unpack(self.parts.patches))
        self._params = [at for (at,) in OFFSET.iter_unpack(self.parts.params)]
        self._ends = [l[-1] for l in self._launches[1:]] + [len(self._params)]
        self._inputs = len(self.parts.modulo) - len(self.parts.allocations)

    def is_current(self) -> bool:
        same, asked = self.parts.same, self.parts.asked
        return (
            all(d.get(k) is v for d, k, v in zip(same[::3], same[1::3], same[2::3]))
            and not any(self.parts.quiet)
            and all(question() == answer for question, answer in zip(asked[::2], asked[1::2]))
        )

    def _address(self, x: Any) -> int:
        address = self.parts.address
        return 0 if x is None else x.data.ptr if address is None else address(x)

    def __call__(self, *given: Any) -> Any:
        if len(given) != self._inputs + self.parts.numbers:
            raise TypeError("tape: it takes the arrays and then the numbers that it was recorded with")
        cuda, on = driver(), ctypes.c_int(-1)
        if cuda.cuCtxGetDevice(ctypes.byref(on)) or on.value != self.parts.device or not self.is_current():
            return NotImplemented
        arrays = list(given[: self._inputs])
        if any(self._address(x) & 15 != m for x, m in zip(arrays, self.parts.modulo)):
            return NotImplemented
        arrays += [function(*args) for function, *args in self.parts.allocations]
        pointers = list(map(self._address, arrays))
        if any(p & 15 != m for p, m in zip(pointers, self.parts.modulo)):
            return NotImplemented
        stream = self.parts.stream(self.parts.device) if self.parts.stream is not None else 0
        room = ctypes.create_string_buffer(len(self.parts.block) + 64)
        base = ctypes.addressof(room) + 63 & ~63
        ctypes.memmove(base, self.parts.block, len(self.parts.block))
        for delta, at, slot, kind, _ in self._patches:
            self._write(
                base + at, kind, given[self._inputs + slot] if kind in (FLOAT, DOUBLE) else pointers[slot] + delta
            )
        for (function, *sizes, shared, first), end in zip(self._launches, self._ends):
            params = (ctypes.c_void_p * (end - first))(*[base + at for at in self._params[first:end]])
            if shared & COOPERATIVE:
                error = cuda.cuLaunchCooperativeKernel(function, *sizes, shared & ~COOPERATIVE, stream, params)
            else:
                error = cuda.cuLaunchKernel(function, *sizes, shared, stream, params, None)
            if error:
                raise RuntimeError(f"cuLaunchKernel failed: CUDA error {error}")
        return tuple(None if slot is None else arrays[slot] for slot in self.parts.returned)

    def _write(self, place: int, kind: int, value: Any) -> None:
        if kind == MAP:
            if driver().cuTensorMapReplaceAddress(place, value):
                raise RuntimeError("cuTensorMapReplaceAddress failed")
            return
        raw = struct.pack({POINTER: "Q", FLOAT: "f", DOUBLE: "d"}[kind], value)
        ctypes.memmove(place, raw, len(raw))
