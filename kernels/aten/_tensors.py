"""What kernels on torch's CPU tensors share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gpulayers.arrays import Spec, float32, spec

_KEYS = torch._C.DispatchKey
_ABOVE = torch._C.DispatchKeySet(_KEYS.AutocastCPU) | torch._C.DispatchKeySet(_KEYS.AutogradCPU)
"""What would record an operation, or round what it takes to 16 bits: that was decided before."""


def plainly(function: Callable, *args: Any) -> Any:
    """function(*args) and nothing besides."""
    with torch._C._ExcludeDispatchKeyGuard(_ABOVE):
        return function(*args)


def lent(x: Any) -> Any:
    """A view for NumPy, which does not write to it. Not by ``numpy()``: its memory may be resized later."""
    return None if x is None else np.from_dlpack(x.detach())


FLOAT32 = "only float32: in 16 bits the NumPy kernel is quicker, float64 is left to the definition"


def refusal(x: Spec) -> str | None:
    return None if x.dtype == float32 else FLOAT32


def order_of(x: torch.Tensor) -> tuple[int, ...] | None:
    """The memory order that an output of x's shape has: x's, where that is dense."""
    return None if x.is_contiguous() else spec(x).like().order  # type: ignore[union-attr]


def arranged(x: torch.Tensor, order: tuple[int, ...] | None) -> torch.Tensor:
    """``x`` dense with its axes in this memory order (row-major for None); a copy only where it is not."""
    if order is None:
        return x.contiguous()
    return x.permute(order).contiguous().permute([order.index(a) for a in range(x.ndim)])
