"""A gradient has its input's memory layout: whoever made that input reads and writes it so.

Some kernels work on rows and give row-major gradients whatever the layout of x (``Rule.grads``). What comes out of them
is put in order here, in one pass, where x is dense in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpulayers.arrays import Spec
from gpulayers.dispatch import Plan

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""By the rank of what convolutions take."""


def as_weight(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` in channels-last memory where a convolution's weight is, as torch takes it: itself, or a copy."""
    if not isinstance(weight, Tensor) or weight.dim() not in CHANNELS_LAST or x.dim() != weight.dim():
        return x
    channels, strides = weight.shape[1], weight.stride()
    if channels == 1 or strides[1] != 1 or strides[-1] != channels:
        return x
    return x.contiguous(memory_format=CHANNELS_LAST[x.dim()])


def in_layout(plan: Plan) -> Plan:
    """``plan`` with gradients in their inputs' layouts; itself where they are so already, as they mostly are."""
    others = plan.rule.grads or {}
    wanted = [
        (i, spec.like())
        for i, (name, spec) in enumerate(zip(plan.op.inputs, plan.inputs))
        if name in others and name in plan.needs and others[name].order != spec.like().order
    ]
    if not wanted:
        return plan
    run = plan.run_backward

    def run_backward(*args: Any, **values: Any) -> tuple:
        grads = list(run(*args, **values))
        for i, like in wanted:
            grads[i] = laid(grads[i], like)
        return tuple(grads)

    return plan._replace(run_backward=run_backward)


def laid(g: Tensor | None, like: Spec) -> Tensor | None:
    """``g`` with the strides of a dense ``like``: itself, or a copy."""
    strides = like.strides
    if g is None or all(n == 1 or a == b for n, a, b in zip(g.shape, g.stride(), strides)):
        return g
    return g.new_empty_strided(g.shape, strides).copy_(g)
