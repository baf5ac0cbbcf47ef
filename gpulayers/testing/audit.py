"""Reads a compiled kernel's machine code: registers, spills, shared memory, and which instructions move and multiply.

`audit(compiled).faults(…)` lists what speaks against a kernel before any GPU has run it. Results are kept on disk,
by the source of a Triton kernel and by the binary of another.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpulayers.kernels._budget import Budget
from gpulayers.testing._cache import cached, keep, place
from gpulayers.testing._sass import READER, read, serializes
from gpulayers.testing.gpus import GPUS

if TYPE_CHECKING:
    from gpulayers.testing.compiling import Compiled, Planned


NO_BUDGET = Budget()
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
    serialized: bool = False
    """Its products of warp groups (wgmma) wait for each other, instead of running side by side."""

    @cached_property
    def spills(self) -> int:
        """Instructions that move registers to and from local memory; at least 1 if there is a stack."""
        return self.mix.get("LDL", 0) + self.mix.get("STL", 0) or int(self.stack > 0)

    @cached_property
    def room(self) -> dict[str, int]:
        """Blocks that one multiprocessor has room for, by what each takes of it."""
        have = GPUS[self.arch]
        return {
            "registers": have.registers // (_round_up(self.registers * 32, 256) * self.warps),
            "shared memory": have.shared // (self.shared + 1024),  # the system takes 1 KiB for each block
            "warps": have.threads // (32 * self.warps),
            "blocks": have.blocks,
        }

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that one multiprocessor holds at once; 0 if none fits."""
        return min(self.room.values())

    @property
    def bound(self) -> str:
        """What it has no room for beyond those blocks: registers, shared memory, warps, or blocks as such."""
        return min(self.room, key=self.room.__getitem__)

    @property
    def loads(self) -> int | None:
        """Bits that its widest global load moves: 128, 64 or 32 (or fewer); None if it loads nothing."""
        wide = self.mix.keys() & {"LDG.128", "LDGSTS.128", "UTMALDG"}
        return _bits(wide, "LDG.64" in self.mix, self.mix.keys() & {"LDG", "LDGSTS"})

    @property
    def stores(self) -> int | None:
        """Bits that its widest global store moves; None if it stores nothing."""
        return _bits(self.mix.keys() & {"STG.128", "UTMASTG"}, "STG.64" in self.mix, "STG" in self.mix)

    @property
    def widths(self) -> str:
        """How many global accesses move how many bits: "loads 128×2 32×6, stores 128×1"."""
        named = {"loads": ("LDG", "LDGSTS"), "stores": ("STG",)}
        found = []
        for what, names in named.items():
            wide, half, all_of = (sum(self.mix.get(n + bits, 0) for n in names) for bits in (".128", ".64", ""))
            each = {"128": wide, "64": half, "32": all_of - wide - half}
            if all_of:
                found.append(" ".join([what, *(f"{bits}×{n}" for bits, n in each.items() if n)]))
        return ", ".join(found)

    @property
    def tensor_core(self) -> str:
        """Its matrix instruction: UTCMMA (sm_100), HGMMA (sm_90), HMMA, or nothing."""
        return next((name for name in ("UTCMMA", "HGMMA", "HMMA") if self.mix.get(name)), "")

    @property
    def bulk(self) -> int:
        """Instructions of the engine that copies whole tiles."""
        return self.mix.get("UTMALDG", 0) + self.mix.get("UTMASTG", 0)

    def launched(self, threads: int, shared: int) -> Report:
        """The same code launched with so many threads and bytes of dynamic shared memory a block."""
        return replace(self, warps=threads // 32, shared=self.shared + shared)

    def faults(self, aligned: bool = False, budget: Budget = NO_BUDGET, narrow: str = "") -> list[str]:
        """What is wrong with the kernel, in words; empty if nothing is.

        aligned: its rows begin at multiples of 16 bytes, so global memory must be moved 128 bits at a time.
        narrow: "loads" and "stores" that need not be, for all that.
        """
        mix = Counter(self.mix)
        limit = GPUS[self.arch].block_shared
        found = []
        if self.spills > budget.spills:
            found.append(f"spills: {mix['LDL']} loads, {mix['STL']} stores, {self.stack} bytes of stack a thread")
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory; sm_{self.arch} gives a block {limit}")
        if self.registers > budget.registers:
            found.append(f"takes {self.registers} registers a thread; its budget is {budget.registers}")
        if 0 < self.blocks_per_sm < budget.blocks:
            found.append(
                f"{self.blocks_per_sm} blocks fit a multiprocessor (by {self.bound}); its budget is {budget.blocks}"
            )
        if self.multiplies and not self.tensor_core:
            found.append("multiplies 16-bit or TF32 matrices without tensor-core instructions")
        if self.serialized:
            found.append("its wgmmas are serialized by the assembler")
        if (
            aligned
            and "loads" not in narrow
            and mix["LDG"] + mix["LDGSTS"]
            and not mix["LDG.128"] + mix["LDGSTS.128"] + mix["UTMALDG"]
        ):
            found.append(f"none of its {mix['LDG'] + mix['LDGSTS']} global loads is 128 bits wide")
        if aligned and "stores" not in narrow and mix["STG"] >= NARROW_STORES and not mix["STG.128"] + mix["UTMASTG"]:
            found.append(f"none of its {mix['STG']} global stores is 128 bits wide")
        if mix["ATOM.FLOAT"]:
            found.append(f"{mix['ATOM.FLOAT']} floating-point atomics: the sum depends on their order")
        return found


def audit(compiled: Compiled) -> Report:
    """The report of a kernel from `compiling`. RuntimeError with the tool's words if the binary can't be read."""
    return audit_launches([compiled])[0]


def audit_launches(launches: Sequence[Planned], kept: bool = True) -> list[Report]:
    """The report of each launch from `planning`. One whose source was audited before is not compiled again.

    kept: as in `Planned.compile`; the reports always are.

    Raises what the compiler raises, and RuntimeError with the tool's words if a binary can't be read.
    """
    places = {p.key: _place(p) for p in launches}
    missing = {p.key: p for p in launches if not places[p.key].exists()}
    for arch in sorted({p.arch for p in missing.values()}):
        compiled = [p.compile(kept) for p in missing.values() if p.arch == arch]
        for one, found in zip(compiled, read([c.cubin for c in compiled], arch)):
            ((name, figures),) = found.items()
            report = _report(name, arch, one.warps, one.shared, figures, multiplies=_multiplies(one))
            report = replace(report, serialized=serializes(one.binary.asm["ptx"], arch, one.words))
            keep(places[one.key], partial(Path.write_text, data=json.dumps(asdict(report))))
    return [Report(**json.loads(places[p.key].read_text())) for p in launches]


def is_known(launch: Planned) -> bool:
    """Whether its report is kept already, so that nothing is compiled for it."""
    return _place(launch).exists()


def _place(launch: Planned) -> Path:
    return place("audited", f"{READER} {launch.key}".encode(), ".json")


def audit_cubin(cubin: bytes, arch: int, warps: int = 1, shared: int = 0) -> dict[str, Report]:
    """The report of each kernel in a binary. `warps` and `shared` (dynamic, bytes) are what its launches ask for."""

    def make(path: Path) -> None:
        path.write_text(json.dumps(read([cubin], arch)[0]))

    found = json.loads(cached("audit", b"%d " % READER + cubin, ".json", make).read_text())
    return {name: _report(name, arch, warps, shared, figures) for name, figures in found.items()}


def describe(report: Report) -> dict[str, Any]:
    """A report as plain data, what follows from it included."""
    derived = ("spills", "blocks_per_sm", "bound", "loads", "stores", "tensor_core", "bulk", "widths")
    return asdict(report) | {name: getattr(report, name) for name in derived}


def _report(name: str, arch: int, warps: int, shared: int, figures: dict[str, Any], multiplies: bool = False) -> Report:
    system = 1024 if arch >= 90 else 0  # counted as static by the tools, on top of what a block may have
    rest = {k: v for k, v in figures.items() if k != "static"}
    return Report(name, arch, warps, shared=max(shared, figures["static"] - system), multiplies=multiplies, **rest)


def _multiplies(compiled: Compiled) -> bool:
    """Whether it multiplies matrices that came in types that tensor cores are for, whatever it made of them."""
    products = re.findall(r"tt\.dot\b.*", compiled.binary.asm["ttir"])
    half = any(dtype in ("float16", "bfloat16") for dtype in compiled.dtypes)
    return bool(products) and (half or any("inputPrecision = tf32" in p for p in products))


def budget_of(launch: Planned) -> Budget:
    """What stands in ``BUDGETS`` of the kernel's own file; without limits if nothing does."""
    return launch.source.fn.fn.__globals__.get("BUDGETS", {}).get(launch.kernel, NO_BUDGET)


def _bits(wide: Any, half: Any, any: Any) -> int | None:
    return 128 if wide else 64 if half else 32 if any else None


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
