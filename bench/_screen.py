"""Candidates' machine code, compiled by all processors before a GPU times any; the GPU finds it in Triton's cache."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import Any

from gpulayers.bench._search import Screened
from gpulayers.bench._uses import Use, directions, dry, precision
from gpulayers.kernels.triton import _configs, _tile

from gpulayers.testing.audit import LIMITS, audit_launches
from gpulayers.testing.compiling import GPUS, compiling

Job = tuple[Use, str, Any]
"""(use, choice, candidate)"""


def screen(job: Job, arch: int) -> Screened:
    """Compile what the use launches where the choice is forced, and read the code of the kernels that this changes."""
    use, name, candidate = job
    forward, backward = directions(use)
    saved: dict = {}
    if use.direction == "backward":
        with dry(_tile.Device(arch, *GPUS[arch]), use.dtype):
            saved = forward()[1]
    try:
        with compiling(arch) as session, precision(use.dtype), _configs.forced(name, candidate):
            forward() if use.direction == "forward" else backward(saved)
    except Exception as error:  # whatever the compiler raises speaks against the candidate alone
        return Screened(f"{type(error).__name__}: {error}"[:300], 0.0, False)
    reports = audit_launches([c for c in session.compiled if c.warps == candidate.warps])
    faults = [f"{r.kernel} {fault}" for r in reports for fault in r.faults()]
    faults += [f"{r.kernel}: no block fits a multiprocessor" for r in reports if not r.blocks_per_sm]
    resident = min((r.blocks_per_sm * r.warps * 32 / LIMITS[arch].threads for r in reports), default=0.0)
    wide = all("LDG" not in r.mix or "LDG.128" in r.mix for r in reports)
    return Screened("; ".join(faults) or None, resident, wide)


def screened(jobs: Sequence[Job], arch: int) -> Iterator[tuple[Job, Screened]]:
    """Each job's result as it comes, from as many processes as there are processors."""
    if not jobs:
        return
    workers = min(os.cpu_count() or 1, len(jobs))
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used CUDA cannot
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(screen, job, arch): job for job in jobs}
        try:
            for done in concurrent.futures.as_completed(futures):
                yield futures[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
