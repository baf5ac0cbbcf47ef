"""An op whose input others read, too, as a residual block's: it gives that on, and adds what comes back for it where its own
kernel writes the gradient. Autograd would add the two in a pass of its own, over three of a model's largest arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpulayers.torch._op import TorchOp, _compute, applying, function


class Joined(TorchOp):
    """(*args) → (what ``of`` gives, its first input, for all others that read it): where autograd records a call for that
    input, else the op's output alone. The op must ``join`` the gradients of its first input, and have one output."""

    def __init__(self, of: TorchOp):
        assert of.op.joins == of.op.inputs[0]
        vars(self).update(vars(of), _known={}, _latest={})
        self._of = of
        self._apply = applying(_joining(self))

    def gradients(
        self, dys: Sequence[Any], saved: dict[str, Any], plan: Any, options: Sequence[Any], needs: tuple
    ) -> list:
        dx, *others = self._of.gradients(dys[:1], saved, plan, options, needs)
        return [dx if dx is None or len(dys) == 1 else dx + dys[1], *others]


def _joining(of: TorchOp) -> type[torch.autograd.Function]:
    plain: Any = function(of, _compute)

    def forward(ctx: Any, call: tuple, *ins: Any) -> tuple[Tensor, Tensor]:
        return plain.forward(ctx, call, *ins), ins[0]

    def backward(ctx: Any, dy: Any, other: Any) -> tuple:
        if dy is None:
            return None, other, *(None,) * (of.n - 1)
        return plain.backward(ctx, dy) if other is None else plain.backward(ctx, dy, other)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(of.name, (torch.autograd.Function,), members)
