"""What a fused forward calls in the place of modules in a row (see ``_fuse.py``): one op, one autograd Function.

Each looks at its modules as they are at that moment. Where one has hooks, another class than the drop-in's, or an option
that the fused op has not, they run one after the other, as the model says.
"""

from __future__ import annotations

import operator
from typing import Any, TypeAlias

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as _module

from gpulayers.ops.activation import ACTIVATIONS
from gpulayers.torch import _epilogue, activation
from gpulayers.torch._arguments import held
from gpulayers.torch._conv_norm import NORMS, conv_norm
from gpulayers.torch.linear import Linear, linear
from gpulayers.torch.norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LayerNorm,
    RMSNorm,
    add_layer_norm,
    add_rms_norm,
    alike,
)

BATCH_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
_ADDS = operator.add, operator.iadd
_ADD_NORMS: dict[type, Any] = {LayerNorm: add_layer_norm, RMSNorm: add_rms_norm}

Act: TypeAlias = nn.Module | str
"""A module, or a name in ACTIVATIONS for what the forward says by a function."""
_autocasting = torch._C._is_any_autocast_enabled


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


def _apply(act: Act, z: Tensor) -> Tensor:
    return _epilogue.applied(act, z) if isinstance(act, str) else act(z)


def linear_act(layer: Any, act: Act, x: Tensor) -> Tensor:
    """act(layer(x))"""
    name = name_of(act)
    if type(layer) is not Linear or name is None or not (is_bare(layer) and is_bare(act)):
        return _apply(act, layer(x))
    weight = held(layer, "weight")
    if name not in _epilogue.BY_Y and torch.is_grad_enabled() and not weight.requires_grad:
        return _apply(act, layer(x))  # the fused op's second gradient needs x, which nothing else keeps here
    return linear(x, weight, held(layer, "bias"), activation=name)


def norm_act(norm: Any, act: Act, x: Tensor) -> Tensor:
    """act(norm(x))"""
    return norm_add_act(norm, act, x, None)


def norm_add_act(norm: Any, act: Act, x: Tensor, residual: Tensor | None, in_place: bool = False) -> Tensor:
    """act(norm(x) + residual); in_place: by ``+=``, which keeps the dtype."""
    name = name_of(act)
    if type(norm) not in BATCH_NORMS or name is None or not (is_bare(norm) and is_bare(act)):
        z = norm(x)
        return _apply(act, z if residual is None else _ADDS[in_place](z, residual))
    if residual is not None and not alike(x, residual):
        return _apply(act, _ADDS[in_place](norm(x), residual))
    return norm.fused(x, residual, name)


def conv_norm_act(
    conv: Any,
    norm: Any,
    act: Act | None,
    x: Tensor,
    residual: Tensor | None = None,
    in_place: bool = False,
    steps: tuple = (),
) -> Tensor:
    """act(norm(conv(x)) + residual); in_place: by ``+=``, which keeps the dtype. steps: these and the modules among them that
    do nothing, None where is added."""
    name = None if act is None else name_of(act)
    if (
        NORMS.get(type(conv)) is type(norm)
        and (act is None or (name is not None and is_bare(act)))
        and is_bare(conv)
        and is_bare(norm)
        and (not steps or _are_quiet([s for s in steps if s is not None and s not in (conv, norm, act)]))
    ):
        y = conv_norm(conv, norm, x, residual, name)
        if y is not NotImplemented:
            return y
        if residual is not None and (y := conv_norm(conv, norm, x)) is not NotImplemented:
            y = _ADDS[in_place](y, residual)
            return y if act is None else _apply(act, y)
    if not steps:
        steps = (conv, norm, *[None] * (residual is not None), *[act] * (act is not None))
    for step in steps:
        x = _ADDS[in_place](x, residual) if step is None else _apply(step, x)
    return x


def _are_quiet(modules: list) -> bool:
    return all([type(m) is nn.Identity and is_bare(m) for m in modules])


def add_norm(norm: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual)"""
    fused = _ADD_NORMS.get(type(norm))
    if fused is None or not is_bare(norm) or not _summed_alike(x, residual):
        total = x + residual
        return norm(total), total
    if fused is add_rms_norm:
        return add_rms_norm(x, residual, norm.normalized_shape, held(norm, "weight"), norm.eps)
    return add_layer_norm(x, residual, norm.normalized_shape, held(norm, "weight"), held(norm, "bias"), norm.eps)


def _summed_alike(x: Tensor, residual: Tensor) -> bool:
    """Whether the sum has the dtype that the fused op gives it: autocast on CUDA widens a norm's inputs."""
    return alike(x, residual) and not (x.is_cuda and x.dtype != torch.float32 and _autocasting())
