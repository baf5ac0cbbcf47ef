"""What NumPy kernels over images share: memory like an image's, and blocks of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpulayers.arrays import Spec, empty_numpy

from . import _blocks


def empty_like(x: np.ndarray, size: tuple, kind: Any) -> np.ndarray:
    """(n, c, *size), its axes in memory as x's are."""
    order = tuple(sorted(range(x.ndim), key=lambda a: -x.strides[a]))
    return empty_numpy(Spec((*x.shape[:2], *size), np.dtype(kind), order))


def along_axes(place: Callable[[np.ndarray, np.ndarray, int], None], dy: np.ndarray, dx: np.ndarray, kind: Any) -> None:
    """dx from dy by place(wide, narrow, axis) along one spatial axis after the other, the first first; sums in ``kind``."""
    part = dy
    for axis in range(2, dx.ndim):
        narrow, last = part, axis == dx.ndim - 1
        part = (
            dx if last and dx.dtype == kind else empty_like(dx, (*dx.shape[2 : axis + 1], *dy.shape[axis + 1 :]), kind)
        )
        place(part, narrow, axis)
    if part is not dx:
        dx[...] = part


def over_blocks(work: Callable[..., None], results: list[np.ndarray], given: list[np.ndarray]) -> None:
    """work(*results, *given) for blocks of images that fit the cache; of single planes where the results allow it."""
    if all(a.flags.c_contiguous for a in results):
        results, given = (
            [a.reshape(a.shape[0] * a.shape[1], 1, *a.shape[2:]) for a in arrays] for arrays in (results, given)
        )
    n = len(results[0])
    each = max(a.size for a in [*results, *given]) // max(n, 1)

    def block(lo: int, hi: int) -> None:
        work(*[a[lo:hi] for a in results], *[a[lo:hi] for a in given])

    _blocks.over(n, _blocks.block_rows(each), block, n * each)
