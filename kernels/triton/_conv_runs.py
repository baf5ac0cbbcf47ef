"""Convolutions whose windows do not share columns, for the kernels of pointers: the columns of a window's row are neighbours in
channels-last memory, so they are one column of kw · C channels. Few channels are then read in long runs, not one by one."""

from __future__ import annotations

import math
from typing import Any

from . import _conv_product, _conv_weight, _tile
from ._conv import Walk
from ._epilogue import Epilogue
from ._image import finish
from ._tracing import thread


def apart(x: Any, kernel: tuple, y: Any, walk: Walk, whole: bool = False) -> bool:
    """Whether windows of x, which give y, are of several columns and share none. whole: nor leave one out."""
    columns, taken, step = x.shape[4], kernel[2], walk.stride[2]
    if (
        walk.groups > 1
        or walk.before[2]
        or walk.dilation[2] > 1
        or not 1 < taken <= step
        or thread.compiler is not None
    ):
        return False
    fits = y.shape[4] * step == columns and taken == step if whole else (y.shape[4] - 1) * step + taken <= columns
    return fits and x.permute(0, 2, 3, 4, 1).is_contiguous() and x.numel() > 0


def _columns(x: Any, taken: int, y: Any, walk: Walk) -> Any:
    """x (N, kw · C, D, H, OW), a view."""
    n, c, d, h, w = x.shape
    line = w * c
    rows = x.as_strided((n, d, h, y.shape[4], taken * c), (d * h * line, h * line, line, walk.stride[2] * c, 1))
    return rows.permute(0, 4, 1, 2, 3)


def _taps(taps: Any) -> Any:
    """(O, kw · C, kd, kh, 1), a view of channels-last ones."""
    o, c, kd, kh, kw = taps.shape
    return taps.permute(0, 2, 3, 4, 1).reshape(o, kd, kh, 1, kw * c).permute(0, 4, 1, 2, 3)


def _walk(walk: Walk) -> Walk:
    return walk._replace(stride=(*walk.stride[:2], 1))


def forward(x: Any, taps: Any, end: Epilogue, y: Any, walk: Walk, plain: bool) -> None:
    """As ``_conv_product.forward``."""
    if apart(x, taps.shape[2:], y, walk):
        x, taps, walk = _columns(x, taps.shape[4], y, walk), _taps(taps), _walk(walk)
    _conv_product.forward(x, taps, end, y, walk, plain)


def input_gradient(dy: Any, taps: Any, end: Epilogue, dx: Any, walk: Walk, plain: bool, empty: Any) -> None:
    """As ``_conv_product.input_gradient``."""
    if end.is_bias and apart(dx, taps.shape[2:], dy, walk, whole=True):
        kw = taps.shape[4]
        if end.bias is not None:  # of each column
            end = Epilogue(_tile.copied(end.bias.expand(kw, -1), None, empty).view(-1))
        dx, taps, walk = _columns(dx, kw, dy, walk), _taps(taps), _walk(walk)
    _conv_product.input_gradient(dy, taps, end, dx, walk, plain)


def weight_gradient(dy: Any, x: Any, dweight: Any, walk: Walk, plain: bool, empty: Any) -> None:
    """dweight (O, C / groups, *kernel), of any strides."""
    (o, c, *kernel), sizes = dweight.shape, tuple(dweight.shape)
    if apart(x, tuple(kernel), dy, walk):
        x, walk, sizes = _columns(x, kernel[2], dy, walk), _walk(walk), (o, kernel[2] * c, *kernel[:2], 1)
    partial = _conv_weight.shares_of(dy, x, sizes, walk, plain, empty)
    finish(partial.view(len(partial), o, math.prod(kernel), c), dweight)
