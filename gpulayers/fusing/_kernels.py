"""All kernels that serve one program, and the module that has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpulayers.fusing._file import module_of
from gpulayers.fusing._kernel import HELD, LOOPED, TILED, Kernel, Namer, Writer, finishing
from gpulayers.fusing._launch import Kernels, Tile, held_tile
from gpulayers.fusing._program import COLUMN, ONE, REPEATED, Program

_NONE: Mapping[int, Tile] = {}


def kernels_of(program: Program, namer: Namer, measured: Mapping[int, Tile] = _NONE) -> Kernels:
    """measured: the first kernel's tiles, by size class. Raises Misfit where a form that it needs cannot be written."""
    held = looped = tiled = None
    if program.by_rows:
        held = Writer(program, namer, HELD).kernel()
    if program.walks:
        looped = Writer(program, namer, LOOPED).kernel()
    if not program.by_rows or (program.walks and program.parts(COLUMN)):
        tiled = Writer(program, namer, TILED).kernel()
    finish = {layout: finishing(program, namer, layout) for layout in (COLUMN, REPEATED, ONE)}
    second = {layout: k for layout, k in finish.items() if k is not None}
    return Kernels(program, held, looped, tiled, second, measured)


def refusal(program: Program) -> str | None:
    """Why no kernel computes rows as wide as these; None where one does."""
    columns = program.extents(1)[1]
    if program.by_rows and not program.walks and held_tile(program, columns) is None:
        return f"rows of {columns} elements are too wide for registers, and cannot be walked"
    return None


def module_with(name: str, text: str, kernels: Sequence[Kernel]) -> Any:
    """The module of these kernels, compiled by nobody yet."""
    module = module_of(name, text)
    if not hasattr(module, "BUDGETS"):
        from gpulayers.kernels._budget import Budget

        module.BUDGETS = {k.name: Budget(narrow=k.narrow) for k in kernels}
    return module
