"""Reads a compiled kernel's machine code: registers, spills, shared memory, and which instructions move and multiply.

`audit(compiled).faults(…)` lists what speaks against a kernel before any GPU has run it. Results are kept on disk,
by the source of a Triton kernel and by the binary of another.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpulayers.testing._cache import cached, keep, place
from gpulayers.testing._sass import READER, read

if TYPE_CHECKING:
    from gpulayers.testing.compiling import Compiled, Planned


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor holds, and one block may take (bytes of shared memory)."""

    threads: int
    blocks: int
    shared: int
    block_shared: int
    registers: int = 65536


LIMITS = {
    80: Limits(2048, 32, 167936, 166912),
    86: Limits(1536, 16, 102400, 101376),
    89: Limits(1536, 24, 102400, 101376),
    90: Limits(2048, 32, 233472, 232448),
    100: Limits(2048, 32, 233472, 232448),
    120: Limits(1536, 24, 102400, 101376),
}

NARROW_STORES = 4  # a thread stores a few results of a reduction one by one; more than that is the output itself


@dataclass(frozen=True)
class Report:
    """One kernel's machine code in figures. Sizes are bytes; `mix` counts instructions, as in `FAMILIES`."""

    kernel: str
    arch: int
    warps: int
    registers: int
    """A thread's registers."""
    stack: int
    """A thread's stack: spilled registers and arrays that the compiler could not keep in registers."""
    local: int
    shared: int
    """A block's shared memory."""
    instructions: int
    mix: dict[str, int]
    multiplies: bool = False
    """It multiplies matrices of 16-bit or TF32 numbers, so the tensor cores must do it."""

    @cached_property
    def spills(self) -> int:
        """Instructions that move registers to and from local memory; at least 1 if there is a stack."""
        return self.mix.get("LDL", 0) + self.mix.get("STL", 0) or int(self.stack > 0)

    @cached_property
    def tensor_cores(self) -> int:
        """Matrix instructions, of any generation."""
        return sum(self.mix.get(name, 0) for name in ("HMMA", "HGMMA", "UTCMMA"))

    @cached_property
    def blocks_per_sm(self) -> int:
        """Blocks that one multiprocessor holds at once; 0 if none fits."""
        have = LIMITS[self.arch]
        by_registers = have.registers // (_round_up(self.registers * 32, 256) * self.warps)
        by_shared = have.shared // (self.shared + 1024)  # the system takes 1 KiB for each block
        return min(have.blocks, have.threads // (32 * self.warps), by_registers, by_shared)

    def faults(self, aligned: bool = False) -> list[str]:
        """What is wrong with the kernel, in words; empty if nothing is.

        aligned: its rows begin at multiples of 16 bytes, so global memory must be moved 128 bits at a time.
        """
        mix = Counter(self.mix)
        limit = LIMITS[self.arch].block_shared
        found = []
        if self.spills:
            found.append(f"spills: {mix['LDL']} loads, {mix['STL']} stores, {self.stack} bytes of stack a thread")
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory; sm_{self.arch} gives a block {limit}")
        if self.multiplies and not self.tensor_cores:
            found.append("multiplies 16-bit or TF32 matrices without tensor-core instructions")
        if aligned and mix["LDG"] + mix["LDGSTS"] and not mix["LDG.128"] + mix["LDGSTS.128"] + mix["UTMALDG"]:
            found.append(f"none of its {mix['LDG'] + mix['LDGSTS']} global loads is 128 bits wide")
        if aligned and mix["STG"] >= NARROW_STORES and not mix["STG.128"] + mix["UTMASTG"]:
            found.append(f"none of its {mix['STG']} global stores is 128 bits wide")
        if mix["ATOM.FLOAT"]:
            found.append(f"{mix['ATOM.FLOAT']} floating-point atomics: the sum depends on their order")
        return found


def audit(compiled: Compiled) -> Report:
    """The report of a kernel from `compiling`. RuntimeError with the tool's words if the binary can't be read."""
    return audit_launches([compiled])[0]


def audit_launches(launches: Sequence[Planned]) -> list[Report]:
    """The report of each launch from `planning`. One whose source was audited before is not compiled again.

    Raises what the compiler raises, and RuntimeError with the tool's words if a binary can't be read.
    """
    places = {p.key: place("audited", f"{READER} {p.key}".encode(), ".json") for p in launches}
    missing = {p.key: p for p in launches if not places[p.key].exists()}
    for arch in sorted({p.arch for p in missing.values()}):
        compiled = [p.compile() for p in missing.values() if p.arch == arch]
        for one, found in zip(compiled, read([c.cubin for c in compiled], arch)):
            ((name, figures),) = found.items()
            text = json.dumps(vars(_report(name, arch, one.warps, one.shared, figures, multiplies=_multiplies(one))))
            keep(places[one.key], lambda path, text=text: path.write_text(text))
    return [Report(**json.loads(places[p.key].read_text())) for p in launches]


def audit_cubin(cubin: bytes, arch: int, warps: int = 1, shared: int = 0) -> dict[str, Report]:
    """The report of each kernel in a binary. `warps` and `shared` (dynamic, bytes) are what its launches ask for."""

    def make(path: Path) -> None:
        path.write_text(json.dumps(read([cubin], arch)[0]))

    found = json.loads(cached("audit", b"%d " % READER + cubin, ".json", make).read_text())
    return {name: _report(name, arch, warps, shared, figures) for name, figures in found.items()}


def describe(report: Report) -> dict[str, Any]:
    """A report as plain data, blocks per multiprocessor included."""
    return {**asdict(report), "spills": report.spills, "blocks_per_sm": report.blocks_per_sm}


def _report(name: str, arch: int, warps: int, shared: int, figures: dict[str, Any], multiplies: bool = False) -> Report:
    system = 1024 if arch >= 90 else 0  # counted as static by the tools, on top of what a block may have
    rest = {k: v for k, v in figures.items() if k != "static"}
    return Report(name, arch, warps, shared=max(shared, figures["static"] - system), multiplies=multiplies, **rest)


def _multiplies(compiled: Compiled) -> bool:
    """Whether it multiplies matrices that came in types that tensor cores are for, whatever it made of them."""
    products = re.findall(r"tt\.dot\b.*", compiled.binary.asm["ttir"])
    half = any(dtype in ("float16", "bfloat16") for dtype in compiled.dtypes)
    return bool(products) and (half or any("inputPrecision = tf32" in p for p in products))


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
