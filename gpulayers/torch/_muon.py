"""``torch.optim.Muon``: momentum of all matrices of one shape in one launch, and their products together."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpulayers.kernels import _updates
from gpulayers.ops import optim as ops
from gpulayers.ops._newton_schulz import newton_schulz
from gpulayers.torch._op import is_plain
from gpulayers.torch._updating import _alike, _Launch, _Left, _numbers, _step_groups

_Torchs: Any = getattr(torch.optim, "Muon", torch.optim.Optimizer)  # torch 2.9 has it first


class Muon(_Torchs):
    """``torch.optim.Muon`` over gpulayers' kernels: products of matrices of one shape are torch's batched ones."""

    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. closure: computes the loss anew; its value is returned."""
        own: Any = inspect.unwrap(_Torchs.step)
        if torch.compiler.is_compiling():
            return own(self, closure)
        return _step_groups(self, own, closure)

    def _launches(self, group: dict) -> list:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        momentums: list[Tensor] = []
        self._init_group(group, params, grads, momentums)
        if not all(is_plain(t) for t in (*params, *grads, *momentums)):
            raise _Left("a parameter, gradient or momentum is no plain tensor")
        if group["ns_steps"] >= 100 or len(group["ns_coefficients"]) != 3:
            raise _Left("an error that torch raises")
        n = _numbers(group, "lr", "weight_decay", "momentum")
        rule, numbers = _updates.muon_numbers(n["momentum"], group["nesterov"])
        launches: list[Any] = []
        for at in _alike(params, [tuple(p.shape) for p in params]):
            own = [[a[i] for i in at] for a in (params, grads, momentums)]
            batch = own[0][0].new_zeros((len(at), *own[0][0].shape), dtype=torch.bfloat16)
            gathered = [[*batch], *own[1:], None, None, None, None, None]
            launches.append(_Launch(ops.optimizer_update, gathered, {"rule": rule, "numbers": numbers}))
            launches.append(lambda batch=batch, own=own[0]: self._move(batch, own, group, n))
        return launches

    def _move(self, batch: Tensor, params: list[Tensor], group: dict, n: dict) -> None:
        lr = _updates.muon_rate(n["lr"], group["adjust_lr_fn"], tuple(params[0].shape))
        found = newton_schulz(batch, group["ns_coefficients"], group["ns_steps"], group["eps"]).contiguous()
        options = {"rule": "sgd", "numbers": (lr,), "shrink": 1 - n["lr"] * n["weight_decay"]}
        _Launch(ops.optimizer_update, [params, [*found], *[None] * 6], options)()
