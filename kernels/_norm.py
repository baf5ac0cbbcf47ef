"""What batch norm has in common on every backend."""

from __future__ import annotations

from typing import Any

from ._activation import FROM_Y


def batch_norm_saved(
    activation: str | None, y: Any, mean: Any, rstd: Any, x: Any, weight: Any, bias: Any, residual: Any
) -> dict[str, Any]:
    """What backward computes from: f'(z) from y where that does, else z again from all that made it."""
    saved = {"x": x, "mean": mean, "rstd": rstd, "weight": weight}
    if activation is not None:
        saved |= {"y": y} if activation in FROM_Y else {"bias": bias, "residual": residual}
    return {name: a for name, a in saved.items() if a is not None}
