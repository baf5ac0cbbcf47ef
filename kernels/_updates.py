"""Optimizers' rules: how one element of a parameter and of its state goes on from its gradient.

Each formula takes the element w, its gradient g, the state and the step's numbers, and gives w and the state anew. It is
written once: NumPy and CuPy run it over arrays (``bound``), Triton compiles it. ``sqrt``, ``maximum`` and ``sign`` are those of either.
"""

from __future__ import annotations

import functools
import itertools
import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

sqrt: Any = math.sqrt
maximum: Any = max
sign: Any = math.copysign

FUNCTIONS = ("sqrt", "maximum", "sign")
"""What formulas call."""
MOST_NUMBERS = 8
"""Of any rule's formula."""


def sgd(w, g, lr):
    return w - lr * g


def sgd_momentum(w, g, m, lr, keep, take):
    m = keep * m + take * g
    return w - lr * m, m


def sgd_nesterov(w, g, m, lr, keep, take, momentum):
    m = keep * m + take * g
    return w - lr * (g + momentum * m), m


def adam(w, g, m, v, step_size, root, eps, beta1, rest1, beta2, rest2):
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    return w - step_size * m / (sqrt(v) / root + eps), m, v


def nadam(w, g, m, v, of_gradient, of_average, root, eps, beta1, rest1, beta2, rest2):
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    return w - (of_gradient * g + of_average * m) / (sqrt(v) / root + eps), m, v


def radam(w, g, m, v, step_size, eps, beta1, rest1, beta2, rest2):
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    return w - step_size * m / (sqrt(v) + eps), m, v


def radam_unrectified(w, g, m, v, step_size, eps, beta1, rest1, beta2, rest2):
    m = beta1 * m + rest1 * g
    return w - step_size * m, m, beta2 * v + rest2 * g * g


def adamax(w, g, m, u, step_size, eps, beta1, rest1, beta2):
    m = beta1 * m + rest1 * g
    u = maximum(beta2 * u, maximum(g, -g) + eps)
    return w - step_size * m / u, m, u


def adagrad(w, g, s, rate, eps):
    s = s + g * g
    return w - rate * g / (sqrt(s) + eps), s


def rmsprop(w, g, v, lr, eps, alpha, rest):
    v = alpha * v + rest * g * g
    return w - lr * g / (sqrt(v) + eps), v


def rmsprop_momentum(w, g, v, m, lr, eps, alpha, rest, momentum):
    v = alpha * v + rest * g * g
    m = momentum * m + g / (sqrt(v) + eps)
    return w - lr * m, v, m


def rmsprop_centered(w, g, v, a, lr, eps, alpha, rest):
    v = alpha * v + rest * g * g
    a = alpha * a + rest * g
    return w - lr * g / (sqrt(v - a * a) + eps), v, a


def rmsprop_centered_momentum(w, g, v, a, m, lr, eps, alpha, rest, momentum):
    v = alpha * v + rest * g * g
    a = alpha * a + rest * g
    m = momentum * m + g / (sqrt(v - a * a) + eps)
    return w - lr * m, v, a, m


def lion(w, g, m, lr, beta1, rest1, beta2, rest2):
    u = beta1 * m + rest1 * g
    return w - lr * sign(u), beta2 * m + rest2 * g


def muon(w, g, m, keep, take, of_average, of_gradient):
    """Muon's momentum: what is to be made orthogonal comes in the place of w, whatever that was."""
    m = keep * m + take * g
    return of_average * m + of_gradient * g, m


def lars(w, g, m, rate, decay, momentum):
    """(what is taken from w, m)."""
    m = momentum * m + rate * (g + decay * w)
    return m, m


def lamb(w, g, m, v, rate, decay, bias, root, eps, beta1, rest1, beta2, rest2):
    """(what is taken from w, m, v)."""
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    return rate * (m / bias / (sqrt(v) / root + eps) + decay * w), m, v


class Update(NamedTuple):
    """One rule: its formula, how many arrays of state it has, how many numbers a step needs."""

    formula: Callable
    states: int
    numbers: int


def _update(formula: Callable, states: int) -> Update:
    return Update(formula, states, formula.__code__.co_argcount - 2 - states)


UPDATES = {
    "sgd": _update(sgd, 0),
    "sgd_momentum": _update(sgd_momentum, 1),
    "sgd_nesterov": _update(sgd_nesterov, 1),
    "adam": _update(adam, 2),
    "nadam": _update(nadam, 2),
    "radam": _update(radam, 2),
    "radam_unrectified": _update(radam_unrectified, 2),
    "adamax": _update(adamax, 2),
    "adagrad": _update(adagrad, 1),
    "rmsprop": _update(rmsprop, 1),
    "rmsprop_momentum": _update(rmsprop_momentum, 2),
    "rmsprop_centered": _update(rmsprop_centered, 2),
    "rmsprop_centered_momentum": _update(rmsprop_centered_momentum, 3),
    "lion": _update(lion, 1),
    "muon": _update(muon, 1),
}


LAYERWISE = {"lars": Update(lars, 1, 1), "lamb": Update(lamb, 2, 7)}
"""Rules whose rate is each array's own: lr times its trust ratio. Rate and weight decay come before their numbers."""


@functools.cache
def bound(rule: str, xp: Any) -> Callable:
    """The rule's formula over arrays of ``xp``, always a tuple: (w, *state)."""
    update = (UPDATES | LAYERWISE)[rule]
    own = types.FunctionType(update.formula.__code__, {name: getattr(xp, name) for name in FUNCTIONS})
    return own if update.states else lambda *args: (own(*args),)


# --- the numbers of a step, which counts from 1 -------------------------------------------------------------------------


def sgd_numbers(
    lr: float, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False, first: bool = False
) -> tuple[str, tuple]:
    """(rule, numbers): the first step with momentum takes the whole gradient."""
    keep, take = (0.0, 1.0) if first else (momentum, 1 - dampening)
    if not momentum:
        return "sgd", (lr,)
    return ("sgd_nesterov", (lr, keep, take, momentum)) if nesterov else ("sgd_momentum", (lr, keep, take))


def adam_numbers(step: int, lr: float, betas: tuple, eps: float) -> tuple[str, tuple]:
    b1, b2 = betas
    return "adam", (lr / (1 - b1**step), math.sqrt(1 - b2**step), eps, b1, 1 - b1, b2, 1 - b2)


@functools.lru_cache(8)
def _products(beta1: float, momentum_decay: float) -> Callable[[int], float]:
    """n → the product of NAdam's first n momentums."""
    known = [1.0]

    def product(n: int) -> float:
        for i in range(len(known), n + 1):
            known.append(known[-1] * nadam_momentum(i, beta1, momentum_decay))
        return known[n]

    return product


def nadam_momentum(step: int, beta1: float, momentum_decay: float) -> float:
    return beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))


def nadam_numbers(
    step: int, lr: float, betas: tuple, eps: float, momentum_decay: float, product: float | None = None
) -> tuple[str, tuple]:
    """product: of the momentums of all steps so far, this one's too; by default that of these options."""
    b1, b2 = betas
    now, then = (nadam_momentum(i, b1, momentum_decay) for i in (step, step + 1))
    product = _products(b1, momentum_decay)(step) if product is None else product
    of_gradient, of_average = lr * (1 - now) / (1 - product), lr * then / (1 - product * then)
    return "nadam", (of_gradient, of_average, math.sqrt(1 - b2**step), eps, b1, 1 - b1, b2, 1 - b2)


def radam_numbers(step: int, lr: float, betas: tuple, eps: float) -> tuple[str, tuple]:
    b1, b2 = betas
    most, size, rest = 2 / (1 - b2) - 1, lr / (1 - b1**step), 1 - b2**step
    rho = most - 2 * step * b2**step / rest
    tail = (eps, b1, 1 - b1, b2, 1 - b2)
    if rho <= 5:
        return "radam_unrectified", (size, *tail)
    rectified = math.sqrt((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho))
    return "radam", (size * rectified * math.sqrt(rest), *tail)


def adamax_numbers(step: int, lr: float, betas: tuple, eps: float) -> tuple[str, tuple]:
    b1, b2 = betas
    return "adamax", (lr / (1 - b1**step), eps, b1, 1 - b1, b2)


def adagrad_numbers(step: int, lr: float, lr_decay: float, eps: float) -> tuple[str, tuple]:
    return "adagrad", (lr / (1 + (step - 1) * lr_decay), eps)


def rmsprop_numbers(lr: float, alpha: float, eps: float, momentum: float, centered: bool) -> tuple[str, tuple]:
    name = "".join(("rmsprop", "_centered" * bool(centered), "_momentum" * (momentum > 0)))
    return name, (lr, eps, alpha, 1 - alpha, *itertools.repeat(momentum, int(momentum > 0)))


def lion_numbers(lr: float, betas: tuple) -> tuple[str, tuple]:
    b1, b2 = betas
    return "lion", (lr, b1, 1 - b1, b2, 1 - b2)


def muon_numbers(momentum: float, nesterov: bool) -> tuple[str, tuple]:
    return "muon", (momentum, 1 - momentum, *((momentum, 1 - momentum) if nesterov else (1.0, 0.0)))


def muon_rate(lr: float, adjust_lr_fn: str | None, shape: tuple[int, ...]) -> float:
    """The learning rate for a matrix: by √max(1, rows / columns), or so that updates are as large as AdamW's."""
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return lr * 0.2 * math.sqrt(max(rows, columns))
    return lr * math.sqrt(max(1, rows / columns))


def lars_numbers(momentum: float, weight_decay: float, trust_coefficient: float, eps: float) -> tuple[str, dict]:
    """(rule, {"numbers", "trust", "weight_decay"}) of any step."""
    trust = (trust_coefficient, math.inf, weight_decay, eps)
    return "lars", {"numbers": (momentum,), "trust": trust, "weight_decay": weight_decay}


def lamb_numbers(step: int, betas: tuple, eps: float, weight_decay: float, max_weight_norm: float) -> tuple[str, dict]:
    """(rule, {"numbers", "trust", "weight_decay"})."""
    b1, b2 = betas
    numbers = (1 - b1**step, math.sqrt(1 - b2**step), eps, b1, 1 - b1, b2, 1 - b2)
    trust = (1.0, max_weight_norm, 0.0, 0.0)
    return "lamb", {"numbers": numbers, "trust": trust, "weight_decay": weight_decay}
