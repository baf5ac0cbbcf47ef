"""Batch norms that apply an activation of their own, in the manner of timm's BatchNormAct2d: found by name and structure, and
by what they compute."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from gpulayers.torch._acts import is_bare, is_quiet, name_of
from gpulayers.torch._batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from gpulayers.torch._standing import Standing, bare, standing, unlike

_KINDS: dict[type, Any] = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}


class NormAct(Standing):
    """Stands before such a class: act(drop(norm(x))), of whose modules either may be missing."""

    kind: Any
    """The drop-in that it is, but for its activation."""
    _modules: Any

    @property
    def activation(self) -> str | None:
        """Its activation's name in ACTIVATIONS; None where it has none."""
        act = self._modules.get("act")
        return None if act is None else name_of(act)

    @property
    def is_whole(self) -> bool:
        """Whether the name says all that follows the norm now."""
        drop, act = self._modules.get("drop"), self._modules.get("act")
        if drop is not None and not is_quiet(drop):
            return False
        return act is None or is_quiet(act) or (name_of(act) is not None and is_bare(act))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_whole:
            return self.fused(x, None, self.activation)  # type: ignore[attr-defined]
        y = self.fused(x)  # type: ignore[attr-defined]
        for name in ("drop", "act"):
            step = self._modules.get(name)
            y = y if step is None else step(y)
        return y


@functools.cache
def norm_act_class(own: type) -> Any:
    kind = next(_KINDS[c] for c in own.__mro__ if c in _KINDS)
    return standing(NormAct, own, (norm_act_class, own), kind=kind, fused=kind.fused, counted=kind.counted)


def is_named_so(own: type) -> bool:
    return own.__name__.startswith("BatchNormAct") and any(c in _KINDS for c in own.__mro__)


def is_no_norm_act(module: Any, own: Any) -> str:
    """Why a module of a class that is named so is not replaced: what it has, or what it computes."""
    if set(module._modules) - {"drop", "act"}:
        return "it has other modules than drop and act"
    return unlike(lambda: _agrees(module, own))


@torch.no_grad()
def _agrees(module: Any, own: Any) -> bool:
    """Whether two copies with random parameters give the same, and move their statistics alike, on the CPU."""
    random = torch.Generator().manual_seed(0)
    axes = list(_KINDS).index(next(c for c in own.__mro__ if c in _KINDS)) + 1
    x = torch.randn(2, module.num_features, *(2, 3, 2)[:axes], generator=random)
    for training in (True, False):
        state = torch.Generator().manual_seed(1)
        theirs = _probe(module, own, state, training)
        ours = _probe(module, norm_act_class(own), state.manual_seed(1), training)
        pairs = [(theirs.forward(x.clone()), ours.forward(x.clone())), *zip(theirs.buffers(), ours.buffers())]
        if not all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs):
            return False
    return True


def _probe(module: Any, kind: Any, random: torch.Generator, training: bool) -> Any:
    """A copy of the module's plain attributes and its activation, without hooks, as one of class ``kind``."""
    probe = bare(module, kind)
    for name, p in module._parameters.items():
        probe._parameters[name] = None if p is None else nn.Parameter(torch.randn(p.shape, generator=random))
    for name, b in module._buffers.items():
        counts = b is not None and not b.is_floating_point()
        probe._buffers[name] = None if b is None else torch.rand(b.shape, generator=random) + 0.5
        if counts:
            probe._buffers[name] = torch.zeros(b.shape, dtype=b.dtype)
    probe._modules.update({k: nn.Identity() if k == "drop" else copy.deepcopy(m) for k, m in module._modules.items()})
    return probe.train(training)
