"""Work cut into blocks that fit the cache, done by a few threads (NumPy lets go of the interpreter's lock)."""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gpulayers.arrays import guests

from .. import _invariance
from . import _blas

BYTES = 1 << 20
"""Of one array in one block. Threads hand the interpreter's lock over at each ufunc, which costs as much as 64K sums, so
fewer and longer calls win although L2 holds one such array only."""
CHAIN = 1 << 17
"""Elements of a block that a long chain of ufuncs goes through with a few blocks of scratch: twice as many leave the
cache, and with a quarter the threads wait for the lock as long as they work."""
ALONE = 1 << 15
"""Elements below which a second thread costs more than it brings (it takes 10–20 µs to hand over)."""


def threads() -> int:
    """Threads to use: one for each core, but those that others' threads spin on."""
    return max(1, _cores() - guests.cores)


@functools.cache
def _cores() -> int:
    """The cores this process may run on, or OMP_NUM_THREADS if that is fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _asked(os.environ.get("OMP_NUM_THREADS", "")) or cores)


def _asked(text: str) -> int:
    """The threads of the outermost level, the first of OpenMP's list ("4,2"); 0 where the text says nothing."""
    found = re.match(r"\s*\+?(\d+)\s*(,|$)", text)
    return int(found[1]) if found else 0


_ours = threading.local()


def _enter() -> None:
    """A thread of the pool starts."""
    _ours.inside = True
    np.seterr(all="ignore")  # NumPy's warnings are each thread's own affair; the caller's are for the caller's thread


def _single() -> bool:
    """Whether this thread should do its work by itself: it is one of the pool's, or there is one core."""
    return getattr(_ours, "inside", False) or threads() == 1


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), thread_name_prefix="gpulayers", initializer=_enter)


os.register_at_fork(after_in_child=_pool.cache_clear)


def block_rows(columns: int, itemsize: int = 4, budget: int = BYTES) -> int:
    """Rows of ``columns`` elements that make one block."""
    return max(1, budget // max(1, columns * itemsize))


def over(total: int, size: int, work: Callable[[int, int], Any], elements: int = 1 << 62) -> list:
    """[work(lo, hi) for each block of ``size`` in range(total)], in order; each thread takes a run of neighbouring blocks.

    The partition depends on ``total`` and ``size`` alone, so sums of the results have the same bits on any machine.
    elements: how many the whole call touches; few, and one thread does it.
    """
    bounds = [(lo, min(lo + size, total)) for lo in range(0, total, max(1, size))]
    if len(bounds) < 2 or elements < ALONE or _single():
        return [work(lo, hi) for lo, hi in bounds]
    share = -(-len(bounds) // threads())  # a hand-over costs as much as a small block, so there is one a thread

    def run(start: int) -> list:
        return [work(lo, hi) for lo, hi in bounds[start : start + share]]

    later = [_pool().submit(run, start) for start in range(share, len(bounds), share)]
    found = _busy(lambda: run(0))
    for part in later:
        found += part.result()
    return found


def flat(x: np.ndarray) -> np.ndarray | None:
    """A dense array as one row in memory order (a view), or None if it has gaps or overlaps."""
    if x.flags.c_contiguous:
        return x.reshape(-1)
    order = sorted(range(x.ndim), key=lambda a: -x.strides[a])
    turned = x.transpose(order)
    return turned.reshape(-1) if turned.flags.c_contiguous else None


def flat_like(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    """``x`` as one row in the memory order of ``like`` (row-major where that is not dense); copies only if it must."""
    if x.flags.c_contiguous and like.flags.c_contiguous:
        return x.reshape(-1)
    if flat(like) is None:
        return np.ascontiguousarray(x).reshape(-1)
    order = sorted(range(x.ndim), key=lambda a: -like.strides[a])
    return np.ascontiguousarray(x.transpose(order)).reshape(-1)


def empty_like(x: np.ndarray) -> np.ndarray:
    """An uninitialised array with the shape, dtype and memory order of ``x``; row-major where ``x`` is not dense."""
    return np.empty_like(x) if x.flags.c_contiguous or flat(x) is not None else np.empty(x.shape, x.dtype)


def each(total: int, size: int, work: Callable[[int, int], Any], elements: int | None = None) -> None:
    """work(lo, hi) for blocks of at most ``size`` in range(total), as many for each thread: for work whose results do not
    depend on the partition.

    elements: how many the whole call touches, where ``total`` counts rows; few, and one thread does it.
    """
    elements = total if elements is None else elements
    over(total, size if elements < ALONE else min(size, -(-total // threads())), work, elements)


def apart(items: Sequence, work: Callable[[Any], Any]) -> list:
    """[work(item) for each], on one thread each, products of matrices included; a single item has all the threads."""
    if len(items) < 2 or _single():
        return [work(item) for item in items]
    with _blas.alone() as could:
        if not could:
            return [work(item) for item in items]
        found, left = [None] * len(items), iter(range(len(items)))

        def run() -> None:
            for i in left:
                found[i] = work(items[i])

        later = [_pool().submit(run) for _ in range(min(threads(), len(items)) - 1)]
        _busy(run)
        for part in later:
            part.result()
        return found


def _busy(work: Callable[[], Any]) -> Any:
    """work() in this thread, while the pool's have the rest."""
    _ours.inside = True
    try:
        return work()
    finally:
        _ours.inside = False


_PARTS = 4


def total(items: Sequence, work: Callable[[Any], np.ndarray]) -> np.ndarray:
    """Σ work(item), in an order that depends on the number of items alone: the same bits on any machine."""
    share = max(1, -(-len(items) // _PARTS))

    def part(start: int) -> np.ndarray:
        found = work(items[start])
        for item in items[start + 1 : start + share]:
            found += work(item)
        return found

    first, *others = apart(range(0, len(items), share), part)
    for other in others:
        first += other
    return first


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a b, of matrices. A batch-invariant one takes one row of ``a`` after the other, since BLAS adds up in an order that hangs
    on a row's place, too."""
    if not _invariance.on():
        return guests.matmul(a, b)
    a, found = np.ascontiguousarray(a)[:, None], np.empty((len(a), 1, b.shape[1]), np.float32)
    each(len(a), 64, lambda lo, hi: np.matmul(a[lo:hi], b, out=found[lo:hi]), found.size)
    return found[:, 0]


_LONG = 256


def dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Σ a b along the last axis.

    BLAS sums into a few lanes from one end to the other, so long rows are cut, or their rounding errors would add up.
    """
    n = a.shape[-1]
    if a.strides[-1] != a.itemsize:
        a = np.ascontiguousarray(a)  # off BLAS's road, one number is added after the other
    if n <= 2 * _LONG:
        return np.vecdot(a, b)
    head = n - n % _LONG
    cut = [t[..., :head].reshape(*t.shape[:-1], -1, _LONG) for t in (a, b)]
    return np.vecdot(*cut).sum(-1) + np.vecdot(a[..., head:], b[..., head:])
