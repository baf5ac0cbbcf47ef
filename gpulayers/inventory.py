"""What there is: families of ops, their ops, the backends that have kernels for them, the packages installed here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pathlib
import re
from collections.abc import Iterator

from gpulayers import dispatch
from gpulayers import ops as room
from gpulayers.ops._op import Op

PACKAGES = ("numpy", "ml_dtypes", "torch", "triton", "cupy")
"""Those that results depend on."""


def families() -> list[str]:
    """The names of all op families."""
    return sorted(p.stem for p in pathlib.Path(room.__path__[0]).glob("[!_]*.py"))


def ops() -> Iterator[Op]:
    """Every op there is, family by family."""
    for family in families():
        module = importlib.import_module(f"gpulayers.ops.{family}")
        yield from (op for op in vars(module).values() if isinstance(op, Op) and op.family == family)


def backends_of(op: Op) -> list[str]:
    """The backends that have kernels for an op, whether or not they can run here."""
    if op.kernels:
        return list(op.kernels)
    return [backend for backend in dispatch.KERNELS if _has_kernel(backend, op)]


def _has_kernel(folder: str, op: Op) -> bool:
    """Read from the file's text: loading it would need the backend's packages. Launchers that one body makes for many
    ops are named in ``kernels/_<family>.py``, by the op alone."""
    kernels = pathlib.Path(importlib.import_module("gpulayers.kernels").__path__[0])
    path, shared = kernels / folder / f"{op.family}.py", kernels / f"_{op.family}.py"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    made = "launchers(" in text and re.search(rf'"{op.name}": ', shared.read_text(encoding="utf-8"))
    return bool(made or re.search(rf"\b{op.name}_forward\b", text))


def version(package: str) -> str:
    """A package's version, for people."""
    if importlib.util.find_spec(package) is None:
        return "not installed"
    for name in ("cupy-cuda12x", "cupy-cuda13x", package) if package == "cupy" else (package,):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "installed"
