"""Places for grid_sample that an affine map gives: affine_grid."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, arranged, namespace, up
from gpulayers.definition import KindError, Rule, ShapeError
from gpulayers.ops._op import Op, require_float
from gpulayers.ops._pooling import along
from gpulayers.ops._window import numbers


def affine_grid_rule(theta: Spec, *, needs: tuple = (), size: Any, align_corners: bool = False) -> Rule:
    require_float("theta", theta)
    if theta.ndim != 3 or tuple(theta.shape[1:]) not in ((2, 3), (3, 4)):
        raise ShapeError("theta", "theta.shape = (N, 2, 3) or (N, 3, 4)", list(theta.shape))
    if not isinstance(align_corners, bool):
        raise KindError("align_corners", "True or False", repr(align_corners))
    sizes = numbers("size", size, 1, theta.shape[1])
    return Rule(
        {"grid": Spec((theta.shape[0], *sizes, theta.shape[1]), theta.dtype)},
        {},
        {"size": sizes, "align_corners": align_corners},
    )


def _coordinates(xp: Any, size: tuple, dtype: Any, align: bool) -> list[Any]:
    """Of the pixels along each axis, the last first, as they meet arrays over all axes: from −1 to 1."""
    found = []
    for axis, n in enumerate(size):
        last = n - 1 if align else n
        values = (2 * xp.arange(n) - (n - 1)).astype(dtype) / max(last, 1)
        found.append(along(values, axis, len(size)))
    return found[::-1]


def affine_grid_forward(theta: Any, *, needs: tuple = (), size: Any, align_corners: bool = False) -> tuple[tuple, dict]:
    """grid[n, h, w] = theta[n] · (x_w, y_h, 1), of volumes theta[n] · (x_w, y_h, z_d, 1).

    theta: (N, 2, 3) or (N, 3, 4), float. size: (H, W) or (D, H, W). Coordinates are the pixels' centres where −1 and 1 are
    the image's outer sides, or, with align_corners, the centres of its outermost pixels (0 for a single one).

    Returns grid: (N, H, W, 2) or (N, D, H, W, 3), theta's dtype, as grid_sample takes it. Saves nothing. As
    torch.nn.functional.affine_grid.
    """
    xp, t, count = namespace(theta), up(theta), len(size)
    grid = xp.zeros((theta.shape[0], count, *size), t.dtype)
    matrix = t.reshape(*t.shape, *(1,) * count)
    grid += matrix[:, :, count]
    for j, values in enumerate(_coordinates(xp, size, t.dtype, align_corners)):
        grid += matrix[:, :, j] * values
    return (arranged(xp.moveaxis(grid, 1, -1).astype(theta.dtype, copy=False), None),), {}


def affine_grid_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, size: tuple, align_corners: bool
) -> tuple:
    """dtheta[n, k, j] = Σ_{h, w} dgrid[n, h, w, k] · the j-th of (x_w, y_h, 1)."""
    (dy,), theta, count = dys, inputs[0], len(size)
    xp = namespace(dy)
    g = xp.moveaxis(up(dy), -1, 1)
    axes = tuple(range(2, 2 + count))
    sums = [(g * values).sum(axes) for values in _coordinates(xp, size, g.dtype, align_corners)]
    dtheta = xp.stack([*sums, g.sum(axes)], -1)
    return (arranged(dtheta.astype(theta.dtype, copy=False), theta.like().order),)


affine_grid = Op(affine_grid_rule, affine_grid_forward, affine_grid_backward, family="resize")
