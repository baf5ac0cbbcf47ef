"""Reads a compiled kernel's machine code: registers, spills, shared memory, and which instructions move and multiply.

`audit(compiled).faults(…)` lists what speaks against a kernel before any GPU has run it. The disassembler ships inside
triton; results are kept on disk by the hash of the binary.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpulayers.testing._cache import cached

if TYPE_CHECKING:
    from gpulayers.testing.compiling import Compiled

READER = 1  # part of the key of cached results: raise it when the reading below changes


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

FAMILIES = {  # name in `Report.mix` -> pattern of the opcodes
    "LDG.128": r"LDG\..*\b(128|256)\b",
    "LDG.64": r"LDG\..*\b64\b(?!\.(128|256))",
    "LDG": r"LDG\b",
    "STG.128": r"STG\..*\b(128|256)\b",
    "STG.64": r"STG\..*\b64\b",
    "STG": r"STG\b",
    "LDGSTS.128": r"LDGSTS\..*\b128\b",
    "LDGSTS": r"LDGSTS\b",
    "UTMALDG": r"(UTMALDG|UBLKCP)\b",
    "UTMASTG": r"UTMASTG\b",
    "LDS": r"LDS\b",
    "STS": r"STS\b",
    "LDSM": r"LDSM\b",
    "LDL": r"LDL\b",
    "STL": r"STL\b",
    "HMMA": r"[HQIBDO]MMA\b",
    "HGMMA": r"[HQIB]GMMA\b",
    "UTCMMA": r"UTC\w*MMA\b",
    "BAR": r"BAR\b",
    "MUFU": r"MUFU\b",
    "ATOM": r"(ATOM|ATOMG|ATOMS|RED|REDG|UTMAREDG)\b",
    "ATOM.FLOAT": r"((ATOM|ATOMG|ATOMS|RED|REDG)\..*\b(B?F16|F32|F64)|UTMAREDG)",
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

    def faults(self, multiplies16: bool = False, aligned: bool = False) -> list[str]:
        """What is wrong with the kernel, in words; empty if nothing is.

        multiplies16: it multiplies matrices of 16-bit numbers, so the tensor cores must do it.
        aligned: its rows begin at multiples of 16 bytes, so global memory must be moved 128 bits at a time.
        """
        mix = Counter(self.mix)
        limit = LIMITS[self.arch].block_shared
        found = []
        if self.spills:
            found.append(f"spills: {mix['LDL']} loads, {mix['STL']} stores, {self.stack} bytes of stack a thread")
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory; sm_{self.arch} gives a block {limit}")
        if multiplies16 and not self.tensor_cores:
            found.append("multiplies 16-bit matrices without tensor-core instructions")
        if aligned and mix["LDG"] + mix["LDGSTS"] and not mix["LDG.128"] + mix["LDGSTS.128"] + mix["UTMALDG"]:
            found.append(f"none of its {mix['LDG'] + mix['LDGSTS']} global loads is 128 bits wide")
        if aligned and mix["STG"] >= NARROW_STORES and not mix["STG.128"] + mix["UTMASTG"]:
            found.append(f"none of its {mix['STG']} global stores is 128 bits wide")
        if mix["ATOM.FLOAT"]:
            found.append(f"{mix['ATOM.FLOAT']} floating-point atomics: the sum depends on their order")
        return found


def audit(compiled: Compiled) -> Report:
    """The report of a kernel from `compiling`. RuntimeError with the tool's words if the binary can't be read."""
    (report,) = audit_cubin(compiled.cubin, compiled.arch, compiled.warps, compiled.shared).values()
    return report


def audit_cubin(cubin: bytes, arch: int, warps: int = 1, shared: int = 0) -> dict[str, Report]:
    """The report of each kernel in a binary. `warps` and `shared` (dynamic, bytes) are what its launches ask for."""

    def make(path: Path) -> None:
        path.write_text(json.dumps(_read(cubin)))

    found = json.loads(cached("audit", b"%d " % READER + cubin, ".json", make).read_text())
    system = 1024 if arch >= 90 else 0  # counted as static by the tools, on top of what a block may have
    return {
        name: Report(name, arch, warps, shared=max(shared, facts.pop("static") - system), **facts)
        for name, facts in found.items()
    }


def describe(report: Report) -> dict[str, Any]:
    """A report as plain data, blocks per multiprocessor included."""
    return {**asdict(report), "spills": report.spills, "blocks_per_sm": report.blocks_per_sm}


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _read(cubin: bytes) -> dict[str, dict[str, Any]]:
    """Resources and instruction mix of each kernel, from NVIDIA's binary tools."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # Without its analysis of branches the code is the same, and there a quarter sooner.
        usage, code = _run(("cuobjdump", "-res-usage", file.name), ("nvdisasm", "-c", "-ndf", file.name))
    sections = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", code, re.M | re.S))
    kernels = {}
    for name, line in re.findall(r"Function (\S+):\s*\n(.*)", usage):
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9_.a-z]*)", sections[name]))
        mix = {f: sum(n for op, n in opcodes.items() if re.match(pattern, op)) for f, pattern in FAMILIES.items()}
        kernels[name] = {
            "registers": numbers["REG"],
            "stack": numbers["STACK"],
            "local": numbers["LOCAL"],
            "static": numbers["SHARED"],
            "instructions": sum(opcodes.values()),
            "mix": {family: n for family, n in mix.items() if n},
        }
    return kernels


def _run(*commands: tuple[str, ...]) -> list[str]:
    """The output of several tools that run at once."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    running = [
        subprocess.Popen([str(folder / tool), *rest], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for tool, *rest in commands
    ]
    outputs = [process.communicate()[0] for process in running]
    for (tool, *_), process, output in zip(commands, running, outputs):
        if process.returncode:
            raise RuntimeError(f"{tool} could not read the binary: {output.strip()[:500]}")
    return outputs
