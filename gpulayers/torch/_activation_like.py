"""Activations, and GPT-2's Conv1D, as classes of Hugging Face's: found by their form, proved by what they compute."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from gpulayers.torch import activation
from gpulayers.torch._arguments import held
from gpulayers.torch._standing import Standing, bare, standing, unlike
from gpulayers.torch.linear import linear

_FUNCTIONS: dict[str, Any] = {
    "silu": activation.silu,
    "gelu": activation.gelu,
    "gelu_tanh": functools.partial(activation.gelu, approximate="tanh"),
    "quick_gelu": activation.quick_gelu,
    "relu": activation.relu,
    "relu_squared": activation.relu_squared,
    "mish": activation.mish,
    "sigmoid": activation.sigmoid,
    "tanh": activation.tanh,
    "relu6": activation.relu6,
}
"""By the name in ACTIVATIONS."""


class ActivationLike(Standing):
    """Stands before the class of an activation."""

    _activation: str

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        return _FUNCTIONS[self._activation](x)


@functools.cache
def _activation_class(own: type, name: str) -> Any:
    return standing(ActivationLike, own, (_activation_class, own, name), _activation=name)


def activation_class_for(module: Any, own: Any) -> Any:
    """The class for one of transformers' activations; None where it is none, or not one of ours."""
    if not own.__module__.startswith("transformers.") or module._parameters or module._buffers or module._modules:
        return None
    if len(inspect.signature(own.forward).parameters) != 2:
        return None
    name = _name(module, own)
    return None if name is None else _activation_class(own, name)


@torch.no_grad()
def _name(module: Any, own: Any) -> str | None:
    """That of the activation that gives the same from −8 to 8, in the same dtype."""
    x = torch.linspace(-8, 8, 257)
    try:
        truth, narrow = own.forward(module, x), own.forward(module, x.bfloat16())
    except Exception:
        return None
    if not isinstance(truth, Tensor) or truth.shape != x.shape or narrow.dtype is not torch.bfloat16:
        return None
    bound = 32 * torch.finfo(torch.float32).eps * truth.abs().max()
    return next((name for name, f in _FUNCTIONS.items() if bool(((f(x) - truth).abs() <= bound).all())), None)


class Conv1DLike(Standing):
    """Stands before a class in the manner of transformers' Conv1D: x W + b, where Linear has x Wᵀ + b."""

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        return linear(x, held(self, "weight").t(), held(self, "bias"))


@functools.cache
def conv1d_class(own: type) -> Any:
    return standing(Conv1DLike, own, (conv1d_class, own))


def is_conv1d_like(module: Any, own: type) -> bool:
    weight = module._parameters.get("weight")
    return own.__name__ == "Conv1D" and weight is not None and weight.dim() == 2 and hasattr(module, "nf")


def is_no_conv1d(module: nn.Module, own: Any) -> str:
    """Why a module of a class that is named so is not replaced."""
    return unlike(lambda: _agrees(module, own))


@torch.no_grad()
def _agrees(module: nn.Module, own: Any) -> bool:
    """Whether two copies with random weights give the same."""
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=random) for shape in ((2, 4, 3), (3, 5), (5,)))
    found = []
    for kind in (own, conv1d_class(own)):
        probe = bare(module, kind)
        probe.weight, probe.bias, probe.nf, probe.nx = nn.Parameter(weight), nn.Parameter(bias), 5, 3
        found.append(probe.forward(x))
    return torch.allclose(*found, rtol=1e-5, atol=1e-5)


class Derived(Standing):
    """Stands before a class that derives from one of torch.nn's and calls its forward: that is our drop-in's then."""

    _ours: type
    """The drop-in."""


@functools.cache
def derived_class(own: Any, ours: type) -> Any:
    """The class before ``own`` with ``ours`` behind it, so that ``super().forward`` is ours'; None where it calls none."""
    forward = inspect.unwrap(own.forward)
    code = getattr(forward, "__code__", None)
    if not own.__module__.startswith("transformers.") or code is None:
        return None
    calls = "__class__" in code.co_freevars and {"super", "forward"} <= set(code.co_names)
    if not calls and forward not in [vars(c).get("forward") for c in ours.__mro__]:
        return None
    return standing(Derived, own, (derived_class, own, ours), ours, _ours=ours)
