"""What a mutant is, and how it is proven faulty without check_layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import gpulayers as gl


class Mutant(NamedTuple):
    """A faulty layer.

    make: makes one. inputs: what check_layer is given. names: words (a pattern) that a finding must have to have named
    the fault. test: takes what makes a layer, and raises if that is faulty, with no help of check_layer.
    """

    name: str
    axis: str
    make: Callable[[], gl.Layer]
    inputs: tuple
    names: str
    test: Callable[[Callable[[], gl.Layer]], None]

    def proof(self) -> None:
        """Raises, because the layer is faulty."""
        self.test(self.make)


MUTANTS: list[Mutant] = []
RIGHT: list[tuple[str, Callable[[], gl.Layer], tuple]] = []


def mutant(axis: str, inputs: tuple, names: str, test: Callable, *args: Any) -> Callable[[type], type]:
    """Class decorator. test: as in Mutant."""

    def add(cls: type) -> type:
        gl.register(cls, name=f"layer_mutants.{cls.__name__}")  # other tests have a Scale, too
        make = lambda: cls(*args)  # noqa: E731
        MUTANTS.append(Mutant(cls.__name__, axis, make, inputs, names, test))
        return cls

    return add


def right(inputs: tuple, *args: Any) -> Callable[[type], type]:
    """Class decorator of a layer that is right."""

    def add(cls: type) -> type:
        gl.register(cls, name=f"layer_mutants.{cls.__name__}")  # other tests have a Scale, too
        RIGHT.append((cls.__name__, lambda: cls(*args), inputs))
        return cls

    return add


# --- direct proofs ---------------------------------------------------------------------------------------------------


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def wide(make: Callable[[], gl.Layer], *xs: np.ndarray, training: bool = True) -> gl.Layer:
    """The layer, built, in float64, its weights at other values than those they start with."""
    layer = make()
    layer.ensure_built(*((None, *x.shape[1:]) for x in xs))
    layer.to("float64").train(training)
    random = np.random.default_rng(5)
    for w in layer.trainable_weights:
        w.data = w.data + 0.3 + 0.2 * random.standard_normal(w.shape)
    return layer


def slope_differs(
    *shapes: tuple,
    training: bool = True,
    weight: str | None = None,
    start: bool = False,
    scale: float = 1.0,
    of: int = 0,
) -> Callable:
    """The gradient of input ``of`` (or of a weight) along a direction is not what two forwards differ by."""

    def proof(make: Callable[[], gl.Layer]) -> None:
        xs = [scale * drawn(*s, seed=i) if isinstance(s, tuple) else s for i, s in enumerate(shapes)]
        layer = make() if start else wide(make, *xs, training=training)
        if start:
            layer.ensure_built(*((None, *x.shape[1:]) for x in xs))
            layer.to("float64")
        ys = layer(*xs)
        dy = drawn(*ys.shape, seed=9)
        dx = layer.backward(dy)
        dx = dx if isinstance(dx, tuple) else (dx,)
        way = drawn(*(xs[of].shape if weight is None else layer.named_weights()[weight].shape), seed=11)
        grad = dx[of] if weight is None else layer.named_weights()[weight].grad
        mine = 0.0 if grad is None else float((grad * way).sum())
        step = 1e-6

        def value(t: float) -> float:
            if weight is None:
                moved = [*xs[:of], xs[of] + t * way, *xs[of + 1 :]]
                return float((layer(*moved) * dy).sum())
            w = layer.named_weights()[weight]
            before, w.data = w.data, w.data + t * way
            total = float((layer(*xs) * dy).sum())
            w.data = before
            return total

        with gl.no_grad():
            true = (value(step) - value(-step)) / (2 * step)
        assert abs(mine - true) <= 1e-4 * max(1.0, abs(true)), f"gradient {mine}, differences {true}"

    return proof
