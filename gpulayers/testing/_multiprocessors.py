"""Which launches depend on the GPU's size: all those of a launcher that asked for the number of multiprocessors."""

from __future__ import annotations

import sys
from types import FrameType

from gpulayers.kernels.triton._tile import Device

launched: set[tuple[str, int]] = set()
"""(kernel, multiprocessors that its launcher was told of) of every such launch in this process."""


class Watched(Device):
    """A pretended GPU that notes who asks for its size."""

    __slots__ = ()

    @property
    def sms(self) -> int:  # type: ignore[override]
        launcher = _launcher()
        if launcher is not None:
            launcher.f_trace = _asked
        return self[1]


def _asked(*_: object) -> None:
    """The mark of a launcher's frame, which must not outlive it: it would keep its arrays alive."""


def note(kernel: str, device: Device | None) -> None:
    """A kernel is launched; ``device`` is the pretended one."""
    launcher = _launcher()
    if device is not None and launcher is not None and launcher.f_trace is _asked:
        launched.add((kernel, device[1]))


def _launcher() -> FrameType | None:
    """The outermost function of `gpulayers.kernels` at work."""
    frame: FrameType | None = sys._getframe(1)
    found = None
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("gpulayers.kernels."):
            found = frame
        frame = frame.f_back
    return found
