"""Convolutions whose windows do not overlap, as those that cut images into patches, on the tiles of ``_conv_tiles.py``.

In channels-last memory the columns of a window's row are neighbours, a run of kw · C elements, and the runs of all rows are
a view (N, OH, kh, OW, kw · C) of the image: what a product wants is there already, to one descriptor of five axes. So it is
a convolution of kh taps over kw · C channels; dx writes each row of the patches through the same view.
"""

from __future__ import annotations

from typing import Any

from . import _tile
from ._conv import Walk
from ._conv_tiles import HALF, Axis, box, in_rows, launch, machine_refusal, rows_of, summed, views_of
from ._conv_tiles_weight import shares_of
from ._epilogue import Epilogue, in_boxes
from ._image import finish


class _Rows(Axis):
    """Rows of a patch, which are an axis of their own."""

    @property
    def views(self) -> int:
        return 0


_WALKS = (_Rows(0, 0, 1, 1), Axis(0, 0, 0, 1))


def refusal(x: Any, taps: Any, y: Any, walk: Walk, whole: bool = False) -> str | None:
    """Why y = conv(x, taps), or the gradient of any of the three, is not done by patches; None if it is. All of three spatial
    axes. whole: every pixel must lie in a patch, as for dx."""
    (_, sh, sw), (kd, kh, kw), (_, dh, dw) = walk.stride, taps.shape[2:], walk.dilation
    if reason := machine_refusal(x, y):
        return reason
    if {kd, walk.stride[0]} != {1} or walk.groups > 1 or any(walk.before):
        return "groups, padding, or a third axis of the kernel"
    if kh > sh or kw > sw or dh > 1 < kh or dw > 1 < kw:
        return "windows that overlap, or have gaps"
    run, (h, w), (oh, ow) = kw * x.shape[1], x.shape[3:], y.shape[3:]
    if (oh - 1) * sh + kh > h or (ow - 1) * sw + kw > w:
        return "windows that reach out of the image"
    if whole and ((kh, kw) != (sh, sw) or (oh * sh, ow * sw) != (h, w)):
        return "pixels that lie in no patch, whose gradients are zeros"
    if run < FEW or any(n % 8 for n in (run, sw * x.shape[1], w * x.shape[1], y.shape[1])):
        return f"runs of fewer than {FEW} elements, or that do not begin at multiples of 16 bytes"
    aligned = _tile.begins_aligned(x) and _tile.begins_aligned(taps)
    if not (x.permute(0, 2, 3, 4, 1).is_contiguous() and aligned and in_rows(y)):
        return "channels that are not neighbours in memory, or do not begin at multiples of 16 bytes"
    return None


FEW = 16
"""Elements of a run at least: a step of products."""


def _patches(x: Any, kernel: tuple, y: Any, walk: Walk) -> Any:
    """x as (N, OH, kh, OW, kw · C), a view."""
    rows, (_, sh, sw), (_, kh, kw) = rows_of(x), walk.stride, kernel
    n, h, w, c = rows.shape
    line = w * c
    return rows.as_strided((n, y.shape[3], kh, y.shape[4], kw * c), (h * line, sh * line, line, sw * c, 1))


def _runs(taps: Any) -> Any:
    """(O, kh, kw · C), a view."""
    o, _, _, kh, _ = taps.shape
    return taps.permute(0, 2, 3, 4, 1).reshape(o, kh, -1)


def forward(x: Any, taps: Any, end: Epilogue, y: Any, walk: Walk, moments: Any = None) -> list[Any]:
    """y of a convolution that is not refused. taps: (O, C, 1, kh, kw), channels last. moments, what is returned: as of
    ``_conv_tiles.forward``."""
    patches = _patches(x, taps.shape[2:], y, walk)
    return summed(patches, _runs(taps), end, rows_of(y), _WALKS, (taps.shape[3], 1), 1, moments)


def input_gradient(dy: Any, taps: Any, bias: Any, dx: Any, walk: Walk, empty: Any) -> None:
    """dx of a convolution that is not refused for whole images, + bias."""
    (n, h, w, o), source, (_, kh, run) = rows_of(dy).shape, rows_of(dy), _runs(taps).shape
    if bias is not None:  # of each column of a run
        bias = _tile.copied(bias.expand(run // len(bias), -1), None, empty)
    tile = HALF(_tile.device(dy), n, h, w, o, run, kh, False)
    pixels = box(tile.BM, n, h, w)
    target = _patches(dx, taps.shape[2:], dy, walk)
    part, ends, constants = in_boxes(Epilogue(bias), tile, pixels, target)
    views = views_of(target, (), (), part)
    weights = _tile.described(_runs(taps).view(o, kh * run), (tile.BK, tile.BN))
    launch(
        tile, pixels, 1, kh, _tile.described(source, (*pixels, tile.BK)), weights, ends, views[0], views[1:],
        (n, h, w, o, run, 1, 1), (0,) * 6 + (1,) * 4 + (0, 0), None, None, **constants,
        TURNED=True, WIDE=False, IN_H=1, IN_W=1, OUT_H=0, OUT_W=0,
    )  # fmt: skip


def weight_gradient(dy: Any, x: Any, dweight: Any, walk: Walk, empty: Any) -> None:
    """dweight (O, C, 1, kh, kw), of any strides."""
    o, c, _, kh, kw = dweight.shape
    patches = _patches(x, dweight.shape[2:], dy, walk)
    partial = shares_of(rows_of(dy), patches, _WALKS, (o, kw * c, 1, kh, 1), 1, empty)
    finish(partial.view(len(partial), o, kh * kw, c), dweight)
