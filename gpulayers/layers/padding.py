"""Padding of images."""

from __future__ import annotations

from typing import Any

from gpulayers.definition import ShapeError
from gpulayers.layers._layer import OpLayer
from gpulayers.ops import padding as ops


class _Pad2d(OpLayer):
    """padding: an integer, or (left, right, top, bottom); negative cuts off."""

    op = ops.pad2d
    mode = "constant"

    def __init__(self, padding: Any):
        if isinstance(padding, list | tuple) and len(padding) != 4:
            raise ShapeError("padding", "an integer or (left, right, top, bottom)", repr(padding))
        self.padding = padding

    def options(self) -> dict[str, Any]:
        padding = self.padding
        if isinstance(padding, list | tuple):
            left, right, top, bottom = padding
            padding = ((top, bottom), (left, right))
        return {"padding": padding, "mode": self.mode}


class ReflectionPad2d(_Pad2d):
    """The image mirrored at the centre of its edge pixels: (N, C, H, W) → (N, C, OH, OW). As torch.nn.ReflectionPad2d.

    padding: an integer, or (left, right, top, bottom), less than the image's size; negative cuts off.
    """

    mode = "reflect"


class ReplicationPad2d(_Pad2d):
    """The edge pixels again and again: (N, C, H, W) → (N, C, OH, OW). As torch.nn.ReplicationPad2d.

    padding: an integer, or (left, right, top, bottom); negative cuts off.
    """

    mode = "replicate"


class CircularPad2d(_Pad2d):
    """The image around in a circle: (N, C, H, W) → (N, C, OH, OW). As torch.nn.CircularPad2d.

    padding: an integer, or (left, right, top, bottom), at most the image's size; negative cuts off.
    """

    mode = "circular"


class ConstantPad2d(_Pad2d):
    """One value around the image: (N, C, H, W) → (N, C, OH, OW). As torch.nn.ConstantPad2d.

    padding: an integer, or (left, right, top, bottom); negative cuts off.
    """

    def __init__(self, padding: Any, value: float):
        super().__init__(padding)
        self.value = value

    def options(self) -> dict[str, Any]:
        return {**super().options(), "value": self.value}


class ZeroPad2d(_Pad2d):
    """Zeros around the image: (N, C, H, W) → (N, C, OH, OW). As torch.nn.ZeroPad2d.

    padding: an integer, or (left, right, top, bottom); negative cuts off.
    """
