"""What makes an op of two plain functions: the value y = f(x) and the gradient dx = dy f'(x), element by element.

::

    def _leaky_relu(x, negative_slope=0.01): ...            -> y; what follows x are the op's numbers, with torch's defaults
    def _leaky_relu_gradient(dy, x, negative_slope): ...    -> dx from x, or from y where the second is called y
    leaky_relu = elementwise(_leaky_relu, _leaky_relu_gradient)

The value's name and docstring are the op's. Both compute in the dtype they are given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from gpulayers._named import named
from gpulayers.arrays import Spec, arranged, namespace, spec, up
from gpulayers.definition import ArgumentError, KindError, Rule
from gpulayers.ops._op import Op, require_float


class Activation(NamedTuple):
    value: Callable[..., Any]
    """y from x and the activation's numbers."""
    gradient: Callable[..., Any]
    """dx from dy, what is kept, and the numbers."""
    keeps: str
    """What the gradient is computed from: "x", or "y" where that is as cheap and as exact."""
    options: dict[str, float]
    """The names of its numbers, and their defaults, which are torch's."""

    @property
    def numbers(self) -> tuple[float, ...]:
        """The defaults of its numbers."""
        return tuple(self.options.values())


ACTIVATIONS: dict[str, Activation] = {}
"""By name, those whose numbers all have defaults: the epilogues of other ops offer them."""


def require_activation(activation: str | None) -> None:
    """An epilogue's activation is one of ``ACTIVATIONS``, or none."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ArgumentError("activation", f"activation ∈ {{None, {', '.join(ACTIVATIONS)}}}", repr(activation))


def activation(value: Callable, gradient: Callable) -> Activation:
    """The activation that two functions are; see the top of this file."""
    numbers = list(inspect.signature(value).parameters.values())[1:]
    keeps = list(inspect.signature(gradient).parameters)[1]
    made = Activation(value, gradient, keeps, {p.name: p.default for p in numbers})
    if all(p.default is not p.empty for p in numbers):
        ACTIVATIONS[value.__name__.removeprefix("_")] = made
    return made


def elementwise(value: Callable, gradient: Callable, check: Callable[..., None] | None = None) -> Op:
    """The op of an activation; ``check`` raises for numbers outside their range."""
    f = activation(value, gradient)

    def rule(x: Spec, *, needs: tuple = (), **numbers: Any) -> Rule:
        require_float("x", x)
        require_numbers(**numbers)
        if check is not None:
            check(**numbers)
        return rule_of(f, x, needs, numbers)

    def forward(x: Any, *, needs: tuple = (), **numbers: float) -> tuple[tuple, dict]:
        return forward_of(f, x, needs, *(f.options | numbers).values())

    def backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, **numbers: float) -> tuple:
        return backward_of(f, dys, saved, inputs, *(f.options | numbers).values())

    name = value.__name__.removeprefix("_")
    return Op(
        named(rule, f"{name}_rule", f.options, value),
        named(forward, f"{name}_forward", f.options, value),
        named(backward, f"{name}_backward", f.options, gradient),
    )


def require_numbers(**numbers: Any) -> None:
    for argument, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise KindError(argument, "a number", repr(value))


def rule_of(f: Activation, x: Spec, needs: tuple, numbers: dict[str, float]) -> Rule:
    """x is float, and the numbers are numbers."""
    y = x.like()
    saved = {f.keeps: x if f.keeps == "x" else y} if needs else {}
    return Rule({"y": y}, saved, {k: float(v) for k, v in numbers.items()} if numbers else None)


def dense(x: Any, like: Spec) -> Any:
    """``x`` rounded to the spec's dtype, in its memory order."""
    return arranged(namespace(x).asarray(x, like.dtype), like.like().order)


def forward_of(f: Activation, x: Any, needs: tuple, *numbers: float) -> tuple[tuple, dict]:
    y = dense(f.value(up(x), *numbers), spec(x))
    return (y,), {f.keeps: x if f.keeps == "x" else y} if needs else {}


def backward_of(f: Activation, dys: tuple, saved: dict, inputs: tuple, *numbers: float) -> tuple:
    return (dense(f.gradient(up(dys[0]), up(saved[f.keeps]), *numbers), inputs[0]),)
