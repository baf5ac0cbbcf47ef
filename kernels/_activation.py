"""What activations have in common on every backend: their numbers, and the launchers that one body makes for all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from gpulayers._named import named

FROM_Y = ("relu", "relu6", "sigmoid", "tanh")
"""Activations whose gradient is computed from y; the others' from x."""
OPTIONS: dict[str, dict[str, float]] = {
    "relu": {},
    "leaky_relu": {"negative_slope": 0.01},
    "relu6": {},
    "relu_squared": {},
    "hardtanh": {"min_val": -1.0, "max_val": 1.0},
    "hardsigmoid": {},
    "hardswish": {},
    "hardshrink": {"lambd": 0.5},
    "softshrink": {"lambd": 0.5},
    "threshold": {"threshold": 0.0, "value": 0.0},
    "gelu": {},
    "gelu_tanh": {},
    "silu": {},
    "quick_gelu": {},
    "sigmoid": {},
    "logsigmoid": {},
    "tanh": {},
    "tanhshrink": {},
    "softsign": {},
    "softplus": {"beta": 1.0, "threshold": 20.0},
    "elu": {"alpha": 1.0},
    "celu": {"alpha": 1.0},
    "selu": {},
    "mish": {},
}
"""The numbers that an activation has, and their defaults."""


def numbers_of(name: str | None, count: int = 0) -> tuple[float, ...]:
    """The defaults of an activation's numbers, with zeros after them up to ``count``."""
    numbers = tuple(OPTIONS.get(name or "", {}).values())
    return numbers + (0.0,) * (count - len(numbers))


def launchers(forward: Callable, backward: Callable, *handed: str) -> dict[str, Callable]:
    """{"relu_forward": …, "relu_backward": …, …}: a backend's launchers of every activation, made of two bodies.

    forward(name, x, empty, *numbers) → y and backward(name, dy, kept, empty, *numbers) → dx. handed: what launchers get
    from dispatch besides the options, "empty" or nothing; without it ``empty`` is None.
    """
    made: dict[str, Callable] = {}
    for op in OPTIONS:
        if op == "gelu_tanh":  # an option of gelu
            continue
        options: dict[str, Any] = {"approximate": "none"} if op == "gelu" else OPTIONS[op]
        parameters = options | dict.fromkeys(handed, inspect.Parameter.empty)
        for direction, launcher in zip(("forward", "backward"), _pair(op, forward, backward)):
            name = f"{op}_{direction}"
            made[name] = named(launcher, name, parameters)
    return made


def _pair(op: str, forward: Callable, backward: Callable) -> tuple[Callable, Callable]:
    defaults, keeps = OPTIONS[op], "y" if op in FROM_Y else "x"

    def name_of(options: dict[str, Any]) -> str:
        return "gelu_tanh" if options.get("approximate") == "tanh" else op

    def value(x: Any, *, needs: tuple = (), **options: Any) -> tuple[tuple, dict]:
        numbers = [options.get(k, d) for k, d in defaults.items()]
        y = forward(name_of(options), x, options.get("empty"), *numbers)
        return (y,), {keeps: y if keeps == "y" else x} if needs else {}

    def gradient(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, **options: Any) -> tuple:
        numbers = [options.get(k, d) for k, d in defaults.items()]
        return (backward(name_of(options), dys[0], saved[keeps], options.get("empty"), *numbers),)

    return value, gradient
