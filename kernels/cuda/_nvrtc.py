"""CUDA C++ compiled by NVRTC, kept on disk. CuPy's own road would flush numbers under 2⁻¹²⁶ to 0 (it adds -ftz=true), which
no definition does; and what an audit reads must be what runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

OPTIONS = ("--std=c++17",)


def options(only: str = "") -> tuple[str, ...]:
    """What NVRTC is given; only: the part of the family to compile, where its file knows ``ONLY``."""
    return (*OPTIONS, f"-DONLY={only}") if only else OPTIONS


def compiled(source: str, flags: tuple[str, ...]) -> bytes:
    """The cubin of a source. Raises RuntimeError with NVRTC's words."""
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(source, "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, flags)
        cubin = nvrtc.getCUBIN(program)
        return cubin + bytes(-len(cubin) % 8)  # CuPy takes the last byte for a string's end and cuts it off
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"NVRTC refused the kernel ({flags[0]}):\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def module(source: str, only: str, capability: str) -> Any:
    """CuPy's module of a source for a device's compute capability ("90"), from beside CuPy's own on disk, or made anew."""
    import cupy
    from cupy_backends.cuda.libs import nvrtc

    if int(capability) not in nvrtc.getSupportedArchs():  # a newer GPU: through PTX, as CuPy does it
        return cupy.RawModule(code=source, options=options(only), backend="nvrtc")
    flags = (f"--gpu-architecture=sm_{capability}", *options(only))
    key = hashlib.sha256(f"{nvrtc.getVersion()} {flags}\n{source}".encode()).hexdigest()
    folder = os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache"
    path = Path(folder, f"gpulayers_{key}.cubin")
    if not path.exists():
        _write(path, compiled(source, flags))
    return cupy.RawModule(path=str(path))


def _write(path: Path, cubin: bytes) -> None:
    """Whole or not at all: another process may look for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".cubin")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(cubin)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(name)
        raise
