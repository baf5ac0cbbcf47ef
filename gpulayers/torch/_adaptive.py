"""Adaptive softmax: torch.nn.AdaptiveLogSoftmaxWithLoss, made of this library's linear layers and losses."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from gpulayers.torch._cross_entropy import cross_entropy
from gpulayers.torch.linear import linear
from gpulayers.torch.softmax import log_softmax


def _through(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = linear(x, layer.weight, layer.bias)
    return x


def _chosen(logits: Tensor, target: Tensor) -> Tensor:
    """The log-probability of each row's class."""
    return -cross_entropy(logits, target, reduction="none")


class AdaptiveLogSoftmaxWithLoss(nn.AdaptiveLogSoftmaxWithLoss):
    """``torch.nn.AdaptiveLogSoftmaxWithLoss`` over gpulayers' kernels. As torch's, it waits for a GPU to learn which rows
    belong to which cluster."""

    def forward(self, input_: Tensor, target_: Tensor) -> Any:
        _require(input_, target_)
        alone = target_.dim() == 0
        input, target = (input_.unsqueeze(0), target_.unsqueeze(0)) if alone else (input_, target_)
        output, inside = input.new_zeros(target.shape), target.clone()
        counted = int(((target >= 0) & (target < self.shortlist_size)).sum())
        for i, (low, high) in enumerate(itertools.pairwise(self.cutoffs)):
            rows = ((target >= low) & (target < high)).nonzero().squeeze(1)
            if len(rows):
                logits = _through(self.tail[i], input.index_select(0, rows))
                output = output.index_copy(0, rows, _chosen(logits, target[rows] - low).to(output.dtype))
                inside = inside.index_fill(0, rows, self.shortlist_size + i)
                counted += len(rows)
        if counted != len(target):
            raise RuntimeError(
                f"Target values should be in [0, {self.n_classes - 1}], "
                f"but values in range [{target.min().item()}, {target.max().item()}] "
                "were found. "
            )
        output = output + _chosen(_through([self.head], input), inside)
        return nn.modules.adaptive._ASMoutput(output.squeeze(0) if alone else output, (-output).mean())

    def log_prob(self, input: Tensor) -> Tensor:
        return self._get_full_log_prob(input, _through([self.head], input))

    def _get_full_log_prob(self, input: Tensor, head_output: Tensor) -> Tensor:
        head = log_softmax(head_output, 1)
        clusters = [
            log_softmax(_through(layers, input), 1) + head[:, self.shortlist_size + i].unsqueeze(1)
            for i, layers in enumerate(self.tail)
        ]
        return torch.cat([head[:, : self.shortlist_size], *clusters], 1)


def _require(input: Tensor, target: Tensor) -> None:
    """Raises as torch does."""
    if target.dim() > 1:
        raise RuntimeError("0D or 1D target tensor expected, multi-target not supported")
    if target.dim() == 1 and input.size(0) != target.size(0):
        raise RuntimeError("Input and target should have the same size in the batch dimension.")
    if input.dim() != target.dim() + 1:
        raise RuntimeError(
            f"{target.dim()}D target tensor expects {target.dim() + 1}D input tensors, "
            f"but found inputs with size {input.size()}"
        )
