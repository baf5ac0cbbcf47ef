"""The command itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpulayers.bench.reporting.tables import show
from gpulayers.sweep import _calls, _show
from gpulayers.sweep._diff import audited
from gpulayers.sweep._results import sweep
from gpulayers.testing.gpus import GPUS


def audit(options: Any, families: Sequence[_calls.Family] | None = None, root: Path | None = None) -> int:
    """Compile, read, and print; 1 if anything is wrong.

    options: the command's, as ``gpulayers audit --help`` lists them.
    families: what is audited instead of the named ones. root: the checkout that ``--diff`` looks into.
    """
    runs = _runs(options.arch, options.dtype)
    names = options.family or _calls.families()
    whole = families is None and set(names) == set(_calls.families()) and runs.keys() == GPUS.keys()
    chosen = [_calls.family(name) for name in names] if families is None else families
    same = [*options.family, f"--arch={options.arch}", f"--dtype={options.dtype}"]
    before = audited(options.diff, same, root) if options.diff else None  # first: there may be no such revision
    found = sweep(chosen, runs, _calls.shared_files() if whole else (), whole)
    if options.json:
        found.write(options.json)
    if before is not None:
        text, count = _show.changes(before, found)
        print(text if count else f"the machine code is the same as {options.diff}'s, by these figures")
    elif options.all:
        print(_show.lines(found))
    else:
        show(*_show.worst(found))
    kernels = len({r.kernel for r in found.results})
    known = len(found.results) - found.compiled
    print(f"\n{kernels} kernels, {len(found.results)} binaries: {found.compiled} compiled now, {known} known")
    for fault in found.faults:
        print(f"FAULT {fault}")
    return 1 if found.faults else 0


def _runs(archs: str, dtypes: str) -> dict[int, list[str]]:
    """Architecture -> dtypes. By default float16 is for one: its code is bfloat16's but for the conversions."""
    numbers = [int(n) for n in re.findall(r"\d+", archs)] or list(GPUS)
    if not set(numbers) <= GPUS.keys():
        raise ValueError(f"audit: --arch: the rule is some of {', '.join(f'sm_{a}' for a in GPUS)}; got {archs!r}")
    names = dtypes.split(",") if dtypes else list(_calls.DTYPES)
    if not set(names) <= set(_calls.DTYPES):
        raise ValueError(f"audit: --dtype: the rule is some of {', '.join(_calls.DTYPES)}; got {dtypes!r}")
    half = 90 if 90 in numbers else numbers[0]
    return {a: [n for n in names if dtypes or n != "float16" or a == half] for a in numbers}
