"""One seeded fault, and which faults a file can have."""

from __future__ import annotations

import difflib
import functools
import random
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"
FOLDERS = ("", "triton", "cuda", "aten", "numpy")
CHOOSING = ("__init__.py", "_budget.py", "_configs.py", "_tables.py")
"""Files that choose configurations by measurement: any choice gives the same results."""


@dataclass(frozen=True)
class Mutant:
    file: str
    """Relative to ``kernels/``."""
    kind: str
    start: int
    """The bytes of the file that change: text[start:end] becomes ``new``."""
    end: int
    new: bytes
    line: int
    before: str
    """The line, stripped, as it is and as it becomes: what tells equal mutants from each other in any version."""
    after: str

    @property
    def equal(self) -> str | None:
        """Why no test can notice it, where that is known."""
        return equal().get((self.file, self.before, self.after))

    def name(self, seed: int | str) -> str:
        return f"{seed}:{self.file}:{self.line}:{self.kind}"

    def applied(self) -> bytes:
        text = (KERNELS / self.file).read_bytes()
        return text[: self.start] + self.new + text[self.end :]

    def diff(self) -> str:
        old, new = (KERNELS / self.file).read_text(), self.applied().decode()
        lines = difflib.unified_diff(old.splitlines(), new.splitlines(), self.file, self.file, lineterm="", n=1)
        return "\n".join(lines)


def made(file: str, text: bytes, kind: str, start: int, end: int, new: bytes) -> Mutant:
    """A mutant with what follows from the place of the change."""
    first = text.rfind(b"\n", 0, start) + 1
    last = text.find(b"\n", end)
    last = len(text) if last < 0 else last
    before, after = text[first:last], text[first:start] + new + text[end:last]
    line = text.count(b"\n", 0, start) + 1
    return Mutant(file, kind, start, end, new, line, *(" ".join(part.decode().split()) for part in (before, after)))


def files(families: Sequence[str]) -> list[str]:
    """The kernels' files, of some families (their private helpers too) or of all."""
    found = [
        p for folder in FOLDERS for p in sorted((KERNELS / folder).glob("*")) if p.suffix in (".py", ".cu", ".cuh")
    ]
    chosen = [p for p in found if p.name not in CHOOSING]
    if families:
        chosen = [p for p in chosen if p.stem in families or p.stem.lstrip("_") in families]
    return [str(p.relative_to(KERNELS)) for p in chosen]


def every(file: str) -> list[Mutant]:
    """All faults that can be seeded in a file; some of them may be known to be equal."""
    from mutation import in_cuda, in_python

    text = (KERNELS / file).read_bytes()
    find = in_python.faults if file.endswith(".py") else in_cuda.faults
    changes = sorted(set(find(text)), key=lambda c: (c[1], c[2], c[0], c[3]))
    mutants = [made(file, text, *change) for change in changes]
    return [m for m in mutants if m.after != m.before]


@functools.cache
def equal() -> dict[tuple[str, str, str], str]:
    """(file, line before, line after) of the mutants that no test can notice, and why."""
    entries = tomllib.loads(Path(__file__).with_name("equal.toml").read_text()).get("equal", [])
    return {(e["file"], e["before"], e["after"]): e["why"] for e in entries}


def kept(name: str) -> list[tuple[Mutant, str]]:
    """(fault, the test that notices it) of ``<name>.toml``; KeyError for one whose line is no more."""
    entries = tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text())["fault"]
    return [(_of_line(e["file"], e["before"], e["after"], e.get("about", "kept")), e["test"]) for e in entries]


def _of_line(file: str, before: str, after: str, about: str) -> Mutant:
    """The mutant in which the first line, or statement over lines, that reads ``before`` reads ``after``."""
    text = (KERNELS / file).read_bytes()
    words = rb"[ ]*\n?[ ]*".join(re.escape(word.encode()) for word in before.split())
    found = re.search(rb"^[ ]*(%b)[ ]*$" % words, text, re.M)
    if found is None:
        raise KeyError(f"{file} has no line {before!r}")
    return made(file, text, about, *found.span(1), after.encode())


def draw(count: int, seed: int, families: Sequence[str] = (), only: Sequence[str] = ()) -> list[Mutant]:
    """Random faults, at most one for a line and a kind; rare kinds come more often than they stand in the files."""
    pool = [m for file in files(families) for m in every(file) if not only or m.kind in only]
    kinds = Counter(m.kind for m in pool)

    def chance(m: Mutant) -> float:
        """Of each fault by itself: what changes elsewhere in the kernels does not change which are drawn."""
        return random.Random(f"{seed}:{m.file}:{m.before}:{m.after}").random() ** kinds[m.kind] ** 0.5

    once: dict[str, Mutant] = {}
    for mutant in sorted(pool, key=chance, reverse=True):
        once.setdefault(mutant.name(seed), mutant)
    return list(once.values())[:count]
