"""How torch.nn reads arguments: inputs without a batch dimension, one number for height and width, a module's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn as nn
from torch import Tensor


def batched(function: Callable[..., Any], ndim: int, input: Tensor, *args: Any) -> Any:
    """function(input, *args) for an op whose input has ``ndim`` dimensions; one fewer is a batch of one."""
    if not isinstance(input, Tensor) or input.dim() != ndim - 1:
        return function(input, *args)
    found = function(input.unsqueeze(0), *args)
    return tuple(y.squeeze(0) for y in found) if isinstance(found, tuple) else found.squeeze(0)


def pair(value: Any) -> tuple:
    """``value`` for height and width, as torch reads it: one number stands for both. Wrong ones stay as they are."""
    if isinstance(value, (tuple, list)):
        return tuple(value) * 2 if len(value) == 1 else tuple(value)
    return (value, value)


def held(module: nn.Module, name: str) -> Any:
    """``module.<name>``, a parameter or buffer, without ``Module.__getattr__``: that costs more than an op's dispatch."""
    if name in module._parameters:
        return module._parameters[name]
    if name in module._buffers:
        return module._buffers[name]
    return getattr(module, name)  # parametrized, say
