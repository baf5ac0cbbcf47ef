"""What launchers of every backend ask about memory: arrays are dense in ``order``, None for row-major."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpulayers.arrays import Spec, dtype, empty_numpy


def empty_of(shape: Sequence[int], kind: Any, order: tuple[int, ...] | None = None) -> np.ndarray:
    return empty_numpy(Spec(tuple(shape), dtype(kind), order))


def own_memory(launcher: Callable) -> Callable:
    """A launcher as NumPy's are, which take their memory themselves, from one that is handed ``empty``."""
    made = functools.partial(launcher, empty=empty_of)
    functools.update_wrapper(made, launcher)
    signature = inspect.signature(launcher)
    made.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p for p in signature.parameters.values() if p.name != "empty"]
    )
    return made


def around(shape: Sequence[int], order: Sequence[int] | None, axis: int) -> tuple[int, int, int]:
    """(A, C, B): how many elements lie in memory outside an axis, along it, and inside it."""
    axes = list(order or range(len(shape)))
    at = axes.index(axis)
    return math.prod(shape[a] for a in axes[:at]), shape[axis], math.prod(shape[a] for a in axes[at + 1 :])


def halved(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])


def row_major_steps(shape: Sequence[int], order: Sequence[int]) -> list[tuple[int, int]]:
    """(size, row-major step) of each axis from the slowest to the fastest in memory, joined where they can be."""
    joined: list[tuple[int, int]] = []
    for a in order:
        step = math.prod(shape[a + 1 :])
        if joined and joined[-1][1] == step * shape[a]:
            joined[-1] = joined[-1][0] * shape[a], step
        elif shape[a] != 1:
            joined.append((shape[a], step))
    return joined
