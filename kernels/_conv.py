"""What convolutions have in common on every backend."""

from __future__ import annotations

from typing import Any

from ._activation import FROM_Y


def conv_saved(
    needs: tuple,
    activation: str | None,
    y: Any,
    z: Any,
    x: Any,
    weight: Any,
    bias: Any = None,
    scale: Any = None,
    residual: Any = None,
) -> dict[str, Any]:
    """What backward computes from: f'(z) from y where that does, else from z, beside all that made it."""
    saved = ({"x": x} if "weight" in needs else {}) | ({"weight": weight} if "x" in needs else {})
    if saved and scale is not None:
        saved["scale"] = scale
    if activation is None or not needs:
        return saved
    if activation in FROM_Y:
        return saved | {"y": y}
    given = {"z": z, "weight": weight, "bias": bias, "scale": scale, "residual": residual}
    return saved | {name: a for name, a in given.items() if a is not None}
