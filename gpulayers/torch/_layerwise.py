"""LARS and LAMB, which torch has not: each group is updated together, each parameter at a rate of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _use_grad_for_differentiable

from gpulayers.kernels import _updates
from gpulayers.ops import optim as ops
from gpulayers.torch._op import is_plain
from gpulayers.torch._optimizers import Mastered, _betas
from gpulayers.torch._updating import _Left, _loss, _numbers


def _check(name: str, betas: tuple = (), **least: float) -> None:
    if not all(x >= 0 for x in least.values()) or not all(0 <= b < 1 for b in betas):
        rule = f"{', '.join(least)} ≥ 0" + (", 0 ≤ betas < 1" if betas else "")
        raise ValueError(f"{name}: the rule is {rule}; got {', '.join(map(str, (*least.values(), *betas)))}")


def _trust_ratio(w: Tensor, direction: Tensor, trust: tuple) -> Tensor:
    coefficient, most, decay, eps = trust
    length, other = (torch.linalg.vector_norm(x) for x in (w, direction))
    ratio = coefficient * length.clamp(max=most) / (other + decay * length + eps)
    return torch.where((length > 0) & (other > 0), ratio, torch.ones_like(ratio))


class _Plain(torch.optim.Optimizer):
    """By torch's operations: of whatever kernels do not serve, DTensors, whose norms are those of all processes, too."""

    def __init__(self, params: Iterable, defaults: dict[str, Any]):
        super().__init__(params, defaults | {"differentiable": False})

    def _shift(self, group: dict, w: Tensor, g: Tensor, state: dict) -> Tensor:
        """What is taken from w; the state moves."""
        raise NotImplementedError

    def _start(self, p: Tensor) -> dict[str, Tensor]:
        """A parameter's state before its first step."""
        raise NotImplementedError

    def _init_group(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        for p in group["params"]:
            if p.grad is not None:
                if p.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__}: the rule is dense gradients; got a sparse one")
                params.append(p)
                grads.append(p.grad)
                if not self.state[p]:
                    self.state[p].update(self._start(p))

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = _loss(closure)
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            self._init_group(group, params, grads)
            for p, grad in zip(params, grads):
                w, g = (x if x.dtype == torch.float64 else x.float() for x in (p, grad))
                p.copy_(w - self._shift(group, w, -g if group["maximize"] else g, self.state[p]))
        return loss


class _Lars(_Plain):
    def __init__(
        self,
        params: Iterable,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        *,
        maximize: bool = False,
    ):
        given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        given |= {"trust_coefficient": trust_coefficient, "eps": eps}
        _check("LARS", (), **given)
        super().__init__(params, given | {"maximize": maximize})

    def _start(self, p: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(p)}

    def _shift(self, group: dict, w: Tensor, g: Tensor, state: dict) -> Tensor:
        decay, m = group["weight_decay"], state["momentum_buffer"]
        ratio = _trust_ratio(w, g, (group["trust_coefficient"], math.inf, decay, group["eps"]))
        shift = group["momentum"] * m + group["lr"] * ratio * (g + decay * w)
        m.copy_(shift)
        return shift


class _Lamb(_Plain):
    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_weight_norm: float = math.inf,
        *,
        maximize: bool = False,
    ):
        given = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        _check("LAMB", betas, **given, max_weight_norm=max_weight_norm)
        super().__init__(params, given | {"betas": betas, "max_weight_norm": max_weight_norm, "maximize": maximize})

    def _start(self, p: Tensor) -> dict[str, Tensor]:
        return {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def _shift(self, group: dict, w: Tensor, g: Tensor, state: dict) -> Tensor:
        state["step"] += 1
        (b1, b2), t, most = group["betas"], int(state["step"]), group["max_weight_norm"]
        m, v = b1 * state["exp_avg"] + (1 - b1) * g, b2 * state["exp_avg_sq"] + (1 - b2) * g * g
        state["exp_avg"].copy_(m)
        state["exp_avg_sq"].copy_(v)
        d = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + group["eps"]) + group["weight_decay"] * w
        return group["lr"] * _trust_ratio(w, d, (1.0, most, 0.0, 0.0)) * d


class _Layerwise(Mastered):
    def __init__(self, params: Any, *args: Any, master_weights: bool = False, **options: Any):
        super().__init__(params, *args, **options)
        self.master_weights = master_weights

    def _call(self, group: dict, arrays: list[list[Tensor]], rule: str, numbers: Any) -> tuple[Any, list, dict]:
        params, grads = arrays
        if not all(map(is_plain, (*params, *grads))):
            raise _Left("a parameter's norm is that of no plain tensor")
        masters = self._masters(params, group)
        state: list[Any] = [[self.state[p][name] for p in params] for name in self.moments]
        options = numbers | {"rule": rule, "grad_scale": -1.0 if group["maximize"] else 1.0} | _numbers(group, "lr")
        rest = [None] * (2 - len(state))
        return ops.layerwise_update, [params, grads, *state, *rest, masters, None], options


class LARS(_Layerwise, _Lars):
    """Layer-wise adaptive rates (You et al., 2017): each parameter's is lr η ‖p‖ / (‖g‖ + weight_decay ‖p‖ + eps).

    m ← momentum m + rate (g + weight_decay p);  p ← p − m. η is ``trust_coefficient``; where ‖p‖ or ‖g‖ is 0, the rate
    is lr. master_weights: 16-bit parameters are rounded copies of float32 ones, which the state keeps as "master_param".
    """

    moments = ("momentum_buffer",)

    def numbers(self, group: dict, step: int, state: dict) -> tuple[str, Any]:
        return _updates.lars_numbers(**_numbers(group, "momentum", "weight_decay", "trust_coefficient", "eps"))


class LAMB(_Layerwise, _Lamb):
    """Adam with layer-wise rates for large batches (You et al., 2020).

    r = m̂ / (√v̂ + eps) + weight_decay p, with Adam's corrected m̂ and v̂;  p ← p − lr min(‖p‖, max_weight_norm) / ‖r‖ r,
    or lr r where ‖p‖ or ‖r‖ is 0. master_weights: as LARS here has them.
    """

    moments = ("exp_avg", "exp_avg_sq")

    def numbers(self, group: dict, step: int, state: dict) -> tuple[str, Any]:
        return _updates.lamb_numbers(step, _betas(group), **_numbers(group, "eps", "weight_decay", "max_weight_norm"))
