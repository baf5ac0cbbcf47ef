"""Compiles the Triton kernels that a launcher would launch, for a GPU that need not be there.

`with compiling(90) as session: launcher(meta_tensor, …)`: each launch whose arrays are torch meta tensors is compiled
exactly as a real launch would be (dtypes, divisibility by 16, arguments equal to 1, warps, stages), and not run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpulayers.testing import _launches

GPUS = {  # compute capability -> multiprocessors, bytes of shared memory that one block may have
    80: (108, 166912),
    86: (84, 101376),
    89: (142, 101376),
    90: (132, 232448),
    100: (148, 232448),
    120: (170, 101376),
}


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel: the launch it serves, and Triton's product (`binary.asm["cubin"]`, `["ptx"]`, …)."""

    kernel: str
    dtypes: tuple[str, ...]
    signature: dict[str, str]
    constexprs: dict[str, Any]
    grid: tuple[int, int, int]
    arch: int
    warps: int
    stages: int
    shared: int
    """Bytes of shared memory that a launch reserves for a block."""
    binary: Any = field(repr=False, compare=False)

    @property
    def cubin(self) -> bytes:
        return self.binary.asm["cubin"]


@dataclass
class Session:
    """One `compiling()` block: the architecture, and what was compiled, each binary once."""

    arch: int
    compiled: list[Compiled] = field(default_factory=list)


_sessions: list[Session] = []


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[Session]:
    """Within, Triton launches on torch meta tensors are compiled for compute capability `arch` (80, …, 120), not run.

    Launchers are told that they run on such a GPU. Yields the session, whose `compiled` lists the results. A kernel
    compiled before in this process is not compiled again. Raises what the compiler raises, ValueError for another arch.
    """
    from gpulayers.kernels.triton import _tile

    if arch not in GPUS:
        raise ValueError(f"arch must be one of {', '.join(map(str, GPUS))}, not {arch}")
    session = Session(arch)
    outermost = not _sessions
    before = _tile.pretend
    _tile.pretend = _tile.Device(arch, *GPUS[arch])
    _sessions.append(session)
    try:
        with _launches.catching("meta", _compile) if outermost else contextlib.nullcontext():
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
def _driving(arch: int) -> Iterator[None]:
    """Triton believes that a GPU of this architecture is there."""
    from triton.runtime import driver

    before = driver._active  # `driver.active` would look for a real one
    driver.set_active(_Driver(arch))
    try:
        yield
    finally:
        driver._active = before


def _compile(launch: Any, kernel: Any, grid: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Compile one launch and add it to the innermost session, unless it is there."""
    session = _sessions[-1]
    name = kernel.fn.__name__
    bound = _launches.bind(kernel, args, kwargs)
    sizes = _launches.grid_sizes(name, grid, bound)
    with _driving(session.arch):
        binary = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
    if any(c.binary is binary for c in session.compiled):
        return
    session.compiled.append(
        Compiled(
            kernel=name,
            dtypes=tuple(map(_launches.dtype_name, _launches.arrays(tuple(bound.values())))),
            signature={k: str(v) for k, v in binary.src.signature.items()},
            constexprs=_launches.constexprs(kernel, bound),
            grid=sizes,
            arch=session.arch,
            warps=binary.metadata.num_warps,
            stages=binary.metadata.num_stages,
            shared=binary.metadata.shared,
            binary=binary,
        )
    )
