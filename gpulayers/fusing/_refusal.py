"""What cannot be fused, said with its line and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gpulayers.export.recording import Formula, Node, Place, Unrecordable


class FusionError(ValueError):
    """A layer that cannot be fused: ``place`` (file, line, text; None where no line is to blame), ``reason``, ``advice``."""

    def __init__(self, layer: str, why: Unrecordable):
        super().__init__(layer, why)
        self.layer, self.place, self.reason, self.advice = layer, why.place, why.reason, why.advice
        self._why = why

    def __str__(self) -> str:
        return f"{self.layer}: it cannot be fused: {self._why}"


class Misfit(Unrecordable):
    """What no fused kernel computes.

    node: the one to blame. ended: where a kernel has to end before it, sums over rows that it takes.
    """

    def __init__(self, reason: str, advice: str, place: Place | None, node: Node, ended: Sequence[Node]):
        super().__init__(reason, advice, place)
        self.node, self.ended = node, list(ended)


def misfit(node: Node, reason: str, advice: str = "", users: Iterable[Node] = (), ended: Sequence[Node] = ()) -> Misfit:
    """The error for a node that no fused kernel computes; an input's line is that of its first user."""
    place = node.place or next((n.place for n in users if node in n.inputs and n.place), None)
    return Misfit(reason, advice, place, node, ended)


def sizes_in_words(shape: Iterable) -> str:
    """[N, 3, 1]: N for the batch."""
    words = []
    for n in shape:
        whole = isinstance(n, Formula) and n.is_whole and not n.a
        words.append(("N" if n.b == 1 else f"{n.b} N") if whole else "?" if isinstance(n, Formula) else str(n))
    return f"[{', '.join(words)}]"
