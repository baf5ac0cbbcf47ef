"""What convolutions have in common on every backend."""

from __future__ import annotations

from typing import Any


def conv_saved(x: Any, weight: Any, needs: tuple) -> dict[str, Any]:
    """What backward computes from."""
    return ({"x": x} if "weight" in needs else {}) | ({"weight": weight} if "x" in needs else {})
