"""What ops that slide a window over an image share: their options, the size of their output, its memory order."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, arranged, spec
from gpulayers.definition import KindError, ShapeError

CHANNELS_LAST = (0, 2, 3, 1)

Pair = tuple[int, int]
Sides = tuple[Pair, Pair]
"""((top, bottom), (left, right))"""


def require_image(x: Spec) -> None:
    if x.ndim != 4:
        raise ShapeError("x", "x.shape = (N, C, H, W)", list(x.shape))


def pair(argument: str, value: Any, least: int | None) -> Pair:
    """``value`` for height and width: an integer stands for both. least: None where any integer will do."""
    both = value if isinstance(value, list | tuple) else (value, value)
    if not all(hasattr(v, "__index__") and not isinstance(v, bool) for v in both):  # symbolic sizes have it too
        raise KindError(argument, "an integer or a pair of integers", repr(value))
    if len(both) != 2 or (least is not None and min(both) < least):
        rule = f"{argument} = (height, width)" + (f", both ≥ {least}" if least is not None else "")
        raise ShapeError(argument, rule, repr(value))
    return tuple(both)  # type: ignore[return-value]


def sides(argument: str, value: Any, least: int | None) -> Sides:
    """((top, bottom), (left, right)) from that, from the four in a row, from (height, width), or from one integer."""
    if isinstance(value, list | tuple) and len(value) == 4:
        value = (value[:2], value[2:])
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, list | tuple) for v in value):
        return pair(argument, value[0], least), pair(argument, value[1], least)
    height, width = pair(argument, value, least)
    return (height, height), (width, width)


def output_order(x: Spec) -> tuple[int, ...] | None:
    """The output's memory order: channels-last for a dense channels-last input, else row-major."""
    return CHANNELS_LAST if x.contiguous and x.order == CHANNELS_LAST else None


def ordered_as(y: Any, x: Any) -> Any:
    """``y`` in the memory order that ``output_order`` gives for an input ``x``."""
    return arranged(y, output_order(spec(x)))  # type: ignore[arg-type]


def window(x: Any, tap: Pair, dilation: Pair, stride: Pair, size: Pair) -> Any:
    """The view of a padded image (…, H, W) that lies under one tap of the kernel: (…, OH, OW)."""
    top, left = tap[0] * dilation[0], tap[1] * dilation[1]
    bottom, right = top + stride[0] * (size[0] - 1) + 1, left + stride[1] * (size[1] - 1) + 1
    return x[..., top : bottom : stride[0], left : right : stride[1]]
