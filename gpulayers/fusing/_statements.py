"""The statements of a kernel's body: under each line of the author's, what that line became, with the author's names."""

from __future__ import annotations

import itertools
import keyword
import re
from collections.abc import Iterable, Sequence
from typing import Any

from gpulayers.export.recording import Formula, Node, authors_name
from gpulayers.fusing._axes import REDUCTIONS, counting
from gpulayers.fusing._expression import (
    CALL,
    COMPARISON,
    PRODUCT,
    SUM,
    TYPES,
    Expression,
    expression,
    literal,
    takes_twice,
)
from gpulayers.fusing._program import COLUMN, FULL, ONE, ROW, Program
from gpulayers.fusing._tidy import number

_WORDS = "tl triton libdevice row n at inside tile block blocks part parts start i p M N P UNIT ROWS BLOCK each range float int"
RESERVED = frozenset((*keyword.kwlist, *keyword.softkwlist, *_WORDS.split()))
"""Names that the text around has."""
SHAPES = ("reshape", "broadcast", "transpose")
"""Operations after which a value is the same tile."""
_LONGEST = 96
_EMPTY = {"sum": "0.0", "mean": "0.0", "max": 'float("-inf")', "min": 'float("inf")', "any": "False", "all": "True"}
_COMBINED = {"max": "_larger", "min": "_smaller"}
INSIDE = {FULL: "inside", ROW: "row < M", COLUMN: "n < N", ONE: ""}
"""Where a tile has elements."""


def identifier(name: str, taken: Iterable[str] = ()) -> str:
    """A name for a kernel's text that none in ``taken`` is: letters, digits and _."""
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)
    plain = plain if plain[:1].isalpha() else f"w{plain}"
    taken = RESERVED | set(taken)
    more = itertools.count(2)
    return next(n for n in itertools.chain([plain], (f"{plain}{k}" for k in more)) if n not in taken)


class Statements:
    """What is written so far of one kernel: ``known`` has the expression that stands for each value.

    walked: rows are walked, a tile at a time.
    """

    def __init__(self, program: Program, names: dict[Node, str], formulas: dict[Formula, str], walked: bool = False):
        self.walked = walked
        self.program, self.names, self.formulas = program, names, formulas
        self.taken = {*names.values(), *formulas.values(), *(f"{name}_ptr" for name in names.values())}
        parts = list(map(program.part_name, program.totals))
        self.taken |= {f"{name}_ptr" for name in (*parts, *(o.name for o in program.outputs))}
        self.taken |= {name.replace("_parts", "_sum") for name in parts}
        self.known: dict[Node, Expression] = {}
        self.inside = dict(INSIDE)
        """Where sums over rows take an element: where no other program does."""
        self.helpers: set[str] = set()
        self.first = ""
        """What the first column of a tile is, as a term that is added."""
        self.fours = False
        """Whether a kernel has to know that rows begin where a Philox counter does."""
        self._own: dict[Node, str] = {}
        self._users: dict[Node, list[Node]] = {}
        for node in program.nodes:
            for operand in node.inputs:
                self._users.setdefault(operand, []).append(node)
        for output in program.outputs:
            if not authors_name(output.node, self._users.get(output.node, ())) and output.node not in self._own:
                self._own[output.node] = identifier(output.name, self.taken)
                self.taken.add(self._own[output.node])
        self._place: Any = None

    def emit(self, nodes: Sequence[Node], keep: Iterable[Node] = ()) -> list[str]:
        """Statements for the values that are not known yet; those in ``keep`` get a name of their own."""
        here, keep, lines = set(nodes), set(keep), []
        for node in nodes:
            if node in self.known:
                continue
            value = number(node)
            if value is not None:
                self.known[node] = self._constant(node, value)
                continue
            if node.op == "draw":
                self.known[node] = Expression(f"{self._name(node)}_ptr")
                continue
            if node.op in SHAPES or (node.op in REDUCTIONS and not self.program.is_row_reduction(node)):
                self.known[node] = self.known[node.inputs[0]]
                continue
            if node.op == "random_bits":
                lines += [*self._authors_line(node), *self.drawn(node)]
                continue
            found = self._computed(node)
            if node not in keep and self._is_part(node, found, here):
                self.known[node] = found
                continue
            name = self._name(node)
            lines += self._authors_line(node)
            lines.append(f"{name} = {found.text}")
            if node.op == "cumsum" and self.walked:
                total = f"tl.sum({self.masked(node, self.text(node.inputs[0]))}, 1, keep_dims=True)"
                lines.append(f"{self.before(node)} = {self.before(node)} + {total}")
            self.known[node] = Expression(name)
        return lines

    def _authors_line(self, node: Node) -> list[str]:
        """The line that a value came from, where that is another than the last one's."""
        if node.op == "input" or node.place is None or not node.place.text or node.place == self._place:
            return []
        self._place = node.place
        return ["", f"# {node.place.text}"]

    def forget(self, nodes: Iterable[Node]) -> None:
        """These have to be computed again: another pass over the row begins."""
        self._place = None
        for node in nodes:
            self.known.pop(node, None)

    def text(self, node: Node) -> str:
        return self.known[node].text

    def before(self, scan: Node) -> str:
        """What a cumulative sum came to before the tile at hand."""
        return f"{self._name(scan)}_before"

    def helper(self, name: str) -> str:
        self.helpers.add(name)
        return name

    # --- one value ---------------------------------------------------------------------------------------------------

    def _name(self, node: Node) -> str:
        if node in self.names:
            return self.names[node]
        if node not in self._own:
            own = authors_name(node, self._users.get(node, ()))
            taken = self.taken | {o.name for o in self.program.outputs if o.node is not node}
            counted = next(f"v{k}" for k in itertools.count(1) if f"v{k}" not in taken)
            counted = "words" if node.op == "random_bits" else counted
            self._own[node] = identifier(own or counted, taken)
            self.taken.add(self._own[node])
        return self._own[node]

    def _is_part(self, node: Node, found: Expression, here: set[Node]) -> bool:
        """Whether it stands inside the expression of its only user."""
        users = self._users.get(node, [])
        if node.op == "cumsum" and self.walked:
            return False
        if len(users) != 1 or users[0] not in here or node.op == "input" or takes_twice(users[0]):
            return False
        return users[0].place == node.place and len(found.text) < _LONGEST

    def _constant(self, node: Node, value: object) -> Expression:
        if isinstance(value, Formula):
            return Expression(self.formulas[value])
        return literal(float(value) if node.kind == "f" else value)  # type: ignore[arg-type]

    def _computed(self, node: Node) -> Expression:
        program = self.program
        if node.op == "input":
            return self.loaded(node)
        if node.op == "const":
            start, step = counting(node)
            suffix = ".to(tl.float32)" if node.kind == "f" else ".to(tl.int64)"
            return Expression(f"({start} + {step} * n){suffix}" if (start, step) != (0, 1) else f"n{suffix}")
        operands = [self.known[i] for i in node.inputs]
        if program.is_row_reduction(node):
            return self.reduced(node, operands[0].text)
        if node.op == "cumsum":
            back = ", reverse=True" if "reverse" in node.attributes else ""
            scan = f"tl.cumsum({self.masked(node, operands[0].text)}, 1{back})"
            return Expression(f"{self.before(node)} + {scan}" if self.walked else scan, SUM if self.walked else CALL)
        self.helpers |= {name for name in ("_mod", "_sign", "_isinf", "_isfinite") if name == f"_{node.op}"}
        return expression(node, operands)

    def place(self, name: str, again: str = "") -> str:
        """Where a tile lies in a wide array. again: the remainder of the row that it follows."""
        inner = self.program.inner
        if inner == 1:
            return f"row{again} * {name}_row + n"
        return (
            f"row{again} // {inner} * {inner} * N + row{again} % {inner} + n * {inner}"
            if again
            else f"at + n * {inner}"
        )

    def loaded(self, node: Node) -> Expression:
        """A given array's tile, floating-point numbers as float32."""
        name, layout = self.names[node], self.program.layout[node]
        again = f" % {self.program.period[node]}" if node in self.program.period else ""
        at = {FULL: f" + {self.place(name, again)}", ROW: f" + row{again}", COLUMN: " + n", ONE: ""}[layout]
        other = {"f": "0.0", "i": "0", "b": "False"}[node.kind]
        mask = f", {INSIDE[layout]}, other={other}" if INSIDE[layout] else ""
        kind = TYPES[node.kind]
        return Expression(f"tl.load({name}_ptr{at}{mask}).to({kind})")

    def drawn(self, node: Node) -> list[str]:
        """Random words, uint32, each by the number of its element."""
        layout, draw = self.program.layout[node], self.known[node.inputs[0]].text
        again = f" % {self.program.period[node]}" if node in self.program.period else ""
        element = {
            FULL: "row * N + n" if self.program.inner == 1 else self.place(""),
            ROW: f"row{again}",
            COLUMN: "n.to(tl.int64)",
            ONE: "tl.full((), 0, tl.int64)",
        }
        name, shift = self._name(node), node.attributes["shift"]
        self.known[node] = Expression(f"{name} >> {shift}", PRODUCT) if shift else Expression(name)
        self.helpers |= {"_draw", "word_of"}
        single = f"{name} = word_of({draw}, {element[layout]})"
        if layout is not FULL or self.program.inner > 1:
            return [single]
        self.fours = True
        self.helpers.add("_words_of")
        counter = f"(row * N{self.first}) // 4 + tl.arange(0, BLOCK // 4)[None, :]"
        together = f"{name} = _words_of({draw}, {counter})"
        return ["if FOURS:  # neighbours share a Philox counter", f"    {together}", "else:", f"    {single}"]

    def masked(self, node: Node, text: str) -> str:
        """The operand of a reduction, with what leaves it as it is where the tile has no elements."""
        empty = _EMPTY.get(node.op, "0.0")
        empty = "0" if node.inputs[0].kind == "i" and empty == "0.0" else empty
        return f"tl.where({self.inside[self.program.layout[node.inputs[0]]]}, {text}, {empty})"

    def reduced(self, node: Node, text: str) -> Expression:
        """A row's sum (mean, maximum, …) of a tile."""
        return self.summed(node, self.masked(node, text), 1)

    def summed(self, node: Node, text: str, axis: int) -> Expression:
        """A tile summed up along an axis, which stays with size 1."""
        match node.op:
            case "sum" | "mean":
                total = f"tl.sum({text}, {axis}, keep_dims=True)"
                return Expression(total) if node.op == "sum" else Expression(f"{total} / N", PRODUCT)
            case "any" | "all":
                way = "max" if node.op == "any" else "min"
                return Expression(f"tl.{way}(({text}).to(tl.int32), {axis}, keep_dims=True) != 0", COMPARISON)
        return Expression(f"tl.reduce({text}, {axis}, {self.helper(_COMBINED[node.op])}, keep_dims=True)")

    def accumulated(self, node: Node, so_far: str, text: str) -> str:
        """What a loop has of a reduction after one more tile."""
        value = self.masked(node, text)
        match node.op:
            case "sum" | "mean":
                return f"{so_far} + {value}"
            case "any":
                return f"{so_far} | {value}"
            case "all":
                return f"{so_far} & {value}"
        return f"{self.helper(_COMBINED[node.op])}({so_far}, {value})"

    def start(self, node: Node) -> str:
        """What a loop has of a reduction before the first tile."""
        kind = TYPES[node.inputs[0].kind]
        source = self.program.layout[node.inputs[0]]
        shape = f"({'ROWS' if source.rows else '1'}, {'BLOCK' if source.columns else '1'})"
        return f"tl.full({shape}, {_EMPTY[node.op]}, {kind})"
