"""NumPy's BLAS told to use one thread, while our own threads each multiply something of their own.

OpenBLAS's threads meet after each product, and spin for tens of milliseconds after the last one, on a core that copying
and adding would need.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import pathlib
import threading
from collections.abc import Callable, Iterator

_NAMES = ("scipy_openblas_{}64_", "openblas_{}64_", "openblas_{}")
_lock = threading.Lock()
_users = 0
_before = 1


@functools.cache
def _functions() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """(get_num_threads, set_num_threads) of the OpenBLAS that NumPy has loaded; None where it is another BLAS."""
    maps = pathlib.Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    for path in sorted({line.split()[-1] for line in lines if "openblas" in line and "/numpy" in line}):
        library = ctypes.CDLL(path)
        for name in _NAMES:
            if hasattr(library, name.format("set_num_threads")):
                return getattr(library, name.format("get_num_threads")), getattr(
                    library, name.format("set_num_threads")
                )
    return None


@contextlib.contextmanager
def alone() -> Iterator[bool]:
    """BLAS in the calling threads alone. Yields whether that could be had."""
    global _users, _before
    functions = _functions()
    if functions is None:
        yield False
        return
    get, put = functions
    with _lock:
        if not _users:
            _before = get()
            put(1)
        _users += 1
    try:
        yield True
    finally:
        with _lock:
            _users -= 1
            if not _users:
                put(_before)
