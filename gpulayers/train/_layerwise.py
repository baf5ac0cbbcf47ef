"""LARS and LAMB: each weight at a rate of its own, by its norm and that of its update."""

from __future__ import annotations

import math
from typing import Any

from gpulayers.kernels import _updates
from gpulayers.ops import optim as ops
from gpulayers.train.optimizers import Adam, Optimizer, Rate


class LARS(Optimizer):
    """Layer-wise adaptive rates (You et al. 2017): each weight's is lr η ‖w‖ / (‖g‖ + weight_decay ‖w‖ + eps).

    v ← momentum v + rate (g + weight_decay w);  w ← w − v. η is ``trust_coefficient``; where ‖w‖ or ‖g‖ is 0, the rate is lr.
    """

    takes_scale = True
    buffers = ("momentum_buffer",)

    def __init__(
        self,
        lr: Rate = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
    ):
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.trust_coefficient, self.eps = trust_coefficient, eps

    def phase(self, step: int) -> int:
        return 1

    def update(
        self, data: list, grads: list, *buffers: list, lr: float, step: int, grad_scale: float, scale: Any = None
    ) -> None:
        rule, options = _updates.lars_numbers(self.momentum, self.weight_decay, self.trust_coefficient, self.eps)
        inputs = (data, grads, *buffers, None, None, scale)
        ops.layerwise_update(*inputs, rule=rule, lr=lr, grad_scale=grad_scale, **options)


class LAMB(Adam):
    """Adam with layer-wise rates for large batches (You et al. 2020).

    r = m̂ / (√v̂ + eps) + weight_decay w, with Adam's corrected m̂ and v̂;  w ← w − lr min(‖w‖, max_weight_norm) / ‖r‖ r, or
    lr r where ‖w‖ or ‖r‖ is 0. master_weights: as ``Adam`` has them.
    """

    def __init__(
        self,
        lr: Rate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_weight_norm: float = math.inf,
        master_weights: bool = False,
    ):
        super().__init__(lr, betas, eps, weight_decay, master_weights)
        self.max_weight_norm = max_weight_norm

    def update(
        self, data: list, grads: list, *buffers: list, lr: float, step: int, grad_scale: float, scale: Any = None
    ) -> None:
        rule, options = _updates.lamb_numbers(step, self.betas, self.eps, self.weight_decay, self.max_weight_norm)
        inputs = (data, grads, *buffers, *[None] * (3 - len(buffers)), scale)
        ops.layerwise_update(*inputs, rule=rule, lr=lr, grad_scale=grad_scale, **options)
