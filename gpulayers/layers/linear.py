"""Fully connected layers."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, float32
from gpulayers.layers._initial import uniform
from gpulayers.layers._layer import OpLayer
from gpulayers.layers._weight import Weight
from gpulayers.ops import linear as ops


class FullyConnected(OpLayer):
    """The fully connected neuron type: every output sees every input. Start here for such a layer of your own.

    y = f(x Wᵀ + b) over the last axis: (…, in_features) → (…, out_features).

    activation: f, fused into the product: None, "relu", "gelu", "silu", … (the names in ops.activation.ACTIVATIONS).
    in_features may be left out (None): it is then read from the first input.
    Weights: ``weight`` (out_features, in_features) and ``bias`` (out_features,), both uniform in ±1/√in_features.
    """

    op = ops.linear
    neuron_type = "fully connected"
    casts_weights = True

    def __init__(self, in_features: int | None, out_features: int, bias: bool = True, *, activation: str | None = None):
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        self.bias: Weight | None = None
        self._with_bias = bias
        if in_features is not None:
            self.ensure_built((None, in_features))

    def build(self, input_shape: Any) -> None:
        features = self.in_features = input_shape[-1]
        self.weight = self.add_weight("weight", (self.out_features, features), "fan_in_uniform")
        if self._with_bias:
            bound = max(1, features) ** -0.5
            self.bias = self.add_weight("bias", (self.out_features,), uniform(bound))

    def arguments(self, *xs: Any) -> tuple:
        (x,) = xs
        if self.in_features is None:  # not built yet: somebody asks for the output's shape
            size = self.out_features
            return x, Spec((size, x.shape[-1]), float32), Spec((size,), float32) if self._with_bias else None
        return x, self.weight, self.bias

    def options(self) -> dict[str, Any]:
        return {"activation": self.activation}


class Linear(FullyConnected):
    """As torch.nn.Linear, and with an activation fused into it; see FullyConnected."""
