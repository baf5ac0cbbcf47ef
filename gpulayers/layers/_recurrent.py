"""A stack of recurrent layers: the same for layers of arrays and for torch's modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Weights = dict[str, Any]
"""One layer's in one direction: weight_ih, weight_hh, and bias_ih, bias_hh, weight_hr where it has them."""


def suffix(layer: int, direction: int) -> str:
    """What follows a weight's name in torch's state_dict: "_l0", "_l0_reverse"."""
    return f"_l{layer}" + "_reverse" * direction


def kinds(bias: bool, projected: bool) -> list[str]:
    """The names of one layer's weights, in torch's order."""
    return ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * bias + ["weight_hr"] * projected


def stacked(
    x: Any,
    h0: Sequence[Any],
    c0: Sequence[Any],
    weights: Sequence[Sequence[Weights]],
    *,
    linear: Callable[..., Any],
    recurrent: Callable[..., tuple],
    join: Callable[[list], Any],
    drop: Callable[[Any], Any],
) -> tuple[Any, list, list]:
    """(y, the states after the last step, the cells after it) of x, whose last axis are features.

    h0, c0: one for each layer and direction, c0 empty without cells. weights: by layer, then by direction. linear: (x, W, b);
    recurrent: (gates, W, h0, c0, b, projection, direction); join: outputs along the features; drop: between layers.
    """
    states: list = []
    cells: list = []
    for number, layer in enumerate(weights):
        x = drop(x) if number else x
        ys = []
        for direction, w in enumerate(layer):
            at = number * len(layer) + direction
            gates = linear(x, w["weight_ih"], w.get("bias_ih"))
            carried = h0[at], c0[at] if len(c0) else None
            y, h, *c = recurrent(gates, w["weight_hh"], *carried, w.get("bias_hh"), w.get("weight_hr"), direction)
            ys.append(y)
            states.append(h)
            cells += c
        x = ys[0] if len(ys) == 1 else join(ys)
    return x, states, cells
