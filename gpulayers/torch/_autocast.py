"""What autocast does to an op's inputs. torch's rules, which differ by device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LOWER = "lower"
"""To the 16-bit dtype of autocast."""
FLOAT32 = "float32"
LOSS = FLOAT32
ON_CUDA = {"cuda": FLOAT32}
"""To float32 on CUDA, unchanged on the CPU."""
ON_CPU = {"cpu": FLOAT32}
"""To float32 on the CPU, unchanged on CUDA."""
WIDENED = "cuda"
"""Where autocast has norms in float32."""
KINDS: set[type] = {Tensor, torch.nn.Parameter}
"""Of tensors whose norms may do without that."""
_DEVICES = ("cpu", "cuda")
"""Others, "meta" among them, are torch's own business."""


def cast(rule: str | dict[str, str] | None, args: Sequence[Any], n: int) -> tuple:
    """``args`` with the first ``n``, the inputs, as autocast wants them; all unchanged where it is off."""
    args = tuple(args)
    if rule is None or args[0] is None:
        return args
    device = args[0].device.type
    if isinstance(rule, dict):
        rule = rule.get(device)
    if rule is None or not is_on(device):
        return args
    dtype = torch.float32 if rule == FLOAT32 else torch.get_autocast_dtype(device)
    return (*[_to(t, dtype, device) for t in args[:n]], *args[n:])


def is_on(device: str) -> bool:
    return device in _DEVICES and torch.is_autocast_enabled(device)


def state(like: Tensor) -> Callable[[], bool]:
    """() → whether autocast of the device of ``like`` is what it is now."""
    device = like.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.is_autocast_enabled(device) is enabled and torch.get_autocast_dtype(device) is dtype


def applied(casts: Sequence[tuple[int, torch.dtype]], args: tuple) -> tuple:
    """``args`` with these inputs cast."""
    found = list(args)
    for i, dtype in casts:
        found[i] = found[i].to(dtype)
    return tuple(found)


def _to(x: Any, dtype: torch.dtype, device: str) -> Any:
    eligible = (
        isinstance(x, Tensor) and x.is_floating_point() and x.dtype is not torch.float64 and x.device.type == device
    )
    return x.to(dtype) if eligible else x
