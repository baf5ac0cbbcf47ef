"""What max pooling leaves behind, put back where it was."""

from __future__ import annotations

import math
from typing import Any

from gpulayers.arrays import Spec, arranged, int64, namespace, up
from gpulayers.definition import Rule, ShapeError
from gpulayers.ops._op import Op, require_float, require_shape
from gpulayers.ops._window import AXES, numbers, ordered_as, output_order, require_images


def max_unpool_rule(x: Spec, indices: Spec, *, needs: tuple = (), output_size: Any) -> Rule:
    require_float("x", x)
    count = require_images(x)
    if indices.dtype != int64:
        raise ShapeError("indices", "dtype = int64", indices.dtype)
    require_shape("indices", indices, x.shape, "indices.shape = x.shape")
    if 0 in x.shape[1:]:
        raise ShapeError("x", f"C, {', '.join(AXES[count])} ≥ 1 (N may be 0)", list(x.shape))
    size = numbers("output_size", output_size, 1, count)
    y = Spec((*x.shape[:2], *size), x.dtype, output_order(x))
    return Rule({"y": y}, {"indices": indices} if needs else {}, {"output_size": size})


def _check(x: Any, indices: Any, *, output_size: tuple, **_: Any) -> None:
    size = math.prod(output_size)
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        raise ShapeError("indices", f"0 ≤ indices < {size}", f"{int(indices.min())} to {int(indices.max())}")


def _rows(a: Any) -> Any:
    """(N · C, pixels)."""
    return a.reshape(math.prod(a.shape[:2]), math.prod(a.shape[2:]))


def max_unpool_forward(x: Any, indices: Any, *, needs: tuple = (), output_size: Any) -> tuple[tuple, dict]:
    """y[n, c, indices[n, c, i, j]] = x[n, c, i, j], and 0 elsewhere: the inverse of max_pool with its indices.

    x: (N, C, L), (N, C, H, W) or (N, C, D, H, W), float. indices: int64, x's shape: places in their channel, counted
    row-major (h · W + w of y); of several with one place the last stays. output_size: an integer, or one for each axis.

    Returns y: (N, C, *output_size), x's dtype, channels-last in memory where x is. Raises ShapeError for a place outside
    of y; on a GPU, where looking would mean to wait, such a one is left out. Saves indices.
    """
    xp, pixels = namespace(x), math.prod(output_size)
    at = _rows(indices)
    at = xp.where((at >= 0) & (at < pixels), at + xp.arange(len(at)).reshape(-1, 1) * pixels, len(at) * pixels)
    places = xp.arange(len(at) * pixels)
    at = at.reshape(-1)
    order = xp.argsort(at, kind="stable")
    sorted_at = at[order]
    last = xp.searchsorted(sorted_at, places, side="right") - 1
    here = xp.maximum(last, 0)
    if x.size:
        y = xp.where((last >= 0) & (sorted_at[here] == places), up(x).reshape(-1)[order[here]], 0)
    else:
        y = xp.zeros(places.shape, x.dtype)
    y = y.reshape(*x.shape[:2], *output_size).astype(x.dtype, copy=False)
    return (ordered_as(y, x),), {"indices": indices} if needs else {}


def max_unpool_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, output_size: tuple) -> tuple:
    """dx[n, c, i, j] = dy[n, c, indices[n, c, i, j]], 0 for a place outside of y."""
    (dy,), x, at = dys, inputs[0], _rows(saved["indices"])
    xp, pixels = namespace(dy), math.prod(output_size)
    there = (at >= 0) & (at < pixels)
    g = xp.where(there, xp.take_along_axis(_rows(up(dy)), xp.where(there, at, 0), 1), 0)
    return arranged(g.reshape(x.shape).astype(x.dtype, copy=False), x.like().order), None


max_unpool = Op(
    max_unpool_rule, max_unpool_forward, max_unpool_backward, differentiable=("x",), check=_check, family="pooling"
)
