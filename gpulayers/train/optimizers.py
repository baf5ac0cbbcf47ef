"""Optimizers: state and hyperparameters over the update ops; one launch updates all weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpulayers import arrays, transfer
from gpulayers.layers._config import Configurable
from gpulayers.layers._weight import Weight
from gpulayers.ops import optim as ops

Rate = float | Callable[[int], float]


class Optimizer(Configurable):
    """Updates weights from their gradients. ``lr`` is a number, or a function from the step (0, 1, …) to one."""

    lr: Rate
    buffers: tuple[str, ...] = ()
    """Names of the state arrays that each weight has."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls, *args, **kwargs)
        self.steps, self.state = 0, {}
        return self

    def rate(self) -> float:
        """The learning rate of the next step."""
        rate = float(self.lr(self.steps) if callable(self.lr) else self.lr)
        if not rate >= 0:
            raise ValueError(f"{type(self).__name__}: lr: the rule is lr ≥ 0; got {rate}")
        return rate

    def step(self, weights: Mapping[str, Weight], grad_scale: float = 1.0) -> None:
        """Update every weight that has a gradient, in place; gradients are multiplied by ``grad_scale`` first.

        weights: by name, as ``model.named_weights()`` gives them.
        """
        named = {name: w for name, w in weights.items() if w.trainable and w.has_grad}
        for name, w in named.items():
            for buffer in self.buffers:
                if (name, buffer) not in self.state:
                    self.state[name, buffer] = arrays.zeros_like(w.data)
        lr = self.rate()
        self.steps += 1
        if named:
            buffers = [[self.state[name, b] for name in named] for b in self.buffers]
            data, grads = [w.data for w in named.values()], [w.grad for w in named.values()]
            self.update(data, grads, *buffers, lr=lr, grad_scale=grad_scale)
        for w in named.values():
            w.changed()

    def update(self, data: list, grads: list, *buffers: list, lr: float, grad_scale: float) -> None:
        """Write ``data`` and ``buffers`` (one list of arrays for each of ``self.buffers``) in place."""
        raise NotImplementedError(f"{type(self).__name__} must write update(data, grads, *buffers, lr, grad_scale)")

    def state_dict(self) -> dict[str, np.ndarray]:
        """The state on the CPU, by "weight/buffer", and the step count."""
        state = {f"{w}/{b}": transfer.to_numpy(a) for (w, b), a in self.state.items()}
        return state | {"steps": np.array(self.steps)}

    def load_state_dict(self, state: dict[str, np.ndarray], device: str = "cpu") -> None:
        self.steps = int(state["steps"])
        names = [n for n in state if n != "steps"]
        self.state = {tuple(n.rsplit("/", 1)): transfer.to_device(np.array(state[n]), device) for n in names}


class SGD(Optimizer):
    """w ← w − lr · v, v = momentum · v + (1 − dampening) · (g + weight_decay · w). As torch.optim.SGD."""

    def __init__(
        self,
        lr: Rate = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"SGD: nesterov: the rule is momentum > 0 and dampening = 0; got {momentum} and {dampening}"
            )
        self.lr, self.momentum, self.dampening = lr, momentum, dampening
        self.weight_decay, self.nesterov = weight_decay, nesterov
        self.buffers = ("momentum",) if momentum else ()

    def update(self, data: list, grads: list, *buffers: list, lr: float, grad_scale: float) -> None:
        ops.sgd_update(
            data,
            grads,
            *buffers,
            lr=lr,
            momentum=self.momentum,
            dampening=self.dampening,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            first=self.steps == 1,
            grad_scale=grad_scale,
        )


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019). As torch.optim.AdamW."""

    buffers = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        lr: Rate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        self.lr, self.betas, self.eps, self.weight_decay = lr, tuple(betas), eps, weight_decay

    def update(self, data: list, grads: list, *buffers: list, lr: float, grad_scale: float) -> None:
        ops.adamw_update(
            data,
            grads,
            *buffers,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            step=self.steps,
            grad_scale=grad_scale,
        )


BY_NAME = {"sgd": SGD, "adamw": AdamW}


def optimizer(value: Optimizer | str | None) -> Optimizer:
    """An optimizer as it is or by name ("sgd", "adamw"); None is AdamW()."""
    if value is None:
        return AdamW()
    if isinstance(value, str):
        if value.lower() not in BY_NAME:
            raise ValueError(f"optimizer: the rule is one of {', '.join(BY_NAME)} or an Optimizer; got {value!r}")
        return BY_NAME[value.lower()]()
    if not isinstance(value, Optimizer):
        raise TypeError(f"optimizer: the rule is one of {', '.join(BY_NAME)} or an Optimizer; got {value!r}")
    return value
