"""Muon for the matrices inside a network, AdamW for all other weights."""

from __future__ import annotations

from typing import Any

from gpulayers import arrays
from gpulayers.arrays import Spec
from gpulayers.kernels import _updates
from gpulayers.layers._weight import Weight
from gpulayers.ops import optim as ops
from gpulayers.ops._newton_schulz import COEFFICIENTS, newton_schulz
from gpulayers.train.optimizers import ByRule, Rate


class Muon(ByRule):
    """Momentum whose matrices are made orthogonal (Jordan et al. 2024). As torch.optim.Muon, with AdamW for the rest.

    Matrices, weights of two axes, go by Muon; all others, and those whose names begin with one of ``others`` (an
    embedding's table, the head: ("0.", "14.")), go by AdamW with ``betas``, ``adamw_eps`` and lr · ``adamw_lr``.
    adjust_lr_fn: "match_rms_adamw" takes steps as large as AdamW's, so that one lr serves both; "original", or None,
    is √max(1, rows / columns), which wants a larger one: 0.02, with adamw_lr 0.1 or so.
    """

    decoupled = True
    buffers = ("momentum_buffer", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        lr: Rate = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        others: tuple[str, ...] = (),
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_lr: float = 1.0,
    ):
        if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
            raise ValueError(f"Muon: adjust_lr_fn: the rule is original or match_rms_adamw; got {adjust_lr_fn!r}")
        self.lr, self.weight_decay, self.momentum, self.nesterov = lr, weight_decay, momentum, nesterov
        self.ns_coefficients, self.eps, self.ns_steps = tuple(ns_coefficients), eps, ns_steps
        self.adjust_lr_fn, self.others = adjust_lr_fn, tuple(others)
        self.betas, self.adamw_eps, self.adamw_lr = tuple(betas), adamw_eps, adamw_lr

    def buffers_of(self, name: str, weight: Weight) -> tuple[str, ...]:
        inside = len(weight.shape) == 2 and not name.startswith(self.others)
        return self.buffers[:1] if inside else self.buffers[1:]

    def numbers(self, step: int, lr: float) -> tuple[str, tuple]:
        return _updates.adam_numbers(step, lr, self.betas, self.adamw_eps)

    def update(
        self, data: list, grads: list, *buffers: list, lr: float, step: int, grad_scale: float, scale: Any = None
    ) -> None:
        if len(buffers) == 2:
            given = {"step": step, "grad_scale": grad_scale, "scale": scale}
            return super().update(data, grads, *buffers, lr=lr * self.adamw_lr, **given)
        shapes: dict[tuple, list[int]] = {}
        for i, w in enumerate(data):
            shapes.setdefault(tuple(w.shape), []).append(i)
        for at in shapes.values():
            own = ([a[i] for i in at] for a in (data, grads, buffers[0]))
            self._move(*own, lr=lr, grad_scale=grad_scale, scale=scale)

    def _move(self, data: list, grads: list, momentums: list, *, lr: float, grad_scale: float, scale: Any) -> None:
        """One step of matrices of one shape."""
        lib, shape = arrays.library(data[0]), tuple(data[0].shape)
        batch = lib.empty(Spec((len(data), *shape), arrays.float32), lib.device(data[0]))
        batch[...] = 0
        rule, numbers = _updates.muon_numbers(self.momentum, self.nesterov)
        inputs: tuple[Any, ...] = ([*batch], grads, momentums, None, None, None, scale, None)
        ops.optimizer_update(*inputs, rule=rule, numbers=numbers, grad_scale=grad_scale)
        found = newton_schulz(batch, self.ns_coefficients, self.ns_steps, self.eps)
        kept = None if scale is None else scale * 0 + 1  # not finite where it was not
        rate = _updates.muon_rate(lr, self.adjust_lr_fn, shape)
        inputs = (data, [*found], None, None, None, None, kept, None)
        ops.optimizer_update(*inputs, rule="sgd", numbers=(rate,), shrink=1 - lr * self.weight_decay)
