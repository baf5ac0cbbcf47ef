"""Padding over one to three spatial axes."""

from __future__ import annotations

from typing import Any

from gpulayers.definition import ShapeError
from gpulayers.layers._layer import OpLayer
from gpulayers.ops import padding as ops
from gpulayers.ops._window import AXES

_SIDES = ("left", "right", "top", "bottom", "front", "back")


class Pad(OpLayer):
    """padding: an integer, or one for each side, the last axis first: (left, right, top, bottom, front, back); negative cuts
    off."""

    op = ops.pad
    mode = "constant"
    spatial = 2

    def __init__(self, padding: Any):
        if isinstance(padding, list | tuple) and len(padding) != 2 * self.spatial:
            raise ShapeError("padding", f"an integer or ({', '.join(_SIDES[: 2 * self.spatial])})", repr(padding))
        self.padding = padding

    def arguments(self, *xs: Any, **_: Any) -> tuple:
        if len(xs[0].shape) != self.spatial + 2:
            rule = f"x.shape = (N, C, {', '.join(AXES[self.spatial])})"
            raise ShapeError(f"{self.name}: x", rule, list(xs[0].shape))
        return xs

    def options(self) -> dict[str, Any]:
        padding = self.padding
        if isinstance(padding, list | tuple):
            padding = tuple(zip(padding[::2], padding[1::2]))[::-1]
        return {"padding": padding, "mode": self.mode}


class _Constant(Pad):
    def __init__(self, padding: Any, value: float):
        super().__init__(padding)
        self.value = value

    def options(self) -> dict[str, Any]:
        return {**super().options(), "value": self.value}


class _Reflection(Pad):
    mode = "reflect"


class _Replication(Pad):
    mode = "replicate"


class _Circular(Pad):
    mode = "circular"


class ReflectionPad1d(_Reflection):
    """The sequence mirrored at the centre of its ends: (N, C, L) → (N, C, OL). As torch.nn.ReflectionPad1d.

    padding: an integer, or (left, right), less than the sequence's length; negative cuts off.
    """

    spatial = 1


class ReflectionPad2d(_Reflection):
    """The image mirrored at the centre of its edge pixels: (N, C, H, W) → (N, C, OH, OW). As torch.nn.ReflectionPad2d.

    padding: an integer, or (left, right, top, bottom), less than the image's size; negative cuts off.
    """


class ReflectionPad3d(_Reflection):
    """The volume mirrored at the centre of its edge pixels: (N, C, D, H, W) → (N, C, OD, OH, OW). As
    torch.nn.ReflectionPad3d.

    padding: an integer, or (left, right, top, bottom, front, back), less than the volume's size; negative cuts off.
    """

    spatial = 3


class ReplicationPad1d(_Replication):
    """The ends again and again: (N, C, L) → (N, C, OL). As torch.nn.ReplicationPad1d.

    padding: an integer, or (left, right); negative cuts off.
    """

    spatial = 1


class ReplicationPad2d(_Replication):
    """The edge pixels again and again: (N, C, H, W) → (N, C, OH, OW). As torch.nn.ReplicationPad2d.

    padding: an integer, or (left, right, top, bottom); negative cuts off.
    """


class ReplicationPad3d(_Replication):
    """The edge pixels again and again: (N, C, D, H, W) → (N, C, OD, OH, OW). As torch.nn.ReplicationPad3d.

    padding: an integer, or (left, right, top, bottom, front, back); negative cuts off.
    """

    spatial = 3


class CircularPad1d(_Circular):
    """The sequence around in a circle: (N, C, L) → (N, C, OL). As torch.nn.CircularPad1d.

    padding: an integer, or (left, right), at most the sequence's length; negative cuts off.
    """

    spatial = 1


class CircularPad2d(_Circular):
    """The image around in a circle: (N, C, H, W) → (N, C, OH, OW). As torch.nn.CircularPad2d.

    padding: an integer, or (left, right, top, bottom), at most the image's size; negative cuts off.
    """


class CircularPad3d(_Circular):
    """The volume around in a circle: (N, C, D, H, W) → (N, C, OD, OH, OW). As torch.nn.CircularPad3d.

    padding: an integer, or (left, right, top, bottom, front, back), at most the volume's size; negative cuts off.
    """

    spatial = 3


class ConstantPad1d(_Constant):
    """One value around the sequence: (N, C, L) → (N, C, OL). As torch.nn.ConstantPad1d.

    padding: an integer, or (left, right); negative cuts off.
    """

    spatial = 1


class ConstantPad2d(_Constant):
    """One value around the image: (N, C, H, W) → (N, C, OH, OW). As torch.nn.ConstantPad2d.

    padding: an integer, or (left, right, top, bottom); negative cuts off.
    """


class ConstantPad3d(_Constant):
    """One value around the volume: (N, C, D, H, W) → (N, C, OD, OH, OW). As torch.nn.ConstantPad3d.

    padding: an integer, or (left, right, top, bottom, front, back); negative cuts off.
    """

    spatial = 3


class ZeroPad1d(Pad):
    """Zeros around the sequence: (N, C, L) → (N, C, OL). As torch.nn.ZeroPad1d.

    padding: an integer, or (left, right); negative cuts off.
    """

    spatial = 1


class ZeroPad2d(Pad):
    """Zeros around the image: (N, C, H, W) → (N, C, OH, OW). As torch.nn.ZeroPad2d.

    padding: an integer, or (left, right, top, bottom); negative cuts off.
    """


class ZeroPad3d(Pad):
    """Zeros around the volume: (N, C, D, H, W) → (N, C, OD, OH, OW). As torch.nn.ZeroPad3d.

    padding: an integer, or (left, right, top, bottom, front, back); negative cuts off.
    """

    spatial = 3
