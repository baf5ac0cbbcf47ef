"""Dropout: the NumPy kernel's mask, whose bits are the same everywhere, by torch's product."""

from __future__ import annotations

from typing import Any

import torch

from gpulayers.arrays import Spec

from ..numpy import _masks
from ._tensors import FLOAT32, arranged, lent, order_of, plainly, refusal

REFUSALS = {"dtype": FLOAT32}
LOOKS = ("dropout",)
"""Ops that look at values, so that compilers cannot trace them: at the seed's."""


def dropout_refuses(x: Spec, seed: Spec, *, needs: tuple = (), p: float = 0.5) -> str | None:
    return refusal(x)


def _masked(x: torch.Tensor, order: Any, seed: torch.Tensor, p: float, first: bool) -> torch.Tensor:
    mask = torch.from_numpy(_masks.mask(lent(seed), p, x.numel(), first)).view(x.shape)
    return arranged(plainly(torch.mul, x, mask), order)


def dropout_forward(x: torch.Tensor, seed: torch.Tensor, *, needs: tuple = (), p: float = 0.5) -> tuple[tuple, dict]:
    return (_masked(x, order_of(x), seed, p, bool(needs)),), {"seed": seed} if needs else {}


def dropout_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 0.5) -> tuple:
    return _masked(dys[0], inputs[0].like().order, saved["seed"], p, False), None
