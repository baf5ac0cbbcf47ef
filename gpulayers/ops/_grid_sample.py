"""Images and volumes looked up at any places: grid_sample."""

from __future__ import annotations

import math
from typing import Any

from gpulayers._lookups import corners, neighbours
from gpulayers.arrays import Spec, arranged, namespace, up
from gpulayers.definition import KindError, Rule, ShapeError, UnsupportedTypeError
from gpulayers.ops._op import Op, require_float, require_same_dtype
from gpulayers.ops._window import ordered_as, output_order

SAMPLING = ("bilinear", "nearest", "bicubic")
PADDING = ("zeros", "border", "reflection")


def grid_sample_rule(
    x: Spec,
    grid: Spec,
    *,
    needs: tuple = (),
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> Rule:
    require_float("x", x)
    require_same_dtype(x, grid=grid)
    axes = x.ndim - 2
    if axes not in (2, 3) or 0 in x.shape[1:]:
        raise ShapeError("x", "x.shape = (N, C, H, W) or (N, C, D, H, W), C and sizes ≥ 1", list(x.shape))
    batches = (x.shape[0], *grid.shape[:1])
    if grid.ndim != x.ndim or grid.shape[-1] != axes or (None not in batches and batches[0] != batches[1]):
        raise ShapeError("grid", f"grid.shape = (N, *sizes of y, {axes})", f"{list(grid.shape)} with x {list(x.shape)}")
    for name, value, known in (("mode", mode, SAMPLING), ("padding_mode", padding_mode, PADDING)):
        if value not in known:
            raise UnsupportedTypeError(name, f"one of {', '.join(known)}", repr(value))
    if mode == "bicubic" and axes == 3:
        raise ShapeError("mode", "bilinear or nearest for volumes", repr(mode))
    if not isinstance(align_corners, bool):
        raise KindError("align_corners", "True or False", repr(align_corners))
    y = Spec((*x.shape[:2], *grid.shape[1:-1]), x.dtype, output_order(x))
    return Rule({"y": y}, {"x": x, "grid": grid} if needs else {})


def grid_sample_forward(
    x: Any,
    grid: Any,
    *,
    needs: tuple = (),
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> tuple[tuple, dict]:
    """y[n, c, i, j] = x[n, c] at the place grid[n, i, j] = (x, y), −1 the image's left or upper end, 1 the other.

    x: (N, C, H, W) or (N, C, D, H, W), float. grid: (N, OH, OW, 2) or (N, OD, OH, OW, 3), x's dtype, the last axis of x
    first. mode: "bilinear" (between the neighbours, of volumes too), "nearest", "bicubic" (images; A = −0.75).
    padding_mode, outside of the image: "zeros"; "border": the nearest pixel; "reflection": mirrored. align_corners: the
    ends are the centres of the outermost pixels, else their outer sides. NaN (and infinity where it is reflected) is a place
    outside of the image (zeros) or pixel 0, of which grid has no gradient; so torch's CUDA kernels have it. "bicubic" makes
    NaN of both and of infinities, in y and in grid's gradient, and nothing in x's.

    Returns y: (N, C, OH, OW) or (N, C, OD, OH, OW), x's dtype, channels-last in memory where x is. Saves x and grid. As
    torch.nn.functional.grid_sample.
    """
    xp, (n, c, *sizes) = namespace(x), x.shape
    pixels = up(x).reshape(n, c, math.prod(sizes)).swapaxes(1, 2)
    rows = xp.arange(n)[:, None]
    axes = neighbours(x, grid, mode, padding_mode, align_corners)
    y = xp.zeros((n, axes[0][0].index.shape[1], c), pixels.dtype)
    for taps, index, inside in corners(axes, tuple(sizes)):
        weight = math.prod(tap.weight for tap in taps)
        y += xp.where(inside[..., None], pixels[rows, index] * weight[..., None], weight[..., None] * 0)
    y = y.swapaxes(1, 2).reshape(n, c, *grid.shape[1:-1]).astype(x.dtype, copy=False)
    return (ordered_as(y, x),), {"x": x, "grid": grid} if needs else {}


def grid_sample_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    mode: str,
    padding_mode: str,
    align_corners: bool,
) -> tuple:
    """dx[n, c, pixel] = Σ weight · dy over the places that it is a neighbour of, in their order; dgrid = Σ_c dy · dy/dplace."""
    (dy,), x, grid = dys, saved["x"], saved["grid"]
    xp, (n, c, *sizes) = namespace(dy), x.shape
    axes = neighbours(x, grid, mode, padding_mode, align_corners)
    g = up(dy).reshape(n, c, math.prod(dy.shape[2:])).swapaxes(1, 2)
    pixels, rows = up(x).reshape(n, c, math.prod(sizes)).swapaxes(1, 2), xp.arange(n)
    dx, dgrid = xp.zeros(pixels.shape, g.dtype), xp.zeros((*g.shape[:2], len(sizes)), g.dtype)
    for taps, index, inside in corners(axes, tuple(sizes)):
        if "grid" in needs:
            along = xp.where(inside, (pixels[rows[:, None], index] * g).sum(2), g[..., 0] * 0)
            for a, tap in enumerate(taps):
                others = [o.weight for b, o in enumerate(taps) if b != a]
                dgrid[..., len(sizes) - 1 - a] += along * tap.slope * math.prod(others)
        if "x" in needs:
            part = xp.where(inside[..., None], math.prod(t.weight for t in taps)[..., None] * g, dx[:, :1, :1] * 0)
            for p in range(g.shape[1]):  # one place of each image: no pixel twice
                dx[rows, index[:, p]] += part[:, p]
    grads: list[Any] = [None, None]
    if "x" in needs:
        found = dx.swapaxes(1, 2).reshape(x.shape).astype(x.dtype, copy=False)
        grads[0] = arranged(found, inputs[0].like().order)
    if "grid" in needs:
        grads[1] = arranged(dgrid.reshape(grid.shape).astype(grid.dtype, copy=False), inputs[1].like().order)
    return tuple(grads)


grid_sample = Op(grid_sample_rule, grid_sample_forward, grid_sample_backward, family="resize")
