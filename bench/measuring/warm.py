"""Compiles what the next cases will launch, by all processors: the process that measures would do it one by one, with the
GPU waiting. It is done before they are measured, not beside it, which would show in the host's times."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import time
from collections.abc import Sequence

from gpulayers.bench.cases.uses import Use, directions, precision, uses_of
from gpulayers.bench.measuring.lab import Task
from gpulayers.bench.measuring.pool import pool

from gpulayers.testing.compiling import compiling
from gpulayers.testing.gpus import GPUS

FEWEST = 8
"""Cases for which the processes are worth their start."""


def compile_use(use: Use, arch: int) -> None:
    """Into Triton's cache. What cannot be compiled so is left to who launches it."""
    forward, backward = directions(use)
    with contextlib.suppress(Exception), compiling(arch), precision(use.dtype):
        _, saved = forward()
        if use.direction == "backward":
            backward(saved)


def warm(tasks: Sequence[Task], arch: int, until: float) -> None:
    """Compile ours of these tasks for an architecture; no longer than ``until`` of time.monotonic()."""
    uses = [use for t in tasks if not t.slow for use in uses_of(t.family, t.case, str(t.dtype))]
    if len(uses) < FEWEST or arch not in GPUS:
        return
    with contextlib.suppress(TimeoutError, concurrent.futures.BrokenExecutor), pool(os.cpu_count() or 1) as workers:
        for done in [workers.submit(compile_use, use, arch) for use in uses]:
            done.result(timeout=max(0.0, until - time.monotonic()))
