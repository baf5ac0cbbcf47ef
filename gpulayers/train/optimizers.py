"""Optimizers: state and hyperparameters over the update ops; one launch updates all weights that are at one step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from gpulayers import arrays, random, transfer
from gpulayers.kernels import _updates
from gpulayers.layers._config import Configurable, to_config
from gpulayers.layers._weight import Weight
from gpulayers.ops import optim as ops

Rate = float | Callable[[int], float]


class Optimizer(Configurable):
    """Updates weights from their gradients. ``lr`` is a number, or a function from the step (0, 1, …) to one.

    steps: those it has made. counts: those of each weight by name, fewer where it was frozen or had no gradient.
    """

    lr: Rate
    buffers: tuple[str, ...] = ()
    """Names of the state arrays that each weight has."""
    takes_scale = False
    """Whether ``update`` takes ``scale``, too."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls, *args, **kwargs)
        self.steps, self.counts, self.state, self._of = 0, {}, {}, {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_of": {}}  # a copy serves copies of the weights

    def rate(self) -> float:
        """The learning rate of the next step."""
        rate = float(self.lr(self.steps) if callable(self.lr) else self.lr)
        if not rate >= 0:
            raise ValueError(f"{type(self).__name__}: lr: the rule is lr ≥ 0; got {rate}")
        return rate

    def step(self, weights: Mapping[str, Weight], grad_scale: float = 1.0, scale: Any = None) -> None:
        """Update every weight that has a gradient, in place; gradients are multiplied by ``grad_scale`` first.

        weights: by name, as ``model.named_weights()`` gives them. scale: one float32 beside the weights that multiplies
        gradients, too, for those that take it (``takes_scale``); where it is not finite, no weight and no state moves.
        Raises ValueError for weights of another model.
        """
        named = {name: w for name, w in weights.items() if w.trainable and w.has_grad}
        self._require_same(named)
        lr = self.rate()
        given = {} if scale is None else {"scale": scale}
        groups: dict[tuple, list[str]] = {}
        for name, w in named.items():
            buffers = self.buffers_of(name, w)
            fresh = [b for b in buffers if (name, b) not in self.state]
            self.state.update({(name, b): self.start(b, w.data) for b in fresh})
            if fresh or name not in self.counts:
                self.counts[name] = 0
            if name not in self._of:
                self._of[name] = weakref.ref(w)
            groups.setdefault((self.phase(self.counts[name] + 1), buffers), []).append(name)
        for (phase, buffers), names in groups.items():
            data, grads = [named[n].data for n in names], [named[n].grad for n in names]
            state = [[self.state[n, b] for n in names] for b in buffers]
            self.update(data, grads, *state, lr=lr, step=phase, grad_scale=grad_scale, **given)
            for n in names:
                self.counts[n] += 1
        self.steps += 1

    def buffers_of(self, name: str, weight: Weight) -> tuple[str, ...]:
        """Those of ``buffers`` that this weight has; weights that agree in it share one launch."""
        return self.buffers

    def start(self, buffer: str, data: Any) -> Any:
        """A buffer of a weight before its first step."""
        return arrays.zeros_like(data)

    def assigned(self, name: str, weight: Weight) -> None:
        """The weight has another value than the last step gave it: by its constraint, for one."""

    def phase(self, step: int) -> int:
        """What ``update`` must know of a weight's step (1, 2, …); weights that agree in it share one launch."""
        return step

    def update(self, data: list, grads: list, *buffers: list, lr: float, step: int, grad_scale: float) -> None:
        """Write ``data`` and ``buffers`` (one list of arrays for each of ``self.buffers``), which are at ``step``."""
        raise NotImplementedError(
            f"{type(self).__name__} must write update(data, grads, *buffers, lr, step, grad_scale)"
        )

    # --- state -------------------------------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """The arguments of ``__init__`` as they are now, in JSON; None in place of a function."""
        found: dict[str, Any] = {}
        for name in list(self._arguments.signature.parameters)[1:]:
            if hasattr(self, name):
                try:
                    found[name] = to_config(getattr(self, name), type(self).__name__)
                except TypeError:
                    found[name] = None
        return found

    def state_dict(self) -> dict[str, Any]:
        """{"algorithm", "buffers", "options", "steps", "counts", "arrays": {"weight/buffer": on the CPU}}.

        All but the arrays are JSON values.
        """
        return {
            "algorithm": type(self).__name__,
            "buffers": list(self.buffers),
            "options": self.options(),
            "steps": self.steps,
            "counts": dict(self.counts),
            "arrays": {f"{w}/{b}": np.array(transfer.to_numpy(a)) for (w, b), a in self.state.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Weight]) -> None:
        """Go on from ``state``, its options (lr, …) included, with the weights that it belongs to.

        Raises ValueError before anything is changed, as ``require_state`` does.
        """
        self.require_state(state, weights)
        for name, value in state["options"].items():
            if value is not None:
                setattr(self, name, tuple(value) if isinstance(value, list) else value)
        self.steps, self.counts = int(state["steps"]), {n: int(c) for n, c in state["counts"].items()}
        self._of = {n: weakref.ref(weights[n]) for n in self.counts}
        self.state = {}
        for key, a in state["arrays"].items():
            name, buffer = key.rsplit("/", 1)
            device = arrays.library(weights[name].data).device(weights[name].data)
            self.state[name, buffer] = transfer.to_device(np.array(a), device)

    def require_state(self, state: Mapping[str, Any], weights: Mapping[str, Weight]) -> None:
        """Raises ValueError, which names the difference, unless ``state`` is of this algorithm and of these weights."""
        who, keys = type(self).__name__, {"algorithm", "buffers", "options", "steps", "counts", "arrays"}
        if lacks := sorted(keys - state.keys()):
            raise ValueError(f"{who}: state: the rule is what state_dict() gives; it lacks {', '.join(lacks)}")
        mine = f"{who} with the state {list(self.buffers)}"
        if mine != (came := f"{state['algorithm']} with the state {list(state['buffers'])}"):
            raise ValueError(f"{who}: the rule is the same optimizer, {mine}; the state is that of {came}")
        for name, value in self.options().items():
            if (value is None) != (state["options"].get(name, value) is None):
                rule, came = ("a function" if v is None else "a value" for v in (state["options"][name], value))
                raise ValueError(f"{who}: {name}: the rule is {rule}, as where the state comes from; got {came}")
        if unknown := sorted(state["counts"].keys() - weights.keys()):
            raise ValueError(f"{who}: the rule is the state of {_some(weights)}; it is that of {_some(unknown)}")
        shapes = {n: (weights[n.rsplit("/", 1)[0]].shape, a.shape) for n, a in state["arrays"].items()}
        if wrong := [f"{n}: {list(w)} ← {list(a)}" for n, (w, a) in shapes.items() if w != a]:
            raise ValueError(f"{who}: the rule is state of the weights' shapes; got {'; '.join(wrong)}")

    def attach(self, weights: Mapping[str, Weight]) -> None:
        """Go on with ``weights``, and forget the state of those that are gone.

        Raises ValueError if the state that it has is another model's.
        """
        if self.counts and not self.counts.keys() & weights.keys():
            self._refuse(self.counts)
        self._require_same(weights)
        for name in self.counts.keys() - weights.keys():
            del self.counts[name]
            self._of.pop(name, None)
        self.state = {key: a for key, a in self.state.items() if key[0] in weights}

    def _require_same(self, weights: Mapping[str, Weight]) -> None:
        others = [n for n, w in weights.items() if n in self._of and self._of[n]() is not w]
        if others:
            self._refuse(others)

    def _refuse(self, names: Iterable[str]) -> None:
        who = type(self).__name__
        raise ValueError(
            f"{who}: the rule is an optimizer for each model; it has the state of another's {_some(names)}"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class ByRule(Optimizer):
    """An optimizer whose rule is in the table of updates."""

    takes_scale = True
    decoupled = False
    """Whether weight decay shrinks the weights, rather than be a part of the gradient."""
    weight_decay: float = 0.0
    stochastic_rounding = False

    def numbers(self, step: int, lr: float) -> tuple[str, tuple]:
        """(rule, numbers) of a weight's step (1, 2, …)."""
        raise NotImplementedError

    def update(
        self, data: list, grads: list, *buffers: list, lr: float, step: int, grad_scale: float, scale: Any = None
    ) -> None:
        rule, numbers = self.numbers(step, lr)
        count = _updates.UPDATES[rule].states
        state, masters = buffers[:count], buffers[count] if len(buffers) > count else None
        seed = transfer.beside(random.draw(), data[0]) if self.stochastic_rounding else None
        inputs = (data, grads, *state, *[None] * (3 - count), masters, scale, seed)
        decay = {"shrink": 1 - lr * self.weight_decay} if self.decoupled else {"l2": self.weight_decay}
        ops.optimizer_update(*inputs, rule=rule, numbers=numbers, grad_scale=grad_scale, **decay)


class SGD(ByRule):
    """w ← w − lr · v, v = momentum · v + (1 − dampening) · (g + weight_decay · w). As torch.optim.SGD.

    A weight's first v is g + weight_decay · w, whenever its first gradient comes.
    """

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

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("momentum",) if self.momentum else ()

    def phase(self, step: int) -> int:
        """The first step with momentum differs from the others."""
        return min(step, 2) if self.momentum else 2

    def numbers(self, step: int, lr: float) -> tuple[str, tuple]:
        return _updates.sgd_numbers(lr, self.momentum, self.dampening, self.nesterov, step == 1)

    def update(
        self, data: list, grads: list, *buffers: list, lr: float, step: int, grad_scale: float, scale: Any = None
    ) -> None:
        if scale is not None:
            return super().update(data, grads, *buffers, lr=lr, step=step, grad_scale=grad_scale, scale=scale)
        ops.sgd_update(
            data,
            grads,
            *buffers,
            lr=lr,
            momentum=self.momentum,
            dampening=self.dampening,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            first=step == 1,
            grad_scale=grad_scale,
        )


class Adam(ByRule):
    """Adam (Kingma and Ba 2015), whose weight decay is a part of the gradient. As torch.optim.Adam.

    A weight's bias correction counts its own steps. master_weights: 16-bit weights are rounded copies of float32 ones,
    which are the state "master" beside float32 moments. stochastic_rounding: bfloat16 weights are rounded up or down by
    chance, seeded by ``gl.random``, so that small updates are kept on average.
    """

    def __init__(
        self,
        lr: Rate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ):
        if master_weights and stochastic_rounding:
            raise ValueError(f"{type(self).__name__}: the rule is master_weights or stochastic_rounding; got both")
        self.lr, self.betas, self.eps, self.weight_decay = lr, tuple(betas), eps, weight_decay
        self.master_weights, self.stochastic_rounding = master_weights, stochastic_rounding

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("exp_avg", "exp_avg_sq") + ("master",) * self.master_weights

    def buffers_of(self, name: str, weight: Weight) -> tuple[str, ...]:
        return self.buffers if weight.dtype in arrays.HALVES else self.buffers[:2]

    def start(self, buffer: str, data: Any) -> Any:
        if self.master_weights and arrays.library(data).dtype(data) in arrays.HALVES:
            data = arrays.cast(data, arrays.float32)
        return data if buffer == "master" else arrays.zeros_like(data)

    def assigned(self, name: str, weight: Weight) -> None:
        if (name, "master") in self.state:
            self.state[name, "master"][...] = arrays.cast(weight.data, arrays.float32)

    def numbers(self, step: int, lr: float) -> tuple[str, tuple]:
        return _updates.adam_numbers(step, lr, self.betas, self.eps)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019). As torch.optim.AdamW.

    A weight's bias correction counts its own steps. master_weights, stochastic_rounding: as ``Adam`` has them.
    """

    decoupled = True

    def __init__(
        self,
        lr: Rate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ):
        super().__init__(lr, betas, eps, weight_decay, master_weights, stochastic_rounding)

    def update(
        self, data: list, grads: list, *buffers: list, lr: float, step: int, grad_scale: float, scale: Any = None
    ) -> None:
        if scale is not None or self.master_weights or self.stochastic_rounding:
            return super().update(data, grads, *buffers, lr=lr, step=step, grad_scale=grad_scale, scale=scale)
        ops.adamw_update(
            data,
            grads,
            *buffers,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            step=step,
            grad_scale=grad_scale,
        )


class NAdam(ByRule):
    """Adam with Nesterov momentum (Dozat 2016). As torch.optim.NAdam."""

    buffers = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        lr: Rate = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
    ):
        self.lr, self.betas, self.eps, self.weight_decay = lr, tuple(betas), eps, weight_decay
        self.momentum_decay, self.decoupled = momentum_decay, decoupled_weight_decay

    def numbers(self, step: int, lr: float) -> tuple[str, tuple]:
        return _updates.nadam_numbers(step, lr, self.betas, self.eps, self.momentum_decay)


class RAdam(ByRule):
    """Adam whose first steps' variance is rectified (Liu et al. 2020). As torch.optim.RAdam."""

    buffers = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        lr: Rate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
    ):
        self.lr, self.betas, self.eps, self.weight_decay = lr, tuple(betas), eps, weight_decay
        self.decoupled = decoupled_weight_decay

    def numbers(self, step: int, lr: float) -> tuple[str, tuple]:
        return _updates.radam_numbers(step, lr, self.betas, self.eps)


class Adamax(ByRule):
    """Adam by the largest gradient (Kingma and Ba 2015). As torch.optim.Adamax."""

    buffers = ("exp_avg", "exp_inf")

    def __init__(
        self, lr: Rate = 2e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
    ):
        self.lr, self.betas, self.eps, self.weight_decay = lr, tuple(betas), eps, weight_decay

    def numbers(self, step: int, lr: float) -> tuple[str, tuple]:
        return _updates.adamax_numbers(step, lr, self.betas, self.eps)


class Adagrad(ByRule):
    """Steps by the sum of all squared gradients (Duchi et al. 2011). As torch.optim.Adagrad."""

    buffers = ("sum",)

    def __init__(self, lr: Rate = 1e-2, lr_decay: float = 0.0, weight_decay: float = 0.0, eps: float = 1e-10):
        self.lr, self.lr_decay, self.weight_decay, self.eps = lr, lr_decay, weight_decay, eps

    def phase(self, step: int) -> int:
        return step if self.lr_decay else 1

    def numbers(self, step: int, lr: float) -> tuple[str, tuple]:
        return _updates.adagrad_numbers(step, lr, self.lr_decay, self.eps)


class RMSprop(ByRule):
    """Steps by the running mean of squared gradients (Hinton 2012). As torch.optim.RMSprop."""

    def __init__(
        self,
        lr: Rate = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
    ):
        self.lr, self.alpha, self.eps, self.weight_decay = lr, alpha, eps, weight_decay
        self.momentum, self.centered = momentum, centered

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("square_avg",) + ("grad_avg",) * bool(self.centered) + ("momentum_buffer",) * (self.momentum > 0)

    def phase(self, step: int) -> int:
        return 1

    def numbers(self, step: int, lr: float) -> tuple[str, tuple]:
        return _updates.rmsprop_numbers(lr, self.alpha, self.eps, self.momentum, self.centered)


class Lion(ByRule):
    """Steps of one size, by the sign of a momentum (Chen et al. 2023), with decoupled weight decay."""

    buffers = ("exp_avg",)
    decoupled = True

    def __init__(self, lr: Rate = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        self.lr, self.betas, self.weight_decay = lr, tuple(betas), weight_decay

    def phase(self, step: int) -> int:
        return 1

    def numbers(self, step: int, lr: float) -> tuple[str, tuple]:
        return _updates.lion_numbers(lr, self.betas)
