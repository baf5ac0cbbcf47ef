"""Candidates' machine code, compiled by all processors before a GPU times any; the GPU finds it in Triton's cache."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from gpulayers.bench.cases.uses import Use, directions, dry, precision
from gpulayers.bench.measuring.pool import pool
from gpulayers.bench.tuning.search import Screened
from gpulayers.kernels.triton import _configs

from gpulayers.testing.audit import audit_launches
from gpulayers.testing.compiling import compiling, one
from gpulayers.testing.gpus import GPUS

Job = tuple[Use, str, Any]
"""(use, choice, candidate)"""


def screen(job: Job, arch: int) -> Screened:
    """Compile what the use launches where the choice is forced, and read the code of the kernels that this changes."""
    use, name, candidate = job
    forward, backward = directions(use)
    saved: dict = {}
    if use.direction == "backward":
        with dry(one(arch), use.dtype):
            saved = forward()[1]
    try:
        with compiling(arch) as session, precision(use.dtype), _configs.forced(name, candidate):
            forward() if use.direction == "forward" else backward(saved)
    except Exception as error:  # whatever the compiler raises speaks against the candidate alone
        return Screened(f"{type(error).__name__}: {error}"[:300], 0.0, False)
    reports = audit_launches([c for c in session.compiled if c.warps == candidate.warps])
    faults = [f"{r.kernel} {fault}" for r in reports for fault in r.faults()]
    faults += [f"{r.kernel}: no block fits a multiprocessor" for r in reports if not r.blocks_per_sm]
    resident = min((r.blocks_per_sm * r.warps * 32 / GPUS[arch].threads for r in reports), default=0.0)
    wide = all("LDG" not in r.mix or "LDG.128" in r.mix for r in reports)
    return Screened("; ".join(faults) or None, resident, wide)


def screened(jobs: Sequence[Job], arch: int) -> Iterator[tuple[Job, Screened]]:
    """Each job's result as it comes, from as many processes as there are processors.

    Who stops listening ends them. Where the compiler takes its process with it, the jobs that are left run one by one.
    """
    lost: list[Job] = []
    with pool(os.cpu_count() or 1) as workers:  # it starts as many as there are jobs
        futures = {workers.submit(screen, job, arch): job for job in jobs}
        for done in concurrent.futures.as_completed(futures):
            try:
                found = done.result()
            except BrokenProcessPool:
                lost.append(futures[done])
                continue
            yield futures[done], found
    while lost:
        with pool(1) as workers:
            for job, future in [(job, workers.submit(screen, job, arch)) for job in lost]:
                lost = lost[1:]
                try:
                    found = future.result()
                except BrokenProcessPool:
                    yield job, Screened("the compiler's process died of it", 0.0, False)
                    break
                yield job, found
