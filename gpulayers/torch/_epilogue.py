"""Activations that other ops apply in the same pass, in torch's words: y = f(z), with torch's default numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops._activation import require_activation
from gpulayers.ops.activation import ACTIVATIONS

BY_Y: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, y: torch.where(y <= 0, 0, dy),
    "relu6": lambda dy, y: torch.where((y <= 0) | (y >= 6), 0, dy),
    "sigmoid": lambda dy, y: dy * (1 - y) * y,
    "tanh": lambda dy, y: dy * (1 - y * y),
}
"""dz from dy and y, for those whose gradient is computed from y."""
_OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "threshold": lambda z: F.threshold(z, 0.0, 0.0),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu_squared": lambda z: F.relu(z).square(),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}
TWINS: dict[str, Callable[[Tensor], Tensor]] = {
    name: _OTHERS[name] if name in _OTHERS else getattr(F, name) for name in ACTIVATIONS
}
"""torch's own function of each."""


def applied(activation: str | None, z: Tensor) -> Tensor:
    """y = f(z) by torch's own function; z where there is no activation. Raises ValueError for an unknown one."""
    require_activation(activation)
    return z if activation is None else TWINS[activation](z)


def gradient(activation: str | None, dy: Tensor, kept: Tensor | None) -> Tensor:
    """dz = dy f'(z) in torch's operations, which can be differentiated again.

    kept: y for the activations in BY_Y, else z; either has the graph that it was computed by. None without an activation.
    """
    if activation is None:
        return dy
    assert kept is not None
    if activation in BY_Y:
        return BY_Y[activation](dy, kept)
    with torch.enable_grad():
        z = kept if kept.requires_grad else kept.detach().requires_grad_()
        (dz,) = torch.autograd.grad(TWINS[activation](z), z, dy.to(z.dtype), create_graph=True)
    return dz
