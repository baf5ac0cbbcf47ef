"""Connectionist temporal classification: torch.nn.CTCLoss and torch.nn.functional.ctc_loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import loss as ops
from gpulayers.torch import _autocast
from gpulayers.torch._op import TorchOp


def _twin(
    x: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    zero_infinity: bool,
    reduction: str,
) -> Tensor:
    return F.ctc_loss(x, targets, input_lengths, target_lengths, blank, reduction, zero_infinity)


_ctc_loss = TorchOp(
    ops.ctc_loss,
    _twin,
    "int blank, bool zero_infinity, str reduction",
    buffers=("alpha", "nll"),
    cast=_autocast.ON_CPU,
)


def _lengths(given: Any, device: torch.device) -> Any:
    """(N,) on the device; None for what are no integers."""
    if isinstance(given, Tensor):
        if given.is_floating_point() or given.is_complex():
            return None
        given = given if given.device == device else given.to(device)
        return given if given.ndim else given.unsqueeze(0)
    return torch.tensor(given, dtype=torch.int64, device=device)


def _padded(targets: Tensor, target_lengths: Tensor) -> Tensor:
    """(N, S) of targets one after the other. S is a number, so a GPU's lengths are waited for, as in torch."""
    ends = target_lengths.cumsum(0)
    places = torch.arange(int(target_lengths.max()), device=targets.device) + (ends - target_lengths).unsqueeze(1)
    return targets[places.clamp_max(max(len(targets) - 1, 0))]


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """As ``torch.nn.functional.ctc_loss``: targets padded, (N, S), or one after the other; lengths as tensors or numbers."""
    device = log_probs.device
    lengths, counts = _lengths(input_lengths, device), _lengths(target_lengths, device)
    in_a_row = log_probs.ndim == 3 and targets.ndim == 1
    wrong = log_probs.ndim not in (2, 3) or targets.is_floating_point() or lengths is None or counts is None
    if not wrong and in_a_row:  # their number is a matter of values
        known = not torch.compiler.is_compiling() and counts.ndim == 1 and len(counts) == log_probs.shape[1] > 0
        wrong = not (known and int(counts.min()) >= 0 and int(counts.sum()) == len(targets) > 0)
    if wrong:
        return F.ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity)
    targets = targets if targets.device == device else targets.to(device)
    alone = log_probs.ndim == 2
    if in_a_row:
        targets = _padded(targets, counts)
    elif alone:
        log_probs, targets = log_probs.unsqueeze(1), targets if targets.ndim == 2 else targets.unsqueeze(0)
    y = _ctc_loss(log_probs, targets, lengths, counts, blank, zero_infinity, reduction)
    return y.squeeze(0) if alone and reduction == "none" else y


class CTCLoss(nn.CTCLoss):
    """``torch.nn.CTCLoss`` over gpulayers' kernels."""

    def forward(self, log_probs: Tensor, targets: Tensor, input_lengths: Any, target_lengths: Any) -> Tensor:
        return ctc_loss(
            log_probs, targets, input_lengths, target_lengths, self.blank, self.reduction, self.zero_infinity
        )
