"""Places that won, counted row-major in their images: where the numbers under taps lie, which of them is the greatest, and
what comes back to them."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import Spec, compute_dtype, empty_numpy

from .._window import channels_last, output_order
from . import _blocks


def rows_of(x: Any, last: bool) -> np.ndarray:
    """(images, *sizes, channels), or with channels as images of their own (N · C, *sizes, 1)."""
    return x.transpose(channels_last(x.ndim)) if last else x.reshape(x.shape[0] * x.shape[1], *x.shape[2:], 1)


def outputs(x: np.ndarray, size: tuple, needs: tuple, return_indices: bool) -> tuple[list, bool]:
    """([y, index or None, indices or None], whether they are channels-last)."""
    order, wanted = output_order(x), [x.dtype, "i4" if needs else None, "i8" if return_indices else None]
    made = [None if d is None else empty_numpy(Spec((*x.shape[:2], *size), np.dtype(d), order)) for d in wanted]
    return made, order is not None


def returned(y: Any, index: Any, indices: Any) -> tuple[tuple, dict]:
    return (y,) if indices is None else (y, indices), {} if index is None else {"index": index}


def back(dy: np.ndarray, index: np.ndarray, like: Spec) -> np.ndarray:
    """dx: the sum of dy at each place that won, in their order."""
    dx = empty_numpy(like)
    last = output_order(dx) is not None
    into = dx if last or dx.flags.c_contiguous else np.empty(dx.shape, dx.dtype)
    of, g, at = (rows_of(a, last) for a in (into, dy, index))
    channels, kind = np.arange(of.shape[-1]), compute_dtype(dx.dtype)

    def work(first: int, end: int) -> None:
        own = of[first:end]
        direct = own.dtype == kind and own.flags.c_contiguous
        total = own if direct else np.empty(own.shape, kind)
        total.fill(0)
        images = np.arange(end - first).reshape(-1, *(1,) * (of.ndim - 1)) * (total.size // (end - first))
        places = at[first:end] * of.shape[-1] + (images + channels)
        np.add.at(total.reshape(-1), places.reshape(-1), g[first:end].astype(kind, copy=False).reshape(-1))
        if not direct:
            own[...] = total

    _blocks.over(len(of), _blocks.block_rows(of[:1].size), work, dx.size)
    if into is not dx:
        dx[...] = into
    return dx
