"""Fully connected layers."""

from __future__ import annotations

from typing import Any

from gpulayers.layers._layer import OpLayer
from gpulayers.layers._weight import Weight, fans, uniform
from gpulayers.ops import linear as ops


class FullyConnected(OpLayer):
    """The fully connected neuron type: every output sees every input. Start here for such a layer of your own.

    y = activation(x Wᵀ + b): (…, in_features) → (…, out_features). weight: (out, in), bias: (out,), both uniform in
    ±1 / √in. activation: None or a name ("relu", "gelu", …), fused into the same kernel.
    """

    op = ops.linear
    neuron_type = "fully connected"
    casts_weights = True

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str | None = None):
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        shape = (out_features, in_features)
        self.weight = self.add_weight("weight", shape, "fan_in_uniform")
        bound = max(1, fans(shape)[0]) ** -0.5
        self.bias: Weight | None = self.add_weight("bias", (out_features,), uniform(bound)) if bias else None

    def arguments(self, x: Any) -> tuple:
        return x, self.weight, self.bias

    def options(self) -> dict[str, Any]:
        return {"activation": self.activation}


class Linear(FullyConnected):
    """As torch.nn.Linear, with an activation that may be fused; see FullyConnected."""
