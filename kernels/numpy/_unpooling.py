"""Maxima put back one after the other, some images at a time; backward looks them up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpulayers.arrays import Spec, empty_numpy

from .._window import output_order
from . import _blocks


def _over(flat: Callable[..., None], wide: np.ndarray, narrow: np.ndarray, indices: np.ndarray, last: bool) -> None:
    """flat(wide, narrow, places) for each image, or each of its channels where those lie apart: rows of neighbours in
    memory; last: channels are neighbours."""
    n, c, *sizes = wide.shape
    pixels, count = math.prod(sizes), math.prod(narrow.shape[2:])

    def rows(a: np.ndarray, each: int) -> Any:
        if last:
            return np.moveaxis(a, 1, -1).reshape(n, each * c)
        return a.reshape(n * c, each)

    of_wide, of_narrow, places = rows(wide, pixels), rows(narrow, count), rows(indices, count)
    channels = np.tile(np.arange(c), count) if last else None

    def work(first: int, end: int) -> None:
        for row in range(first, end):
            at = places[row]
            flat(of_wide[row], of_narrow[row], at if channels is None else at * c + channels)

    _blocks.over(len(of_wide), 1 if last else _blocks.block_rows(pixels), work, wide.size)


def max_unpool_forward(
    x: np.ndarray, indices: np.ndarray, *, needs: tuple = (), output_size: tuple
) -> tuple[tuple, dict]:
    order = output_order(x)
    y = empty_numpy(Spec((*x.shape[:2], *output_size), x.dtype, order))

    def put(y: np.ndarray, x: np.ndarray, at: np.ndarray) -> None:
        y.fill(0)
        y[at] = x

    _over(put, y, x, indices, order is not None)
    return (y,), {"indices": indices} if needs else {}


def max_unpool_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, output_size: tuple) -> tuple:
    dx = empty_numpy(inputs[0].like())
    order = output_order(dx)
    into = dx if order is not None or dx.flags.c_contiguous else np.empty(dx.shape, dx.dtype)

    def look_up(dy: np.ndarray, dx: np.ndarray, at: np.ndarray) -> None:
        np.take(dy, at, out=dx, mode="clip")

    _over(look_up, dys[0], into, saved["indices"], order is not None)
    if into is not dx:
        dx[...] = into
    return dx, None
