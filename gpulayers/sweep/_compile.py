"""Compiles and reads what a plan lists, on all processors; what was seen before comes from disk."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm

from gpulayers.testing import compiling
from gpulayers.testing.audit import Report, audit_launches, is_known
from gpulayers.testing.compiling import Planned

A_BATCH = 12
"""Kernels that a process compiles before it reads them all at once: the disassembler takes half a second to start."""
_launches: list[Planned] = []
"""What worker processes, which are forks of this one, compile."""


def reports(launches: Sequence[Planned], processes: int | None = None) -> tuple[dict[str, Report | str], int]:
    """({key: report, or the compiler's words}, how many were compiled). Shows progress with the time left."""
    known = [p for p in launches if is_known(p)]
    found: dict[str, Report | str] = {p.key: r for p, r in zip(known, audit_launches(known))}
    _launches[:] = [p for p in launches if p.key not in found]
    if not _launches:
        return found, 0
    archs = [p.arch for p in _launches]
    if processes == 1:
        return _alone(found, list(_batches(archs, len(archs))))
    batches = list(_batches(archs, A_BATCH))
    workers = min(processes or os.cpu_count() or 1, len(batches))
    compiled = 0
    context: Any = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context) as pool:
        futures: dict[Future, list[int]] = {pool.submit(_batch, batch): batch for batch in batches}
        with tqdm(total=len(_launches), desc="compiling", unit=" kernels") as bar:
            for future in as_completed(futures):
                batch = futures[future]
                results, count = future.result()
                found |= {_launches[i].key: result for i, result in zip(batch, results)}
                compiled += count
                bar.update(len(batch))
    return found, compiled


def _alone(found: dict[str, Report | str], batches: Sequence[list[int]]) -> tuple[dict[str, Report | str], int]:
    """The same in this process."""
    compiled = 0
    for batch in batches:
        results, count = _batch(batch)
        found |= {_launches[i].key: result for i, result in zip(batch, results)}
        compiled += count
    return found, compiled


def _batches(archs: Sequence[int], size: int) -> Iterator[list[int]]:
    """Numbers of launches for one architecture, ``size`` at a time."""
    for arch in dict.fromkeys(archs):
        numbers = [i for i, a in enumerate(archs) if a == arch]
        yield from (numbers[i : i + size] for i in range(0, len(numbers), size))


def _batch(numbers: list[int]) -> tuple[list[Report | str], int]:
    """In a worker: the reports of some launches; if one does not compile, the others' all the same."""
    before = compiling.compilations
    chosen = [_launches[i] for i in numbers]
    try:
        results: list[Report | str] = [*audit_launches(chosen, kept=False)]
    except Exception:
        results = [_one(launch) for launch in chosen]
    compiling._binaries.clear()
    return results, compiling.compilations - before


def _one(launch: Planned) -> Report | str:
    try:
        return audit_launches([launch], kept=False)[0]
    except Exception as error:  # whatever the compiler raises is what the audit reports
        return f"does not compile: {type(error).__name__}: {str(error).strip()[:500]}"
