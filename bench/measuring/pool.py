"""Processes that compile kernels, on all processors, before a GPU times any; it finds them in Triton's cache."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool

_resting: dict[int, concurrent.futures.ProcessPoolExecutor] = {}
"""By their number of processes. These take seconds to start, torch and all: the next to ask finds them."""


@contextlib.contextmanager
def pool(workers: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Who leaves by an exception, or stops listening, ends what they are at."""
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used CUDA cannot
    found = _resting.pop(workers, None) or concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
    try:
        yield found
        with contextlib.suppress(BrokenProcessPool):
            found.submit(int).result()
            _resting[workers] = found
    finally:
        if _resting.get(workers) is not found:
            processes = list((found._processes or {}).values())
            found.shutdown(wait=False, cancel_futures=True)
            for process in processes:  # a compilation may last half a minute
                process.terminate()
