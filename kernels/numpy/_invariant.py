"""Batch-invariant calls: NumPy's own BLAS, one thread a product, on arrays that lie in memory as those of one row do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpulayers.arrays import guests

from . import _blas


def _dense(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(_dense, x))
    return np.ascontiguousarray(x) if isinstance(x, np.ndarray) and x.ndim else x


class Invariant(NamedTuple):
    """A function that computes a call, in the mode. as_given: its arrays may lie as they do."""

    function: Callable
    as_given: bool

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The function's, of its inputs, or of dys and what was saved."""
        before, guests.matmul = guests.matmul, np.matmul
        try:
            with _blas.alone():
                return self.function(*(args if self.as_given else map(_dense, args)), **options)
        finally:
            guests.matmul = before
