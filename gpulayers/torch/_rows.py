"""What a fused forward calls in the place of modules in a row (see ``_fuse.py``): one op, one autograd Function.

Each looks at its modules as they are at that moment. Where one has hooks, another class than the drop-in's, or an option
that the fused op has not, they run one after the other, as the model says.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from gpulayers.torch import _epilogue
from gpulayers.torch._acts import Act, apply, is_bare, is_quiet, name_of
from gpulayers.torch._arguments import held
from gpulayers.torch._conv_act import CONVOLUTIONS as CONVOLUTIONS
from gpulayers.torch._conv_act import conv_act as convolved
from gpulayers.torch._conv_norm import NORMS, conv_norm, conv_norm_joined
from gpulayers.torch._norm_act import NormAct
from gpulayers.torch._sums import add_norm as add_norm
from gpulayers.torch.linear import Linear, linear
from gpulayers.torch.norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    alike,
)

BATCH_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
"""And subclasses of ``NormAct``."""
SAMPLE_NORMS = (GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d)
"""Whose statistics are those of each sample."""
_CHANNEL_NORMS = {*BATCH_NORMS, *SAMPLE_NORMS}
_ADDS = operator.add, operator.iadd


def linear_act(layer: Any, act: Act, x: Tensor) -> Tensor:
    """act(layer(x))"""
    name = name_of(act)
    if type(layer) is not Linear or name is None or not (is_bare(layer) and is_bare(act)):
        return apply(act, layer(x))
    weight = held(layer, "weight")
    if name not in _epilogue.BY_Y and torch.is_grad_enabled() and not weight.requires_grad:
        return apply(act, layer(x))  # the fused op's second gradient needs x, which nothing else keeps here
    return linear(x, weight, held(layer, "bias"), activation=name)


def conv_act(conv: Any, act: Act, x: Tensor, residual: Tensor | None = None, in_place: bool = False) -> Tensor:
    """act(conv(x) + residual); in_place: by ``+=``, which keeps the dtype."""
    name = name_of(act)
    if type(conv) in CONVOLUTIONS and name is not None and is_bare(conv) and is_bare(act):
        y = convolved(conv, x, residual, name)
        if y is not NotImplemented:
            return y
    z = conv(x)
    return apply(act, z if residual is None else _ADDS[in_place](z, residual))


def norm_act(norm: Any, act: Act, x: Tensor) -> Tensor:
    """act(norm(x))"""
    return norm_add_act(norm, act, x, None)


def norm_add_act(norm: Any, act: Act, x: Tensor, residual: Tensor | None, in_place: bool = False) -> Tensor:
    """act(norm(x) + residual); in_place: by ``+=``, which keeps the dtype."""
    name = name_of(act)
    if type(norm) not in _CHANNEL_NORMS or name is None or not (is_bare(norm) and is_bare(act)):
        z = norm(x)
        return apply(act, z if residual is None else _ADDS[in_place](z, residual))
    if residual is not None and not alike(x, residual):
        return apply(act, _ADDS[in_place](norm(x), residual))
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
    if _is_one_call(conv, norm, act, steps):
        inner = norm.activation if isinstance(norm, NormAct) else None
        name = None if act is None else name_of(act)
        y = conv_norm(conv, norm, x, residual, name) if inner is None else NotImplemented
        if y is not NotImplemented:
            return y
        if (y := conv_norm(conv, norm, x, None, inner)) is not NotImplemented:
            y = y if residual is None else _ADDS[in_place](y, residual)
            return y if act is None else apply(act, y)
    if not steps:
        steps = (conv, norm, *[None] * (residual is not None), *[act] * (act is not None))
    for step in steps:
        x = _ADDS[in_place](x, residual) if step is None else apply(step, x)
    return x


def conv_norm_act_joined(
    conv: Any,
    norm: Any,
    act: Act | None,
    x: Tensor,
    residual: Tensor | None = None,
    in_place: bool = False,
    steps: tuple = (),
) -> tuple[Tensor, Tensor]:
    """(conv_norm_act(…), x for all others that read it: what comes back for that is added in the kernel that computes dx)"""
    if _is_one_call(conv, norm, act, steps):
        inner = norm.activation if isinstance(norm, NormAct) else None
        name = inner if act is None else name_of(act)
        if inner is None or (act is residual is None):
            found = conv_norm_joined(conv, norm, x, residual, name)
            if found is not NotImplemented:
                return found
    return conv_norm_act(conv, norm, act, x, residual, in_place, steps), x


def _is_one_call(conv: Any, norm: Any, act: Any, steps: tuple) -> bool:
    """Whether nothing but these would run, and the op has what they compute."""
    kind = type(norm)
    if kind is not NORMS.get(type(conv)) and not (
        issubclass(kind, NormAct) and kind.kind is NORMS.get(type(conv)) and norm.is_whole
    ):
        return False
    if not (is_bare(conv) and is_bare(norm)) or not (act is None or (name_of(act) is not None and is_bare(act))):
        return False
    return not steps or all([s is None or s in (conv, norm, act) or is_quiet(s) for s in steps])
