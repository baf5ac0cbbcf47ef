"""torch.nn.functional's functions that are others under a second name, or a few of them in a row."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpulayers.torch import _fractional_pooling, _rare_pooling, activation, pooling
from gpulayers.torch._globals import rebuilt
from gpulayers.torch.attention import scaled_dot_product_attention
from gpulayers.torch.conv import conv1d
from gpulayers.torch.dropout import dropout
from gpulayers.torch.linear import linear
from gpulayers.torch.padding import pad
from gpulayers.torch.resize import interpolate
from gpulayers.torch.softmax import softmax
from gpulayers.torch.window import channel_shuffle


def _in_place(name: str, like: str) -> Callable[..., Tensor]:
    """``relu_`` of relu, and so on."""
    function: Any = getattr(activation, name)

    def over(input: Tensor, *args: Any, **named: Any) -> Tensor:
        return function(input, *args, **named, inplace=True)

    over.__name__ = over.__qualname__ = f"{name}_"
    over.__doc__ = f"As ``torch.nn.functional.{name}_``: ``{name}`` written over its input. Arguments: {like}."
    return over


relu_, selu_ = _in_place("relu", "input"), _in_place("selu", "input")
elu_, celu_ = (_in_place(name, "input, alpha=1.0") for name in ("elu", "celu"))
hardtanh_ = _in_place("hardtanh", "input, min_val=-1.0, max_val=1.0")
leaky_relu_ = _in_place("leaky_relu", "input, negative_slope=0.01")
threshold_ = _in_place("threshold", "input, threshold, value")
rrelu_ = _in_place("rrelu", "input, lower=1/8, upper=1/3, training=False")


def _with_indices(function: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """``max_pool2d_with_indices`` of max_pool2d, and so on."""
    signature = inspect.signature(function)

    def both(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        return function(**(signature.bind(*args, **named).arguments | {"return_indices": True}))

    both.__name__ = both.__qualname__ = f"{function.__name__}_with_indices"
    both.__doc__ = f"As ``torch.nn.functional.{both.__name__}``: ``{function.__name__}`` with the places of the maxima."
    both.__signature__ = signature  # type: ignore[attr-defined]
    return both


max_pool1d_with_indices, max_pool2d_with_indices, max_pool3d_with_indices = (
    _with_indices(getattr(pooling, f"max_pool{axes}d")) for axes in (1, 2, 3)
)
adaptive_max_pool1d_with_indices, adaptive_max_pool2d_with_indices, adaptive_max_pool3d_with_indices = (
    _with_indices(getattr(_rare_pooling, f"adaptive_max_pool{axes}d")) for axes in (1, 2, 3)
)
fractional_max_pool2d_with_indices, fractional_max_pool3d_with_indices = (
    _with_indices(getattr(_fractional_pooling, f"fractional_max_pool{axes}d")) for axes in (2, 3)
)


def _upsampled(name: str, input: Tensor, **how: Any) -> Tensor:
    text = f"`nn.functional.{name}` is deprecated. Use `nn.functional.interpolate` instead."
    warnings.warn(text, stacklevel=3)  # torch's
    return interpolate(input, **how)


def upsample_nearest(input: Tensor, size: Any = None, scale_factor: Any = None) -> Tensor:
    """As ``torch.nn.functional.upsample_nearest``, an old name of ``interpolate``."""
    return _upsampled("upsample_nearest", input, size=size, scale_factor=scale_factor, mode="nearest")


def upsample_bilinear(input: Tensor, size: Any = None, scale_factor: Any = None) -> Tensor:
    """As ``torch.nn.functional.upsample_bilinear``, an old name of ``interpolate`` with corners aligned."""
    how = {"size": size, "scale_factor": scale_factor, "mode": "bilinear", "align_corners": True}
    return _upsampled("upsample_bilinear", input, **how)


def native_channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """As ``torch.nn.functional.native_channel_shuffle``."""
    return channel_shuffle(input, groups)


def conv_tbc(input: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> Tensor:
    """As ``torch.nn.functional.conv_tbc``: input (T, N, C), weight (kernel, C, O), bias (O,) → (T′, N, O)."""
    if not (input.dim() == weight.dim() == 3 and bias.dim() == 1):
        return F.conv_tbc(input, weight, bias, pad)  # raises
    return conv1d(input.permute(1, 2, 0), weight.permute(2, 1, 0), bias, padding=pad).permute(2, 0, 1)


def gumbel_softmax(logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> Tensor:
    """As ``torch.nn.functional.gumbel_softmax``, with torch's noise for torch's seed."""
    if not isinstance(logits, Tensor) or eps != 1e-10:
        return F.gumbel_softmax(logits, tau, hard, eps, dim)  # raises, records itself, or warns
    noise = -torch.empty_like(logits, memory_format=torch.legacy_contiguous_format).exponential_().log()
    soft = softmax((logits + noise) / tau, dim)
    if not hard:
        return soft
    whole = torch.zeros_like(logits, memory_format=torch.legacy_contiguous_format)
    return whole.scatter_(dim, soft.argmax(dim, keepdim=True), 1.0) - soft.detach() + soft


_within = {"linear": linear, "softmax": softmax, "dropout": dropout, "pad": pad}
_within["scaled_dot_product_attention"] = scaled_dot_product_attention
_projections: dict[str, Any] = {
    name: rebuilt(getattr(F, name), _within) for name in ("_in_projection", "_in_projection_packed")
}
multi_head_attention_forward = rebuilt(F.multi_head_attention_forward, _within | _projections)
