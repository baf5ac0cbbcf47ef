"""Padding of images: with a constant, by reflection, by repeating the edge, or around in a circle."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, arranged, namespace, up
from gpulayers.definition import KindError, Rule, ShapeError, UnsupportedTypeError
from gpulayers.ops._op import Op, require_float
from gpulayers.ops._window import Pair, Sides, ordered_as, output_order, require_image, sides

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


def pad2d_rule(x: Spec, *, needs: tuple = (), padding: Any, mode: str = "constant", value: float = 0.0) -> Rule:
    require_float("x", x)
    require_image(x)
    if mode not in MODES:
        raise UnsupportedTypeError("mode", f"one of {', '.join(MODES)}", repr(mode))
    if not isinstance(value, int | float):
        raise KindError("value", "a number", repr(value))
    if mode != "constant" and value != 0:
        raise ShapeError("value", 'value = 0 (not used) where mode is not "constant"', value)
    if mode in ("reflect", "replicate") and 0 in x.shape[1:]:
        raise ShapeError("x", f"C, H, W ≥ 1 (N may be 0) for {mode} padding", list(x.shape))
    around = sides("padding", padding, None)
    size = tuple(_output_size(n, p, mode, axis) for n, p, axis in zip(x.shape[2:], around, "HW"))
    options = {"padding": around, "mode": mode, "value": float(value)}
    return Rule({"y": Spec((*x.shape[:2], *size), x.dtype, output_order(x))}, {}, options)


def _own(size: int, around: Pair) -> tuple[slice, slice]:
    """(places of y, rows or columns of x) that are the same pixels."""
    before, after = around
    first, last = max(0, -before), size - max(0, -after)
    return slice(first + before, last + before), slice(first, last)


def _sources(size: int, around: Pair, mode: str) -> list[int]:
    """The row (or column) of x that each one of y shows."""
    at = range(-around[0], size + around[1])
    if mode == "reflect":
        return [size - 1 - abs(size - 1 - abs(a)) for a in at]
    if mode == "replicate":
        return [min(max(a, 0), size - 1) for a in at]
    there = _own(size, around)[1]
    return [(a - there.start) % (there.stop - there.start) + there.start for a in at]


def pad2d_forward(
    x: Any, *, needs: tuple = (), padding: Any, mode: str = "constant", value: float = 0.0
) -> tuple[tuple, dict]:
    """y[n, c, i, j] = x[n, c, i − top, j − left], and what lies outside of x is, by mode,

    "constant": value; "reflect": x mirrored at the centre of its edge pixels; "replicate": the nearest pixel of x;
    "circular": x again. x: (N, C, H, W), float. padding: ((top, bottom), (left, right)), a pair (height, width) or an
    integer; a negative one cuts off. "reflect": padding < H, W; "circular": padding ≤ H, W (of what is left of them).

    Returns y: (N, C, H + top + bottom, W + left + right), x's dtype, channels-last in memory where x is. Saves nothing.
    """
    xp, (h, w) = namespace(x), x.shape[2:]
    if mode == "constant":
        y = xp.full((*x.shape[:2], h + sum(padding[0]), w + sum(padding[1])), value, x.dtype)
        (rows, tall), (columns, wide) = map(_own, (h, w), padding)
        y[:, :, rows, columns] = x[:, :, tall, wide]
    else:
        of_rows, of_columns = (xp.asarray(_sources(n, p, mode), "int64") for n, p in zip((h, w), padding))
        y = x[:, :, of_rows][..., of_columns]
    return (ordered_as(y, x),), {}


def pad2d_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, padding: Sides, mode: str, value: float
) -> tuple:
    """dx[n, c, h, w] = the sum of dy over the places that show (h, w)."""
    (dy,), (x,) = dys, inputs
    g = up(dy)
    dx = namespace(dy).zeros(x.shape, g.dtype)
    (h, w), (top, left) = x.shape[2:], padding
    if mode == "constant":
        (rows, tall), (columns, wide) = _own(h, top), _own(w, left)
        dx[:, :, tall, wide] = g[:, :, rows, columns]
    else:
        part = namespace(dy).zeros((*x.shape[:3], dy.shape[3]), g.dtype)
        for i, row in enumerate(_sources(h, top, mode)):
            part[:, :, row] += g[:, :, i]
        for j, column in enumerate(_sources(w, left, mode)):
            dx[..., column] += part[..., j]
    return (arranged(dx.astype(x.dtype, copy=False), x.like().order),)


pad2d = Op(pad2d_rule, pad2d_forward, pad2d_backward)
