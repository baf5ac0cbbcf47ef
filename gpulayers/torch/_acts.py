"""Activations as modules and by name, and what else than its forward runs when a module is called."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as _module

from gpulayers.ops.activation import ACTIVATIONS
from gpulayers.torch import _epilogue, activation
from gpulayers.torch._activation_like import ActivationLike

Act: TypeAlias = nn.Module | str
"""A module, or a name in ACTIVATIONS for what the forward says by a function."""


def _classes() -> dict[type, tuple[str, dict[str, float]]]:
    by_name = {c.__name__.lower(): c for c in vars(activation).values() if isinstance(c, type)}
    names = {name: by_name.get(name.replace("_", "")) for name in ACTIVATIONS}
    return {c: (name, ACTIVATIONS[name].options) for name, c in names.items() if c is not None}


_CLASSES = _classes()
"""{drop-in: (its name in ACTIVATIONS, the numbers that it must have)}."""


def name_of(act: Any) -> str | None:
    """The name in ACTIVATIONS of what an activation computes now; None where it has none."""
    if isinstance(act, str):
        return act
    if isinstance(act, ActivationLike):
        return act._activation
    name, numbers = _CLASSES.get(type(act), (None, {}))
    if name == "gelu" and act.approximate != "none":
        return "gelu_tanh" if act.approximate == "tanh" else None
    for option, value in numbers.items():
        if getattr(act, option) != value:
            return None
    return name


def is_bare(module: Any) -> bool:
    """Whether nothing but its forward runs when a module is called."""
    return isinstance(module, str) or not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or module._compiled_call_impl is not None
        or _module._has_any_global_hook()
    )


def apply(act: Act, z: Tensor) -> Tensor:
    return _epilogue.applied(act, z) if isinstance(act, str) else act(z)


def is_quiet(module: Any) -> bool:
    """Whether a module gives what it is given, and nobody looks on."""
    return type(module) is nn.Identity and is_bare(module)
