"""What a model is to those who train it: a network, one batch for it, a loss, and an optimizer."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor


class NextToken(nn.Module):
    """Cross entropy of every position."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, logits: Tensor, following: Tensor) -> Tensor:  # (N, T, V), (N, T) → ()
        return self.loss(logits.flatten(0, 1), following.flatten())


class WithLoss(nn.Module):
    """A network and its loss as one module, which a step calls once and torch.compile sees whole."""

    def __init__(self, net: nn.Module, loss: nn.Module):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, *batch: Tensor) -> Tensor:
        *inputs, target = batch
        return self.loss(self.net(*inputs), target)


class Kind(NamedTuple):
    """A model in one size, and how it is trained."""

    net: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, ...]]
    """Inputs, then the target, on the generator's device."""
    loss: Callable[[], nn.Module] = nn.CrossEntropyLoss
    optimizer: str = "AdamW"
    memory_format: torch.memory_format = torch.channels_last
    """Of images."""

    def made(self, device: str = "cpu", seed: int = 0) -> tuple[WithLoss, tuple[Tensor, ...]]:
        """(model, batch): the same for a seed, on a device."""
        torch.manual_seed(seed)
        return self._laid(device, self.batch(torch.Generator(device).manual_seed(seed)))

    def on_meta(self) -> tuple[WithLoss, tuple[Tensor, ...]]:
        """(model, batch) on the device "meta"."""
        return self._laid("meta", tuple([t.to("meta") for t in self.batch(torch.Generator().manual_seed(0))]))

    def _laid(self, device: str, batch: tuple[Tensor, ...]) -> tuple[WithLoss, tuple[Tensor, ...]]:
        with torch.device(device):
            model = WithLoss(self.net(), self.loss())
        model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        return model, tuple([t.to(memory_format=self.memory_format) if t.dim() == 4 else t for t in batch])


def images(count: int, size: int, classes: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """Images (N, 3, size, size), and their labels (N,)."""

    def batch(g: torch.Generator) -> tuple[Tensor, ...]:
        x = torch.randn(count, 3, size, size, generator=g, device=g.device)
        return x, torch.randint(classes, (count,), generator=g, device=g.device)

    return batch


def tokens(count: int, length: int, vocabulary: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """Tokens (N, T), and those that follow them (N, T)."""

    def batch(g: torch.Generator) -> tuple[Tensor, ...]:
        text = torch.randint(vocabulary, (count, length + 1), generator=g, device=g.device)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    return batch


def installed(home: str, name: str, **options: Any) -> nn.Module | None:
    """The network that another package has: ``home`` is its module; None where it is not installed, or cannot be imported,
    as torchvision beside a torch that it was not built for. A row names the class's home."""
    try:
        make = getattr(importlib.import_module(home), name)
    except (ImportError, RuntimeError):
        return None
    return make(**options)


OPTIONS: dict[str, dict[str, float]] = {
    "SGD": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4},
    "AdamW": {"lr": 1e-4, "weight_decay": 0.05},
}
"""Of optimizers, by name."""


def stepping(
    call: Callable[..., Tensor],
    batch: tuple[Tensor, ...],
    optimizer: torch.optim.Optimizer,
    cast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Callable[[], Tensor]:
    """A step of training, which gives the loss: gradients to zero, forward inside ``cast()``, backward, update."""

    def step() -> Tensor:
        optimizer.zero_grad()
        with cast():
            loss = call(*batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
