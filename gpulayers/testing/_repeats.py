"""Launches that come again with the same bytes: what the first one wrote is written again, and no program runs.

An interpreted launch is a function of its kernel, its arguments and the bytes of its tensors; so are the checks that it
passed. `check_op` makes the same launches many times over: forward again, each gradient alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from gpulayers.arrays import span
from gpulayers.testing.memory import Memory, layout

MOST_BYTES = 1 << 22
"""Of the tensors of a launch that is remembered."""

_remembered: dict[Hashable, list[tuple[int, bytes]]] | None = None
"""What a launch changed: the numbers of its tensors, and what they held then."""


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
    """One launch, before its first program runs.

    settings: what its outcome hangs on beside its arguments, and the tensors that these and `reached` hold.
    """

    def __init__(self, settings: tuple, arguments: Sequence[Any], tensors: Sequence[Any]):
        self.key: Hashable = None
        if _remembered is None:
            return
        laid = list(map(layout, tensors))
        self.spans = [span(*each[:4]) for each in laid]
        if sum(size for _, size in self.spans) > MOST_BYTES:
            return
        self.dtypes = tuple(dtype for *_, dtype in laid)
        self.held = list(itertools.starmap(ctypes.string_at, self.spans))
        kinds = tuple(each[1:] for each in laid)
        key = settings, tuple(map(_told, arguments)), kinds, tuple(self.held), _shared(self.spans)
        with contextlib.suppress(TypeError):  # an argument without a hash
            hash(key)
            self.key = key

    def repeat(self) -> bool:
        """Whether such a launch has run; its tensors then hold what it left in them."""
        if _remembered is None or self.key is None or self.key not in _remembered:
            return False
        for i, held in _remembered[self.key]:
            ctypes.memmove(self.spans[i][0], held, len(held))
        return True

    def ran(self, memory: Memory) -> None:
        """It ran to its end."""
        if _remembered is not None and self.key is not None and not memory.asked_where:
            after = enumerate(zip(itertools.starmap(ctypes.string_at, self.spans), self.held))
            _remembered[self.key] = [(i, now) for i, (now, before) in after if now != before]


def _told(argument: Any) -> Hashable:
    """An argument without the arrays in it, which are among the launch's tensors."""
    if isinstance(argument, tuple):
        return type(argument), tuple(map(_told, argument))
    if type(argument).__name__ == "TensorDescriptor":
        return tuple(argument.shape), tuple(argument.strides), tuple(argument.block_shape), argument.padding
    if isinstance(argument, np.ndarray) or hasattr(argument, "data_ptr"):
        return None
    return type(argument), repr(argument) if isinstance(argument, float | np.generic) else argument  # 0.0 and -0.0


def _shared(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int, int], ...]:
    """How tensors that share memory lie to each other."""
    found, last = [], 0
    for i, (low, size) in sorted(enumerate(spans), key=lambda each: each[1]):
        if low < last:
            found += [
                (i, j, low - start)
                for j, (start, length) in enumerate(spans)
                if start < low + size and low < start + length
            ]
        last = max(last, low + size)
    return tuple(found)
