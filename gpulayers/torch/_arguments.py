"""How torch.nn reads arguments: inputs without a batch dimension, one number for height and width, a module's weights, the
types of options."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch.nn as nn
from torch import Tensor


def batched(function: Callable[..., Any], ndim: int, input: Tensor, *args: Any) -> Any:
    """function(input, *args) for an op whose input has ``ndim`` dimensions; one fewer is a batch of one."""
    if not isinstance(input, Tensor) or input.dim() != ndim - 1:
        return function(input, *args)
    found = function(input.unsqueeze(0), *args)
    return tuple(y.squeeze(0) for y in found) if isinstance(found, tuple) else found.squeeze(0)


def each(value: Any, count: int) -> tuple:
    """``value`` for each of so many axes, as torch reads it: one number stands for all. Wrong ones stay as they are."""
    if isinstance(value, (tuple, list)):
        return tuple(value) * count if len(value) == 1 else tuple(value)
    return (value,) * count


pair = functools.partial(each, count=2)
"""For height and width."""


def held(module: nn.Module, name: str) -> Any:
    """``module.<name>``, a parameter or buffer, without ``Module.__getattr__``: that costs more than an op's dispatch."""
    if name in module._parameters:
        return module._parameters[name]
    if name in module._buffers:
        return module._buffers[name]
    return getattr(module, name)  # parametrized, say


_NUMBERS: dict[str, tuple] = {
    "float": (float, int, np.number),
    "int": (int, np.integer),
    "bool": (bool,),
    "str": (str,),
}
"""What an option of each kind may be; torch's own functions deal with all else."""


def is_a(kind: str, value: Any) -> bool:
    """Whether an option is what the word of a torch.library schema says."""
    if kind.endswith("?"):
        return value is None or is_a(kind[:-1], value)
    if kind.endswith("[]"):
        return isinstance(value, tuple) and all(is_a(kind[:-2], v) for v in value)
    return isinstance(value, _NUMBERS[kind]) and (kind != "int" or not isinstance(value, bool))
