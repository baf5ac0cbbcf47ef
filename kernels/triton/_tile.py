"""What Triton launchers share: the figures of the device they choose configurations by."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple


class Device(NamedTuple):
    """What a launcher chooses by."""

    arch: int
    """Compute capability: 80, 86, 89, 90, 100, 120."""
    sms: int
    """Streaming multiprocessors."""
    shared: int
    """Bytes of shared memory that one block may have."""


pretend: Device | None = None
"""Stands for the real device while kernels are interpreted or compiled without one."""


@cache
def _real_device(index: int) -> Device:
    import torch

    p = torch.cuda.get_device_properties(index)
    return Device(p.major * 10 + p.minor, p.multi_processor_count, p.shared_memory_per_block_optin)


def device(x: Any) -> Device:
    """The figures of the device that ``x`` is on."""
    return pretend or _real_device(x.device.index or 0)
