"""Whether calls are taped, and what makes every tape so far invalid."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

enabled = os.environ.get("GPULAYERS_TAPE", "1") not in ("", "0")
epoch: object = object()
"""Tapes of another epoch are not played."""
cpu_stream: Callable[[int], int] | None = None
"""Gives the stream that tensors on the CPU are launched on; None where there is no driver that takes them."""


def forget() -> None:
    """Let every tape be recorded anew."""
    global epoch
    epoch = object()


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Within, every call takes its launcher's road, in every thread."""
    global enabled, epoch
    before = enabled, epoch
    enabled, epoch = False, object()
    try:
        yield
    finally:
        enabled, epoch = before


@contextlib.contextmanager
def on_cpu(stream: Callable[[int], int]) -> Iterator[None]:
    """Within, tensors on the CPU are taped as if they were on a GPU; ``stream(0)`` is their current stream."""
    global cpu_stream
    before, cpu_stream = cpu_stream, stream
    try:
        yield
    finally:
        cpu_stream = before
