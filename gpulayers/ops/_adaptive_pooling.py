"""Pooling of so many parts of an image, whatever its size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from gpulayers.arrays import Spec, arranged, int64, namespace, up
from gpulayers.definition import Rule, ShapeError
from gpulayers.ops._op import Op, require_float
from gpulayers.ops._pooling import place_dtype
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

# --- adaptive_max_pool -----------------------------------------------------------------------------------------------


def adaptive_max_pool_rule(x: Spec, *, needs: tuple = (), output_size: Any, return_indices: bool = False) -> Rule:
    require_float("x", x)
    size = _output_size(x, output_size)
    if 0 in x.shape[1:]:
        axes = ", ".join(AXES[len(size)])
        raise ShapeError("x", f"C, {axes} ≥ 1 (N may be 0)", list(x.shape))
    y = Spec((*x.shape[:2], *size), x.dtype, output_order(x))
    outputs = {"y": y} | ({"indices": y._replace(dtype=int64)} if return_indices else {})
    options = {"output_size": size, "return_indices": bool(return_indices)}
    return Rule(outputs, {"index": y._replace(dtype=place_dtype)} if needs else {}, options)


def adaptive_max_pool_forward(
    x: Any, *, needs: tuple = (), output_size: Any, return_indices: bool = False
) -> tuple[tuple, dict]:
    """y[n, c, i, j] = the maximum of x[n, c, h, w] over ⌊i · H / OH⌋ ≤ h < ⌈(i + 1) · H / OH⌉, and w likewise.

    x, output_size: as adaptive_avg_pool's. Returns y: (N, C, OH, OW), x's dtype, channels-last in memory where x is; a NaN
    in a part gives NaN. The gradient goes to the first of equal maxima, to the last NaN, as in torch. return_indices: also
    returns where each maximum lies in its channel, counted row-major (h · W + w), int64. Saves that place in place_dtype.
    """
    xp, v = namespace(x), up(x)
    y = xp.zeros((*x.shape[:2], *output_size), v.dtype)
    index = xp.zeros(y.shape, place_dtype)
    numbers = xp.arange(math.prod(x.shape[2:]), dtype=place_dtype).reshape(x.shape[2:])
    for at, part, count in _parts(x, output_size):
        values, places = v[part].reshape(*x.shape[:2], count), numbers[part].reshape(count)
        none = xp.isnan(values)
        last = count - 1 - none[..., ::-1].argmax(-1)
        won = xp.where(none.any(-1), last, values.argmax(-1))
        y[at] = xp.take_along_axis(values, won[..., None], -1)[..., 0]
        index[at] = xp.where(xp.arange(count) == won[..., None], places, 0).sum(-1)
    outputs = (ordered_as(y.astype(x.dtype, copy=False), x), ordered_as(index.astype(int64), x))
    return outputs if return_indices else outputs[:1], {"index": ordered_as(index, x)} if needs else {}


def adaptive_max_pool_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, output_size: tuple, return_indices: bool
) -> tuple:
    """dx[n, c, h, w] = the sum of dy over the parts in which (h, w) won."""
    (dy,), (x,), index = dys[:1], inputs, saved["index"]
    xp, g = namespace(dy), up(dy)
    dx = xp.zeros(x.shape, g.dtype)
    numbers = xp.arange(math.prod(x.shape[2:]), dtype=place_dtype).reshape(x.shape[2:])
    for at, part, _ in _parts(x, output_size):
        one = (..., *[slice(i, i + 1) for i in at[1:]])
        dx[part] += xp.where(numbers[part] == index[one], g[one], 0)
    return (arranged(dx.astype(x.dtype, copy=False), x.like().order),)


adaptive_max_pool = Op(adaptive_max_pool_rule, adaptive_max_pool_forward, adaptive_max_pool_backward, family="pooling")
