"""Launches that come again with the same bytes: what the first one wrote is written again, and no program runs.

An interpreted launch is a function of its kernel, its arguments and the bytes of its tensors; so are the checks that it
passed. `check_op` makes the same launches many times over: forward again, each gradient alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np

from gpulayers.testing.memory import Memory, Region

MOST_BYTES = 1 << 22
"""Of the tensors of a launch that is remembered."""

_remembered: dict[Hashable, list[tuple[int, np.ndarray]]] | None = None
"""The regions that a launch changed, by number, and what they held then."""


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Within, kernels and all that they call stay as they are: a launch that has run is not run again."""
    global _remembered
    before, _remembered = _remembered, {}
    try:
        yield
    finally:
        _remembered = before


class Launched:
    """One launch, before its first program runs. settings: what else its outcome hangs on."""

    def __init__(self, settings: tuple, arguments: dict[str, Any], memory: Memory):
        self.memory, self.key = memory, None
        if _remembered is None or sum(region.nbytes for region in memory.regions) > MOST_BYTES:
            return
        self.before = [region.raw.tobytes() for region in memory.regions]
        tensors = [(r.dtype, r.shape, r.steps, held) for r, held in zip(memory.regions, self.before)]
        key = settings, tuple(map(_told, arguments.values())), tuple(tensors), _shared(memory.regions)
        with contextlib.suppress(TypeError):  # an argument without a hash
            hash(key)
            self.key = key

    def repeat(self) -> bool:
        """Whether such a launch has run; its tensors then hold what it left in them."""
        if self.key is None or _remembered is None or self.key not in _remembered:
            return False
        for i, held in _remembered[self.key]:
            self.memory.regions[i].raw[...] = held
        return True

    def ran(self) -> None:
        """It ran to its end."""
        if self.key is None or _remembered is None or self.memory.asked_where:
            return
        pairs = enumerate(zip(self.memory.regions, self.before))
        _remembered[self.key] = [(i, region.raw.copy()) for i, (region, held) in pairs if region.raw.tobytes() != held]


def _told(argument: Any) -> Hashable:
    """An argument without the arrays in it, which are regions of the launch's memory."""
    if isinstance(argument, tuple):
        return type(argument), tuple(map(_told, argument))
    if type(argument).__name__ == "TensorDescriptor":
        return tuple(argument.shape), tuple(argument.strides), tuple(argument.block_shape), argument.padding
    if isinstance(argument, np.ndarray) or hasattr(argument, "data_ptr"):
        return None
    return type(argument), repr(argument) if isinstance(argument, float | np.generic) else argument  # 0.0 and -0.0


def _shared(regions: list[Region]) -> tuple[tuple[int, int, int], ...]:
    """How tensors that share memory lie to each other."""
    found = []
    for i, a in enumerate(regions):
        for j in range(i):
            b = regions[j]
            if a.low < b.low + b.nbytes and b.low < a.low + a.nbytes:
                found.append((i, j, a.low - b.low))
    return tuple(found)
