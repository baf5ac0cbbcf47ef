"""Pooling of so many parts of an image, whatever its size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from gpulayers.arrays import Spec, arranged, namespace, up
from gpulayers.definition import Rule, ShapeError
from gpulayers.ops._op import Op, require_float
from gpulayers.ops._window import AXES, numbers, ordered_as, output_order, require_images


def _output_size(x: Spec, output_size: Any) -> tuple:
    """How many parts along each axis; None keeps the input's size."""
    count = require_images(x)
    each = list(output_size) if isinstance(output_size, list | tuple) else output_size
    if isinstance(each, list):
        numbers("output_size", [0 if s is None else s for s in each], 0, count)
        return tuple([n if s is None else s for n, s in zip(x.shape[2:], each)])
    return numbers("output_size", each, 0, count)


def adaptive_avg_pool_rule(x: Spec, *, needs: tuple = (), output_size: Any) -> Rule:
    require_float("x", x)
    size = _output_size(x, output_size)
    if 0 in x.shape[2:] and set(size) != {1}:
        axes = ", ".join(AXES[len(size)])
        raise ShapeError("x", f"{axes} ≥ 1 where output_size is not 1", list(x.shape))
    return Rule({"y": Spec((*x.shape[:2], *size), x.dtype, output_order(x))}, {}, {"output_size": size})


def _ends(size: int, parts: int) -> list[tuple[int, int]]:
    """[first, last) of each of so many parts of an axis; they overlap where they do not divide it."""
    return [(i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)]


def _parts(x: Any, output_size: tuple) -> Iterator[tuple[tuple, tuple, int]]:
    """(index of the part, index of x's pixels, how many they are) of each part."""
    each = [list(enumerate(_ends(n, o))) for n, o in zip(x.shape[2:], output_size)]
    for part in itertools.product(*each):
        pixels = 1
        for _, (first, last) in part:
            pixels *= last - first
        yield (..., *[i for i, _ in part]), (..., *[slice(*ends) for _, ends in part]), pixels


def adaptive_avg_pool_forward(x: Any, *, needs: tuple = (), output_size: Any) -> tuple[tuple, dict]:
    """y[n, c, i, j] = the mean of x[n, c, h, w] over ⌊i · H / OH⌋ ≤ h < ⌈(i + 1) · H / OH⌉, and w likewise.

    x: (N, C, L), (N, C, H, W) or (N, C, D, H, W), float. output_size: a number for each axis, or an integer for all; None
    keeps the input's size. Windows overlap where OH does not divide H. Returns y: (N, C, OH, OW), x's dtype, channels-last
    in memory where x is; the mean of no pixels is NaN. Saves nothing.
    """
    xp, v = namespace(x), up(x)
    axes = tuple(range(2, x.ndim))
    y = xp.zeros((*x.shape[:2], *output_size), v.dtype)
    for at, part, count in _parts(x, output_size):
        y[at] = v[part].sum(axes) / count if count else xp.nan
    return (ordered_as(y.astype(x.dtype, copy=False), x),), {}


def adaptive_avg_pool_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, output_size: tuple) -> tuple:
    """dx[n, c, h, w] = the sum of dy / (pixels of its window) over the windows that (h, w) lies in."""
    (dy,), (x,) = dys, inputs
    g = up(dy)
    dx = namespace(dy).zeros(x.shape, g.dtype)
    for at, part, count in _parts(x, output_size):
        one = (..., *[slice(i, i + 1) for i in at[1:]])
        dx[part] += g[one] / max(count, 1)
    return (arranged(dx.astype(x.dtype, copy=False), x.like().order),)


adaptive_avg_pool = Op(adaptive_avg_pool_rule, adaptive_avg_pool_forward, adaptive_avg_pool_backward, family="pooling")
