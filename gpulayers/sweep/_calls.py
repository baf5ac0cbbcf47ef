"""What is audited: the calls that ``bench/<family>.py`` declares, in each dtype and memory order, and the kernel files
that those calls must reach."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpulayers.arrays import Spec, dtype, float32
from gpulayers.bench.cases.case import Case
from gpulayers.bench.cases.uses import precision
from gpulayers.testing.audit_op import launched
from gpulayers.testing.compiling import Planned

DTYPES = ("bfloat16", "float16", "float32")


class Call(NamedTuple):
    """One case in one dtype."""

    case: Case
    dtype: np.dtype
    tf32: bool = False
    """torch is told to allow TF32."""

    @property
    def specs(self) -> tuple[Spec | list[Spec] | None, ...]:
        return self.case.specs(self.dtype)

    def __str__(self) -> str:
        return f"{self.case.op.name}, {self.case.name}, {self.dtype}{' by TF32' if self.tf32 else ''}"

    def launched(self, arch: int) -> list[Planned]:
        """What its forward and backward would have compiled."""
        with precision("tf32" if self.tf32 else str(self.dtype)):
            return launched(self.case.op, self.specs, self.case.wanted(), self.case.options, arch)


class Family(NamedTuple):
    """An op family: its cases, and the files whose kernels they must reach."""

    name: str
    cases: list[Case]
    triton: list[Path]
    cuda: list[str]
    """Stems of files in ``kernels/cuda``."""


def family(name: str) -> Family:
    """A family of ops. ValueError if there is none of that name."""
    folder = kernels()
    if not (folder / "triton" / f"{name}.py").is_file():
        raise ValueError(f"audit: no family {name!r}; there are {', '.join(families())}")
    bench = importlib.import_module(f"gpulayers.bench.{name}")
    launcher = folder / "cuda" / f"{name}.py"
    text = launcher.read_text(encoding="utf-8") if launcher.is_file() else ""
    cuda = [p.stem for p in sorted(folder.glob("cuda/*.cu")) if p.stem == name or re.search(rf"\b{p.stem}\b", text)]
    return Family(name, [*bench.cases(), *bench.audits()], [folder / "triton" / f"{name}.py"], cuda)


def families() -> list[str]:
    """The names of all families that have Triton kernels."""
    return sorted(p.stem for p in kernels().glob("triton/[!_]*.py"))


def kernels() -> Path:
    """The folder of kernels, wherever it is installed."""
    return Path(importlib.import_module("gpulayers.kernels").__path__[0])


def shared_files() -> list[Path]:
    """Files of kernels that belong to several families, all of which together must reach them."""
    return sorted(kernels().glob("triton/_*.py"))


def calls(cases: Sequence[Case], dtypes: Sequence[str] = DTYPES, layouts: bool = True) -> list[Call]:
    """Each case in each dtype; images channels first and last (``layouts``: or only as the case says); float32
    products with and without TF32."""
    found = []
    for case in cases:
        axes = max((len(s) for s in case.shapes[:1] if isinstance(s, tuple)), default=0)
        last = (0, *range(2, axes), 1)
        orders = (None, last) if layouts and axes in (4, 5) else (case.order,)
        for name in dtypes:
            for order in orders:
                call = Call(case._replace(order=order), dtype(name))
                found.append(call)
                if call.dtype == float32 and case.tf32:
                    found.append(call._replace(tf32=True))
    return found
