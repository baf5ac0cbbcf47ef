"""Which launches depend on the GPU's size: all those of a launcher that asked for the number of multiprocessors."""

from __future__ import annotations

import sys
from types import FrameType

from gpulayers.kernels.triton._tile import Device

launched: set[tuple[str, int]] = set()
"""(kernel, multiprocessors that its launcher was told of) of every such launch in this process."""
_asked: FrameType | None = None


class Watched(Device):
    """A pretended GPU that notes who asks for its size."""

    __slots__ = ()

    @property
    def sms(self) -> int:  # type: ignore[override]
        global _asked
        _asked = _launcher()
        return self[1]


def note(kernel: str, device: Device) -> None:
    """A kernel is launched."""
    if _asked is not None and _launcher() is _asked:
        launched.add((kernel, device[1]))


def forget() -> None:
    """Keep no launcher's arrays alive."""
    global _asked
    _asked = None


def _launcher() -> FrameType | None:
    """The outermost function of `gpulayers.kernels` at work."""
    frame: FrameType | None = sys._getframe(1)
    found = None
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("gpulayers.kernels."):
            found = frame
        frame = frame.f_back
    return found
