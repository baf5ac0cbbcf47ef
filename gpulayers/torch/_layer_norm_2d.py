"""Layer norms of each pixel's channels, in the manner of torchvision's and timm's LayerNorm2d: found by name and by what they
compute. Of channels-last images no copy is made: a permutation is all that turns them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from gpulayers.torch._arguments import held
from gpulayers.torch._standing import Standing, bare, standing, unlike
from gpulayers.torch.norm import layer_norm


class LayerNorm2d(Standing):
    """Stands before such a class: y (N, C, H, W) = layer_norm of x (N, C, H, W) over C."""

    normalized_shape: Any
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        weights = held(self, "weight"), held(self, "bias")
        return layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, *weights, self.eps).permute(0, 3, 1, 2)


@functools.cache
def layer_norm_2d_class(own: type) -> Any:
    return standing(LayerNorm2d, own, (layer_norm_2d_class, own))


def is_named_so(own: type) -> bool:
    return own.__name__ == "LayerNorm2d" and issubclass(own, nn.LayerNorm)


def is_no_layer_norm_2d(module: Any, own: Any) -> str:
    """Why a module of a class that is named so is not replaced: what it has, or what it computes."""
    if len(module.normalized_shape) != 1 or module._modules or module._buffers:
        return "it is not over one axis, or has modules or buffers"
    if getattr(module, "_fast_norm", False):
        return "its fast norm has autocast's 16 bits where torch's layer norm has float32"
    return unlike(lambda: _agrees(module, own))


@torch.no_grad()
def _agrees(module: Any, own: Any) -> bool:
    """Whether two copies with random weights give the same on the CPU, in both modes and memory formats, with as many
    channels as columns."""
    random = torch.Generator().manual_seed(0)
    n = module.normalized_shape[0]
    x = torch.randn(2, n, 3, n if n < 64 else 2, generator=random)
    weights = {k: None if p is None else torch.randn(n, generator=random) for k, p in module._parameters.items()}
    for training, like in ((True, torch.contiguous_format), (False, torch.channels_last)):
        given = x.contiguous(memory_format=like)
        theirs, ours = (_probe(module, kind, weights, training) for kind in (own, layer_norm_2d_class(own)))
        truth, y = theirs.forward(given.clone()), ours.forward(given)
        if not isinstance(truth, Tensor) or (truth.dtype, truth.shape) != (y.dtype, y.shape):
            return False
        if not torch.allclose(truth, y, rtol=1e-4, atol=1e-5):
            return False
    return True


def _probe(module: Any, kind: Any, weights: dict[str, Tensor | None], training: bool) -> Any:
    probe = bare(module, kind)
    for name, p in weights.items():
        probe._parameters[name] = None if p is None else nn.Parameter(p)
    return probe.train(training)
