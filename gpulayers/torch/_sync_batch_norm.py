"""``torch.nn.SyncBatchNorm``: batch norm by the statistics of all processes' parts of a batch.

Each takes the moments of its part, all hear of all, and the norm is that by known statistics, in one pass. Backward sums
dy and dy x̂ over its part, all add those up, and what they take off dx is one pass more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from gpulayers import dispatch
from gpulayers.ops import norm as ops
from gpulayers.torch._batch_norm import _BatchNorm, batch_norm


def _gathered(part: Tensor, group: Any) -> Tensor:
    """(processes, *part.shape)."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part, group)
    return torch.stack(parts)


class _Synchronised(torch.autograd.Function):
    """(x, weight, bias, eps, group) → y, mean, var (the biased one), count of all parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, eps: float, group: Any) -> tuple[Tensor, ...]:
        mean, var = ops.batch_moments(x)
        count = mean.new_full((1,), x.numel() // x.shape[1])
        means, spreads, counts = _gathered(torch.cat([mean, var, count]), group).split([len(mean), len(mean), 1], 1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        var = ((spreads + (means - mean).square()) * counts).sum(0) / total
        w = mean.new_ones(len(mean)) if weight is None else weight  # its gradient is a sum that dx takes
        b = torch.zeros_like(w) if bias is None else bias
        needs = "x", "weight", "bias"
        y, call = ops.batch_norm.record(x, w, b, mean, var, None, training=False, eps=eps, needs=needs)
        ctx.save_for_backward(weight, bias, mean, var, total, *call.saved.values())
        ctx.plan, ctx.values, ctx.names = call.plan, call.values, tuple(call.saved)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, var, total)
        return y, mean, var, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple:
        weight, bias, mean, var, total, *rest = ctx.saved_tensors
        saved = dict(zip(ctx.names, rest))
        dx, dweight, dbias = dispatch.Call(ctx.plan, saved, ctx.values).backward(dy)[:3]
        off = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([dbias.to(mean.dtype), dweight.to(mean.dtype)])
            dist.all_reduce(sums, group=ctx.group)
            rstd = (var + ctx.eps).rsqrt()
            scale = saved["weight"].to(mean.dtype) * rstd / total
            # dx − w rstd (Σ dy + x̂ Σ dy x̂) / n, which is a norm of x by mean and var, and a sum.
            off = batch_norm(
                saved["x"], mean, var, -scale * sums[1], -scale * sums[0], False, 0.0, ctx.eps, residual=dx
            )
        given = (None if p is None else g.to(p.dtype) for p, g in ((weight, dweight), (bias, dbias)))
        return off, *given, None, None


class SyncBatchNorm(nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm`` over gpulayers' kernels, on a CPU too."""

    counted = _BatchNorm.counted

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return self._alone(input)
        group = self.process_group or dist.group.WORLD
        if dist.get_world_size(group) < 2:
            return self._alone(input)
        weight, bias, running_mean, running_var, _, momentum = self.counted()
        y, mean, var, count = _Synchronised.apply(input, weight, bias, self.eps, group)
        if running_mean is not None:
            with torch.no_grad():
                unbiased = var * (count / (count - 1).clamp(min=1))
                for running, found in ((running_mean, mean), (running_var, unbiased)):
                    running.lerp_(found.to(running.dtype), momentum)
        return y

    def _alone(self, input: Tensor) -> Tensor:
        weight, bias, mean, var, by_batch, momentum = self.counted()
        return batch_norm(input, mean, var, weight, bias, by_batch, momentum, self.eps)
