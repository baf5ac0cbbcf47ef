"""Whether a layer runs the code of a class that a format knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpulayers.layers._layer import Layer

_CODE = ("forward", "backward", "output_shape", "arguments", "options", "op", "exported", "__call__")
"""What makes a layer compute what it computes."""


def same_code(layer: Layer, known: Mapping[type, Any]) -> Any:
    """What is known of the class whose code the layer runs; None where it has code of its own."""
    cls = type(layer)
    base = next((c for c in cls.__mro__ if c in known), None)
    if base is None or any(getattr(cls, name, None) is not getattr(base, name, None) for name in _CODE):
        return None
    return None if any(name in layer.__dict__ for name in _CODE) else known[base]
