"""Rotary position embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpulayers.layers._layer import OpLayer
from gpulayers.ops import rotary as ops


class RotaryEmbedding(OpLayer):
    """Each token's heads turned by its position: (N, H, L, D) → (N, H, L, D), L ≤ max_positions.

    dim: how many of D's numbers are turned, in pairs (x[i], x[i + dim / 2]), or (x[2i], x[2i + 1]) where interleaved. theta,
    scaling: see ``gpulayers.ops.rotary.frequencies``. Weights, which are not trained: ``cos`` and ``sin``
    (max_positions, dim / 2).
    """

    op = ops.rotary

    def __init__(
        self,
        dim: int,
        max_positions: int = 2048,
        theta: float = 10000.0,
        interleaved: bool = False,
        scaling: Mapping[str, Any] | None = None,
    ):
        self.dim, self.max_positions, self.theta = dim, max_positions, theta
        self.interleaved, self.scaling = interleaved, scaling
        found = ops.tables(*self._turns())
        self.cos, self.sin = (
            self.add_weight(name, values.shape, self._values(values), trainable=False)
            for name, values in zip(("cos", "sin"), found)
        )

    def _turns(self) -> tuple[np.ndarray, int, float]:
        frequency, factor = ops.frequencies(self.dim, self.theta, self.scaling, self.max_positions)
        return frequency, self.max_positions, factor

    @staticmethod
    def _values(values: np.ndarray) -> Any:
        return lambda *_: values

    def arguments(self, *xs: Any, **_: Any) -> tuple:
        return xs[0], self.cos, self.sin

    def options(self) -> dict[str, Any]:
        return {"interleaved": self.interleaved}
