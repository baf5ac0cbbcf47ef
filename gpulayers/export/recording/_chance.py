"""The library's random numbers while a layer is recorded: operations of the graph, so that an export draws its own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpulayers import arrays, random
from gpulayers.export.recording._handle import trace
from gpulayers.export.recording._place import refuse
from gpulayers.export.recording._recorded import NAMESPACE, Recorded
from gpulayers.ops import _random


class Draw(Recorded):
    """A fresh (seed, offset), int64 [2], that names random bits."""

    def random_bits(self, count: int) -> Any:
        """The words that ``ops._random.random_bits`` gives, as numbers: the same ones each time."""
        drawn = trace().bits
        key = self.node.index, count
        if key not in drawn:
            value = _random.random_bits(self.value, count).astype(np.float64)
            drawn[key] = trace().add("random_bits", (self,), value, shape=(count,))
        return drawn[key]


arrays.learn(Draw, NAMESPACE)


class Generator:
    """Stands for a NumPy generator of the library's; what it draws are fresh nodes."""

    def __init__(self, draw: Draw):
        self._draw, self._real = draw, np.random.default_rng(draw.value)

    def _add(self, op: str, value: Any, dtype: Any, **attributes: Any) -> Any:
        value = np.asarray(value, np.float64 if dtype is None else dtype)
        return trace().add(op, (self._draw,), value, shape=value.shape, **attributes)

    def random(self, size: Any = None, dtype: Any = None, out: Any = None) -> Any:
        return self._add("random_uniform", self._real.random(size), dtype, low=0.0, high=1.0)

    def uniform(self, low: float = 0.0, high: float = 1.0, size: Any = None) -> Any:
        low, high = _number(low), _number(high)
        return self._add("random_uniform", self._real.uniform(low, high, size), None, low=low, high=high)

    def standard_normal(self, size: Any = None, dtype: Any = None, out: Any = None) -> Any:
        return self._add("random_normal", self._real.standard_normal(size), dtype, mean=0.0, std=1.0)

    def normal(self, loc: float = 0.0, scale: float = 1.0, size: Any = None) -> Any:
        loc, scale = _number(loc), _number(scale)
        return self._add("random_normal", self._real.normal(loc, scale, size), None, mean=loc, std=scale)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        refuse(f"a random generator's {name} has no counterpart in a recording", "random, uniform, standard_normal")


def _number(x: Any) -> float:
    if not isinstance(x, int | float) or not math.isfinite(x):
        refuse("a random number whose range is an array", "low + (high - low) * generator.random(x.shape)")
    return float(x)


class Chance:
    """Where ``gpulayers.random`` draws from meanwhile."""

    def draw(self) -> Any:
        state = random.mixed(0, len(trace().nodes))
        made = trace().add("draw", (), state)
        return Draw(made.node, state)

    def generator(self) -> Any:
        return Generator(self.draw())
