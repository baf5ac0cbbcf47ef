"""Dropout: the NumPy kernel's mask, whose bits are the same everywhere, by torch's product."""

from __future__ import annotations

import math
from typing import Any

import torch

from gpulayers.arrays import Spec

from ..numpy import _masks
from ._tensors import FLOAT32, arranged, lent, order_of, plainly, refusal

REFUSALS = {"dtype": FLOAT32, "alpha": "alpha is left to the NumPy kernel"}
LOOKS = ("dropout",)
"""Ops that look at values, so that compilers cannot trace them: at the seed's."""


def dropout_refuses(
    x: Spec, seed: Spec, *, needs: tuple = (), p: float = 0.5, alpha: bool = False, features: int = 0
) -> str | None:
    return refusal(x) or (REFUSALS["alpha"] if alpha else None)


def _masked(x: torch.Tensor, order: Any, seed: torch.Tensor, p: float, first: bool, features: int) -> torch.Tensor:
    shape = (*x.shape[:features], *(1 for _ in x.shape[features:])) if features else x.shape
    mask = torch.from_numpy(_masks.mask(lent(seed), p, math.prod(shape), first)).view(shape)
    return arranged(plainly(torch.mul, x, mask), order)


def dropout_forward(
    x: torch.Tensor,
    seed: torch.Tensor,
    *,
    needs: tuple = (),
    p: float = 0.5,
    alpha: bool = False,
    features: int = 0,
) -> tuple[tuple, dict]:
    return (_masked(x, order_of(x), seed, p, bool(needs), features),), {"seed": seed} if needs else {}


def dropout_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, p: float = 0.5, alpha: bool = False, features: int = 0
) -> tuple:
    return _masked(dys[0], inputs[0].like().order, saved["seed"], p, False, features), None
