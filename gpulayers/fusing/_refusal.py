"""What cannot be fused, said with its line and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable

from gpulayers.export.recording import Formula, Node, Unrecordable


class FusionError(ValueError):
    """A layer that cannot be fused: ``place`` (file, line, text; None where no line is to blame), ``reason``, ``advice``."""

    def __init__(self, layer: str, why: Unrecordable):
        super().__init__(layer, why)
        self.layer, self.place, self.reason, self.advice = layer, why.place, why.reason, why.advice
        self._why = why

    def __str__(self) -> str:
        return f"{self.layer}: it cannot be fused: {self._why}"


def misfit(node: Node, reason: str, advice: str = "", users: Iterable[Node] = ()) -> Unrecordable:
    """The error for a node that no fused kernel computes; an input's line is that of its first user."""
    place = node.place or next((n.place for n in users if node in n.inputs and n.place), None)
    return Unrecordable(reason, advice, place)


def sizes_in_words(shape: Iterable) -> str:
    """[N, 3, 1]: N for the batch."""
    words = []
    for n in shape:
        whole = isinstance(n, Formula) and n.is_whole and not n.a
        words.append(("N" if n.b == 1 else f"{n.b} N") if whole else "?" if isinstance(n, Formula) else str(n))
    return f"[{', '.join(words)}]"
