"""Norms in the manner of Hugging Face's LlamaRMSNorm, T5LayerNorm and GemmaRMSNorm: found by their form, proved by what they
compute."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from gpulayers.torch._arguments import held
from gpulayers.torch._standing import Standing, bare, standing, unlike
from gpulayers.torch.norm import rms_norm


class RMSNormLike(Standing):
    """Stands before a class in the manner of LlamaRMSNorm: x̂ in the input's dtype, times the weight."""

    weight: nn.Parameter
    _eps: str
    one_plus = False

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        weight, eps, dtype = self.weight, getattr(self, self._eps), x.dtype
        if weight.dtype != dtype:  # as there: the product has the wider dtype
            return weight * rms_norm(x, weight.shape, None, eps).to(dtype)
        return rms_norm(x, weight.shape, weight, eps).to(dtype)  # autocast may have widened it


class _OnePlus(RMSNormLike):
    """In the manner of GemmaRMSNorm: x̂ (1 + weight) in float32, then in the input's dtype."""

    one_plus = True

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        weight = held(self, "weight")
        work = torch.promote_types(x.dtype, torch.float32)
        return rms_norm(x.to(work), weight.shape, 1.0 + weight.to(work), getattr(self, self._eps)).to(x.dtype)


@functools.cache
def norm_class(own: type, eps: str, one_plus: bool) -> Any:
    """eps: the name of its attribute."""
    return standing(_OnePlus if one_plus else RMSNormLike, own, (norm_class, own, eps, one_plus), _eps=eps)


def class_for(module: Any, own: type) -> Any:
    return norm_class(own, _eps_name(module), _is_one_plus(module, own))


def is_like_one(module: Any, own: type) -> bool:
    """Whether it is named …RMSNorm, or …Norm… with one weight of one dimension and an eps."""
    if own.__module__.startswith("torch.") or isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return False
    return own.__name__.endswith("RMSNorm") or ("Norm" in own.__name__ and not _form(module, own))


def is_no_rms_norm(module: nn.Module, own: Any) -> str:
    """Why a module that is like one is not replaced: its form, or what it computes."""
    return _form(module, own) or unlike(lambda: _agrees(module, own, held(module, "weight").shape[0]))


def _form(module: nn.Module, own: Any) -> str:
    weight, eps = getattr(module, "weight", None), getattr(module, _eps_name(module), None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return "it has no weight of one dimension with a variance_epsilon or eps"
    if len(module._parameters) + len(module._buffers) > 1 or set(module._modules) - {"parametrizations"}:
        return "it has more than one weight"
    if list(inspect.signature(own.forward).parameters)[2:]:
        return "its forward takes more than the hidden states"
    return ""


def _eps_name(module: Any) -> str:
    return "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"


@torch.no_grad()
def _is_one_plus(module: Any, own: Any) -> bool:
    """Whether a weight of zeros gives something."""
    try:
        n = module.weight.shape[0]
        return bool(_probe(module, own, torch.zeros(n)).forward(torch.ones(1, 1, n)).any())
    except Exception:  # is_no_rms_norm says why
        return False


@torch.no_grad()
def _agrees(module: nn.Module, own: Any, n: int) -> bool:
    """Whether two copies with a random weight and a large eps, on the CPU, give the same in each mix of dtypes."""
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=random) for shape in ((2, 3, n), (n,)))
    kinds = own, class_for(module, own)
    for kind, of_weight in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)):
        theirs, ours = (_probe(module, c, weight.to(of_weight)) for c in kinds)
        truth, y = theirs.forward(x.to(kind)), ours.forward(x.to(kind))
        if not isinstance(truth, Tensor) or (truth.dtype, truth.shape) != (y.dtype, y.shape):
            return False
        # Sums of n numbers in another order, and two roundings to 16 bits where we round once.
        bound = max(n * torch.finfo(torch.float32).eps, 2 * torch.finfo(kind).eps) * truth.abs().max()
        if not bool((truth.double() - y.double()).abs().max() <= bound):
            return False
    return True


def _probe(module: nn.Module, kind: Any, weight: Tensor) -> Any:
    probe = bare(module, kind)
    probe.weight = nn.Parameter(weight)
    setattr(probe, _eps_name(module), 0.25)
    return probe
