"""What ops that slide a window over an image share: their options, the size of their output, its memory order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from gpulayers.arrays import Spec, arranged, spec
from gpulayers.definition import KindError, ShapeError

Pair = tuple[int, int]
Sides = tuple[Pair, Pair]
"""((top, bottom), (left, right))"""


def require_image(x: Spec) -> None:
    if x.ndim != 4:
        raise ShapeError("x", "x.shape = (N, C, H, W)", list(x.shape))


AXES = {1: "L", 2: "HW", 3: "DHW"}
"""The names of so many spatial axes."""


def require_images(x: Spec) -> int:
    """How many spatial axes x has: one to three."""
    if x.ndim - 2 not in AXES:
        raise ShapeError("x", "x.shape = (N, C, *sizes) with one to three sizes", list(x.shape))
    return x.ndim - 2


class _Words(NamedTuple):
    """How errors speak of so many spatial axes."""

    integers: str
    names: str
    all: str


_WORDS = {
    1: _Words("an integer", "(length,)", ""),
    2: _Words("an integer or a pair of integers", "(height, width)", "both "),
    3: _Words("an integer or three integers", "(depth, height, width)", "all "),
}


def numbers(argument: str, value: Any, least: int | None, count: int) -> tuple[int, ...]:
    """``value`` for each of so many spatial axes: an integer stands for all. least: None where any integer will do."""
    each = value if isinstance(value, list | tuple) else (value,) * count
    if not all(hasattr(v, "__index__") and not isinstance(v, bool) for v in each):  # symbolic sizes have it too
        raise KindError(argument, _WORDS[count].integers, repr(value))
    if len(each) != count or (least is not None and min(each) < least):
        rule = f"{argument} = {_WORDS[count].names}" + (f", {_WORDS[count].all}≥ {least}" if least is not None else "")
        raise ShapeError(argument, rule, repr(value))
    return tuple(each)


def pair(argument: str, value: Any, least: int | None) -> Pair:
    """``value`` for height and width."""
    return numbers(argument, value, least, 2)  # type: ignore[return-value]


def around(argument: str, value: Any, least: int | None, count: int) -> tuple[Pair, ...]:
    """((before, after), …) for each of so many axes: from that, from its numbers in a row, from one number for both sides
    of each axis, or from one integer."""
    if isinstance(value, list | tuple) and len(value) == 2 * count:
        value = tuple(zip(value[::2], value[1::2]))
    if isinstance(value, list | tuple) and len(value) == count and all(isinstance(v, list | tuple) for v in value):
        return tuple(pair(argument, v, least) for v in value)
    return tuple((v, v) for v in numbers(argument, value, least, count))


def sides(argument: str, value: Any, least: int | None) -> Sides:
    """((top, bottom), (left, right)), as ``around`` reads it."""
    return around(argument, value, least, 2)  # type: ignore[return-value]


def output_order(x: Spec) -> tuple[int, ...] | None:
    """The output's memory order: channels-last for a dense channels-last input, else row-major."""
    last = (0, *range(2, x.ndim), 1)
    return last if x.contiguous and x.order == last else None


def ordered_as(y: Any, x: Any) -> Any:
    """``y`` in the memory order that ``output_order`` gives for an input ``x``."""
    return arranged(y, output_order(spec(x)))  # type: ignore[arg-type]


def window(x: Any, tap: Sequence[int], dilation: Sequence[int], stride: Sequence[int], size: Sequence[int]) -> Any:
    """The view of padded images (…, H, W) that lies under one tap of the kernel: (…, OH, OW); of any number of axes."""
    firsts = [t * d for t, d in zip(tap, dilation)]
    return x[(..., *[slice(f, f + s * (n - 1) + 1, s) for f, s, n in zip(firsts, stride, size)])]
