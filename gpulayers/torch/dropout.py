"""Dropout. The seed is drawn from torch's generator of the input's device, so activation checkpointing replays the mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import dropout as ops
from gpulayers.torch._inplace import InPlace
from gpulayers.torch._op import TorchOp


def _dropout_twin(x: Tensor, seed: Tensor, p: float, inplace: bool = False) -> Tensor:
    return F.dropout(x, p, True, inplace)


def _dropout_again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    (dy,) = dys
    ones = torch.ones(inputs[0].shape, dtype=torch.promote_types(dy.dtype, torch.float32), device=dy.device)
    # The library's op draws the mask by the seed whatever dy is: batched, dual.
    return [(dy * _dropout.library((ones, saved["seed"], options["p"]), False)).to(dy.dtype), None]


_dropout = TorchOp(ops.dropout, _dropout_twin, "float p", again=_dropout_again)
_dropout.in_place = InPlace(_dropout)


def draw_seed(like: Tensor) -> Tensor:
    """[seed, offset] from torch's generator, on the device of ``like``; the host waits for nothing."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=like.device)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.dropout``; the mask is Philox's, the same on every device for the same seed."""
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if not isinstance(input, Tensor):
        return F.dropout(input, p, training, inplace)  # raises, or records itself
    if not training or p == 0.0:  # as torch, which draws nothing then and leaves an input in place as it is
        return input
    return (_dropout.in_place if inplace else _dropout)(input, draw_seed(input), p)


class Dropout(nn.Dropout):
    """``torch.nn.Dropout`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training, self.inplace)
