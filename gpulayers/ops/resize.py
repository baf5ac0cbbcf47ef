"""Resizing of sequences, images and volumes: by the nearest pixel, linear, cubic, by areas; antialiased.

Each axis is resampled by a table of a few (index, weight) for each place (``gpulayers/_taps.py``), one axis after the other.
"""

from __future__ import annotations

from typing import Any

from gpulayers._taps import Taps, taps, transposed
from gpulayers.arrays import Spec, arranged, namespace, up
from gpulayers.definition import ArgumentError, KindError, Rule, ShapeError, UnsupportedTypeError
from gpulayers.ops._affine_grid import affine_grid as affine_grid
from gpulayers.ops._grid_sample import grid_sample as grid_sample
from gpulayers.ops._grid_sample import grid_sample_backward as grid_sample_backward
from gpulayers.ops._grid_sample import grid_sample_forward as grid_sample_forward
from gpulayers.ops._op import Op, require_float
from gpulayers.ops._window import numbers, ordered_as, output_order

MODES = ("nearest", "nearest-exact", "linear", "cubic", "area", "lanczos")
_SMOOTH = ("linear", "cubic", "lanczos")


def _checked_mode(x: Spec, mode: str, align_corners: Any, antialias: Any) -> None:
    if mode not in MODES:
        raise UnsupportedTypeError("mode", f"one of {', '.join(MODES)}", repr(mode))
    for name, value in (("align_corners", align_corners), ("antialias", antialias)):
        if not isinstance(value, bool):
            raise KindError(name, "True or False", repr(value))
    if align_corners and mode not in ("linear", "cubic"):
        raise ArgumentError("align_corners", "False where mode is not linear or cubic", f"mode {mode!r}")
    if (mode in ("cubic", "lanczos") or antialias) and x.ndim != 4:
        raise UnsupportedTypeError("x", "x.shape = (N, C, H, W) for cubic and antialiased resizing", list(x.shape))
    if antialias and mode not in _SMOOTH:
        raise ArgumentError("antialias", "False where mode is not linear, cubic or lanczos", f"mode {mode!r}")
    if mode == "lanczos" and not antialias:
        raise ArgumentError("antialias", "True where mode is lanczos", antialias)


def interpolate_rule(
    x: Spec,
    *,
    needs: tuple = (),
    size: Any,
    mode: str = "nearest",
    align_corners: bool = False,
    antialias: bool = False,
    scales: Any = (),
) -> Rule:
    require_float("x", x)
    count = x.ndim - 2
    if count not in (1, 2, 3):
        raise ShapeError("x", "x.shape = (N, C, *sizes) with one to three sizes", list(x.shape))
    _checked_mode(x, mode, align_corners, antialias)
    size = numbers("size", size, 1, count)
    if 0 in x.shape[1:]:
        raise ShapeError("x", "C and sizes ≥ 1 (N may be 0)", list(x.shape))
    scales = tuple(scales) or (0.0,) * count
    if len(scales) != count or not all(isinstance(s, int | float) for s in scales):
        raise ShapeError("scales", f"scales = () or a number for each of {count} axes", scales)
    options = {"size": size, "mode": mode, "align_corners": align_corners, "antialias": antialias}
    options["scales"] = tuple(map(float, scales))
    return Rule({"y": Spec((*x.shape[:2], *size), x.dtype, output_order(x))}, {}, options)


def _resampled(v: Any, axis: int, table: Taps) -> Any:
    """``v`` with one axis made anew: a term for each tap."""
    xp, shape = namespace(v), (-1, *(1,) * (v.ndim - 1 - axis))
    total = None
    for k in range(table.places.shape[1]):
        index, weight = table.places[:, k], table.weights[:, k]
        factor = xp.asarray(weight.tolist(), v.dtype).reshape(shape)
        term = xp.take(v, xp.asarray(index.clip(0).tolist(), "int64"), axis) * factor
        if index.min(initial=0) < 0:
            term = xp.where(xp.asarray((index >= 0).tolist(), "bool").reshape(shape), term, xp.zeros((), v.dtype))
        total = term if total is None else total + term
    return total


def interpolate_forward(
    x: Any,
    *,
    needs: tuple = (),
    size: Any,
    mode: str = "nearest",
    align_corners: bool = False,
    antialias: bool = False,
    scales: Any = (),
) -> tuple[tuple, dict]:
    """y[n, c, i, j] = Σ weight[i, a] · weight[j, b] · x[n, c, index[i, a], index[j, b]], by tables for each axis.

    x: (N, C, L), (N, C, H, W) or (N, C, D, H, W), float. size: an integer, or one for each axis. Pixel i of y lies at
    (i + ½) · H / OH − ½ of x, or where align_corners at i · (H − 1) / (OH − 1). By mode it is

    "nearest": the pixel at ⌊i · H / OH⌋; "nearest-exact": the nearest pixel; "linear", "cubic" (A = −0.75; images only):
    between the 2 or 4 nearest along each axis; "area": the mean of the pixels from ⌊i · H / OH⌋ to ⌈(i + 1) · H / OH⌉.
    antialias ("linear", "cubic" with A = −0.5, "lanczos"; images only): where y is smaller, the filter is as much wider.
    scales: for each axis how many pixels of y one of x is, where that is not OH / H; 0: it is.

    Returns y: (N, C, *size), x's dtype, channels-last in memory where x is. As torch.nn.functional.interpolate. Saves
    nothing.
    """
    v = up(x)
    for i, (out, scale) in enumerate(zip(size, scales)):
        v = _resampled(v, 2 + i, taps(x.shape[2 + i], out, mode, align_corners, antialias, scale, v.dtype))
    return (ordered_as(v.astype(x.dtype, copy=False), x),), {}


def interpolate_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    size: tuple,
    mode: str,
    align_corners: bool,
    antialias: bool,
    scales: tuple,
) -> tuple:
    """dx: each axis by its table turned around, a sum over the pixels that a pixel of x is a tap of."""
    (dy,), (x,) = dys, inputs
    g = up(dy)
    for i, (out, scale) in enumerate(zip(size, scales)):
        g = _resampled(g, 2 + i, transposed(x.shape[2 + i], out, mode, align_corners, antialias, scale, g.dtype))
    return (arranged(g.astype(x.dtype, copy=False), x.like().order),)


interpolate = Op(interpolate_rule, interpolate_forward, interpolate_backward)
