"""Whether a call's tensors are like those of one that is known, told in C++."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def checker(tensors: Sequence[Tensor | None], second: bool) -> Callable[..., bool]:
    """Compares tensors with these by type, dtype, device, shape, strides, need of a gradient and dispatch keys, which
    autocast, torch.func, tracing and inference mode change: all in C++. A nested tensor ends the process there: the
    caller looks at the first, and the check at the ``second`` where that may be one."""
    there = [i for i, t in enumerate(tensors) if t is not None]
    try:
        from torch._C._dynamo.guards import TensorGuards

        check = TensorGuards(*[tensors[i] for i in there], dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    except (ImportError, TypeError):  # a torch without them, or with others: calls are found by their key
        return never_known
    if len(there) < len(tensors):
        known, missing = check, [i for i, t in enumerate(tensors) if t is None]
        check = lambda *now: all([now[i] is None for i in missing]) and known(*[now[i] for i in there])  # noqa: E731
    return (lambda *now: getattr(now[1], "is_nested", True) is False and check(*now)) if second else check


def never_known(*_: Any) -> bool:
    return False
