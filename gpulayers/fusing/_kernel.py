"""The text of a kernel for a program: in one of three forms, and the second kernel that ends sums over rows.

HELD: a program holds whole rows in registers, and reads them once. LOOPED: rows too wide for that, walked once for each
reduction that waits for another, and once more. TILED: any tile, where no row is summed up, or where that is done.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from gpulayers.export.recording import Formula, Node
from gpulayers.fusing._expression import PRODUCT, Expression
from gpulayers.fusing._program import COLUMN, FULL, ONE, REPEATED, ROW, Layout, Output, Program
from gpulayers.fusing._refusal import misfit
from gpulayers.fusing._statements import INSIDE, Statements, identifier
from gpulayers.fusing._tidy import count


class Form(enum.Enum):
    HELD = "held"
    LOOPED = "looped"
    TILED = "tiled"


HELD, LOOPED, TILED = Form
_FIRST = {HELD: "", LOOPED: " + start", TILED: " + block * BLOCK"}
"""What follows the number of a row's first element in the number of a tile's first one."""
_LONGEST = 110


class Kernel(NamedTuple):
    """A kernel's text, and what its launch gives it, in the order of its parameters."""

    name: str
    text: str
    arguments: tuple[tuple[str, Any], ...]
    """("load", given node), ("row", value of a row from the kernel before), ("store", output), ("keep", value of a row for
    the next kernel), ("part", sum over rows), ("formula", Formula), ("step", given node); sizes follow."""
    helpers: frozenset[str]
    narrow: str = ""
    """Accesses ("loads", "stores") that rightly move less than 128 bits."""
    draws: bool = False
    """Whether it asks if rows begin where a Philox counter does: FOURS."""


class Namer:
    """The names that a layer's kernels share: of arrays and formulas."""

    def __init__(self, given: Iterable[tuple[Node, str]], formulas: Iterable[Formula]):
        self.nodes: dict[Node, str] = {}
        for node, name in given:
            self.nodes[node] = identifier(name, self.nodes.values())
        self.formulas = {f: f"number{i}" for i, f in enumerate(dict.fromkeys(formulas))}

    def add(self, given: Iterable[tuple[Node, str]]) -> None:
        """Parts of arrays: the same part of the same array has one name."""
        known: dict[tuple, str] = {}
        for node, name in given:
            part = node.attributes["of"], node.attributes["spans"]
            if part not in known:
                known[part] = identifier(name, self.nodes.values())
            self.nodes[node] = known[part]


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" if line else "" for line in lines]


class Writer:
    """Writes one kernel of a program."""

    def __init__(self, program: Program, namer: Namer, form: Form):
        self.program, self.form = program, form
        self.body = Statements(program, namer.nodes, namer.formulas, form is LOOPED)
        self.body.first = _FIRST[form]
        self.namer = namer
        self.only_rows = form is LOOPED and bool(program.parts(COLUMN))
        """Whether it leaves everything but the values of rows to a TILED kernel."""
        self.rows_known = form is TILED and program.passes > 0
        """Whether it is that TILED kernel."""
        self.outputs = [o for o in program.stored() if self._stores(o)]
        self.totals = [] if self.only_rows else [t for t in program.totals if t not in program.repeated]
        self.nodes = self._needed()
        self.kept = self._boundary() if self.only_rows or self.rows_known else []

    def _stores(self, output: Output) -> bool:
        """Of two kernels, the first stores values of rows, the second all else."""
        of_row = self.program.layout[output.node] is ROW
        return of_row if self.only_rows else not (self.rows_known and of_row)

    def _roots(self) -> list[Node]:
        return [o.node for o in self.outputs] + [t.inputs[0] for t in self.totals]

    def _needed(self) -> list[Node]:
        """What is computed, in order."""
        program, found = self.program, set()
        todo = self._roots() + (self._row_values() if self.only_rows else [])
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo += node.inputs
        return [n for n in (*program.given, *program.nodes) if n in found]

    def _row_values(self) -> list[Node]:
        """Those of rows, from reductions, that tiles ask for."""
        program = self.program
        wide = [n for n in program.nodes if n not in program.after and program.layout[n].columns]
        asked = {i for n in (*wide, *program.totals) for i in n.inputs}
        asked |= {o.node for o in program.stored()}
        asked = {n for n in asked if n not in program.after}
        return [n for n in program.nodes if n in asked and program.stage[n] and not program.layout[n].columns]

    def _boundary(self) -> list[Node]:
        """Values of rows that one kernel keeps for the next."""
        outputs = {o.node for o in self.program.stored() if self.program.layout[o.node] is ROW}
        asked = {
            i
            for n in self.program.nodes
            if self.program.layout[n].columns or n in self.program.totals
            for i in n.inputs
        }
        kept = [n for n in self._row_values() if n in asked or n not in outputs]
        for node in kept:
            if self.program.layout[node] is ONE:
                raise misfit(
                    node, "a sum along a weight, with the gradients of weights, in rows too wide for registers"
                )
        return kept

    # --- the whole ---------------------------------------------------------------------------------------------------

    def kernel(self) -> Kernel:
        if self.rows_known:
            for node in self.kept:
                self.body.names[node] = identifier(self.body._name(node), self.body.names.values())
            self.nodes = self._after_rows()
        lines = self._walk()
        suffix = {
            HELD: "",
            LOOPED: "_rows" if self.only_rows else "_looped",
            TILED: "_tiles" if self.rows_known else "",
        }
        name = self.program.name + suffix[self.form]
        arguments, parameters = self._arguments()
        steps = [f"{self.namer.nodes[n]}_row" for n in self._steps()] + [f"{o.name}_row" for o in self._joined()]
        head = [*parameters, "M", "N", *steps]
        head += [*(["each"] if self.totals else []), "UNIT: tl.constexpr", "ROWS: tl.constexpr", "BLOCK: tl.constexpr"]
        head += ["FOURS: tl.constexpr"] * self.body.fours
        units = ["N", *steps]
        scaled = [f"{', '.join(units)} = {', '.join(f'{u} * UNIT' for u in units)}"]
        scaled = scaled if len(scaled[0]) < _LONGEST else [f"{u} = {u} * UNIT" for u in units]
        text = "\n".join(["@triton.jit", *signature(name, head), *_indented([*scaled, *lines])]) + "\n"
        narrow = "stores" if self.only_rows else ""
        return Kernel(name, text, tuple(arguments), frozenset(self.body.helpers), narrow, self.body.fours)

    def _after_rows(self) -> list[Node]:
        """What is computed where the values of rows are loaded."""
        program, found = self.program, set()
        todo = self._roots()
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo += () if node in self.kept else node.inputs
        return [n for n in (*program.given, *program.nodes) if n in found]

    def _arguments(self) -> tuple[list[tuple[str, Any]], list[str]]:
        loads = [n for n in self.nodes if n.op in ("input", "draw")]
        formulas = _formulas(self.program, self.namer, self.nodes)
        found: list[tuple[str, Any, str]] = [("load", n, f"{self.namer.nodes[n]}_ptr") for n in loads]
        found += [("row", n, f"{self.body.names[n]}_ptr") for n in self.kept if self.rows_known]
        found += [("store", o, f"{o.name}_ptr") for o in self.outputs]
        found += [("keep", n, self._kept_pointer(n)) for n in self.kept if self.only_rows]
        found += [("part", t, self._part(t)) for t in self.totals]
        found += [("formula", f, self.namer.formulas[f]) for f in formulas]
        found += [("step", n, "") for n in self._steps()] + [("step", o, "") for o in self._joined()]
        return [(kind, value) for kind, value, _ in found], [name for *_, name in found if name]

    def _kept_pointer(self, node: Node) -> str:
        """Where a value of a row is left for the next kernel, which an output may be, too."""
        name = self.body.text(node)
        return f"{name}_kept_ptr" if any(o.name == name for o in self.outputs) else f"{name}_ptr"

    def _steps(self) -> list[Node]:
        wide = [n for n in self.nodes if n.op == "input" and self.program.layout[n] is FULL]
        return wide if self.program.inner == 1 else []

    def _joined(self) -> list[Output]:
        """The outputs that are parts of wider ones."""
        return [o for o in self.outputs if o.of]

    def _part(self, total: Node) -> str:
        return f"{self.program.part_name(total)}_ptr"

    # --- the walk over tiles -----------------------------------------------------------------------------------------

    def _walk(self) -> list[str]:
        rows, columns = "tl.arange(0, ROWS)[:, None]", "tl.arange(0, BLOCK)[None, :]"
        tiled, held = self.form is TILED, self.form is HELD
        blocks = ["blocks = (N - 1) // BLOCK + 1"] if tiled else []
        along = [f"n = block * BLOCK + {columns}"] if tiled else []
        fixed = [f"n = {columns}"] if held else blocks
        row = f"row = tile{' // blocks' if tiled else ''} * ROWS + {rows}"
        inner = self.program.inner
        beside = [f"at = row // {inner} * {inner} * N + row % {inner}"] if inner > 1 else []
        where = [row, *beside, *(["block = tile % blocks"] if tiled else []), *along]
        mask = ["inside = (row < M) & (n < N)"] if tiled or held else []
        if tiled or held:
            self.body.inside[ROW] = "(row < M) & (block == 0)" if tiled else "row < M"
        body = self._tile()
        if not self.totals:
            return [*fixed, "tile = tl.program_id(0).to(tl.int64)", *where, *mask, *body]
        head = fixed
        if tiled and self.program.parts(COLUMN):
            head = [*blocks, "part = tl.program_id(0) // blocks", "parts = tl.num_programs(0) // blocks"]
            head += ["block = (tl.program_id(0) % blocks).to(tl.int64)", *along]
            where = [f"row = (i * parts + part).to(tl.int64) * ROWS + {rows}", *beside]
        else:
            where = ["tile = (i * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)", *where]
        sums = [f"{self._sum(t)} = {self.body.start(t)}" for t in self.totals]
        return [*head, *sums, "for i in range(each):", *_indented([*where, *mask, *body]), *self._parts()]

    def _sum(self, total: Node) -> str:
        return _sum_name(self.program, total)

    def _parts(self) -> list[str]:
        """What a program leaves of sums over rows."""
        lines = []
        for t in self.totals:
            pointer, total = self._part(t), self._sum(t)
            lines.append(f"if {pointer} is not None:")
            if self.program.layout[t] is COLUMN:
                part = "part" if self.form is TILED else "tl.program_id(0)"
                lines.append(
                    f"    tl.store({pointer} + {part}.to(tl.int64) * N + n, tl.sum({total}, 0, keep_dims=True), n < N)"
                )
            else:
                lines.append(f"    tl.store({pointer} + tl.program_id(0), tl.sum({total}))")
        return ["", *lines]

    # --- one tile ----------------------------------------------------------------------------------------------------

    def _tile(self) -> list[str]:
        """From loads to stores."""
        if self.form is LOOPED:
            return self._passes()
        roots = self._roots()
        lines = [] if not self.rows_known else self._loaded_rows()
        lines += self.body.emit(self.nodes, roots)
        return [*lines, "", *self._stored(self.outputs), *self._added(FULL, ROW)]

    def _loaded_rows(self) -> list[str]:
        lines = []
        for node in self.kept:
            name = self.body.names[node]
            lines.append(f"{name} = tl.load({name}_ptr + row, row < M, other=0.0)")
            self.body.known[node] = Expression(name)
        return lines

    def _stored(self, outputs: Sequence[Output]) -> list[str]:
        lines = []
        for output in outputs:
            layout = self.program.layout[output.node]
            value, pointer = self.body.text(output.node), f"{output.name}_ptr"
            step = f"{output.name}_row" if output.of else "N"
            at = f"row * {step} + n" if layout is FULL else f"row * {step}" if output.of else "row"
            at = self.body.place("") if layout is FULL and self.program.inner > 1 else at
            mask = INSIDE[layout]
            if self.form is TILED and layout is ROW:
                mask = "(row < M) & (block == 0)"
            store = f"tl.store({pointer} + {at}, {value}, {mask})"
            lines += [f"if {pointer} is not None:", f"    {store}"] if self.program.optional or output.kept else [store]
        return lines

    def _added(self, *layouts: Layout) -> list[str]:
        """One more tile for the sums over rows of values of these layouts."""
        lines = []
        for t in self.totals:
            if self.program.layout[t.inputs[0]] not in layouts:
                continue
            total = self._sum(t)
            lines.append(f"{total} = {total} + {self.body.masked(t, self.body.text(t.inputs[0]))}")
        return lines

    # --- rows that are walked ----------------------------------------------------------------------------------------

    def _passes(self) -> list[str]:
        program, lines = self.program, []
        narrow = [n for n in self.nodes if not program.layout[n].columns]
        roots = set(self._roots()) | set(self.kept)
        for stage in range(program.passes + 1):
            lines += self.body.emit([n for n in narrow if program.stage[n] == stage and not self._reduces(n)], roots)
            reductions = [n for n in narrow if program.stage[n] == stage + 1 and self._reduces(n)]
            if reductions:
                lines += self._pass(reductions)
        wide = [o for o in self.outputs if program.layout[o.node] is FULL]
        if wide or self.totals:
            self.body.forget(self._wide())
            sources = [o.node for o in wide] + [t.inputs[0] for t in self.totals]
            closure = self._closure(sources)
            inner = [*self._columns(), *self.body.emit(closure, sources)]
            inner += [*self._stored(wide), *self._added(FULL)]
            lines += ["", *self._scans(closure), "for start in range(0, N, BLOCK):", *_indented(inner)]
        lines += [*self._stored([o for o in self.outputs if program.layout[o.node] is ROW]), *self._added(ROW)]
        for node in self.kept if self.only_rows else ():
            name = self.body.text(node)
            lines.append(f"tl.store({self._kept_pointer(node)} + row, {name}, row < M)")
        return lines

    def _reduces(self, node: Node) -> bool:
        return self.program.is_row_reduction(node)

    def _wide(self) -> list[Node]:
        return [n for n in self.nodes if self.program.layout[n].columns]

    def _closure(self, sources: Iterable[Node]) -> list[Node]:
        """Tiles that these come from."""
        found, todo = set(), list(sources)
        while todo:
            node = todo.pop()
            if node not in found and node not in self.body.known:
                found.add(node)
                todo += node.inputs
        return [n for n in self.nodes if n in found]

    def _scans(self, nodes: Iterable[Node]) -> list[str]:
        """What cumulative sums start from."""
        return [f"{self.body.before(n)} = tl.zeros((ROWS, 1), tl.float32)" for n in nodes if n.op == "cumsum"]

    @staticmethod
    def _columns() -> list[str]:
        return [
            "n = start + tl.arange(0, BLOCK)[None, :].to(tl.int64)",
            "inside = (row < M) & (n < N)",
        ]

    def _pass(self, reductions: list[Node]) -> list[str]:
        """A walk over the row that ends in these."""
        self.body.forget(self._wide())
        sources = [r.inputs[0] for r in reductions]
        names = {r: self.body._name(r) for r in reductions}
        starts = [f"{names[r]} = {self.body.start(r)}" for r in reductions]
        closure = self._closure(sources)
        starts += self._scans(closure)
        inner = [*self._columns(), *self.body.emit(closure, sources)]
        for r in reductions:
            inner.append(f"{names[r]} = {self.body.accumulated(r, names[r], self.body.text(r.inputs[0]))}")
        ends = []
        for r in reductions:
            self.body.known[r] = Expression(names[r])
            ends.append(f"{names[r]} = {self.body.summed(r, names[r], 1).text}")
        return ["", *starts, "for start in range(0, N, BLOCK):", *_indented(inner), *ends]


def _formulas(program: Program, namer: Namer, nodes: Sequence[Node]) -> list[Formula]:
    """Those that a kernel asks for."""
    used = {program.formula(n) for n in nodes}
    return [f for f in namer.formulas if f in used]


def _sum_name(program: Program, total: Node) -> str:
    return program.part_name(total).replace("_parts", "_sum")


def signature(name: str, parameters: Sequence[str]) -> list[str]:
    line = f"def {name}({', '.join(parameters)}):"
    return [line] if len(line) <= 120 else [f"def {name}(", *(f"    {p}," for p in parameters), "):"]


def finishing(program: Program, namer: Namer, layout: Layout) -> Kernel | None:
    """The kernel that adds up what programs left, and what follows from it: one value a column, or one number."""
    outputs = program.finished(layout)
    if not outputs:
        return None
    found: set[Node] = set()
    todo = [o.node for o in outputs]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += () if node in program.totals else node.inputs
    nodes = [n for n in (*program.given, *program.nodes) if n in found]
    parts = [n for n in nodes if n in program.totals]
    for node in nodes:
        wrong = program.layout[node] not in (layout, ONE) or (node in parts and program.layout[node] is not layout)
        if wrong or program.is_row_reduction(node):
            raise misfit(node, "a sum over rows that is summed again along the row", "one sum over all axes: x.sum()")
    body = Statements(program, namer.nodes, namer.formulas)
    lines, names = _summed_parts(program, parts, layout)
    for t in parts:
        over = count(t) if t.op == "mean" else 1
        divisor = namer.formulas[over] if isinstance(over, Formula) else over
        body.known[t] = Expression(f"{names[t]} / {divisor}", PRODUCT) if t.op == "mean" else Expression(names[t])
    lines += body.emit(nodes, [o.node for o in outputs])
    for o in outputs:
        value = body.text(o.node)
        at, mask = (" + n", ", n < N") if layout.columns else ("", "")
        lines += [f"if {o.name}_ptr is not None:", f"    tl.store({o.name}_ptr{at}, {value}{mask})"]
    suffix = {COLUMN: "_columns", REPEATED: "_repeated", ONE: "_numbers"}[layout]
    loads = [n for n in nodes if n.op in ("input", "draw")]
    formulas = _formulas(program, namer, nodes)
    arguments: list[tuple[str, Any]] = [("part", t) for t in parts] + [("load", n) for n in loads]
    arguments += [("store", o) for o in outputs] + [("formula", f) for f in formulas]
    head = [f"{program.part_name(t)}_ptr" for t in parts] + [f"{namer.nodes[n]}_ptr" for n in loads]
    head += [f"{o.name}_ptr" for o in outputs] + [namer.formulas[f] for f in formulas]
    sizes = ["N", "UNIT: tl.constexpr", "ROWS: tl.constexpr", "BLOCK: tl.constexpr"]
    head += ["P", *(sizes if layout.columns else sizes[2:3])]
    name = program.name + suffix
    text = "\n".join(["@triton.jit", *signature(name, head), *_indented(lines)]) + "\n"
    narrow = "" if layout is COLUMN else "loads, stores"  # one number for each program
    return Kernel(name, text, tuple(arguments), frozenset(body.helpers), narrow)


def _summed_parts(program: Program, parts: list[Node], layout: Layout) -> tuple[list[str], dict[Node, str]]:
    names = {t: _sum_name(program, t) for t in parts}
    if layout.columns:
        lines = ["N = N * UNIT", "n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]"]
        at, mask = " + p * N + n", "(p < P) & (n < N)"
    else:
        lines, at, mask = [], " + p", "p < P"
    if not parts:
        return lines, names
    shape = "(ROWS, BLOCK)" if layout.columns else "(ROWS, 1)"
    lines += [f"{names[t]} = tl.zeros({shape}, tl.float32)" for t in parts]
    lines += ["for start in range(0, P, ROWS):", "    p = start + tl.arange(0, ROWS)[:, None].to(tl.int64)"]
    for t in parts:
        pointer = f"{program.part_name(t)}_ptr"
        lines += [f"    if {pointer} is not None:", f"        {names[t]} += tl.load({pointer}{at}, {mask}, other=0.0)"]
    ends = "tl.sum({}, 0, keep_dims=True)" if layout.columns else "tl.sum({})"
    return [*lines, *(f"{names[t]} = {ends.format(names[t])}" for t in parts)], names
