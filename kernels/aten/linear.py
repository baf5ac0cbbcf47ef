"""Linear by torch's BLAS."""

from __future__ import annotations

import math
from typing import Any

import torch

from gpulayers.arrays import Spec

from ._tensors import FLOAT32, plainly, refusal

REFUSALS = {"dtype": FLOAT32, "activation": "with an activation the NumPy kernel computes"}


def linear_refuses(
    x: Spec, weight: Spec, bias: Spec | None = None, *, needs: tuple = (), activation: str | None = None
) -> str | None:
    return refusal(x) or (None if activation is None else REFUSALS["activation"])


def linear_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: Any = None, *, needs: tuple = (), activation: str | None = None
) -> tuple[tuple, dict]:
    y = plainly(torch.nn.functional.linear, x, weight, bias)
    saved = {"x": x} if "weight" in needs else {}
    if "x" in needs:
        saved["weight"] = weight
    return (y.contiguous(),), saved


def linear_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, activation: str | None = None) -> tuple:
    return plainly(_gradients, dys[0], saved, inputs, needs)


def _gradients(dy: torch.Tensor, saved: dict, inputs: tuple, needs: tuple) -> tuple:
    out, features = inputs[1].shape
    rows = dy.reshape(math.prod(inputs[0].shape[:-1]), out)
    dx = dweight = dbias = None
    if "x" in needs:
        dx = torch.mm(rows, saved["weight"]).view(inputs[0].shape)
    if "weight" in needs:
        dweight = torch.mm(rows.t(), saved["x"].reshape(len(rows), features))
    if "bias" in needs:
        dbias = rows.sum(0)
    return dx, dweight, dbias
