"""The table that ``model.summary()`` gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from gpulayers._table import amount, table
from gpulayers.layers._calls import each_shape
from gpulayers.layers._weight import Weight

_HEAD = ("layer", "neuron type", "input shape", "output shape", "parameters", "weights", "output a row")


class Row(NamedTuple):
    """One layer's line."""

    depth: int
    name: str
    neuron_type: str
    input_shape: tuple
    output_shape: tuple
    weights: list[Weight]
    """Those that no line above has counted: a shared weight counts once."""
    leaf: bool
    """Whether no line below is of a layer inside it."""


def summary(rows: Sequence[Row], weights: Sequence[Weight]) -> str:
    """One line a layer, containers indented above theirs, and the totals."""
    lines: list[list[Any]] = []
    per_row = 0
    for row in rows:
        activations = 4 * sum(math.prod(n or 1 for n in y[1:]) for y in each_shape(row.output_shape))
        if row.leaf:
            per_row += activations
        name = "  " * row.depth + row.name
        shapes = _shape(row.input_shape), _shape(row.output_shape)
        count, memory = _counted(row.weights)
        lines.append([name, row.neuron_type, *shapes, f"{count:,}", amount(memory), amount(activations)])
    everything, memory = _counted(weights)
    trainable, _ = _counted([w for w in weights if w.trainable])
    return (
        table(_HEAD, lines)
        + f"\n{everything:,} parameters ({trainable:,} trainable), {amount(memory)}; "
        + f"outputs {amount(per_row)} a row in float32"
    )


def _counted(weights: Sequence[Weight]) -> tuple[int, int]:
    """(numbers, bytes)."""
    return sum(w.size for w in weights), sum(w.size * w.dtype.itemsize for w in weights)


def _shape(shape: tuple) -> str:
    if shape and isinstance(shape[0], tuple):
        return " ".join(map(_shape, shape))
    return "(" + ", ".join("N" if n is None else str(n) for n in shape) + ")"
