"""The dtype that a model computes in, and what keeps float16 gradients from vanishing."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers import arrays
from gpulayers.layers._layer import Layer


def named(name: str | None) -> np.dtype | None:
    """The dtype that was asked for by name."""
    dtype = arrays.dtype(name) if name else None
    if dtype not in (None, *arrays.FLOATS):
        raise ValueError(f"precision: the rule is bfloat16, float16, float32 or float64; got {name!r}")
    return dtype


def of_weights(model: Layer) -> np.dtype | None:
    """The dtype of the model's weights; None where it has none."""
    return next((w.dtype for w in model.weights if w.dtype in arrays.FLOATS), None)


def cast(x: Any, dtype: np.dtype | None) -> Any:
    """``x`` in another dtype if it holds floating-point numbers: integers are labels or indices."""
    return x if dtype is None or arrays.library(x).dtype(x) not in arrays.FLOATS else arrays.cast(x, dtype)


def judged(ys: tuple, target: Any) -> tuple[tuple, Any]:
    """(outputs, target) as a loss takes them: of one dtype, 16-bit ones in float32."""
    dtype = arrays.compute_dtype(arrays.library(ys[0]).dtype(ys[0]))
    return tuple(cast(y, dtype) for y in ys), cast(target, dtype)


class LossScale:
    """Keeps float16 gradients from vanishing: the loss is multiplied by ``value``, the gradients divided by it.

    It halves when a gradient overflows (that step is left out) and doubles after 2,000 steps without one
    (Micikevicius et al. 2018).
    """

    def __init__(self, on: bool):
        self.on, self.value, self.good = on, 2.0**16 if on else 1.0, 0

    def update(self, finite: bool) -> None:
        if not self.on:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good % 2000 == 0:
            self.value = min(self.value * 2, 2.0**24)
