"""What cannot be fused, said with its line and what to write instead."""

from __future__ import annotations

from gpulayers.export.recording import Node, Unrecordable


class FusionError(ValueError):
    """A layer that cannot be fused: ``place`` (file, line, text; None where no line is to blame), ``reason``, ``advice``."""

    def __init__(self, layer: str, why: Unrecordable):
        super().__init__(layer, why)
        self.layer, self.place, self.reason, self.advice = layer, why.place, why.reason, why.advice
        self._why = why

    def __str__(self) -> str:
        return f"{self.layer}: it cannot be fused: {self._why}"


def misfit(node: Node, reason: str, advice: str = "") -> Unrecordable:
    """The error for a node that no fused kernel computes."""
    return Unrecordable(reason, advice, node.place)
