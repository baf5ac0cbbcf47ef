"""What has to be compiled: each launch of each call once, and calls with an entry of a table forced on them, where no
call chooses it by itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpulayers.kernels.triton import _configs, _tables
from gpulayers.sweep._calls import Call
from gpulayers.testing.audit_op import aligned
from gpulayers.testing.compiling import Planned

TRIES = 4
"""Calls that an entry is forced on, at most, until it fits one."""


@dataclass
class Job:
    """One binary: the first launch that needs it, and how the calls that share it may be judged."""

    launch: Planned
    call: Call
    aligned: bool
    """Of some call; then its accesses must be wide."""


@dataclass
class Plan:
    """All binaries by their key, and which entries of the tables they come from."""

    jobs: dict[str, Job] = field(default_factory=dict)
    chosen: set[tuple[Path, str, int]] = field(default_factory=set)
    """(table, choice, entry) of every launch."""
    asked: dict[tuple[int, str], list[tuple[Call, _configs.Asked]]] = field(default_factory=dict)
    """(architecture, choice) -> who asked for it."""

    def add(self, call: Call, arch: int, forced: str = "") -> None:
        """Plan a call. forced: the choice that does not choose by itself. Raises what the call's launchers raise."""
        with _configs.asked() as asked:
            launches = call.launched(arch)
        is_aligned = aligned(call.specs)
        for launch in launches:
            job = self.jobs.setdefault(launch.key, Job(launch, call, is_aligned))
            job.aligned |= is_aligned
        table = _tables.find(arch)
        for one in asked:
            self.asked.setdefault((arch, one.choice), []).append((call, one))
            if one.index is not None and one.choice != forced:
                self.chosen.add((table, one.choice, one.index))

    def force(self, arch: int) -> None:
        """Plan calls for each entry that none chose: of each dtype one, that asked for the choice and suits the entry."""
        table = _tables.find(arch)
        for choice in list(_configs.CHOICES.values()):
            askers = self.asked.get((arch, choice.name), [])
            for index, entry in enumerate(choice.entries(arch) if askers else ()):
                if (table, choice.name, index) not in self.chosen:
                    self._force(arch, choice.name, index, entry, list(suited(askers, choice, index, arch)))

    def _force(self, arch: int, name: str, index: int, entry: Any, askers: list[Call]) -> None:
        for dtype in dict.fromkeys(str(call.dtype) for call in askers):
            for call in [c for c in askers if str(c.dtype) == dtype][:TRIES]:
                try:
                    with _configs.forced(name, entry):
                        self.add(call, arch, name)
                except ValueError:  # it has no room for the entry
                    continue
                self.chosen.add((_tables.find(arch), name, index))
                break


def suited(
    askers: Sequence[tuple[Call, _configs.Asked]], choice: _configs.Choice, index: int, arch: int
) -> Iterator[Call]:
    """The calls that an entry may be forced on, largest first: a row that the entry is for, any matrix for a tile."""
    entries = choice.entries(arch)
    least = entries[index - 1].upto if choice.kind is _configs.Row and index else 0
    most = getattr(entries[index], "upto", None)

    def size(asked: _configs.Asked) -> int:
        return max((n for n in asked.key[1:] if isinstance(n, int)), default=0)

    for call, asked in sorted(askers, key=lambda both: -size(both[1])):
        if choice.kind is not _configs.Row or (size(asked) > least and (most is None or size(asked) <= most)):
            yield call


def kernels_in(files: Iterable[Path]) -> list[str]:
    """``<file>.<kernel>`` of every Triton kernel in files of kernels."""
    return [
        f"{p.stem}.{k}" for p in files for k in re.findall(r"^def (_\w+_kernel)\(", p.read_text(encoding="utf-8"), re.M)
    ]


def title(launch: Planned) -> str:
    """``<file>.<kernel>`` of a launch."""
    return f"{launch.source.fn.fn.__module__.rpartition('.')[2]}.{launch.kernel}"


def unreached(plan: Plan, archs: Sequence[int], files: Sequence[Path], whole: bool) -> list[str]:
    """What no call reaches: kernels in the files, entries of tables; in a whole run choices that nobody asked for."""
    reached = {title(job.launch) for job in plan.jobs.values()}
    missing = [f"{kernel}: no case launches it" for kernel in kernels_in(files) if kernel not in reached]
    asked = {name for _, name in plan.asked}
    asked_here = {(_tables.find(arch), name) for arch, name in plan.asked}
    for table in dict.fromkeys(map(_tables.find, archs)):
        for name, entries in _tables.read(table).entries.items():
            if name not in asked:
                missing += [f"{table.name}: {name}: no case asks for it"] if whole else []
                continue
            for i, entry in enumerate(entries):
                if (table, name) in asked_here and (table, name, i) not in plan.chosen:
                    missing.append(f"{table.name}: {name}: no case is for entry {i}, {entry}")
    return missing
