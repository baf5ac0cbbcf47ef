"""Compiles the Triton kernels that a launcher would launch, for a GPU that need not be there.

`with compiling(90) as session: launcher(meta_tensor, …)`: each launch whose arrays are torch meta tensors is compiled
exactly as a real launch would be (dtypes, divisibility by 16, arguments equal to 1, warps, stages), and not run.
`with planning(90)` stops before the compiler: what it lists has a key, made of the source and of all that the compiler
is told, and compiles when asked to.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gpulayers.testing import _launches
from gpulayers.testing.gpus import GPUS


@dataclass(frozen=True)
class Planned:
    """One kernel as a launch would have it compiled."""

    kernel: str
    dtypes: tuple[str, ...]
    signature: dict[str, str]
    constexprs: dict[str, Any]
    grid: tuple[int, int, int]
    arch: int
    warps: int
    stages: int
    key: str = field(repr=False)
    """The source of the kernel and of what it calls, its arguments' types, the options and the compiler's version."""
    source: Any = field(repr=False, compare=False)
    options: Any = field(repr=False, compare=False)

    @property
    def constants(self) -> dict[str, Any]:
        """The arguments that the code has as constants: the constexprs, and others that are 1 or None."""
        names = self.source.fn.arg_names
        return {names[path[0]]: value for path, value in self.source.constants.items() if len(path) == 1}

    @property
    def odd(self) -> frozenset[str]:
        """The other sizes, steps and arrays that the compiler doesn't know 16 to divide (of an array: its address)."""
        names = self.source.fn.arg_names
        known = {path[0] for path, attributes in self.source.attrs.items() if attributes}
        unknown = (n for i, n in enumerate(names) if i not in known and n not in self.constants)
        return frozenset(n for n in unknown if self.signature.get(n, "")[:1] in ("i", "*"))

    def compile(self, kept: bool = True) -> Compiled:
        """Raises what the compiler raises. A kernel compiled before in this process is not compiled again.

        kept: in Triton's cache on disk, where launches on a GPU find it.
        """
        import triton

        global compilations
        if self.key not in _binaries:
            compilations += 1
            with driving(self.arch) as driver, _listening() as said, contextlib.nullcontext() if kept else _not_kept():
                binary = triton.compile(self.source, target=driver.target, options=self.options.__dict__)
            _binaries[self.key] = binary, "".join(said)
        binary, words = _binaries[self.key]
        given = {f.name: getattr(self, f.name) for f in fields(Planned)} | {"warps": binary.metadata.num_warps}
        return Compiled(**given, shared=binary.metadata.shared, binary=binary, words=words)


@dataclass(frozen=True)
class Compiled(Planned):
    """One compiled kernel: the launch it serves, and Triton's product (`binary.asm["cubin"]`, `["ptx"]`, …)."""

    shared: int
    """Bytes of shared memory that a launch reserves for a block."""
    binary: Any = field(repr=False, compare=False)
    words: str = field(repr=False, compare=False)
    """What the assembler said; nothing of a binary that Triton had in its cache."""

    @property
    def cubin(self) -> bytes:
        return self.binary.asm["cubin"]


@dataclass
class Session:
    """One `compiling()` or `planning()` block: the architecture, and the kernels launched, each once."""

    arch: int
    planned: list[Planned] = field(default_factory=list)
    compiled: list[Compiled] = field(default_factory=list)
    """Stays empty while planning."""
    only_plans: bool = False


_sessions: list[Session] = []
_binaries: dict[str, tuple[Any, str]] = {}
compilations = 0
"""How often this process has called the compiler."""


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[Session]:
    """Within, Triton launches on torch meta tensors are compiled for compute capability `arch` (80, …, 120), not run.

    Launchers are told that they run on such a GPU. Yields the session, whose `compiled` lists the results. Raises what
    the compiler raises, ValueError for another arch.
    """
    with _session(Session(arch)) as session:
        yield session


@contextlib.contextmanager
def planning(arch: int) -> Iterator[Session]:
    """Like `compiling`, but stops before the compiler: the session's `planned` lists what would be compiled."""
    with _session(Session(arch, only_plans=True)) as session:
        yield session


def one(arch: int) -> Any:
    """A GPU of an architecture, as launchers see it (``_tile.Device``)."""
    from gpulayers.kernels.triton._tile import Device

    return Device(arch, GPUS[arch].multiprocessors, GPUS[arch].block_shared)


@contextlib.contextmanager
def _session(session: Session) -> Iterator[Session]:
    from gpulayers.kernels.triton import _tile

    if session.arch not in GPUS:
        raise ValueError(f"arch must be one of {', '.join(map(str, GPUS))}, not {session.arch}")
    outermost = not _sessions
    before = _tile.pretend
    _tile.pretend = one(session.arch)
    _sessions.append(session)
    try:
        with _launches.catching("meta", _plan) if outermost else contextlib.nullcontext():
            yield session
    finally:
        _sessions.pop()
        _tile.pretend = before


class _Driver:
    """Answers what Triton asks a driver while it compiles. Its device is the architecture: it keys Triton's caches."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.arch, self.target = arch, GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> str:
        return f"sm_{self.arch}"

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextlib.contextmanager
def driving(arch: int) -> Iterator[_Driver]:
    """Triton believes that a GPU of this architecture is there."""
    from triton.runtime import driver

    before = driver._active  # `driver.active` would look for a real one
    driver.set_active(pretended := _Driver(arch))
    try:
        yield pretended
    finally:
        driver._active = before


class _Folder:
    """What Triton's cache is to one compilation, in a folder that goes when it is done."""

    def __init__(self, path: Path):
        self.path = path

    def get_group(self, filename: str) -> None:
        """There is nothing yet."""

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        path = self.path / filename
        path.write_bytes(data if isinstance(data, bytes) else str(data).encode())
        return str(path)

    def put_group(self, filename: str, group: dict[str, str]) -> None:
        """Nobody will ask for it."""


@contextlib.contextmanager
def _not_kept() -> Iterator[None]:
    """Triton's own cache makes and removes a folder for each of a kernel's eight files, which takes as long as a pass."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as path, knobs.cache.scope():
        knobs.cache.manager_class = lambda key: _Folder(Path(path))  # type: ignore[assignment]
        yield


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """What Triton would print of the assembler's words, where it knows how to."""
    from triton import knobs
    from triton.backends.nvidia import compiler

    said: list[str] = []
    if not hasattr(knobs.nvidia, "dump_ptxas_log"):
        yield said
        return
    with knobs.nvidia.scope():
        knobs.nvidia.dump_ptxas_log = True
        compiler.print = lambda *words: said.extend(map(str, words))  # type: ignore[attr-defined]
        try:
            yield said
        finally:
            del compiler.print  # type: ignore[attr-defined]


_hashes: dict[int, _Hashed] = {}


class _Hashed:
    """A function's two hashes: Triton's own, which counts the line that it begins at, and one that does not."""

    def __init__(self, function: Any):
        self.function, self.triton, self.without = function, None, None

    def swap(self, without: bool) -> None:
        if without:
            self.triton, self.function.hash = self.function.hash, self.without
        else:
            self.without, self.function.hash = self.function.hash, self.triton


@contextlib.contextmanager
def _before_compiling() -> Iterator[None]:
    """Launches return (key, source, options) where they would have begun to compile.

    The key does without the lines that functions begin at, or a new line above a kernel would change it. What is compiled
    later has Triton's own key, for real launches to find it in Triton's cache.
    """
    from triton.runtime import jit

    def stop(kernel: Any, key: Any, signature: dict, device: Any, constexprs: dict, options: Any, attrs: dict, _: Any):
        source, backend = kernel.ASTSource(kernel, signature, constexprs, attrs), kernel.device_caches[device][3]
        return jit.get_cache_key(source, backend, options, jit.get_cache_invalidating_env_vars()), source, options

    def no_line(function: Any) -> int:
        _hashes.setdefault(id(function), _Hashed(function))
        return 0

    before = jit.JITFunction._do_compile
    jit.JITFunction._do_compile = stop
    jit.JITCallable.starting_line_number = property(no_line, lambda f, line: vars(f).update(starting_line_number=line))
    for hashed in _hashes.values():
        hashed.swap(without=True)
    try:
        yield
    finally:
        jit.JITFunction._do_compile = before
        del jit.JITCallable.starting_line_number
        for hashed in _hashes.values():
            hashed.swap(without=False)


def _plan(launch: Any, kernel: Any, grid: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Add one launch to the innermost session, compiled unless it only plans; once for each binary."""
    session = _sessions[-1]
    name = kernel.fn.__name__
    bound = _launches.bind(kernel, args, kwargs)
    sizes = _launches.grid_sizes(name, grid, bound)
    with driving(session.arch), _before_compiling():
        key, source, options = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
    if any(p.key == key for p in session.planned):
        return
    planned = Planned(
        kernel=name,
        dtypes=tuple(map(_launches.dtype_name, _launches.arrays(tuple(bound.values())))),
        signature={k: str(v) for k, v in source.signature.items()},
        constexprs=_launches.constexprs(kernel, bound),
        grid=sizes,
        arch=session.arch,
        warps=options.num_warps,
        stages=options.num_stages,
        key=key,
        source=source,
        options=options,
    )
    if not session.only_plans:
        session.compiled.append(planned.compile())
    session.planned.append(planned)
