"""The table that ``model.summary()`` gives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gpulayers._table import amount, table
from gpulayers.layers._calls import each_shape

if TYPE_CHECKING:
    from gpulayers.layers._layer import Layer

_HEAD = ("layer", "neuron type", "input shape", "output shape", "parameters", "weights", "output a row")


def summary(model: Layer, input_shapes: tuple) -> str:
    """One line a layer, containers indented above theirs, and the totals."""
    rows: list[list[Any]] = []
    per_row = 0
    for depth, layer, shape, out in model.rows(*input_shapes):
        own = [w for w in layer._weights.values()]
        count, size = sum(w.size for w in own), sum(w.size * w.dtype.itemsize for w in own)
        activations = 4 * sum(math.prod(n or 1 for n in y[1:]) for y in each_shape(out))
        if not layer.children():
            per_row += activations
        name = "  " * depth + layer.name
        cells = [name, layer.neuron_type, _shape(shape), _shape(out), f"{count:,}", amount(size), amount(activations)]
        rows.append(cells)
    weights = model.weights
    trainable = sum(w.size for w in weights if w.trainable)
    everything = sum(w.size for w in weights)
    memory = sum(w.size * w.dtype.itemsize for w in weights)
    return (
        table(_HEAD, rows)
        + f"\n{everything:,} parameters ({trainable:,} trainable), {amount(memory)}; "
        + f"outputs {amount(per_row)} a row in float32"
    )


def _shape(shape: tuple) -> str:
    if shape and isinstance(shape[0], tuple):
        return " ".join(map(_shape, shape))
    return "(" + ", ".join("N" if n is None else str(n) for n in shape) + ")"
