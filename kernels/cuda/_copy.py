"""Copies in CUDA C++: what ``_copy.cu`` is launched with. Launchers copy by a kernel, as they do all else: what they do can
then be recorded. Arrays are CuPy's (NumPy's while emulated)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from gpulayers.arrays import spec

from .._budget import Budget
from . import _launch

THREADS, AXES = 256, 6

BUDGETS = {
    # It exists for arrays whose elements do not lie side by side.
    "copy_*": Budget(registers=64, blocks=4, threads=THREADS, narrow="loads, stores"),
}
_NAMES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8")
_BY_SIZE = {1: "uint8", 2: "float16", 4: "int32", 8: "int64"}
"""What stands for all other dtypes."""


def _merged(x: Any, y: Any) -> list[tuple[int, int, int]]:
    """(size, step in x, step in y) of each axis, slowest in y first; axes that are one in both arrays count once."""
    found = zip(x.shape, x.strides, y.strides)
    axes: list[tuple[int, int, int]] = []
    for n, x_step, y_step in sorted(found, key=lambda axis: -axis[2]):
        if axes and axes[-1][1:] == (n * x_step, n * y_step):
            axes[-1] = axes[-1][0] * n, x_step, y_step
        elif n != 1:
            axes.append((n, x_step, y_step))
    return [(n, a // x.itemsize, b // y.itemsize) for n, a, b in axes]


def copy(x: Any, y: Any) -> None:
    """y[…] = x: of one shape and dtype, any strides."""
    if not x.size:
        return
    axes = _merged(x, y)
    if len(axes) > AXES:
        axis = max(range(x.ndim), key=lambda a: y.strides[a] if x.shape[a] > 1 else 0)
        for i in range(x.shape[axis]):
            at = (slice(None),) * axis + (i,)
            copy(x[at], y[at])
        return
    name = str(x.dtype)
    if name not in _NAMES:
        name = _BY_SIZE[x.itemsize]
        x, y = x.view(name), y.view(name)
    padded = [(1, 0, 0)] * (AXES - len(axes)) + axes
    sizes, x_steps, y_steps = ([int(axis[i]) for axis in padded] for i in range(3))
    grid = (min(2**31 - 1, -(-math.prod(sizes) // (4 * THREADS))),)
    arguments = (x, y, x.size, *itertools.islice(sizes, 1, None), *x_steps, *y_steps)
    _launch.launch("_copy", f"copy_{name}", grid, (THREADS,), arguments)


def dense(x: Any, order: tuple[int, ...] | None, empty: Callable) -> Any:
    """``x`` dense in this memory order; itself where it is so already, None for None.

    A copy comes from the ``empty`` that dispatch hands to launchers, and so lies in the memory of the caller's library: a
    CUDA graph that torch captures keeps no memory of CuPy's alive.
    """
    if x is None:
        return None
    of = spec(x)
    if of.contiguous and of.order == order:
        return x
    fresh = empty(of.shape, of.dtype, order)
    copy(x, fresh)
    return fresh
