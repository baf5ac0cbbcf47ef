"""Which kernels there are, and in which dtypes they ran: what a run of the tests on a device has reached, and what never ran.

A cell is a kernel in one dtype: "triton _softmax_forward_kernel bfloat16". The many instances that a CUDA file makes of one
kernel in one dtype (packs, single elements) are one.
"""

from __future__ import annotations

import contextlib
import importlib
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator

DTYPES = ("float32", "float16", "bfloat16")
"""Those that kernels compute; a call in 16 bits may have float32 beside them."""
NO_FLOATS = "integers"
"""In place of the dtype, where a kernel has no other arrays."""
_INSTANCE = re.compile(r"_(?=(?:b?float16|float32|float64|u?int\d+)(?:_|$))")


def cells(backend: str, kernel: str, dtypes: str) -> list[str]:
    """Of one launch. dtypes: of its arrays, separated by spaces."""
    floats = {d for d in dtypes.split() if d in DTYPES}
    of = floats - {"float32"} or floats or {NO_FLOATS}
    return [f"{backend} {_INSTANCE.split(kernel)[0]} {d}" for d in sorted(of)]


def kernels() -> dict[str, list[str]]:
    """Backend → the names of all its kernels, read from the sources."""
    folder = pathlib.Path(importlib.import_module("gpulayers.kernels").__path__[0])
    triton = {k for p in folder.glob("triton/*.py") for k in re.findall(r"^def (_\w+_kernel)\(", p.read_text(), re.M)}
    cuda = {k for p in folder.glob("cuda/*.cu*") for k in _in_cuda(re.sub(r"//.*", "", p.read_text()))}
    return {"triton": sorted(triton), "cuda": sorted(cuda)}


def _in_cuda(text: str) -> Iterator[str]:
    """Names up to the dtype; where a macro's argument begins one, with each function that the file makes kernels of."""
    for name in re.findall(r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?([\w#]+)\(", text):
        first, *rest = name.split("##")
        if first.isupper():
            yield from (
                f"{f}{rest[0]}".rstrip("_") for f in re.findall(r"^EACH_DTYPE\((\w+)\)", text, re.M) if not f.isupper()
            )
        else:
            yield first.rstrip("_")


def never(reached: Iterable[str]) -> dict[str, list[str]]:
    """Backend and kernel → the dtypes in which it did not run."""
    seen, missing = set(reached), {}
    for backend, names in kernels().items():
        for name in names:
            lacking = [d for d in DTYPES if f"{backend} {name} {d}" not in seen]
            if lacking and f"{backend} {name} {NO_FLOATS}" not in seen:
                missing[f"{backend} {name}"] = lacking
    return missing


def in_words(missing: dict[str, list[str]], most: int | None = None) -> str:
    """What ``never`` found, at most so many kernels by name; of those that never ran at all no dtypes."""
    names = [k if len(dtypes) == len(DTYPES) else f"{k} ({', '.join(dtypes)})" for k, dtypes in missing.items()]
    rest = len(names[most:]) if most is not None else 0
    return ", ".join(names[:most]) + (f" and {rest} more" if rest else "") or "none"


_ON_A_GPU = (("triton", "gpulayers.testing.arena", "on_gpu"), ("cuda", "gpulayers.kernels.cuda._launch", "launched"))
_SIMULATED = (
    ("triton", "gpulayers.testing.interpreter", "proven"),
    ("cuda", "gpulayers.testing.emulator", "proven"),
)


class Watch:
    """Which kernels run, test by test: on the GPU where there is one, else simulated."""

    def __init__(self, gpu: bool):
        self.places, self._now = _ON_A_GPU if gpu else _SIMULATED, {}
        for _, module, _ in self.places:
            importlib.import_module(module)

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Within, one test runs; what was proven before stays so."""
        before = {place: getattr(sys.modules[place[1]], place[2]) for place in self.places}
        self._now = {place: set() for place in self.places}
        self._put(self._now)
        try:
            yield
        finally:
            for place, ran in self._now.items():
                before[place] |= ran
            self._put(before)

    def _put(self, sets: dict) -> None:
        for (_, module, name), ran in sets.items():
            setattr(sys.modules[module], name, ran)

    def reached(self) -> tuple[str, ...]:
        """What the test at hand launched so far."""
        found = {
            c
            for (backend, *_), ran in self._now.items()
            for kernel, dtypes in ran
            for c in cells(backend, kernel, dtypes)
        }
        return tuple(sorted(found))
