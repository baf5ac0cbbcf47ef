"""Padding over one to three spatial axes: with a constant, by reflection, by repeating the edge, or around in a circle.

x's rank says how many axes there are: (N, C, L), (N, C, H, W) or (N, C, D, H, W).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpulayers.arrays import Spec, arranged, namespace, up
from gpulayers.definition import KindError, Rule, ShapeError, UnsupportedTypeError
from gpulayers.ops._op import Op, require_float
from gpulayers.ops._window import AXES, Pair, around, ordered_as, output_order, require_images

MODES = ("constant", "reflect", "replicate", "circular")


def _output_size(size: Any, around: Pair, mode: str, axis: str) -> Any:
    if size is None:
        return None
    cut, most = sum(max(0, -p) for p in around), max(around)
    out = size + sum(around)
    if out < 0 or (mode in ("constant", "circular") and cut > size):
        raise ShapeError(
            "padding", f"−padding ≤ {axis}: no more is cut off than is there", f"{around} with {axis} = {size}"
        )
    if mode == "reflect" and most >= size:
        raise ShapeError("padding", f"padding < {axis} where it reflects", f"{around} with {axis} = {size}")
    if mode == "circular" and most > size - cut:
        raise ShapeError("padding", f"padding ≤ {axis} where it is circular", f"{around} with {axis} = {size}")
    return out


def pad_rule(x: Spec, *, needs: tuple = (), padding: Any, mode: str = "constant", value: float = 0.0) -> Rule:
    require_float("x", x)
    axes = AXES[require_images(x)]
    if mode not in MODES:
        raise UnsupportedTypeError("mode", f"one of {', '.join(MODES)}", repr(mode))
    if not isinstance(value, int | float):
        raise KindError("value", "a number", repr(value))
    if mode != "constant" and value != 0:
        raise ShapeError("value", 'value = 0 (not used) where mode is not "constant"', value)
    if mode in ("reflect", "replicate") and 0 in x.shape[1:]:
        raise ShapeError("x", f"C, {', '.join(axes)} ≥ 1 (N may be 0) for {mode} padding", list(x.shape))
    sides = around("padding", padding, None, len(axes))
    size = tuple([_output_size(n, p, mode, axis) for n, p, axis in zip(x.shape[2:], sides, axes)])
    options = {"padding": sides, "mode": mode, "value": float(value)}
    return Rule({"y": Spec((*x.shape[:2], *size), x.dtype, output_order(x))}, {}, options)


def _own(size: int, around: Pair) -> tuple[slice, slice]:
    """(places of y, rows or columns of x) that are the same pixels."""
    before, after = around
    first, last = max(0, -before), size - max(0, -after)
    return slice(first + before, last + before), slice(first, last)


def _same(sizes: tuple, padding: tuple) -> Iterator[tuple]:
    """Twice an index: of y, and of x, where they are the same pixels."""
    return ((slice(None), slice(None), *own) for own in zip(*map(_own, sizes, padding)))


def _sources(size: int, around: Pair, mode: str) -> list[int]:
    """The row (or column) of x that each one of y shows."""
    at = range(-around[0], size + around[1])
    if mode == "reflect":
        return [size - 1 - abs(size - 1 - abs(a)) for a in at]
    if mode == "replicate":
        return [min(max(a, 0), size - 1) for a in at]
    there = _own(size, around)[1]
    return [(a - there.start) % (there.stop - there.start) + there.start for a in at]


def pad_forward(
    x: Any, *, needs: tuple = (), padding: Any, mode: str = "constant", value: float = 0.0
) -> tuple[tuple, dict]:
    """y[n, c, i, j] = x[n, c, i − top, j − left], and what lies outside of x is, by mode,

    "constant": value; "reflect": x mirrored at the centre of its edge pixels; "replicate": the nearest pixel of x;
    "circular": x again. x: (N, C, L), (N, C, H, W) or (N, C, D, H, W), float. padding: ((before, after), …) for each axis,
    one number for each, or an integer for all; a negative one cuts off. "reflect": padding < H, W; "circular": padding ≤
    H, W (of what is left of them).

    Returns y: (N, C, H + top + bottom, W + left + right), x's dtype, channels-last in memory where x is. Saves nothing.
    """
    xp, sizes = namespace(x), x.shape[2:]
    if mode == "constant":
        y = xp.full((*x.shape[:2], *[n + sum(p) for n, p in zip(sizes, padding)]), value, x.dtype)
        place, shown = _same(sizes, padding)
        y[place] = x[shown]
    else:
        y = x
        for axis, (n, p) in enumerate(zip(sizes, padding)):
            y = y[(*(slice(None),) * (2 + axis), xp.asarray(_sources(n, p, mode), "int64"))]
    return (ordered_as(y, x),), {}


def pad_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, padding: tuple, mode: str, value: float
) -> tuple:
    """dx[n, c, h, w] = the sum of dy over the places that show (h, w)."""
    (dy,), (x,) = dys, inputs
    xp, g, sizes = namespace(dy), up(dy), x.shape[2:]
    if mode == "constant":
        dx = xp.zeros(x.shape, g.dtype)
        place, shown = _same(sizes, padding)
        dx[shown] = g[place]
    else:
        dx = g
        for axis, (n, p) in enumerate(zip(sizes, padding)):
            before, narrow = (slice(None),) * (2 + axis), dx
            dx = xp.zeros((*x.shape[: 3 + axis], *g.shape[3 + axis :]), g.dtype)
            for i, source in enumerate(_sources(n, p, mode)):
                dx[(*before, source)] += narrow[(*before, i)]
    return (arranged(dx.astype(x.dtype, copy=False), x.like().order),)


pad = Op(pad_rule, pad_forward, pad_backward)
