"""Which axes of the widest value each other value follows.

Those axes are the atoms (N, 3, 5 → 0, 1, 2). Every axis of a value is a run of atoms; of weights and other inputs that
becomes known when they meet a value whose axes are known. Sizes are compared at two batch sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gpulayers.export.recording import Node
from gpulayers.export.recording.graph import at_batch
from gpulayers.fusing._refusal import misfit, sizes_in_words
from gpulayers.fusing._tidy import number

BATCHES = (7, 11)
Size = tuple[int, int]
"""At these batch sizes."""
ONE: Size = (1, 1)
_WORDS = (
    "neg abs exp expm1 log log1p sqrt tanh sin cos tan sinh cosh asin acos atan asinh acosh atanh floor ceil erf round "
    "reciprocal sign isnan isinf isfinite not cast add sub mul div floordiv mod pow maximum minimum greater less "
    "greater_equal less_equal equal not_equal and or xor where"
)
ELEMENTWISE = frozenset(_WORDS.split())
REDUCTIONS = frozenset(("sum", "mean", "max", "min", "any", "all"))
ADVICE = {
    "matmul": "a layer of its own for the product (gl.Linear), and this one for what follows",
    "gather": "np.where with comparisons",
    "random_uniform": "gl.random.uniform(x.shape, like=x), which a kernel draws, too",
    "random_normal": "gl.random.normal(x.shape, like=x), which a kernel draws, too",
    "slice": "several inputs, or a layer of its own for the cut",
    "concat": "several outputs",
    "segment_sum": "a layer of its own for it",
}


class Refine(Exception):
    """An atom has to be split into two, the second of this size."""

    def __init__(self, atom: int, inner: int):
        super().__init__(atom, inner)
        self.atom, self.inner = atom, inner


class Axis:
    """An axis of a value; two that are broadcast together become the same one."""

    def __init__(self, size: Size, atoms: tuple[int, ...] | None = None):
        self.size, self._atoms = size, atoms
        self._same: Axis | None = None

    def root(self) -> Axis:
        axis = self
        while axis._same is not None:
            axis = axis._same
        return axis

    @property
    def atoms(self) -> tuple[int, ...] | None:
        return self.root()._atoms

    def unites(self, other: Axis) -> bool:
        """Makes the two one; False where they are known to differ."""
        a, b = self.root(), other.root()
        if a is b:
            return True
        if a._atoms is not None and b._atoms is not None:
            return a._atoms == b._atoms
        if a._atoms is None:
            a._same = b
        else:
            b._same = a
        return True


def sizes(node: Node) -> list[Size]:
    """Of its axes."""
    if any(n is None for n in node.shape):
        raise misfit(node, "an array whose size follows the batch in no known way")
    found = [(int(a), int(b)) for a, b in zip(*(at_batch(node.shape, n) for n in BATCHES))]
    if (0, 0) in found:
        raise misfit(node, f"an array of shape {sizes_in_words(node.shape)}, which is always empty")
    return found


class Axes:
    """The axes of every node of a graph; ``of[node]`` has an Axis, or None for size 1, for each of its own.

    space: the widest node. Given arrays and random words of its shape are taken to have its axes.
    """

    def __init__(self, nodes: Sequence[Node], given: Sequence[Node], space: Node):
        self.space, self._alike = space, {*given, *(n for n in nodes if n.op == "random_bits")}
        self.atoms: list[Size] = [s for s in sizes(space) if s != ONE]
        self._parts = [(i,) for i in range(len(self.atoms))]
        while True:
            self.of: dict[Node, list[Axis | None]] = {}
            try:
                for node in (*given, *nodes):
                    self.of[node] = self._placed(node)
                return
            except Refine as split:
                self._refine(split.atom, split.inner)

    def _refine(self, atom: int, inner: int) -> None:
        size = self.atoms[atom][0]
        self.atoms[atom : atom + 1] = [(size // inner,) * 2, (inner,) * 2]
        moved = lambda a: (a, a + 1) if a == atom else (a + (a > atom),)  # noqa: E731
        self._parts = [tuple(m for a in part for m in moved(a)) for part in self._parts]

    def atoms_of(self, node: Node) -> frozenset[int] | None:
        """The atoms that a value follows; None where some axis was never broadcast against a known one."""
        found = [axis.atoms for axis in self.of[node] if axis is not None]
        return None if None in found else frozenset(a for run in found for a in run or ())

    # --- what each operation does to axes ----------------------------------------------------------------------------

    def _placed(self, node: Node) -> list[Axis | None]:
        axes, parts = self._axes(node), iter(self._parts)
        if node is self.space or (node in self._alike and sizes(node) == sizes(self.space)):
            for axis in filter(None, axes):
                axis.root()._atoms = next(parts)
        return axes

    def _axes(self, node: Node) -> list[Axis | None]:
        if node.op in ("input", "full", "random_bits"):
            return self._fresh(node)
        if node.op == "draw":
            return [None]  # two numbers for all
        if node.op == "const":
            if number(node) is None and _step(node) is None:
                raise misfit(
                    node, "an array of constants", "add_weight(…, trainable=False), or np.arange(n) and arithmetic"
                )
            return self._fresh(node)
        if node.op in ELEMENTWISE:
            return self._broadcast(node)
        if node.op in REDUCTIONS:
            return self._reduced(node)
        before = self.of[node.inputs[0]] if node.inputs else []
        match node.op:
            case "reshape":
                return self._reshaped(node)
            case "broadcast":
                return self._spread(node, before)
            case "transpose":
                return [before[a] for a in node.attributes["axes"]]
            case "cumsum" | "reverse":
                return list(before)
        raise misfit(node, f"{node.op} has no counterpart in a fused kernel", ADVICE.get(node.op, ""))

    @staticmethod
    def _fresh(node: Node) -> list[Axis | None]:
        return [None if s == ONE else Axis(s) for s in sizes(node)]

    def _broadcast(self, node: Node) -> list[Axis | None]:
        rank = len(node.shape)
        axes: list[Axis | None] = [None] * rank
        for operand in node.inputs:
            own = self.of[operand]
            for at, axis in enumerate(own, rank - len(own)):
                before = axes[at]
                if axis is not None and before is not None and not before.unites(axis):
                    raise misfit(node, "it brings together what lies along different axes of the input")
                axes[at] = before or axis
        return axes

    def _reduced(self, node: Node) -> list[Axis | None]:
        gone, kept = set(node.attributes["axes"]), node.attributes["keepdims"]
        before = self.of[node.inputs[0]]
        return [None if i in gone else axis for i, axis in enumerate(before) if kept or i not in gone]

    def _spread(self, node: Node, before: list[Axis | None]) -> list[Axis | None]:
        new = [None if s == ONE else Axis(s) for s in sizes(node)]
        more = len(new) - len(before)
        return [*new[:more], *(old or fresh for old, fresh in zip(before, new[more:]))]

    def _reshaped(self, node: Node) -> list[Axis | None]:
        source, wanted = node.inputs[0], sizes(node)
        left = [axis for axis in self.of[source] if axis is not None]
        if [axis.size for axis in left] == [s for s in wanted if s != ONE]:
            axes = iter(left)
            return [None if s == ONE else next(axes) for s in wanted]
        if number(source) is not None:
            return self._fresh(node)
        runs = [axis.atoms for axis in left]
        if None in runs:
            raise misfit(
                node, "a reshape of what does not follow the input's axes", "weights of the shape that is used"
            )
        units = [a for run in runs for a in run or ()]
        return [None if s == ONE else Axis(s, self._taken(node, s, units)) for s in wanted]

    def _taken(self, node: Node, size: Size, units: list[int]) -> tuple[int, ...]:
        """The atoms, off the front of ``units``, that make up this size."""
        run: list[int] = []
        while (have := self._size(run)) != size:
            if not units:
                raise misfit(node, f"a reshape to {sizes_in_words(node.shape)} cuts across the input's axes")
            atom, (left, rest) = units[0], (size[0] // max(have[0], 1), size[0] % max(have[0], 1))
            if rest or (self._size([*run, atom])[0] > size[0]):
                self._split(node, atom, left, bool(rest))
            run.append(units.pop(0))
        return tuple(run)

    def _split(self, node: Node, atom: int, outer: int, uneven: bool) -> None:
        first, second = self.atoms[atom]
        if uneven or first != second or outer < 2 or first % outer:
            raise misfit(node, f"a reshape to {sizes_in_words(node.shape)} cuts across the input's axes")
        raise Refine(atom, first // outer)

    def _size(self, run: Sequence[int]) -> Size:
        first, second = (math.prod(self.atoms[a][i] for a in run) for i in (0, 1))
        return first, second


def _step(node: Node) -> Any:
    """(start, step) of a constant that counts along its only axis, as np.arange does; None for others."""
    value = node.attributes["value"]
    flat = value.reshape(-1)
    if value.size < 2 or value.size != max(value.shape) or node.kind == "b":
        return None
    start, step = flat[0].item(), (flat[1] - flat[0]).item()
    exact = (start + step * range(value.size)[-1] == flat[-1]) and all(
        flat[i] == start + step * i for i in range(value.size)
    )
    return (start, step) if exact else None


counting = _step
