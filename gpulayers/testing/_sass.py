"""Reads machine code: each kernel's resources, and how many instructions of each family it has.

The disassembler takes half a second to start and a millisecond a kernel, so the kernels of many binaries are handed to
it as one piece of code.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import tempfile
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

READER = 3  # part of the key of cached results: raise it when the reading below changes

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
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9_.a-z]*)")


def read(cubins: Sequence[bytes], arch: int) -> list[dict[str, dict[str, Any]]]:
    """The figures of each kernel in each binary for compute capability `arch`. RuntimeError with the tools' words."""
    if not cubins:
        return []
    resources = [_resources(cubin) for cubin in cubins]
    code = [(i, name, text) for i, cubin in enumerate(cubins) for name, text in _code(cubin).items()]
    found: list[dict[str, dict[str, Any]]] = [{} for _ in cubins]
    for (i, name, _), opcodes in zip(code, _opcodes([text for _, _, text in code], arch)):
        mix = {f: sum(n for op, n in opcodes.items() if re.match(pattern, op)) for f, pattern in FAMILIES.items()}
        found[i][name] = {
            **resources[i][name],
            "instructions": sum(opcodes.values()),
            "mix": {family: n for family, n in mix.items() if n},
        }
    return found


def _resources(cubin: bytes) -> dict[str, dict[str, int]]:
    """A thread's registers and local memory and a block's static shared memory, by kernel."""
    found = {}
    for name, line in re.findall(r"Function (\S+):\s*\n(.*)", _run("cuobjdump", cubin, "-res-usage")):
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        figures = {"registers": "REG", "stack": "STACK", "local": "LOCAL", "static": "SHARED"}
        found[name] = {figure: numbers[key] for figure, key in figures.items()}
    return found


def _code(cubin: bytes) -> dict[str, bytes]:
    """The instructions of each kernel: the sections `.text.<kernel>` of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    start = sections[names][4]
    labelled = [(cubin[start + s[0] :].split(b"\0", 1)[0].decode(), cubin[s[4] : s[4] + s[5]]) for s in sections]
    return {name.removeprefix(".text."): text for name, text in labelled if name.startswith(".text.")}


def _opcodes(texts: Sequence[bytes], arch: int) -> list[Counter[str]]:
    """How often each opcode occurs in each piece of code."""
    starts, end = [], 0
    for text in texts:
        starts.append(end)
        end += len(text)
    counts: list[Counter[str]] = [Counter() for _ in texts]
    for line in _run("nvdisasm", b"".join(texts), "-ndf", "-b", f"SM{arch}{'a' * (arch >= 90)}").splitlines():
        if found := INSTRUCTION.search(line):
            counts[bisect(starts, int(found[1], 16)) - 1][found[2]] += 1
    return counts


def run_through(cubin: bytes, arch: int, looped: bool) -> Counter[str]:
    """Instructions of a round of the longest loop in a binary's kernel, or of a kernel from its beginning to its exit (after
    which is what divisions call for rare numbers): "all" of them, and those that are MUFU."""
    (text,) = _code(cubin).values()
    listing = _run("nvdisasm", text, "-ndf", "-b", f"SM{arch}{'a' * (arch >= 90)}")
    places = [(int(m[1], 16), m[2], line) for line in listing.splitlines() if (m := INSTRUCTION.search(line))]
    if looped:
        jumps = [(int(m[1], 16), at) for at, _, line in places if (m := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line))]
        rounds = [(to, at) for to, at in jumps if to < at]
        first, last = max(rounds, key=lambda jump: jump[1] - jump[0], default=(0, 0))
    else:
        ends = (at for at, opcode, line in places if opcode == "EXIT" and "@" not in line.split(opcode)[0])
        first, last = 0, next(ends)
    inside = [opcode for at, opcode, _ in places if first <= at <= last]
    return Counter(all=len(inside), MUFU=sum(opcode.startswith("MUFU") for opcode in inside))


def serializes(ptx: str, arch: int, words: str = "") -> bool:
    """Whether the assembler makes the products of warp groups (wgmma) wait for each other: only its own `words` tell, for
    which it is asked where they are not at hand."""
    if "wgmma" not in ptx:
        return False
    words = words or _run("ptxas", ptx.encode(), "-v", f"--gpu-name=sm_{arch}a", "-o", os.devnull)
    return "wgmma.mma_async instructions are serialized" in words


def _run(tool: str, data: bytes, *options: str) -> str:
    """What one of the binary tools says that ship inside triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(data)
        file.flush()
        done = subprocess.run([str(path), *options, file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} could not read its input: {(done.stdout + done.stderr).strip()[:500]}")
    return done.stdout + done.stderr
