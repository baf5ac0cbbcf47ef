"""Connectionist temporal classification as a layer."""

from __future__ import annotations

from typing import Any

from gpulayers.layers._layer import OpLayer
from gpulayers.ops import loss as ops


class CTCLoss(OpLayer):
    """−log of the probability of a sequence of labels, summed over its alignments, by default averaged. As torch.nn.CTCLoss.

    Called with x (T, N, C), log-probabilities, targets (N, S), input_lengths (N,) and target_lengths (N,), all integers.
    zero_infinity: what cannot be aligned has the loss 0. Averages are over losses by their target's length.
    """

    op = ops.ctc_loss

    def __init__(self, blank: int = 0, reduction: str = "mean", zero_infinity: bool = False):
        self.blank, self.reduction, self.zero_infinity = blank, reduction, zero_infinity

    def options(self) -> dict[str, Any]:
        return {"blank": self.blank, "reduction": self.reduction, "zero_infinity": self.zero_infinity}

    def output_shape(self, *input_shapes: tuple) -> tuple:
        return () if self.reduction != "none" else (input_shapes[0][1],)
