"""``torch.optim``'s optimizers with one update launch over all parameters of a group.

They are torch's own classes with another ``step``: arguments, param groups, hooks, state and state dicts are torch's, so
either loads what the other saved; Lion, LARS and LAMB, which torch has not, have their form. Parameters and state are
written where they lie, DTensors of FSDP2 in their local part (LARS and LAMB, by whole norms, by torch's operations).

Some groups are left to torch's own step, each reason logged once (strict mode raises ``Refused`` instead): ``amsgrad``,
``differentiable``, ``capturable``, what keeps numbers on a GPU (``fused`` AdamW's step there, an ``lr`` that is a CUDA
tensor, GradScaler's numbers for a ``fused`` optimizer: reading them would wait), complex parameters, tensors that are
not plain dense ones (SGD's sparse gradients; AdamW's raise, as torch's do), and whatever torch.compile traces.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import _use_grad_for_differentiable
from torch.optim.sgd import sgd

from gpulayers import dispatch, launch
from gpulayers.definition import RuleError
from gpulayers.ops import optim as ops
from gpulayers.torch._again import Again
from gpulayers.torch._layerwise import LAMB as LAMB
from gpulayers.torch._layerwise import LARS as LARS
from gpulayers.torch._muon import Muon as Muon
from gpulayers.torch._optimizers import Adagrad as Adagrad
from gpulayers.torch._optimizers import Adam as Adam
from gpulayers.torch._optimizers import Adamax as Adamax
from gpulayers.torch._optimizers import Lion as Lion
from gpulayers.torch._optimizers import NAdam as NAdam
from gpulayers.torch._optimizers import RAdam as RAdam
from gpulayers.torch._optimizers import RMSprop as RMSprop
from gpulayers.torch._optimizers import WithMasters, _betas
from gpulayers.torch._optimizers import clip_grad_norm_ as clip_grad_norm_
from gpulayers.torch._optimizers import get_ema_multi_avg_fn as get_ema_multi_avg_fn
from gpulayers.torch._updating import _alike, _check_capture, _Launch, _Left, _loss, _numbers, _scaling, _updated

_sgd: Any = sgd
_adam: Any = adam


class SGD(torch.optim.SGD):
    """``torch.optim.SGD`` over gpulayers' kernels."""

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. closure: computes the loss anew; its value is returned."""
        loss = _loss(closure)
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            momentums: list[Tensor | None] = []
            sparse = self._init_group(group, params, grads, momentums)
            if not _updated(self, lambda: self._launches(group, params, grads, momentums)):  # noqa: B023
                names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize", "foreach", "fused")
                rest = {name: group[name] for name in names}
                _sgd(params, grads, momentums, has_sparse_grad=sparse, **rest, **_scaling(self))
            if group["momentum"] != 0:
                for p, m in zip(params, momentums):
                    self.state[p]["momentum_buffer"] = m
        return loss

    def _launches(self, group: dict, params: list, grads: list, momentums: list) -> list:
        if group["differentiable"]:
            raise _Left("differentiable=True")
        options: dict[str, Any] = _numbers(group, "lr", "momentum", "dampening", "weight_decay")
        options |= dict(nesterov=group["nesterov"], maximize=group["maximize"])
        firsts = [m is None for m in momentums] or [False] * len(params)
        fresh = [torch.zeros_like(p) if m is None else m for p, m in zip(params, momentums)]
        launches: list[Callable[[], Any]] = []
        for at in _alike(params, firsts):
            lists = [[a[i] for i in at] for a in (params, grads, fresh)[: 3 if momentums else 2]]
            launches.append(_Launch(ops.sgd_update, lists, options | {"first": firsts[at[0]]}))
        return [*launches, lambda: operator.setitem(momentums, slice(None), fresh)]  # once they are written


class AdamW(WithMasters, torch.optim.AdamW):
    """``torch.optim.AdamW`` over gpulayers' kernels; master_weights, bf16_stochastic_round: as ``Adam`` here has them."""

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. closure: computes the loss anew; its value is returned."""
        if self.master_weights or self.bf16_stochastic_round:
            return self._ruled_step(closure)
        _check_capture(self)
        loss = _loss(closure)
        for i, group in enumerate(self.param_groups):
            if self._again(i, group):
                continue
            lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
            has_complex = self._init_group(group, *lists)
            if not _updated(self, lambda: self._plain_launches(group, *lists)):  # noqa: B023
                names = ("amsgrad", "lr", "weight_decay", "eps", "maximize", "foreach", "capturable", "differentiable")
                rest = {name: group[name] for name in (*names, "fused", "decoupled_weight_decay")}
                rest |= dict(zip(("beta1", "beta2"), group["betas"]))
                _adam(*lists, has_complex=has_complex, **rest, **_scaling(self))
        return loss

    def _plain_launches(
        self, group: dict, params: list, grads: list, exp_avgs: list, exp_avg_sqs: list, _: list, steps: list
    ) -> list:
        _check_flags(group)
        if not all(s.is_cpu for s in steps):
            raise _Left("the step is on a GPU, and reading it would wait")
        options: dict[str, Any] = _adamw_numbers(group) | {"maximize": group["maximize"]}
        counts = [int(s) + 1 for s in steps]
        launches: list[Any] = []
        for at in _alike(params, counts):
            lists = [[a[i] for i in at] for a in (params, grads, exp_avgs, exp_avg_sqs)]
            launches.append(_Launch(ops.adamw_update, lists, options | {"step": counts[at[0]]}))
        if not launches:
            return []
        counting = [lambda: torch._foreach_add_(steps, 1)]
        if len(launches) == 1:
            lists = [params, grads, exp_avgs, exp_avg_sqs]
            counting.append(lambda: self._remember(group, lists, launches[0].plan))
        return launches + counting

    def _remember(self, group: dict, lists: list, plan: dispatch.Plan) -> None:
        """Once a group's only launch is taped, its next steps can be made by the tape."""
        taped = isinstance(plan.run_forward, launch.Forward) and plan.run_forward.state() == "taped"
        known = self.__dict__.setdefault("_known", {})
        known.pop(at := next(i for i, g in enumerate(self.param_groups) if g is group), None)
        if taped and Again.serves(lists):
            known[at] = Again(self, group, lists[0], ("exp_avg", "exp_avg_sq"), plan)

    def _again(self, at: int, group: dict) -> bool:
        """Make the step of a group as the one before; False where it has to be made anew."""
        known = self.__dict__.get("_known", {}).get(at)
        if known is None or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return False
        if any(t is not None for t in _scaling(self).values()) or group["maximize"] != known.options["maximize"]:
            return False
        try:
            _check_flags(group)
            values = _adamw_numbers(group)
            assert ops.adamw_update.guard is not None
            ops.adamw_update.guard(**values)
        except (_Left, RuleError):
            return False
        return known.step(self, group, values)


def _check_flags(group: dict) -> None:
    for flag in ("amsgrad", "differentiable", "capturable"):
        if group[flag]:
            raise _Left(f"{flag}=True")
    if not group["decoupled_weight_decay"]:
        raise _Left("decoupled_weight_decay=False")


def _adamw_numbers(group: dict) -> dict[str, Any]:
    return {"betas": _betas(group)} | _numbers(group, "lr", "eps", "weight_decay")
