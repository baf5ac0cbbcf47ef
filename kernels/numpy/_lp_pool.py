"""Pooling by a norm: sums of powers under windows, as those of a mean."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import compute_dtype, empty_numpy

from .._layout import empty_of
from .._pooling import Divisor, pooling_window
from .._window import Window, image, output_order
from ._images import along_axes, empty_like, over_blocks
from ._windows import Taps, weights_of


def _overhang(taps: Taps, kind: np.dtype) -> Any:
    """Taps of each window by those of them on the image."""
    return weights_of(taps, kind, Divisor(None, True)) * kind.type(taps.of.taps)


def lp_pool_forward(
    x: np.ndarray, *, needs: tuple = (), norm_type: float, kernel_size: tuple, stride: tuple, ceil_mode: bool
) -> tuple[tuple, dict]:
    zeros, ones = (0,) * len(stride), (1,) * len(stride)
    size = Window(kernel_size, stride, zeros, ones).output_size(x.shape[2:], zeros, ceil_mode)
    y, kind = empty_of((*x.shape[:2], *size), x.dtype, output_order(x)), compute_dtype(x.dtype)
    of, out = image(x), image(y)
    taps = Taps(pooling_window(kernel_size, stride, zeros), of.shape[2:], out.shape[2:])
    overhang = _overhang(taps, kind)

    def work(y: np.ndarray, x: np.ndarray) -> None:
        v = x.astype(kind, copy=False)
        total = taps.widen(v * v if norm_type == 2 else np.power(v, kind.type(norm_type)), kind, 0)
        for axis in reversed(range(len(taps.kernel))):
            wide, total = total, total[taps.along(axis, 0)].copy("K")
            for tap in range(1, taps.kernel[axis]):
                total += wide[taps.along(axis, tap)]
        total *= overhang
        if norm_type == 2:
            np.sqrt(total, out=total)
        elif norm_type != 1:
            total = np.where(total == 0, kind.type(0), total ** kind.type(1 / norm_type))
        y[...] = total

    with np.errstate(all="ignore"):
        over_blocks(work, [out], [of])
    return (y,), {"x": x, "y": y} if needs else {}


def lp_pool_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    norm_type: float,
    kernel_size: tuple,
    stride: tuple,
    ceil_mode: bool,
) -> tuple:
    dx = empty_numpy(inputs[0].like())
    dy, x, y, out = map(image, (dys[0], saved["x"], saved["y"], dx))
    taps, kind = (
        Taps(pooling_window(kernel_size, stride, (0,) * len(stride)), out.shape[2:], dy.shape[2:]),
        compute_dtype(dx.dtype),
    )
    overhang = _overhang(taps, kind)

    def work(dx: np.ndarray, dy: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        norm, g = y.astype(kind, copy=False), empty_like(dx, taps.size, kind)
        np.multiply(dy, overhang, out=g)
        there = norm != 0
        if norm_type == 1:
            there &= norm == norm
        elif norm_type == 2:
            g /= norm
        else:
            g *= np.power(norm, kind.type(1 - norm_type))
        g[...] = np.where(there, g, kind.type(0))
        wide = empty_like(dx, taps.full, kind)
        if taps.apart:
            wide.fill(0)
            for _, at in taps.each():
                wide[at] = g
        else:
            along_axes(taps.spread, g, wide, kind)
        v = x.astype(kind, copy=False)
        powers = v if norm_type == 2 else np.power(v, kind.type(norm_type - 1))
        np.multiply(taps.inside(wide), powers, out=dx, casting="same_kind")

    with np.errstate(all="ignore"):
        over_blocks(work, [out], [dy, x, y])
    return (dx,)
