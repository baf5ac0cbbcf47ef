"""What a format cannot hold, said before a byte is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Refusal(NamedTuple):
    """One layer that cannot be exported."""

    place: str
    """Its name in the model ("3.0"); "" for the model itself."""
    layer: str
    """The name that it calls itself ("0.Swish")."""
    reason: str

    def __str__(self) -> str:
        return f"{self.layer}{f' (at {self.place})' if self.place else ''}: {self.reason}"


class ExportError(ValueError):
    """A model that cannot be exported; ``refusals`` are its layers that stand in the way, each with its reason."""

    def __init__(self, what: str, refusals: Sequence[Refusal]):
        self.refusals = list(refusals)
        super().__init__("\n  ".join([f"{what}; nothing was written:", *map(str, refusals)]))
