"""Compiles CUDA C++ kernels for a GPU that need not be there: NVRTC through CuPy, without a driver."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from gpulayers.testing._cache import cached
from gpulayers.testing.audit import Report, audit_cubin


def compile_cuda(family: str, arch: int, only: str = "") -> bytes:
    """The cubin of `kernels/cuda/<family>.cu` (or of one part of it) for compute capability `arch`.

    Raises RuntimeError with NVRTC's words.
    """
    from gpulayers.kernels.cuda import _launch

    return compile_source(_launch.source(family), arch, only)


@cache
def compile_source(source: str, arch: int, only: str = "") -> bytes:
    """The cubin of CUDA C++ text, compiled with the options that launches use; kept on disk."""
    from cupy_backends.cuda.libs import nvrtc

    from gpulayers.kernels.cuda._nvrtc import compiled, options

    flags = (f"--gpu-architecture=sm_{arch}", *options(only))
    key = f"{nvrtc.getVersion()} {flags}\n{source}".encode()

    def make(path: Path) -> None:
        path.write_bytes(compiled(source, flags))

    return cached("nvrtc", key, ".cubin", make).read_bytes()


def audit_cuda(family: str, arch: int, warps: int = 8, shared: int = 0, only: str = "") -> dict[str, Report]:
    """The report of each kernel of a family (or of one part of it), launched with so many warps and bytes of dynamic
    shared memory a block."""
    return audit_cubin(compile_cuda(family, arch, only), arch, warps, shared)
