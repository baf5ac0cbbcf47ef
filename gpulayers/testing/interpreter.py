"""Runs Triton kernels on the CPU, checked: `with interpreting(): kernel[grid](cpu_tensor, …)`.

A launch whose pointer arguments are CPU torch tensors or NumPy arrays (bfloat16 through ml_dtypes) runs here, program
by program, on NumPy; every other launch goes on as usual. No environment variable, and nothing stays patched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gpulayers.testing import _launches
from gpulayers.testing._repeats import Launched
from gpulayers.testing.memory import Memory

if TYPE_CHECKING:
    from gpulayers.kernels.triton._tile import Device


@dataclass(frozen=True)
class Launch:
    """One interpreted launch: the kernel's name, the dtype of each tensor argument, constexprs and grid."""

    kernel: str
    dtypes: tuple[str, ...]
    constexprs: dict[str, Any]
    grid: tuple[int, int, int]


@dataclass
class Session:
    """One `interpreting()` block: what it checks, and what it ran."""

    races: bool = True
    poison: bool = True
    corners: bool = False
    fused: bool = False
    launches: list[Launch] = field(default_factory=list)


LARGE = 1 << 26
"""Bytes of an array from its first to its last element."""
proven: set[tuple[str, str]] = set()
"""(kernel, dtypes of its tensors separated by spaces) of every launch that ran to its end in this process."""
_sessions: list[Session] = []


@contextlib.contextmanager
def interpreting(
    device: Device | None = None,
    *,
    races: bool = True,
    poison: bool = True,
    corners: bool = False,
    fused: bool | None = None,
) -> Iterator[Session]:
    """Within, Triton launches on CPU arrays are interpreted, with every memory access checked (`memory.py`).

    device: the GPU that launchers are told they run on; by default the enclosing block's, else an sm_90 with 4 multiprocessors.
    races: two programs of a launch that touch one element, one of them writing, are an error.
    poison: lanes masked off in a load without `other` come back as NaN; otherwise as 0.
    corners: of a launch on arrays too large to walk, in memory that is reserved and not touched, only the first and the
    last program along each axis run.
    fused: float32 products go unrounded into sums, and quotients are products with the reciprocal, as compiled kernels
        may compute both; by default as in the enclosing block, else each operation rounds once.

    Yields the session, whose `launches` lists what ran. Blocks nest; the innermost one's settings hold, and every
    one's list grows. Raises `KernelMemoryError` for a bad access; an exception from a kernel carries a note that
    says which program of which kernel raised it.
    """
    from gpulayers.kernels.triton import _tile
    from gpulayers.testing import _multiprocessors

    outermost = not _sessions
    fused = not outermost and _sessions[-1].fused if fused is None else fused
    session = Session(races, poison, corners, fused)
    before = _tile.pretend
    _tile.pretend = _multiprocessors.Watched(*(device or before or (90, 4, 232448)))
    _sessions.append(session)
    try:
        with _launches.catching("cpu", _run) if outermost else contextlib.nullcontext():
            yield session
    finally:
        _sessions.pop()
        _tile.pretend = before


def register_inline_asm(text: str, function: Callable[..., Any]) -> None:
    """Give a `tl.inline_asm_elementwise` text its meaning: a NumPy function of the operands' arrays."""
    from gpulayers.testing._builder import Builder

    Builder.inline_asm[" ".join(text.split())] = function


def _run(launch: Any, kernel: Any, grid: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Interpret one launch: bind, check the grid, run its programs unless their outcome is known."""
    from gpulayers.kernels.triton import _tile
    from gpulayers.testing import _multiprocessors

    name = kernel.fn.__name__
    bound = _launches.bind(kernel, args, kwargs)
    for hook in kernel.pre_run_hooks:
        hook(*args, **kwargs)
    sizes = _launches.grid_sizes(name, grid, bound)
    constexprs = _launches.constexprs(kernel, bound)
    session = _sessions[-1]
    arguments = [bound[p.name] for p in kernel.params]
    settings = kernel.fn, sizes, session.races, session.poison, session.corners, session.fused
    launched = Launched(settings, arguments, [*_tile.reached, *_launches.arrays(arguments)])
    if launched.repeat():
        dtypes = launched.dtypes
    else:
        memory = _run_programs(kernel, sizes, bound, session)
        launched.ran(memory)
        dtypes = tuple(region.dtype for region in memory.regions)
    for each in _sessions:
        each.launches.append(Launch(name, dtypes, constexprs, sizes))
    if not session.corners:
        proven.add((name, " ".join(dtypes)))
        _multiprocessors.note(name, _tile.pretend)


def _run_programs(kernel: Any, sizes: tuple[int, int, int], bound: dict[str, Any], session: Session) -> Memory:
    """The memory that a launch's programs, run one after another, have used."""
    from gpulayers.kernels.triton import _tile
    from gpulayers.testing._arguments import argument
    from gpulayers.testing._builder import BUILDER
    from gpulayers.testing._language import patched
    from gpulayers.testing._rewriting import rewritten

    name = kernel.fn.__name__
    memory = Memory(name, sizes, session.races, session.poison)
    for i, array in enumerate(_tile.reached):
        memory.add(f"reached[{i}]", array)
    function = rewritten(kernel.fn)
    before = getattr(BUILDER, "memory", None), BUILDER.fused
    BUILDER.memory, BUILDER.fused = memory, session.fused
    BUILDER.grid_dim = sizes
    try:
        with patched(), np.errstate(all="ignore"):
            values = {
                p.name: bound[p.name] if p.is_constexpr else argument(bound[p.name], p, memory) for p in kernel.params
            }
            large = session.corners and any(region.nbytes > LARGE for region in memory.regions)
            for index in _launches.corners(sizes) if large else np.ndindex(sizes):
                BUILDER.grid_idx = index
                memory.program = int(np.ravel_multi_index(index, sizes)) + 1
                function(**values)
    except Exception as error:
        error.add_note(f"in program {memory.index} of the grid {sizes} of {name}")
        raise
    finally:
        BUILDER.memory, BUILDER.fused = before  # type: ignore[assignment]
    return memory
