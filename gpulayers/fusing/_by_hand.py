"""A layer's kernels with plain launchers: a file to read, and to go on from by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpulayers.export.recording import Formula, Node
from gpulayers.fusing._file import file_text
from gpulayers.fusing._fusion import Fusion
from gpulayers.fusing._kernel import Kernel
from gpulayers.fusing._launch import ELEMENTS, Kernels, beside, held_tile
from gpulayers.fusing._piece import Part
from gpulayers.fusing._program import COLUMN, FULL, ONE, REPEATED, Output, Program
from gpulayers.fusing._split import Split

_MOST = 1 << 15
"""The longest row that is tried."""


def by_hand(made: Fusion | Split) -> str:
    """The text of a module: kernels, and ``triton_forward`` and ``triton_backward`` as ``gl.op`` takes them. Of a layer in
    pieces: kernels, and a launcher for each piece."""
    return _in_pieces(made) if isinstance(made, Split) else _whole(made)


def _whole(fusion: Fusion) -> str:
    programs = (fusion.forward, fusion.backward)
    chosen = [k for p in programs for k in _launched(fusion.kernels[p])]
    inputs = [fusion.names[n] for n in fusion.given]
    dys = [f"d{o.name}" for o in fusion.forward.whole]
    saved = [fusion.names[n] for n in fusion.saved]
    names, x = fusion.namer.nodes, fusion.names[fusion.inputs[0]]
    gradients = [f"d{fusion.names[n]}" for n in fusion.given]
    known = [o.name for o in fusion.backward.whole]

    def like(output: Output) -> str:
        """A gradient has its array's dtype, or where the launcher is not given that, dy's."""
        own = output.name.removeprefix("d")
        return f"{own}.dtype" if own in saved else f"{dys[0]}.dtype"

    forward = _Launcher(fusion.forward, fusion.kernels[fusion.forward], names, f"{x}.shape[0]", lambda _: f"{x}.dtype")
    backward = _Launcher(fusion.backward, fusion.kernels[fusion.backward], names, f"{x}.shape[0]", like)
    launchers = [
        *forward.lines("triton_forward", inputs, [o.name for o in fusion.forward.whole]),
        "",
        "",
        *backward.lines("triton_backward", [*dys, *saved], [n if n in known else "None" for n in gradients]),
    ]
    tail = [
        "# Arrays come to launchers row-major, with elements in them. With the layer's array code as functions,",
        f"#     def forward({', '.join(inputs)}): …",
        f"#     def backward({', '.join([*dys, *saved])}): …",
        "# they make an op, which gpulayers dispatches, explains and checks (gpulayers check FILE.py:op):",
        f'#     {fusion.name} = gl.op("{fusion.name}", forward, backward, triton=(triton_forward, triton_backward))',
    ]
    return "\n".join([file_text(fusion.docstring, chosen), "", *launchers, "", "", *tail, ""])


def _in_pieces(split: Split) -> str:
    launchers: list[str] = []
    for part in split.parts:
        inputs, results = [n.name for n in part.stands.values()], part.namesakes()
        wide = next((n.name for n in part.stands.values() if n.kind == "f" and part.is_wide(n)), None)
        dtype = f"{wide}.dtype" if wide else '"float32"'

        def like(output: Output, part: Part = part, dtype: str = dtype) -> str:
            return dtype if part.is_rounded(output) else '"float32"'

        launcher = _Launcher(part.program, part.kernels, part.namer.nodes, _batch(part), like)
        launchers += ["", "", *launcher.lines(f"launch_{part.name}", inputs, results)]
    kernels = [k for part in split.parts for k in _launched(part.kernels)]
    return "\n".join([file_text(split.docstring, kernels), *launchers[1:], ""])


def _batch(part: Part) -> str:
    """The batch's size, in terms of a piece's arrays."""
    if part.counted is None:
        return "1"
    i, axis, size = part.counted
    count = f"{[*part.stands.values()][i].name}.shape[{axis}]"
    count = count if not size.a else f"({count} - {size.a})"
    return count if size.b == 1 else f"{count} // {size.b}"


def _launched(kernels: Kernels) -> list[Kernel]:
    first = kernels.held or kernels.tiled
    assert first is not None
    return [first, *kernels.finish.values()]


class _Launcher:
    """One direction's launcher as text."""

    def __init__(
        self,
        program: Program,
        kernels: Kernels,
        names: dict[Node, str],
        batch: str,
        dtype: Callable[[Output], str],
    ):
        self.program, self.kernels, self.names, self.batch, self._dtype = program, kernels, names, batch, dtype

    def lines(self, name: str, parameters: Sequence[str], results: Sequence[str]) -> list[str]:
        outputs, first = self.program.whole, _launched(self.kernels)[0]
        totals = [t for kind, t in first.arguments if kind == "part"]
        whole = ".contiguous()" if self.program.inner > 1 else ""
        body = [
            f"{self.names[v]} = {self.names[v.attributes['of']]}[{self._spans(v)}]{whole}" for v in self.program.views
        ]
        body.append(self._extents())
        body += [f"{o.name} = empty({self._shape(o)}, {self._dtype(o)})" for o in outputs]
        parts = [o for o in self.program.outputs if o.of]
        body += [f"{o.name} = {o.of}[..., {o.span[0]}:{o.span[1]}]" for o in parts]
        body += self._tile()
        tiles = "triton.cdiv(M, ROWS)" + ("" if self.kernels.held else " * triton.cdiv(N, BLOCK)")
        if totals:
            body += self._programs(tiles)
            for t in totals:
                wide = self.program.layout[t] is COLUMN
                size = f"({'parts' if wide else 'programs'}, N)" if wide else "(programs,)"
                body.append(f'{self._part(t)} = empty({size}, "float32")')
        else:
            body.append(f"programs = {tiles}")
        body += [f'{self._part(t)} = empty((M,), "float32")' for t in self.program.repeated]
        steps = [self._step(what) for kind, what in first.arguments if kind == "step"]
        numbers = ["M", "N", *steps, *(["each"] if totals else [])]
        options = "UNIT=1, ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS"
        if first.draws:
            body.append(
                "FOURS = BLOCK % 4 == 0 and (M == 1 or N % 4 == 0)  # whether rows begin where a Philox counter does"
            )
            options += ", FOURS=FOURS"
        body.append(f"{first.name}[(programs,)]({', '.join([*self._values(first), *numbers])}, {options})")
        body += [self._finish(layout, k) for layout, k in self.kernels.finish.items()]
        body.append(f"return {', '.join(results)}")
        return [f"def {name}({', '.join(parameters)}, *, empty):", *(f"    {line}" for line in body)]

    def _step(self, what: Any) -> str:
        """From row to row."""
        if isinstance(what, Output):
            return f"{what.name}.stride(-2)"
        return f"{self.names[what]}.stride(-2)" if what in self.program.views else "N"

    def _spans(self, view: Node) -> str:
        whole = view.attributes["of"].shape
        spans = [
            ":" if (a, c) == (0, 1) and b == n else f"{self._number(a)}:{self._number(b)}" + (f":{c}" if c != 1 else "")
            for (a, b, c), n in zip(view.attributes["spans"], whole)
        ]
        return ", ".join(spans)

    def _extents(self) -> str:
        program = self.program
        wide = next(n for n in program.given if program.layout[n] is FULL and n not in program.period)
        x, columns = self.names[wide], program.columns_of(wide)
        if program.inner > 1:
            between = [i - len(wide.shape) for i in program.column_axes(wide)]
            sizes = " * ".join(f"{x}.shape[{i}]" for i in between)
            return f"M, N = {x}.numel() // ({sizes}), {sizes}"
        if self.program.views or any(o.of for o in self.program.outputs):
            columns = max(columns, 1)  # rows of a part do not follow one another
        if not columns:
            return f"M, N = 1, {x}.numel()"
        sizes = " * ".join(f"{x}.shape[{i}]" for i in range(-columns, 0))
        return f"M, N = {x}.numel() // {sizes if columns == 1 else f'({sizes})'}, {sizes}"

    def _shape(self, output: Output) -> str:
        for node, name in self.names.items():
            if self.program.takes(node) and tuple(node.shape) == tuple(output.shape):
                return f"{name}.shape"
        sizes = ", ".join(self._number(n) for n in output.shape)
        return f"({sizes}{',' if len(output.shape) == 1 else ''})"

    def _number(self, value: Any) -> str:
        if not isinstance(value, Formula):
            return repr(value)
        top = self.batch if (value.a, value.b) == (0, 1) else f"({value.a} + {value.b} * {self.batch})"
        whole = (value.d, value.c) == (1, 0)
        text = top if whole else f"{top} / ({value.d} + {value.c} * {self.batch})"
        return f"({text}) ** 0.5" if value.root else text

    def _tile(self) -> list[str]:
        rows = beside(self.program)
        if not self.kernels.held:
            return [
                f"BLOCK = min({ELEMENTS // rows}, triton.next_power_of_2(N))",
                f"ROWS, WARPS = {ELEMENTS} // BLOCK, 4",
            ]
        widest = max(n for n in (1 << k for k in range(16)) if held_tile(self.program, n) is not None and n <= _MOST)
        one = held_tile(self.program, 1)
        elements = one.rows if one else 1
        return [
            "BLOCK = triton.next_power_of_2(N)  # a program holds whole rows",
            f"if BLOCK > {widest}:",
            f'    raise ValueError(f"the rule is rows of at most {widest} elements; got {{N}}")',
            f"ROWS = max({rows}, {elements} // BLOCK)",
            "WARPS = 4 if ROWS * BLOCK <= 2048 else 8 if ROWS * BLOCK <= 4096 else 16",
        ]

    def _programs(self, tiles: str) -> list[str]:
        if self.kernels.held or not self.program.parts(COLUMN):
            lines = [f"tiles = {tiles}", "programs = min(tiles, 1024)", "each = triton.cdiv(tiles, programs)"]
            return [
                *lines,
                "programs = triton.cdiv(tiles, each)",
                *(["parts = programs"] if self.program.parts(COLUMN) else []),
            ]
        return [
            "blocks, high = triton.cdiv(N, BLOCK), triton.cdiv(M, ROWS)",
            "each = triton.cdiv(high, max(1, 512 // blocks))",
            "parts = triton.cdiv(high, each)",
            "programs = parts * blocks",
        ]

    def _part(self, total: Node) -> str:
        return self.program.part_name(total)

    def _values(self, kernel: Kernel) -> list[str]:
        found = {
            "load": lambda n: self.names[n],
            "store": lambda o: o.name,
            "part": self._part,
            "formula": self._number,
        }
        return [found[kind](what) for kind, what in kernel.arguments if kind != "step"]

    def _finish(self, layout: Any, kernel: Kernel) -> str:
        values = ", ".join(self._values(kernel))
        if layout is ONE:
            left = "programs" if any(kind == "part" for kind, _ in kernel.arguments) else "0"
            return f"{kernel.name}[(1,)]({values}, {left}, ROWS=1024)"
        if layout is REPEATED:
            (period,) = {self.program.repetition(what) for kind, what in kernel.arguments if kind == "part"} or {1}
            tile = "UNIT=1, ROWS=128, BLOCK=16"
            return f"{kernel.name}[({-(-period // 16)},)]({values}, M // {period}, {period}, {tile})"
        left = "parts" if any(kind == "part" for kind, _ in kernel.arguments) else "0"
        return f"{kernel.name}[(triton.cdiv(N, 16),)]({values}, {left}, N, UNIT=1, ROWS=128, BLOCK=16)"
