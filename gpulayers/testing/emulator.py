"""Runs CUDA C++ kernels on the CPU, checked: within `emulating()`, launches on NumPy arrays need no GPU.

The kernels are compiled by g++ (kept on disk by the hash of the source) with `cuda_emu.h`, one fiber per thread:
barriers, shuffles, static and dynamic shared memory (poisoned with NaN at the start of each block), atomics. Found are
accesses outside the exact elements of an array, misaligned ones, two threads that meet in one place with no barrier
between them, barriers that not all threads reach, and arguments of the wrong type. Not emulated: cp.async, TMA,
clusters, textures.

A cooperative launch runs all blocks at once, in turns that let one after another starve: barriers between them, flags and
volatile or atomic polls work, and what no fence and atomic has ordered between two blocks is a race.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from gpulayers.kernels.cuda import _launch
from gpulayers.testing._cache import cached
from gpulayers.testing.memory import KernelMemoryError, Memory

COMPILER = "g++"
# A template's shared memory is one library's own: as a GNU-unique symbol two families' would be the same.
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-w", "-fvisibility=hidden", "-fno-gnu-unique", "-fwrapv", "-ffp-contract=fast")
FUSED = ("-mfma", "-fexpensive-optimizations")
# A call before every access; the calls end in our runtime, not in ThreadSanitizer's.
CHECKED = ("-fsanitize=thread", "--param=tsan-distinguish-volatile=1")
KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(')
DYNAMIC = re.compile(
    r"extern\s+__shared__\s+(?:(?:__align__|alignas)\s*\(\w+\)\s*)?([\w:<>]+(?:\s+\w+)*?)\s+(\w+)\s*\[\s*\]"
)
SHARED = re.compile(r"__shared__\s+((?:(?:__align__|alignas)\s*\(\w+\)\s*)?)([^;(){}]+?);")
MAX_SHARED = 232448


class KernelBarrierError(RuntimeError):
    """Threads of a block wait at a barrier that the others never reach."""


class KernelRaceError(KernelMemoryError):
    """Two threads met in one place of memory, one of them writing, and no barrier orders them."""


@dataclass(frozen=True)
class Launch:
    """One emulated launch: the kernel's name, the dtype of each array argument, grid, block, dynamic shared bytes."""

    kernel: str
    dtypes: tuple[str, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int


@dataclass
class Session:
    """One `emulating()` block: what it checks, and what it ran."""

    races: bool = True
    corners: bool = False
    launches: list[Launch] = field(default_factory=list)


proven: set[tuple[str, str]] = set()
"""(kernel, dtypes of its arrays separated by spaces) of every launch that ran to its end in this process."""
_sessions: list[Session] = []


@contextlib.contextmanager
def emulating(*, races: bool = True, corners: bool = False) -> Iterator[Session]:
    """Within, launches of `gpulayers.kernels.cuda` on NumPy arrays (bfloat16 through ml_dtypes) run on the CPU.

    races: two threads that reach one element unordered, one of them writing, are an error.
    corners: of a grid only the first and the last block along each axis run, as in the interpreter.

    Yields the session, whose `launches` lists what ran. Blocks nest. Raises KernelMemoryError (KernelRaceError for a
    race), KernelBarrierError, TypeError for an argument of the wrong type, ValueError for a launch that CUDA would
    refuse, RuntimeError with the compiler's words, or if there is no g++.
    """
    session = Session(races, corners)
    before = _launch.emulate
    _launch.emulate = run
    _sessions.append(session)
    try:
        yield session
    finally:
        _sessions.pop()
        _launch.emulate = before


# --- Building --------------------------------------------------------------------------------------------------------


def _compile(*arguments: str, text: str = "") -> str:
    """Run the compiler on `text` (standard input); what it printed."""
    if shutil.which(COMPILER) is None:
        raise RuntimeError(f"emulating CUDA kernels needs {COMPILER}, which is not installed here")
    done = subprocess.run([COMPILER, *arguments], input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{COMPILER} refused the kernel:\n{done.stderr.strip()[:4000]}")
    return done.stdout


@cache
def _preprocess(source: str) -> str:
    """The source without comments and macros, which the patterns above could not look through."""
    return _compile("-E", "-DGPULAYERS_EMULATED", "-x", "c++", "-", text=source)


def kernel_names(source: str) -> list[str]:
    """The `extern "C" __global__` functions of a source, those that macros make included."""
    return list(dict.fromkeys(KERNEL.findall(_preprocess(source))))


def _shared_variables(match: re.Match[str]) -> str:
    """`__shared__ T a[8], b;` becomes thread-local storage (a block's threads are fibers of one thread) and references.

    The references come from a function that g++ can't look into, because it leaves direct uses unchecked.
    """
    alignment, declaration = match.groups()
    first, *others = re.split(r",(?![^<\[]*[>\]])", declaration)
    parts = re.fullmatch(r"\s*(.*?)(\w+)\s*((?:\[[^\]]*\]\s*)*)", first, re.S)
    assert parts is not None, f"not understood: {match.group()}"
    kind = parts[1]
    text = []
    for declarator in (parts[2] + parts[3], *others):
        name, sizes = re.fullmatch(r"\s*(\w+)\s*(.*)", declarator, re.S).groups()  # type: ignore[union-attr]
        text.append(
            f"static thread_local {alignment}{kind}emu_{name}{sizes}; auto& {name} = *emu::opaque(&emu_{name});"
        )
    return " ".join(text)


@cache
def fuses() -> bool:
    """Whether this processor can put a product unrounded into a sum, as NVRTC's code does."""
    about = Path("/proc/cpuinfo")
    return about.exists() and re.search(r"^flags.*\bfma\b", about.read_text(), re.M) is not None


@cache
def build(source: str) -> ctypes.CDLL:
    """Compile CUDA C++ into a library that runs it here; about a second the first time, then from disk."""
    here = files(__package__)
    names = ("cuda_emu.h", "cuda_emu_runtime.h", "cuda_emu_blocks.h")
    header, runtime, blocks = (here.joinpath(name).read_text(encoding="utf-8") for name in names)
    runtime = runtime.replace('#include "cuda_emu_blocks.h"\n', blocks)
    flags = (*FLAGS, *FUSED) if fuses() else FLAGS
    common = " ".join((COMPILER, *flags, *CHECKED))

    def make_runtime(path: Path) -> None:
        _compile(*flags, "-O2", "-x", "c++", "-c", "-", "-o", str(path), text=runtime)

    def make(path: Path) -> None:
        exports = "".join(f"EMU_EXPORT({name})\n" for name in kernel_names(source))
        body = DYNAMIC.sub(r"\1* \2 = (\1*)emu::dynamic_shared", _preprocess(source))
        body = SHARED.sub(_shared_variables, body)
        text = f"{header}\n#pragma GCC visibility push(default)\n{body}\n{exports}"
        linked = cached("emulator", f"{common}{runtime}".encode(), ".o", make_runtime)
        compiled = path.with_suffix(".kernel.o")
        _compile(*flags, *CHECKED, "-c", "-x", "c++", "-", "-o", str(compiled), text=text)
        _compile("-shared", "-Wl,-z,defs", str(compiled), str(linked), "-o", str(path))

    return ctypes.CDLL(str(cached("emulator", f"{common}{header}{runtime}{source}".encode(), ".so", make)))


# --- Running ---------------------------------------------------------------------------------------------------------


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("low", "bytes", "unit", "holes", "span")]


class _Span(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("low", "cells", "unit")]


class _Fault(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "region", "offset", "size", "thread", "block")),
        *((name, ctypes.c_int64) for name in ("other_thread", "other_block", "waiting")),
        ("text", ctypes.c_char * 256),
    ]


NONE, LOAD, STORE, ATOMIC, MISALIGNED, RACE_WAW, RACE_RAW, RACE_WAR, BARRIER, WARP, FAILED, POLL = range(
    12
)  # as in the runtime
ACCESS = {LOAD: "load", STORE: "store", ATOMIC: "atomic"}
RACE = {RACE_WAW: "write-after-write", RACE_RAW: "read-after-write", RACE_WAR: "write-after-read"}


def run(
    source: str,
    name: str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    shared: int,
    cooperative: bool = False,
) -> None:
    """Launch kernel `name` of `source` on NumPy arrays and NumPy scalars. cooperative: all blocks at once."""
    gx, gy, gz = (*grid, 1, 1)[:3]
    bx, by, bz = (*block, 1, 1)[:3]
    if not (
        0 < bx * by * bz <= 1024 and bz <= 64 and gx < 2**31 and max(gy, gz) <= 65535 and 0 <= shared <= MAX_SHARED
    ):
        raise ValueError(
            f"{name}: CUDA launches no grid {tuple(grid)} of blocks {tuple(block)} with {shared} shared bytes"
        )
    if cooperative and gx * gy * gz > (most := _launch.EMULATED_BLOCKS * resident(bx * by * bz, shared)):
        raise ValueError(f"{name}: of a cooperative launch {gx * gy * gz} blocks must run at once; here it is {most}")
    library = build(source)
    if not hasattr(library, f"emu_call_{name}"):
        raise ValueError(f"there is no kernel {name}; the file has {', '.join(kernel_names(source))}")
    _check_types(library, name, args)
    memory = Memory(name)
    values = [_value(arg, index, memory) for index, arg in enumerate(args)]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    session = _sessions[-1] if _sessions else Session()
    regions, spans = _tables(memory)
    fault = _Fault()
    library.emu_launch(
        getattr(library, f"emu_call_{name}"),
        pointers,
        (ctypes.c_uint * 6)(gx, gy, gz, bx, by, bz),
        ctypes.c_size_t(shared),
        regions,
        ctypes.c_int64(len(regions)),
        spans,
        ctypes.c_int64(len(spans)),
        ctypes.c_int(session.races),
        ctypes.c_int(session.corners),
        ctypes.c_int(cooperative),
        ctypes.byref(fault),
    )
    if fault.kind:
        raise _error(fault, memory, (gx, gy, gz), (bx, by, bz))
    dtypes = tuple(region.dtype for region in memory.regions)
    for each in _sessions:
        each.launches.append(Launch(name, dtypes, (gx, gy, gz), (bx, by, bz), shared))
    if not session.corners:
        proven.add((name, " ".join(dtypes)))


def resident(threads: int, shared: int) -> int:
    """How many blocks of so many threads and bytes of dynamic shared memory a multiprocessor holds at once."""
    return min(2048 // threads, (MAX_SHARED + 1024) // (shared + 1024))


def _word(arg: Any) -> str:
    """An argument's type, in the words of `emu::Type`."""
    if not isinstance(arg, np.ndarray | np.generic):
        raise TypeError(f"emulated kernels take NumPy arrays and scalars, not {type(arg).__name__}")
    kind = arg.dtype
    word = "bf" if kind.name == "bfloat16" else f"{kind.kind}{kind.itemsize}"
    return "*" * isinstance(arg, np.ndarray) + word


def _check_types(library: ctypes.CDLL, name: str, args: Sequence[Any]) -> None:
    """TypeError unless each argument is what the kernel's parameter says; a GPU would reinterpret it in silence."""
    types = getattr(library, f"emu_types_{name}")
    types.restype = ctypes.c_char_p
    wanted = types().decode().split()
    given = [_word(arg) for arg in args]
    if len(given) != len(wanted):
        raise TypeError(f"{name} takes {len(wanted)} arguments, not {len(given)}")
    for index, (want, have) in enumerate(zip(wanted, given)):
        if want != have and not (want == "*?" and have[0] == "*"):
            raise TypeError(f"{name}, argument {index}: the kernel's parameter is {want}, what came is {have}")


def _value(arg: Any, index: int, memory: Memory) -> Any:
    """A ctypes object with the argument's bytes; arrays are registered on the way."""
    if isinstance(arg, np.ndarray):
        memory.add(str(index), arg)
        return ctypes.c_void_p(arg.ctypes.data)
    return (ctypes.c_char * arg.nbytes).from_buffer_copy(arg.tobytes())


def _tables(memory: Memory) -> tuple[Any, Any]:
    """The arrays, and the stretches of memory they share, as the runtime reads them."""
    memory.group()
    hazards = list({id(r.hazards): r.hazards for r in memory.regions if r.hazards is not None}.values())
    numbers = {id(h): i for i, h in enumerate(hazards)}
    regions = [
        _Region(
            r.low,
            r.nbytes,
            r.unit,
            r.holes.ctypes.data if isinstance(r.holes, np.ndarray) else 0,
            numbers.get(id(r.hazards), 0),
        )
        for r in memory.regions
    ]
    spans = [_Span(h.low, h.cells, h.unit) for h in hazards]
    return (_Region * len(regions))(*regions), (_Span * len(spans))(*spans)


def _error(fault: _Fault, memory: Memory, grid: tuple[int, ...], block: tuple[int, ...]) -> Exception:
    """What went wrong, as an exception that says where."""

    def place(number: int, sizes: tuple[int, ...]) -> tuple[int, ...]:  # x runs fastest
        return tuple(int(i) for i in np.unravel_index(number, sizes[::-1])[::-1])

    here = f"{memory.kernel}, block {place(fault.block, grid)}"
    if fault.kind == BARRIER:
        total = int(np.prod(block))
        return KernelBarrierError(
            f"{here}: {fault.waiting} of {total} threads wait at a __syncthreads() the rest never reach"
        )
    if fault.kind == POLL:
        return KernelBarrierError(
            f"{here}: {fault.waiting} threads poll memory for what no block that runs will write (a grid barrier that not"
            " all blocks reach, or a launch that is not cooperative)"
        )
    if fault.kind == WARP:
        return KernelBarrierError(f"{here}: {fault.waiting} threads wait for lanes of their warp that never come")
    here += f", thread {place(fault.thread, block)}"
    if fault.kind == FAILED:
        return RuntimeError(f"{here}: {fault.text.decode()}")
    region = memory.regions[fault.region] if fault.region >= 0 else None
    label = region.label if region else "shared memory"
    element = f"element {fault.offset // region.unit}" if region else "a place"
    if fault.kind == MISALIGNED:
        return KernelMemoryError(f"{here}: a {fault.size}-byte access that is misaligned, at {element} of {label}")
    if fault.kind in RACE:
        other = f"thread {place(fault.other_thread, block)}"
        other += f" of block {place(fault.other_block, grid)}" if fault.other_block >= 0 else " of another block"
        return KernelRaceError(f"{here}: {RACE[fault.kind]}: {element} of {label}, which {other} reached unordered")
    label = label if region else "every array"
    inside = region is not None and 0 <= fault.offset <= region.nbytes - fault.size
    gap = ", in a gap between its elements" if inside else ""
    return KernelMemoryError(
        f"{here}: {ACCESS[fault.kind]} out of bounds of {label}: {fault.size} bytes at {element}{gap}"
    )
