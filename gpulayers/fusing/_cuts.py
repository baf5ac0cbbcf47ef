"""A graph cut into pieces: fused kernels, and between them what no kernel fuses, each run by itself.

A piece is as late as its users allow, so that what stands between two cuts is one piece. What several pieces take is
computed again in each where that moves no more bytes than storing and loading it would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from gpulayers.export.recording import Node, Unrecordable, needed
from gpulayers.export.recording.graph import at_batch
from gpulayers.fusing._axes import BATCHES, ELEMENTWISE, REDUCTIONS
from gpulayers.fusing._tidy import number

SOMETIMES = frozenset(("slice", "concat", "reverse"))
"""Operations that are fused at the edge of a piece, if at all."""
_OTHERS = frozenset(["input", "const", "full", "reshape", "broadcast", "transpose", "cumsum", "random_bits"])
FUSED = ELEMENTWISE | REDUCTIONS | SOMETIMES | _OTHERS
VIEWS = frozenset(("reshape", "transpose", "broadcast", "slice", "input"))
"""Operations that move no element."""
_MOST_LOADS = 2
"""Arrays that are loaded to compute a value again, in place of storing it and loading it."""
Made = TypeVar("Made")


class Group(NamedTuple):
    """What may become a fused kernel."""

    outputs: tuple[Node, ...]
    loads: tuple[Node, ...]
    nodes: tuple[Node, ...]
    """What it computes."""
    parts: int = 1
    """Groups that have nothing in common but what they load."""


class Piece(NamedTuple, Generic[Made]):
    """A group, and what was made of it."""

    group: Group
    made: Made


def pieces(roots: Iterable[Node], given: Iterable[Node], make: Callable[[Group], Made]) -> list[Node | Piece[Made]]:
    """The steps that give ``roots``, in order: a node that stands alone, or a piece.

    make: of a group, or raises Misfit for a node of it, which is then cut out.
    """
    division = _Division(roots, given)
    known: dict[Group, Made] = {}
    while True:
        steps = division.steps()
        if all(_is_made(s, known, make, division) for s in steps if isinstance(s, Group)):
            return [Piece(s, known[s]) if isinstance(s, Group) else s for s in steps]


def _is_made(group: Group, known: dict[Group, Made], make: Callable[[Group], Made], division: _Division) -> bool:
    try:
        if group not in known:
            known[group] = make(group)
    except Unrecordable as error:
        division.cut(group, error)
        return False
    return True


def elements(node: Node) -> float:
    """How large an array is; those of sizes not known are the largest."""
    sizes = at_batch(node.shape, BATCHES[0])
    return math.inf if None in sizes else math.prod(sizes)


class _Division:
    """Where the graph is cut, as far as is known."""

    def __init__(self, roots: Iterable[Node], given: Iterable[Node]):
        self.given = set(given)
        self.order = needed(roots, self.given)
        self.roots = [n for n in dict.fromkeys(roots) if n not in self.given]
        self.place = {n: i for i, n in enumerate(self.order)}
        self.of_index = {n.index: n for n in self.order}
        self.users: dict[Node, list[Node]] = {n: [] for n in self.order}
        for node in self.order:
            for operand in node.inputs:
                self.users.get(operand, []).append(node)
        self.cuts = {n for n in self.order if n.op not in FUSED or (n.kind != "f" and n in self.roots)}
        self.ended: set[Node] = set()
        """Values whose users are in other pieces: sums over rows, and what comes before a node that does not fit."""
        self.divided: set[tuple[Node, ...]] = set()
        """Outputs of groups whose parts do not fit into one kernel."""

    def cut(self, group: Group, error: Unrecordable) -> None:
        """Where the next try differs from one that gave this."""
        node = getattr(error, "node", None)
        own = None if node is None else self.of_index.get(node.index)
        if own in group.nodes and own.op in SOMETIMES:
            self.cuts.add(own)
            return
        ended = {self.of_index.get(n.index) for n in getattr(error, "ended", ())} - {None}
        if fresh := ended - self.ended:
            self.ended |= fresh  # type: ignore[arg-type]
        elif group.parts > 1 and group.outputs not in self.divided:
            self.divided.add(group.outputs)
        else:
            if own not in group.nodes or number(own) is not None:
                own = next((n for n in group.nodes if own in n.inputs), group.outputs[-1])
            here = {n for n in own.inputs if n in group.nodes and n.op != "input" and number(n) is None}
            if here - self.ended:
                self.ended |= here  # it may begin a piece
            else:
                self.cuts.add(own)

    # --- which piece computes what -----------------------------------------------------------------------------------

    def steps(self) -> list[Node | Group]:
        """Nodes that stand alone and groups, each after what it takes."""
        while True:
            level = self._levels()
            groups = self._groups(level)
            views = {n for found in groups.values() for g in found for n in g.outputs if n.op in VIEWS}
            if not views:
                break
            self.cuts |= views
        found: list[Node | Group] = []
        for at in sorted({*level.values()}, reverse=True):
            found += [n for n in self.order if n in self.cuts and level[n] == at]
            found += groups.get(at, [])
        return found

    def _levels(self) -> dict[Node, int]:
        """How many cuts follow a node, at most."""
        level: dict[Node, int] = {}
        for node in reversed(self.order):
            apart = node in self.ended
            level[node] = max((level[u] + (apart or u in self.cuts) for u in self.users[node]), default=0)
        return level

    def _groups(self, level: dict[Node, int]) -> dict[int, list[Group]]:
        wanted: dict[int, dict[Node, None]] = {}

        def want(node: Node) -> None:
            if number(node) is not None:
                self.cuts.add(node)
            elif node not in self.given and node not in self.cuts:
                wanted.setdefault(level[node], {})[node] = None

        for node in (*self.roots, *(i for n in self.order if n in self.cuts for i in n.inputs)):
            want(node)
        found: dict[int, list[Group]] = {}
        for at in range(max(level.values(), default=0) + 1):
            outputs = sorted(wanted.get(at, ()), key=self.place.__getitem__)
            parts = [self._part(output, level) for output in outputs]
            found[at] = self._merged(parts)
            for group in found[at]:
                for node in group.loads:
                    want(node)
        return found

    def _part(self, output: Node, level: dict[Node, int]) -> Group:
        """One output, and all that is computed for it."""
        at, seen, loads = level[output], {output}, set()
        todo = [output]
        while todo:
            for operand in todo.pop().inputs:
                if number(operand) is not None:
                    seen.add(operand)
                elif operand in self.given or operand in self.cuts:
                    loads.add(operand)
                elif operand not in seen and (level[operand] == at or self._is_cheap(operand)):
                    seen.add(operand)
                    todo.append(operand)
                elif operand not in seen:
                    loads.add(operand)
        loads |= {n.attributes["of"] for n in seen if n.op == "input"}
        return Group((output,), self._ordered(loads), self._ordered(seen))

    def _ordered(self, nodes: Iterable[Node]) -> tuple[Node, ...]:
        return tuple(sorted(nodes, key=lambda n: self.place.get(n, n.index - len(self.order) - 1_000_000)))

    def _is_cheap(self, node: Node) -> bool:
        """Whether a value is computed again rather than stored and loaded."""
        size, leaves, seen, todo = elements(node), set(), {node}, [node]
        while todo:
            here = todo.pop()
            if here in self.ended or here.op in REDUCTIONS or here.op == "cumsum":
                if here is node:
                    return False
                leaves.add(here)
                continue
            for operand in here.inputs:
                if operand in self.given or operand in self.cuts:
                    leaves.add(operand)
                elif operand not in seen:
                    seen.add(operand)
                    todo.append(operand)
        return sum(elements(n) >= size for n in leaves) <= _MOST_LOADS

    def _merged(self, parts: Sequence[Group]) -> list[Group]:
        """Groups that compute something in common, or walk the same array, as one."""
        found: list[Group] = []
        for part in parts:
            alike = [g for g in found if self._belong(g, part)]
            found = [g for g in found if g not in alike]
            found.append(self._joined(part, alike))
        return found

    def _joined(self, part: Group, others: Sequence[Group]) -> Group:
        def all_of(name: str) -> tuple[Node, ...]:
            return self._ordered({n for g in (part, *others) for n in getattr(g, name)})

        parts = 1 + sum(g.parts - _overlap(g, part) for g in others)
        return Group(all_of("outputs"), all_of("loads"), all_of("nodes"), parts)

    def _belong(self, a: Group, b: Group) -> bool:
        if _overlap(a, b):
            return True
        if self._ordered({*a.outputs, *b.outputs}) in self.divided:
            return False
        widest = max(map(elements, (*a.loads, *b.loads)), default=0)
        return any(elements(n) == widest for n in set(a.loads) & set(b.loads))


def _overlap(a: Group, b: Group) -> bool:
    """Whether they compute something in common."""
    return any(n.op != "input" and number(n) is None for n in set(a.nodes) & set(b.nodes))
