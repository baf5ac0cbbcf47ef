"""One direction of a layer, read for a kernel: what each value is as a tile, and in which pass over a row it is known.

Tiles have rows and columns: the leading and the trailing axes of the widest value. A value has one element for each of
both (FULL), for each row, for each column, or is one number. A reduction along the columns ends a pass over the row; a
sum over rows ends the kernel: each program leaves a part, and a second kernel adds the parts up in a fixed order.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gpulayers.export.recording import Formula, Node, Unrecordable, needed
from gpulayers.export.recording.graph import at_batch
from gpulayers.fusing._axes import REDUCTIONS, Axes, sizes
from gpulayers.fusing._refusal import misfit, sizes_in_words
from gpulayers.fusing._tidy import count, number, tidy


class Layout(enum.Enum):
    """(has rows, has columns, …)"""

    FULL = True, True
    ROW = True, False
    COLUMN = False, True
    ONE = False, False
    REPEATED = False, True, "one value for each of the last of the rows' axes, summed over the others"

    @property
    def rows(self) -> bool:
        return self.value[0]

    @property
    def columns(self) -> bool:
        return self.value[1]


FULL, ROW, COLUMN, ONE, REPEATED = Layout


class Output(NamedTuple):
    """What a program yields: y, or the gradient of an input or a weight."""

    name: str
    node: Node
    shape: tuple
    """Sizes and Formulas."""
    kept: bool = False
    """For backward alone, in float32 at least."""
    of: str = ""
    """The output that it is a part of, ``span`` of its last axis."""
    span: tuple[int, int] = (0, 0)


class Program:
    """name: of its kernels. given: the arrays that it may load. outputs: what it yields; optional: if it is asked for.
    loaded: {a value of another program: the given array that has it}.
    """

    def __init__(
        self,
        name: str,
        given: Sequence[Node],
        outputs: Sequence[Output],
        optional: bool = False,
        loaded: Mapping[Node, Node] | None = None,
    ):
        self.stands = stands = tidy([o.node for o in outputs], given, loaded)
        self.name, self.optional = name, optional
        self.whole = list(outputs)
        """The outputs as they are given; ``outputs`` has the parts that the kernel stores."""
        self.outputs = [part for o in outputs for part in _parts(o._replace(node=stands[o.node]))]
        roots = [o.node for o in self.outputs]
        for node in roots:
            if node.kind != "f":
                raise misfit(node, "an output that is no floating-point number", "x.dtype: y.astype(x.dtype)")
        nodes = needed(roots, given)
        self.views = [n for n in nodes if n.op == "input"]
        """Parts of given arrays, which are loaded as arrays of their own."""
        self.nodes = self._recorded = [n for n in nodes if n.op != "input"]
        used = {id(i) for n in self.nodes for i in n.inputs} | {id(n) for n in roots}
        self.given = [*(n for n in given if id(n) in used), *self.views]
        widest = self._widest()
        self.space = widest.shape
        self.axes = Axes(self.nodes, self.given, widest)
        self._split()

    def _widest(self) -> Node:
        size = lambda node: math.prod(first for first, _ in sizes(node))  # noqa: E731
        loaded = max(self.given, key=size, default=None)
        other = max(self.nodes, key=size, default=loaded)
        widest = other if loaded is None or (other is not None and size(other) > size(loaded)) else loaded
        if widest is None:
            raise Unrecordable("nothing in it follows its input")
        return widest

    def arrays(self, given: Mapping[Node, Any], batch: int) -> dict[Node, Any]:
        """The arrays that it loads, from those that it is given."""
        found = {n: given[n] for n in self.given if n not in self.views}
        for view in self.views:
            spans = at_batch(view.attributes["spans"], batch)
            found[view] = given[view.attributes["of"]][tuple(slice(*map(int, span)) for span in spans)]
        return found

    def takes(self, node: Node) -> bool:
        """Whether it loads a given array, or a part of it."""
        return node in self.given or any(v.attributes["of"] is node for v in self.views)

    # --- rows and columns --------------------------------------------------------------------------------------------

    def _split(self) -> None:
        """Where rows end and columns begin: nowhere for what is computed number by number, else as late as will do, else
        columns are axes between others."""
        count = len(self.axes.atoms)
        said: dict[int, Unrecordable] = {}
        trailing = [(first, count) for first in (0, *range(count - 1, 0, -1))]
        between = [(first, end) for end in range(count - 1, 1, -1) for first in range(end - 1, 0, -1)]
        for first, end in (*trailing, *between):
            try:
                self._arrange(first, end)
                return
            except Unrecordable as error:
                said.setdefault(first if end == count else 0, error)
        raise said[max(said)]

    def _arrange(self, first_column: int, end: int) -> None:
        count = len(self.axes.atoms)
        self.columns = frozenset(range(first_column, end))
        self._row_order = [*range(first_column), *range(end, count)]
        self._rows = frozenset(self._row_order)
        self.inner = math.prod(self.axes.atoms[a][0] for a in range(end, count))
        """How many rows lie side by side in memory, each of its numbers so far from the next; 1 where rows lie along it."""
        self.layout: dict[Node, Layout] = {}
        self.stage: dict[Node, int] = {}
        """After how many passes over a row the value can be known."""
        self.totals: list[Node] = []
        """Sums over rows."""
        self.repeated: dict[Node, Node] = {}
        """{a sum over some axes of rows: the value of each row that it adds up}"""
        self.period: dict[Node, int] = {}
        """After how many rows a value for each row comes again."""
        self.after: set[Node] = set()
        """What follows from sums over rows, those included."""
        if self._rows:
            self._require_fixed(range(first_column, count), self.outputs[0].node)
        nodes, self.nodes = self._recorded, []
        for node in (*self.given, *nodes):
            self.layout[node] = self._layout(node)
            self._place(node)
            self.nodes += () if node in self.given else (node,)
        self._check_outputs()

    def _layout(self, node: Node) -> Layout:
        atoms = self.axes.atoms_of(node)
        if atoms is None:
            if number(node) is not None:
                return ONE
            raise misfit(
                node, f"an array of shape {sizes_in_words(node.shape)} that never meets the input", "", self.nodes
            )
        if not atoms:
            return ONE
        if atoms == self._rows | self.columns:
            return FULL
        if atoms in (self._rows, self.columns):
            return ROW if atoms == self._rows else COLUMN
        if self._ends_rows(atoms):
            self._require_fixed(atoms, node)
            if any(i in self.after for i in node.inputs) or (node.op in ("sum", "mean") and self._gone(node)):
                return REPEATED
            self.period[node] = math.prod(self.axes.atoms[a][0] for a in atoms)
            return ROW
        if self._comes_again(node, atoms - self.columns) and self.columns <= atoms:
            return FULL
        rule = "all of x, one value for each of its leading axes, one for each of its trailing axes, or one"
        came = f"an array of shape {sizes_in_words(node.shape)}: a fused kernel has {rule}"
        raise misfit(node, came, "x.reshape(…), so that what is summed or broadcast along is last", self.nodes)

    def _comes_again(self, node: Node, atoms: frozenset[int]) -> bool:
        """Whether a value follows the last of the rows' axes: a table of positions, the same for each of the batch."""
        period = math.prod(self.axes.atoms[a][0] for a in atoms)
        if not self._ends_rows(atoms) or period % self.inner or node.op == "random_bits":
            return False
        if node.op in REDUCTIONS and self._gone(node) != self.columns:
            return False
        self._require_fixed(atoms, node)
        self.period[node] = period
        return True

    def _ends_rows(self, atoms: frozenset[int]) -> bool:
        """Whether they are the last of the rows' axes."""
        return bool(atoms) and atoms == frozenset(self._row_order[-len(atoms) :])

    def _require_fixed(self, atoms: Iterable[int], node: Node) -> None:
        """Only the first axes of rows may follow the batch: the text has the other sizes."""
        if any(first != second for first, second in (self.axes.atoms[a] for a in atoms)):
            raise misfit(node, "an axis that follows the batch, behind others", "the batch as the first axis")

    def _place(self, node: Node) -> None:
        """The stage of a node, and whether it waits for a sum over rows."""
        stage = max((self.stage[i] for i in node.inputs), default=0)
        if any(i in self.after for i in node.inputs):
            self.after.add(node)
            if self.layout[node].rows or node.op in REDUCTIONS or node.op == "cumsum":
                taken = [i for i in node.inputs if i in self.after]
                raise misfit(
                    node, "what a sum over rows gave is used again", "gl.BatchNorm1d and its kernels", (), taken
                )
        elif node.op in REDUCTIONS and (gone := self._gone(node)):
            if gone == self.columns and self._rows:
                stage += 1
            elif node.op in ("sum", "mean") and self._rows <= (self.axes.atoms_of(node.inputs[0]) or frozenset()):
                self.totals.append(node)
                self.after.add(node)
                if self.layout[node] is REPEATED:
                    self.repeated[node] = self._sum_of_row(node)
            else:
                raise misfit(node, f"{node.op} over rows", "along the last axis")
        elif node.op == "cumsum" and node.kind != "f":
            raise misfit(node, "cumsum of integers", "x.astype(np.float32) first")
        elif node.op == "cumsum" and self._along(node) != self.columns:
            raise misfit(node, "cumsum over rows", "along the last axis")
        elif node.op == "reverse":
            raise misfit(node, "an order that is turned round", "np.flip(np.cumsum(np.flip(x, -1), -1), -1) at most")
        self.stage[node] = stage

    def _sum_of_row(self, total: Node) -> Node:
        """What each row adds to a sum over rows and columns."""
        source = total.inputs[0]
        if self.layout[source] is ROW:
            return source
        axes = self.axes.of[source]
        along = tuple(i for i, axis in enumerate(axes) if axis is not None and set(axis.atoms or ()) <= self.columns)
        shape = tuple(1 if i in along else n for i, n in enumerate(source.shape))
        of_row = Node("sum", (source,), {"axes": along, "keepdims": True}, shape, source.dtype, total.place)
        self.axes.of[of_row] = [None if i in along else axis for i, axis in enumerate(axes)]
        self.layout[of_row], self.stage[of_row] = ROW, self.stage[source] + 1
        self.nodes.append(of_row)
        return of_row

    def _gone(self, node: Node) -> frozenset[int]:
        """The atoms that a reduction sums over."""
        before = self.axes.atoms_of(node.inputs[0])
        now = self.axes.atoms_of(node)
        return (before or frozenset()) - (now or frozenset())

    def _along(self, node: Node) -> frozenset[int]:
        axis = self.axes.of[node][node.attributes["axis"]]
        return frozenset(() if axis is None else axis.atoms or ())

    def is_row_reduction(self, node: Node) -> bool:
        """Whether it sums up each row (or a run of columns) by itself."""
        return node.op in REDUCTIONS and node not in self.after and bool(self._gone(node))

    def _check_outputs(self) -> None:
        words = [n for n in self.nodes if n.op == "random_bits"]
        for node in (*self.given, *words, *(o.node for o in self.outputs)):
            atoms = [a for axis in self.axes.of[node] if axis is not None for a in axis.atoms or ()]
            if atoms != sorted(atoms):
                raise misfit(
                    node, f"{node.name or 'an output'}, whose axes are in another order than the widest array's"
                )
        if len({self.repetition(t) for t in self.repeated}) > 1:
            raise misfit([*self.repeated][-1], "sums over some of the leading axes, and over others")
        for output in self.outputs:
            wide = self._rows and self.layout[output.node] is FULL
            if output.of and wide and (self.columns_of(output.node) != 1 or self.inner > 1):
                raise misfit(output.node, "parts that are joined along one of several axes that are summed up together")
            if output.node in self.period:
                raise misfit(output.node, "an output that is the same in every row, or in every few", "", self.nodes)
            if not self.layout[output.node].rows:
                self.after.add(output.node)

    def extents(self, batch: int) -> tuple[int, int]:
        """(rows, columns) for a batch of this size."""
        columns = math.prod(self.axes.atoms[a][0] for a in self.columns) if self._rows else 0
        size = math.prod(at_batch(self.space, batch))
        return (size // max(columns, 1), columns) if self._rows else (1, size)

    def column_axes(self, node: Node) -> list[int]:
        """Those of its axes that are columns."""
        atoms = [set(() if axis is None else axis.atoms or ()) for axis in self.axes.of[node]]
        return [i for i, run in enumerate(atoms) if run and run <= self.columns]

    def columns_of(self, node: Node) -> int:
        """How many of its axes are columns; 0 where nothing is a row."""
        axes, inner = self.axes.of[node], len(self.column_axes(node))
        known = len(axes) - axes.count(None)
        return inner + axes[known - inner :].count(None) if self._rows else 0

    # --- what the writer asks ----------------------------------------------------------------------------------------

    @property
    def passes(self) -> int:
        """Reductions of a row that wait for one another."""
        return max((self.stage[n] for n in self.nodes), default=0)

    @property
    def by_rows(self) -> bool:
        """Whether a program of the kernel has to see a row as a whole."""
        return self.passes > 0 or bool(self.scans)

    @property
    def scans(self) -> list[Node]:
        """Cumulative sums along rows."""
        return [n for n in self.nodes if n.op == "cumsum"]

    @property
    def walks(self) -> bool:
        """Whether rows too wide to be held can be walked."""
        backwards = any(n.attributes.get("reverse") for n in self.scans)
        return self.by_rows and not backwards and not (self.scans and self.parts(COLUMN))

    def stored(self) -> list[Output]:
        """The outputs that the kernel itself stores."""
        parts = [Output(self.part_name(t), row, row.shape, kept=True) for t, row in self.repeated.items()]
        return [*(o for o in self.outputs if self.layout[o.node].rows), *parts]

    def finished(self, layout: Layout) -> list[Output]:
        """The outputs of the second kernel: one value a column, or one number."""
        return [o for o in self.outputs if self.layout[o.node] is layout]

    def parts(self, layout: Layout) -> list[Node]:
        """Sums over rows of one value a column, or of one number."""
        return [t for t in self.totals if self.layout[t] is layout]

    def follow(self, total: Node) -> list[Output]:
        """The outputs that come from a sum over rows."""
        after = {total}
        for node in self.nodes:
            if after.intersection(node.inputs):
                after.add(node)
        return [o for o in self.outputs if o.node in after]

    def repetition(self, total: Node) -> int:
        """How many numbers a sum over some axes of the rows gives."""
        return math.prod(first for first, _ in sizes(total))

    def part_name(self, total: Node) -> str:
        """What kernels call the parts of a sum over rows: after what follows from it."""
        follow = self.follow(total)
        name = f"{follow[0].name}_parts" if follow else "parts"
        others = [t for t in self.totals if self.follow(t)[:1] == follow[:1]]
        return name if len(others) < 2 else f"{name}{others.index(total)}"

    def formulas(self) -> list[Formula]:
        """Numbers that follow the batch size."""
        return list(dict.fromkeys(f for n in self.nodes if (f := self.formula(n)) is not None))

    def formula(self, node: Node) -> Formula | None:
        """The number, following the batch size, that a node is, or (a mean over rows) divides by."""
        found = count(node) if node in self.totals and node.op == "mean" else number(node)
        return found if isinstance(found, Formula) else None

    def tiles(self) -> int:
        """Values with an element for each row and column that are held at once, at most."""
        order = [n for n in (*self.given, *self.nodes) if self.layout[n] is FULL and n not in self.after]
        place = {n: i for i, n in enumerate(self.nodes)}
        last = {n: max((place[u] for u in self.nodes if n in u.inputs), default=-1) for n in order}
        barriers = [place[n] for n in self.nodes if self.is_row_reduction(n)]
        crossing = [sum(place.get(n, -1) < b < last[n] for n in order) for b in barriers]
        return max([*crossing, 1])


def _parts(output: Output) -> list[Output]:
    """What is joined along the last axis is stored part by part."""
    node = output.node
    if node.op != "concat" or node.attributes["axis"] != len(node.shape) - 1:
        return [output]
    found, start = [], 0
    for i, part in enumerate(node.inputs):
        stop = start + part.shape[-1]
        found.append(Output(f"{output.name}_part{i}", part, part.shape, output.kept, output.name, (start, stop)))
        start = stop
    return found
