"""``torch.optim``'s classes whose rule is in the table of updates; each group is one launch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import _use_grad_for_differentiable

from gpulayers import dispatch
from gpulayers.definition import RuleError
from gpulayers.kernels import _updates
from gpulayers.ops import optim as ops
from gpulayers.torch._op import _PLAIN
from gpulayers.torch._updating import _alike, _check_capture, _Launch, _Left, _loss, _numbers, _step_groups

_HALVES = torch.float16, torch.bfloat16


class _Ruled(torch.optim.Optimizer):
    """A class of torch's with another ``step``. It leaves to torch's own what ``gpulayers.torch.optim`` says."""

    param_groups: list[dict[str, Any]]
    moments: ClassVar[tuple[str, ...]]
    """The names of a parameter's state, in the order of the rule's formula."""
    master_weights = bf16_stochastic_round = False

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. closure: computes the loss anew; its value is returned."""
        return self._ruled_step(closure)

    def numbers(self, group: dict, step: int, state: dict) -> tuple[str, tuple]:
        """(rule, numbers) of a parameter's step (1, 2, …)."""
        raise NotImplementedError

    def _moments(self, group: dict) -> tuple[str, ...]:
        return self.moments

    def _ruled_step(self, closure: Callable[[], Any] | None) -> Any:
        own: Any = inspect.unwrap(_torchs(self).step)
        must = next((n for n in ("master_weights", "bf16_stochastic_round") if getattr(self, n)), "")
        if torch.compiler.is_compiling() and not must:
            return own(self, closure)
        _check_capture(self)
        return _step_groups(self, own, closure, must)

    def _launches(self, group: dict) -> list:
        for flag in ("amsgrad", "differentiable", "capturable"):
            if group.get(flag):
                raise _Left(f"{flag}=True")
        kind: Any = type(self)
        lists: list[list[Tensor]] = [[] for _ in range(_count_lists(kind))]
        self._init_group(group, *lists)  # type: ignore[attr-defined]
        params, grads = lists[:2]
        states = [self.state[p] for p in params]
        counted = [s["step"] for s in states if "step" in s]
        if not all(s.is_cpu for s in counted):
            raise _Left("the step is on a GPU, and reading it would wait")
        counts = [int(s["step"]) + 1 if "step" in s else 1 for s in states]
        marks = [(c, float(s.get("mu_product", 1.0))) for c, s in zip(counts, states)]
        launches: list[Any] = []
        for at in _alike(params, marks):
            first = at[0]
            rule, numbers = self.numbers(group, counts[first], states[first])
            arrays = [[a[i] for i in at] for a in (params, grads)]
            launches.append(_Launch(*self._call(group, arrays, rule, numbers)))
        if counted:
            launches.append(lambda: torch._foreach_add_(counted, 1))
        return launches

    def _masters(self, params: list[Tensor], group: dict) -> list[Tensor] | None:
        return None

    def _call(self, group: dict, arrays: list[list[Tensor]], rule: str, numbers: tuple) -> tuple[Any, list, dict]:
        """(op, its inputs, its options) of one launch."""
        params, grads = arrays
        masters = self._masters(params, group)
        state: list[Any] = [[self.state[p][name] for p in params] for name in self._moments(group)]
        seed = None
        if self.bf16_stochastic_round and params[0].dtype == torch.bfloat16:
            seed = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=params[0].device)
        decay = _numbers(group, "weight_decay", "lr")
        decoupled = group.get("decoupled_weight_decay", False)
        options = {
            "rule": rule,
            "numbers": numbers,
            "l2": 0.0 if decoupled else decay["weight_decay"],
            "shrink": 1 - decay["lr"] * decay["weight_decay"] if decoupled else 1.0,
            "grad_scale": -1.0 if group.get("maximize") else 1.0,
        }
        rest = [None] * (3 - len(state))
        return ops.optimizer_update, [params, grads, *state, *rest, masters, None, seed], options


@functools.cache
def _count_lists(kind: Any) -> int:
    """How many lists ``_init_group`` fills: all that it takes but the optimizer and the group."""
    return len(inspect.signature(kind._init_group).parameters) - 2


def _torchs(optimizer: Any) -> Any:
    """The class that a drop-in stands for."""
    return next(c for c in type(optimizer).__mro__ if "step" in vars(c) and not issubclass(c, _Ruled))


def _betas(group: dict) -> tuple[float, float]:
    found = _numbers(dict(enumerate(group["betas"])), 0, 1)
    return found[0], found[1]


class Mastered(_Ruled):
    """What ``master_weights`` adds to the state."""

    def _masters(self, params: list[Tensor], group: dict) -> list[Tensor] | None:
        """The float32 copies of 16-bit parameters, whose moments are float32, too."""
        if not self.master_weights or params[0].dtype not in _HALVES:
            return None
        for p in params:
            state = self.state[p]
            if (
                "master_param" not in state or state["master_param"].dtype != torch.float32
            ):  # rounded by torch's loading
                state["master_param"] = p.detach().to(torch.float32, copy=True)
            for name in self._moments(group):
                state[name] = state[name].float()
        return [self.state[p]["master_param"] for p in params]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which rounds state to the parameters' dtype: float32 state of 16-bit parameters stays so."""
        super().load_state_dict(state_dict)
        if not self.master_weights:
            for state in self.state.values():
                state.pop("master_param", None)
            return
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, (p for group in self.param_groups for p in group["params"])):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor) and value.dtype == torch.float32 and p.dtype in _HALVES and name != "step":
                    self.state[p][name] = value.to(p.device, copy=True)


class WithMasters(Mastered):
    """Adam's rule, and what it does with 16-bit parameters.

    master_weights: they are rounded copies of float32 ones, which the state keeps as "master_param" beside float32
    moments; a checkpoint has them, and one without them is loaded, too. bf16_stochastic_round: bfloat16 parameters are
    rounded up or down by chance (Philox, seeded by torch's generator), so that small updates are kept on average.
    """

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self, params: Any, *args: Any, master_weights: bool = False, bf16_stochastic_round: bool = False, **options: Any
    ):
        if master_weights and bf16_stochastic_round:
            raise ValueError("master_weights and bf16_stochastic_round cannot be True at the same time")
        for name, value in (("master_weights", master_weights), ("bf16_stochastic_round", bf16_stochastic_round)):
            if value and any(options.get(flag) for flag in ("amsgrad", "capturable", "differentiable", "fused")):
                raise ValueError(f"{name} does not support amsgrad, capturable, differentiable and fused")
        super().__init__(params, *args, **options)
        self.master_weights, self.bf16_stochastic_round = master_weights, bf16_stochastic_round

    def numbers(self, group: dict, step: int, state: dict) -> tuple[str, tuple]:
        return _updates.adam_numbers(step, betas=_betas(group), **_numbers(group, "lr", "eps"))


class Adam(WithMasters, torch.optim.Adam):
    __doc__ = f"""``torch.optim.Adam`` over gpulayers' kernels. {WithMasters.__doc__}"""


class NAdam(_Ruled, torch.optim.NAdam):
    """``torch.optim.NAdam`` over gpulayers' kernels."""

    moments = ("exp_avg", "exp_avg_sq")

    def numbers(self, group: dict, step: int, state: dict) -> tuple[str, tuple]:
        given = _numbers(group, "lr", "eps", "momentum_decay")
        betas = _betas(group)
        product = state["mu_product"] * _updates.nadam_momentum(
            step, betas[0], given["momentum_decay"]
        )  # its rounding is torch's
        return _updates.nadam_numbers(step, betas=betas, product=float(product), **given)

    def _launches(self, group: dict) -> list:
        launches = super()._launches(group)
        beta1, decay = group["betas"][0], group["momentum_decay"]
        moved = [self.state[p] for p in group["params"] if p.grad is not None]

        def count() -> None:
            for state in moved:  # counted already
                state["mu_product"] *= _updates.nadam_momentum(int(state["step"]), beta1, decay)

        return [*launches, count]


class RAdam(_Ruled, torch.optim.RAdam):
    """``torch.optim.RAdam`` over gpulayers' kernels."""

    moments = ("exp_avg", "exp_avg_sq")

    def numbers(self, group: dict, step: int, state: dict) -> tuple[str, tuple]:
        return _updates.radam_numbers(step, betas=_betas(group), **_numbers(group, "lr", "eps"))


class Adamax(_Ruled, torch.optim.Adamax):
    """``torch.optim.Adamax`` over gpulayers' kernels."""

    moments = ("exp_avg", "exp_inf")

    def numbers(self, group: dict, step: int, state: dict) -> tuple[str, tuple]:
        return _updates.adamax_numbers(step, betas=_betas(group), **_numbers(group, "lr", "eps"))


class Adagrad(_Ruled, torch.optim.Adagrad):
    """``torch.optim.Adagrad`` over gpulayers' kernels."""

    moments = ("sum",)

    def numbers(self, group: dict, step: int, state: dict) -> tuple[str, tuple]:
        return _updates.adagrad_numbers(step, **_numbers(group, "lr", "lr_decay", "eps"))


class RMSprop(_Ruled, torch.optim.RMSprop):
    """``torch.optim.RMSprop`` over gpulayers' kernels."""

    def _moments(self, group: dict) -> tuple[str, ...]:
        return (
            ("square_avg",) + ("grad_avg",) * bool(group["centered"]) + ("momentum_buffer",) * (group["momentum"] > 0)
        )

    def numbers(self, group: dict, step: int, state: dict) -> tuple[str, tuple]:
        given = _numbers(group, "lr", "alpha", "eps", "momentum")
        return _updates.rmsprop_numbers(centered=group["centered"], **given)


class _Lion(torch.optim.Optimizer):
    """Lion by torch's operations."""

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ):
        if not lr >= 0 or not weight_decay >= 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(
                f"Lion: the rule is lr, weight_decay ≥ 0, 0 ≤ betas < 1; got {lr}, {weight_decay}, {betas}"
            )
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults | {"decoupled_weight_decay": True, "differentiable": False})

    def _init_group(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        for p in group["params"]:
            if p.grad is not None:
                params.append(p)
                grads.append(p.grad)
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = _loss(closure)
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            self._init_group(group, params, grads)
            (b1, b2), lr = group["betas"], group["lr"]
            for p, grad in zip(params, grads):
                g, m = -grad if group["maximize"] else grad, self.state[p]["exp_avg"]
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * (b1 * m + (1 - b1) * g).sign_())
                m.mul_(b2).add_(g, alpha=1 - b2)
        return loss


class Lion(_Ruled, _Lion):
    """Lion (Chen et al., 2023): p ← p (1 − lr weight_decay) − lr sign(β₁ m + (1 − β₁) g);  m ← β₂ m + (1 − β₂) g."""

    moments = ("exp_avg",)

    def numbers(self, group: dict, step: int, state: dict) -> tuple[str, tuple]:
        return _updates.lion_numbers(betas=_betas(group), **_numbers(group, "lr"))


def get_ema_multi_avg_fn(decay: float = 0.999) -> Callable:
    """As ``torch.optim.swa_utils.get_ema_multi_avg_fn``, one launch for each dtype: ``multi_avg_fn`` of AveragedModel."""
    if decay < 0.0 or decay > 1.0:
        raise ValueError(f"Invalid decay value {decay} provided. Please provide a value in [0,1] range.")
    torchs = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], num_averaged: Any) -> None:
        try:
            launches = [
                _Launch(ops.optimizer_update, [[a[i] for i in at] for a in (averaged, current)], options)
                for at in _alike(averaged, [0] * len(averaged))
            ]
        except _Left:
            torchs(averaged, current, num_averaged)
            return
        for each in launches:
            each()

    options = {"rule": "sgd", "numbers": (1 - decay,), "l2": 1.0, "grad_scale": -1.0}  # a − (1 − decay) (a − p)
    return update


@torch.no_grad()
def clip_grad_norm_(
    parameters: Any,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """As ``torch.nn.utils.clip_grad_norm_``: the norm takes two launches for all gradients of one dtype, in a fixed order,
    and nothing waits. Other norms, and gradients that are no plain tensors of one device, are torch's.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    served = grads and norm_type == 2 and max_norm > 0 and not error_if_nonfinite and not torch.compiler.is_compiling()
    try:
        if not served or len({(g.device, g.dtype) for g in grads}) > 1:
            raise _Left("another norm, or several devices or dtypes")
        if any(type(g) not in _PLAIN for g in grads):
            raise _Left("a gradient is spread over processes")
        launch = _Launch(ops.grad_norm, [grads], {"max_norm": float(max_norm)})
    except (_Left, RuleError, dispatch.Refused):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    (norm, _), _ = launch.plan.run_forward(*launch.local, **launch.values)
    torch._foreach_mul_(grads, torch.clamp(max_norm / (norm[0] + 1e-6), max=1.0))
    return norm[0].to(grads[0].dtype)
