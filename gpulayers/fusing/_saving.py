"""What forward keeps for backward: chosen by the bytes that are moved against what computing it again would take."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

from gpulayers.export.recording import Node, Unrecordable, authors_name
from gpulayers.fusing._program import FULL, ROW, Output, Program
from gpulayers.fusing._statements import identifier

_PASS, _DRAW, _OPERATION = 0.05, 0.1, 0.005
"""What a reduction along the row, random words, and any other operation weigh, where an array as large as the input
weighs 1."""


class Saving(NamedTuple):
    """A forward and a backward that fit together."""

    forward: Program
    backward: Program
    loaded: dict[Node, Node]
    """{a value of forward: the array that backward loads for it}."""
    kept: tuple[str, ...]
    """Those of them that forward stores for backward alone."""

    def weight(self) -> float:
        """Arrays as large as the input that backward moves, and what it computes."""
        columns = math.prod(self.backward.axes.atoms[a][0] for a in self.backward.columns) or 1
        wide = sum(self.backward.layout[n] is FULL for n in self.backward.given)
        draws = sum(n.op == "random_bits" for n in self.backward.nodes)
        work = _PASS * self.backward.passes + _DRAW * draws + _OPERATION * len(self.backward.nodes)
        return wide + 2 * len(self.kept) / columns + work

    def said(self, loads: Sequence[str]) -> str:
        """A comment on the choice."""
        read = [n.name for n in self.loaded.values() if n.name not in self.kept]
        lines = []
        if self.kept:
            lines.append(
                f"Forward keeps {', '.join(self.kept)} for backward: 4 bytes a row each, fewer than reductions are worth."
            )
        if read:
            lines.append(
                f"Backward reads {', '.join(read)}, which forward gives anyway: that computes less than from its inputs."
            )
        if loads:
            lines.append(
                f"Backward computes forward's other values again from {', '.join(loads)}: that moves fewer bytes."
            )
        return "\n".join(lines)


class Programs:
    """The ways to divide the work. ys: forward's outputs. names: of all arrays that are given."""

    def __init__(
        self,
        name: str,
        given: Sequence[Node],
        dys: Sequence[Node],
        ys: Sequence[Output],
        gradients: Sequence[Output],
        names: Sequence[str],
    ):
        self.name, self.given, self.dys, self.ys, self.gradients = (
            name,
            list(given),
            list(dys),
            list(ys),
            list(gradients),
        )
        self.taken = {
            *names,
            *(o.name for o in (*ys, *gradients)),
            *(f"d{n}" for n in names),
            *(f"d{y.name}" for y in ys),
        }

    def ways(self) -> dict[str, Saving]:
        """All of them, by name. Raises Unrecordable where nothing fits."""
        plain = self._saving([], [])
        read = [
            y
            for y in self.ys
            if plain.forward.layout.get(plain.forward.stands[y.node]) is FULL and y.node not in self.given
        ]
        rows = self._row_values(plain)
        found = {"nothing": plain}
        for name, outputs, kept in (("outputs", read, []), ("rows", [], rows), ("outputs and rows", read, rows)):
            if (outputs or name == "rows") and (kept or name == "outputs"):
                with contextlib.suppress(Unrecordable):
                    found[name] = self._saving(outputs, kept)
        return found

    def _saving(self, read: list[Output], kept: list[Output]) -> Saving:
        loaded = {o.node: Node("input", (), {}, o.node.shape, o.node.dtype, None, o.name) for o in (*read, *kept)}
        forward = Program(f"{self.name}_forward", self.given, [*self.ys, *kept])
        given = [*self.given, *loaded.values(), *self.dys]
        backward = Program(f"{self.name}_backward", given, self.gradients, optional=True, loaded=loaded)
        used = {v: n for v, n in loaded.items() if n in backward.given}
        unused = {o.node for o in kept} - used.keys()
        if unused:
            return self._saving(read, [o for o in kept if o.node not in unused])
        return Saving(forward, backward, used, tuple(o.name for o in kept))

    def _row_values(self, plain: Saving) -> list[Output]:
        """Values of rows that follow from reductions in forward, and that backward's own operations take."""
        forward = plain.forward
        found: list[Output] = []
        taken = set(self.taken)
        known = {stand: node for node, stand in forward.stands.items()}
        backwards = {plain.backward.stands.get(node): node for node in forward.stands}
        for stand, node in backwards.items():
            mine = forward.stands[node]
            if stand is None or stand not in plain.backward.layout or forward.layout.get(mine) is not ROW:
                continue
            wide = any(stand in n.inputs and plain.backward.layout[n] is FULL for n in plain.backward.nodes)
            if forward.stage.get(mine, 0) and wide and mine.kind == "f" and mine not in forward.after:
                users = [n for n in forward.nodes if mine in n.inputs]
                name = identifier(authors_name(mine, users) or f"row{len(found)}", taken)
                taken |= {name, f"d{name}"}
                found.append(Output(name, known[mine], known[mine].shape, kept=True))
        return found
