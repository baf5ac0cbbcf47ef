"""How a program's kernels are launched: grids, tiles, and what one kernel leaves for the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gpulayers.export.recording import Node
from gpulayers.fusing._kernel import Kernel
from gpulayers.fusing._program import COLUMN, FULL, ONE, Program

ELEMENTS = 2048
"""Of a tile, but where a row is longer."""
WALKED, _WALKING = 4096, 16
"""Elements of a row that is walked, at a time, and the warps that do."""
_HELD_BY_A_THREAD = 80
"""Registers for a row, at most: the rest compute."""
_NEIGHBOURS = 32
"""Rows side by side whose numbers fill a line of memory."""
_WARPS = (4, 8, 16)
_SIZES = (1024, 2048, 4096, 8192)


class Tile(NamedTuple):
    rows: int
    block: int
    warps: int

    def options(self) -> dict[str, int]:
        return {"ROWS": self.rows, "BLOCK": self.block, "num_warps": self.warps}


class Kernels(NamedTuple):
    """All that serve one program."""

    program: Program
    held: Kernel | None
    looped: Kernel | None
    """For rows that are too wide to be held; None where no kernel serves those."""
    tiled: Kernel | None
    finish: dict[Any, Kernel]
    """Second kernels, by the layout of what they give."""
    measured: Mapping[int, Tile] = {}
    """The first kernel's tiles, by the size class of what is launched; for others ``held_tile`` or ``tiled_tile`` chooses."""

    def texts(self) -> list[Kernel]:
        return [k for k in (self.held, self.looped, self.tiled, *self.finish.values()) if k is not None]


def held_tile(program: Program, columns: int) -> Tile | None:
    """For rows held in registers; None for those that are too wide."""
    block = 1 << max(columns - 1, 0).bit_length()
    tiles = program.tiles() + len(program.parts(COLUMN))
    elements = max(block * beside(program), ELEMENTS if tiles <= 4 else ELEMENTS // 2)
    for warps in _WARPS:
        if tiles * elements <= _HELD_BY_A_THREAD * 32 * warps and (elements <= 512 * warps or warps == _WARPS[-1]):
            return Tile(elements // block, block, warps)
    return None


def tiled_tile(program: Program, columns: int) -> Tile:
    block = min(ELEMENTS // beside(program), 1 << max(columns - 1, 0).bit_length())
    return Tile(ELEMENTS // block, block, 4)


def walked_tile(program: Program) -> Tile:
    """For rows that are too wide to be held."""
    rows = beside(program)
    return Tile(rows, max(1, WALKED // rows), _WALKING)


def beside(program: Program) -> int:
    """Rows that a tile has at least: those that lie side by side in memory are loaded together."""
    return 1 if program.inner == 1 else min(_NEIGHBOURS, 1 << (program.inner - 1).bit_length())


def size_class(m: int, n: int) -> int:
    """Of so many rows and columns: those with as many elements, but for a factor of two."""
    return max(m * n, 1).bit_length()


def tiles(kernels: Kernels, columns: int) -> list[Tile]:
    """What is worth measuring for a program's first kernel: rows held, then rows walked; else any tile."""
    program = kernels.program
    block = 1 << max(columns - 1, 0).bit_length()
    if kernels.held is None:
        blocks = [(elements, min(elements // beside(program), block)) for elements in _SIZES]
        return [
            Tile(elements // block, block, warps)
            for elements, block in blocks
            for warps in _WARPS
            if elements >= 128 * warps
        ]
    values = program.tiles() + len(program.parts(COLUMN))
    found = []
    for elements in dict.fromkeys(max(block * beside(program), size) for size in _SIZES):
        for warps in _WARPS:
            each = elements // (32 * warps)
            if each >= 4 and values * each <= _HELD_BY_A_THREAD:
                found.append(Tile(elements // block, block, warps))
    if kernels.looped is not None and block > _SIZES[-1]:
        rows = beside(program)
        found += [Tile(rows, w // rows, warps) for w in (WALKED // 2, WALKED, 2 * WALKED) for warps in _WARPS[1:]]
    return found


def step(part: Any) -> int:
    """From row to row of a part of a wider array."""
    return 0 if part is None else part.stride(-2) if part.ndim > 1 else part.numel()


class Launch:
    """One call of a program's kernels. given: its arrays; outputs: {name: an array to fill, or None}."""

    def __init__(
        self,
        kernels: Kernels,
        module: Any,
        given: Mapping[Node, Any],
        outputs: Mapping[str, Any],
        batch: int,
        empty: Callable,
    ):
        from gpulayers.kernels.triton import _tile

        self.program, self.kernels, self.module = kernels.program, kernels, module
        self.tools, self.outputs, self.batch, self.empty = _tile, outputs, batch, empty
        self.m, self.n = self.program.extents(batch)
        self.steps: dict[Any, int] = {o: step(outputs[o.name]) for o in self.program.outputs if o.of}
        self.arrays = self._rows(self.program.arrays(given, batch))
        self.rows: dict[Node, Any] = {}
        """Values of rows, from one kernel for the next."""
        self.parts: dict[Node, Any] = {}
        self.outputs = dict(outputs) | self._sums_of_rows()
        self.device = _tile.device(next(iter(given.values())))

    def _rows(self, given: Mapping[Node, Any]) -> dict[Node, Any]:
        """The arrays as kernels take them: wide ones in rows that lie a step apart, others dense."""
        layout, found = self.program.layout, {}
        wide = [x for node, x in given.items() if layout[node] is FULL]
        joined = any(o.of for o in self.program.outputs)
        if self.program.inner > 1:
            return {node: self.tools.dense(x, self.empty) for node, x in given.items()}
        if wide and self.m == 1 and (joined or not all(x.is_contiguous() for x in wide)):
            last = wide[0].shape[-1]
            if last and all(x.shape == wide[0].shape for x in wide):
                self.m, self.n = self.n // last, last
        for node, x in given.items():
            if layout[node] is FULL:
                found[node], self.steps[node] = self._stepped(x)
            else:
                found[node] = self.tools.dense(x, self.empty)
        return found

    def _sums_of_rows(self) -> dict[str, Any]:
        """Where each row leaves what a sum over some axes of the rows adds up."""
        found = {}
        for t in self.program.repeated:
            found[self.program.part_name(t)] = part = self.empty((self.m,), "float32") if self._is_asked(t) else None
            period = self.program.repetition(t)
            self.parts[t] = None if part is None else part.view(self.m // period, period)
        return found

    def _is_asked(self, total: Node) -> bool:
        return any(self.outputs[o.name] is not None for o in self.program.follow(total))

    def _stepped(self, x: Any) -> tuple[Any, int]:
        """(x, the step from row to row), copied where rows do not lie along memory."""
        if not x.is_contiguous() and x.shape[-1] == self.n and (step := self.tools.row_step(x)) is not None:
            return x, step
        return self.tools.dense(x, self.empty), self.n

    def run(self) -> None:
        kernels = self.kernels
        dense = (self.m, self.n) == self.program.extents(self.batch)
        measured = kernels.measured.get(size_class(self.m, self.n)) if dense else None
        if kernels.held is None:
            assert kernels.tiled is not None
            self._tiled(kernels.tiled, measured)
        elif (tile := measured or held_tile(self.program, self.n)) is not None and tile.block >= self.n:
            self._by_rows(kernels.held, tile)
        else:
            assert kernels.looped is not None
            self._by_rows(kernels.looped, tile or walked_tile(self.program))
            if kernels.tiled is not None:
                self._tiled(kernels.tiled)
        for layout, kernel in kernels.finish.items():
            self._finish(layout, kernel)

    # --- grids -------------------------------------------------------------------------------------------------------

    def _by_rows(self, kernel: Kernel, tile: Tile) -> None:
        tiles = self.tools.cdiv(self.m, tile.rows) if self.n else 0
        totals = [t for kind, t in kernel.arguments if kind == "part"]
        most = self.device.sms * max(1, min(16, 8192 // tile.block)) if totals else tiles
        programs, each = self.tools.split(tiles, most)
        self._launch(kernel, programs, tile, totals, programs, each)

    def _tiled(self, kernel: Kernel, measured: Tile | None = None) -> None:
        tile = measured or tiled_tile(self.program, self.n)
        blocks, high = self.tools.cdiv(self.n, tile.block), self.tools.cdiv(self.m, tile.rows)
        totals = [t for kind, t in kernel.arguments if kind == "part"]
        if not totals:
            return self._launch(kernel, blocks * high, tile, totals, 0, 1)
        if self.program.parts(COLUMN):
            parts, each = self.tools.split(high, max(1, self.tools.cdiv(4 * self.device.sms, max(blocks, 1))))
            return self._launch(kernel, parts * blocks, tile, totals, parts, each)
        programs, each = self.tools.split(blocks * high, 8 * self.device.sms)
        return self._launch(kernel, programs, tile, totals, programs, each)

    def _launch(self, kernel: Kernel, programs: int, tile: Tile, totals: list[Node], parts: int, each: int) -> None:
        layout = self.program.layout
        for t in totals:
            size = (parts, self.n) if layout[t] is COLUMN else (programs,)
            self.parts[t] = self.empty(size, "float32") if self._is_asked(t) else None
        for kind, node in kernel.arguments:
            if kind == "keep":
                self.rows[node] = self.empty((self.m,), "float32")
        steps = [self.steps[node] for kind, node in kernel.arguments if kind == "step"]
        unit, *sizes = self.tools.in_units(self.n, *steps)
        numbers = [self.m, *sizes, *([each] if totals else [])]
        function = getattr(self.module, kernel.name)
        options = tile.options()
        if kernel.draws:  # four neighbours share a counter
            options["FOURS"] = tile.block % 4 == 0 and (self.m == 1 or self.n % 4 == 0)
        self.tools.launch(function, (programs,), *self._values(kernel), *numbers, UNIT=unit, **options)

    def _finish(self, layout: Any, kernel: Kernel) -> None:
        if all(self.outputs[o.name] is None for kind, o in kernel.arguments if kind == "store"):
            return
        left = [self.parts[t] for kind, t in kernel.arguments if kind == "part"]
        parts = next((x.shape[0] for x in left if x is not None), 0)
        function = getattr(self.module, kernel.name)
        if layout is ONE:
            self.tools.launch(function, (1,), *self._values(kernel), parts, ROWS=1024, num_warps=4)
            return
        columns = next((x.shape[1] for x in left if x is not None), self.n)
        cols = 16 if columns <= 1024 else 32
        unit, n = self.tools.in_units(columns)
        tile = {"UNIT": unit, "ROWS": ELEMENTS // cols, "BLOCK": cols, "num_warps": 4}
        self.tools.launch(function, (self.tools.cdiv(columns, cols),), *self._values(kernel), parts, n, **tile)

    def _values(self, kernel: Kernel) -> list[Any]:
        found = []
        for kind, what in kernel.arguments:
            match kind:
                case "load":
                    found.append(self.arrays[what])
                case "row" | "keep":
                    found.append(self.rows[what])
                case "store":
                    found.append(self.outputs[what.name])
                case "part":
                    found.append(self.parts[what])
                case "formula":
                    found.append(float(what(self.batch)))
        return found
