"""What Triton launchers share: the device's figures, block sizes, and the launch itself.

Launchers are plain functions over torch tensors: on a GPU, on the CPU (where gpulayers.testing interprets them), and
on torch's meta device (where it compiles them). They take memory only from the ``empty`` they are handed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import triton
import triton.language as tl

from gpulayers.arrays import layout

from .. import _multiprocessors
from .._budget import Budget
from ._configs import Choice, Row, for_length
from ._tracing import thread


class Device(NamedTuple):
    """What a launcher chooses by."""

    arch: int
    """Compute capability: 80, 86, 89, 90, 100, 120."""
    sms: int
    """Streaming multiprocessors; to a launcher, those that it may fill."""
    shared: int
    """Bytes of shared memory that one block may have."""


pretend: Device | None = None
"""Stands for the real device while kernels are interpreted or compiled without one."""


@cache
def real_device(index: int) -> Device:
    import torch

    p = torch.cuda.get_device_properties(index)
    return Device(p.major * 10 + p.minor, p.multi_processor_count, p.shared_memory_per_block_optin)


def device(x: Any) -> Device:
    """The figures of the device that ``x`` is on."""
    index = x.device.index  # asked of what is no tensor, it raises, without a GPU too
    found = pretend or real_device(index or 0)
    sms = _multiprocessors.left(found[1])
    return found if sms == found[1] else found._replace(sms=sms)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tf32(*where: str) -> bool:
    """Whether torch allows TF32 for matrix products ("cuda.matmul"), convolutions ("cudnn.conv").

    torch's older names (allow_tf32) follow this setting, but reading them raises where somebody used this one.
    """
    import torch

    found = []
    for backend, operator in (name.split(".") for name in where):
        settings = getattr(getattr(torch.backends, backend), operator)
        found.append(settings.fp32_precision)
        if recorder is not None:
            recorder.ask((backend, operator), partial(getattr, settings, "fp32_precision"), found[-1])
    return all(precision == "tf32" for precision in found)


recorder: Any = None
"""Hears of what a launcher depends on besides metadata, while it is recorded: ``ask(about, question, answer)`` of torch's
settings, and ``lasting`` memory."""


def lasting(x: Any) -> Any:
    """``x``, which no launcher allocated or was given: it stays for ever, and nobody writes to it any more."""
    if recorder is not None:
        recorder.lasting.append(x)
    return x


MOST_REGISTERS = 255
"""Of a thread, as ``maxnreg``: unasked, the assembler holds to fewer than some tiles take, and puts some aside."""


def next_power_of_2(n: int, most: int = 2**62) -> int:
    """The least power of two that is not under ``n``; at most ``most``."""
    if type(n) is int:
        return min(1 << max(n - 1, 0).bit_length(), most)
    found = 1
    while found < most and found < n:  # of a symbol: it holds for all sizes between two powers, or from one on
        found *= 2
    return min(found, most)


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Launch, unless there is nothing to do (an empty grid is an error in CUDA)."""
    if 0 in grid:
        return
    if thread.compiler is not None:
        thread.compiler.launch(kernel, tuple(grid), args, options)
    else:
        kernel[tuple(grid)](*args, **options)


def begins_aligned(x: Any) -> bool:
    """Whether ``x`` begins at a multiple of 16 bytes. Of memory that a compiler plans, every whole array does."""
    at = x.data_ptr() if thread.compiler is None else x.storage_offset() * x.element_size()
    return at % 16 == 0


def described(x: Any, block: Sequence[int]) -> Any:
    """A tensor descriptor of ``x``, which kernels load blocks through."""
    if thread.compiler is not None:
        return thread.compiler.describe(x, block)
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, block)


reached: Sequence[Any] = ()
"""What the launch at hand reaches through a table of addresses, so that an interpreter can check those accesses."""


def launch_on_table(arrays: Sequence[Any], kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Launch a kernel that finds ``arrays`` through a table of their addresses."""
    global reached
    if thread.compiler is not None:
        thread.compiler.refuse("table")
    reached = arrays
    try:
        launch(kernel, grid, *args, **options)
    finally:
        reached = ()


def dense(x: Any, empty: Callable) -> Any:
    """``x`` row-major: itself, or a copy where it is strided, transposed or expanded."""
    return x if x.is_contiguous() else copied(x, None, empty)


def rows(x: Any, n: int, empty: Callable) -> tuple[Any, int]:
    """(x as a tensor whose rows of ``n`` elements are contiguous, the step from row to row). Copies only if it must."""
    if x.ndim == 2 and x.stride(1) == 1 and x.stride(0) >= n:
        return x, x.stride(0)
    return dense(x, empty), n


def split(total: int, programs: int) -> tuple[int, int]:
    """(programs, items for each) that cover ``total`` items with at most ``programs`` programs."""
    each = max(1, cdiv(total, max(programs, 1)))
    return cdiv(total, each), each


def unit_of(*sizes: int) -> int:
    """The largest of 16, 8, 4, 2, 1 that divides all of them: how much a kernel may say of places in these steps."""
    return next(u for u in (16, 8, 4, 2, 1) if all(s % u == 0 for s in sizes))


def in_units(*sizes: int | None) -> tuple[Any, ...]:
    """(unit, *sizes in units), for rows whose length 16 does not divide but 8, 4 or 2 does; None stays.

    Triton takes from a launch only that a size is a multiple of 16. A kernel that multiplies by the constant ``unit``
    itself shows the compiler the rest: rows of 1000 are then read in 16-byte vectors, too.
    """
    given = [s for s in sizes if s is not None]
    if max(given) >= 2**31:  # in units it might pass as 32 bits, and the kernel's product would overflow
        return (1, *sizes)
    unit = unit_of(*given)
    return (1, *sizes) if unit == 16 else (unit, *(s and s // unit for s in sizes))


def _hold(entries: Sequence[Row], device: Device, n: int) -> tuple[int, tuple[int, int, int]] | None:
    """(rows a program, block, warps) for rows of ``n``: several short rows make one full tile."""
    found = for_length(entries, device, n)
    if found is None:
        return None
    block = next_power_of_2(n)
    return found[0], (max(1, found[1].elements // block), block, found[1].warps)


def steps(x: Any, *axes: int | None) -> list[int]:
    """Along each of these axes; 0 where there is one element for all."""
    return [0 if x is None or a is None or x.shape[a] == 1 else x.stride(a) for a in axes]


def held_rows(name: str) -> Choice:
    """Declare the choice of a kernel that holds rows in registers: (rows a program, block, warps) for a device and n.

    None for rows longer than the table's last entry is for: they would spill, so launchers walk them in blocks.
    """
    return Choice(name, Row, _hold, held=True)


# --- copies ----------------------------------------------------------------------------------------------------------

BUDGETS = {
    # It exists for arrays whose elements do not lie side by side.
    "_copy_kernel": Budget(registers=96, blocks=4, narrow="loads, stores"),
}
COPIED = 1024
"""Elements that a program copies."""


@triton.jit(do_not_specialize=["sizes", "x_steps", "y_steps"])
def _copy_kernel(
    x, y, sizes, x_steps, y_steps, F, L, x_f, x_l, y_f, y_l, AXES: tl.constexpr, BF: tl.constexpr, BL: tl.constexpr
):
    """y[…, f, l] = x[…, f, l], with the AXES axes before f and l counted from the last."""
    tiles_f, tiles_l = (F - 1) // BF + 1, (L - 1) // BL + 1
    pid = tl.program_id(0).to(tl.int64)
    l = pid % tiles_l * BL + tl.arange(0, BL)[None, :]
    f = pid // tiles_l % tiles_f * BF + tl.arange(0, BF)[:, None]
    left = pid // tiles_l // tiles_f
    for k in tl.static_range(AXES):
        x += left % sizes[k] * x_steps[k]
        y += left % sizes[k] * y_steps[k]
        left = left // sizes[k]
    mask = (f < F) & (l < L)
    tl.store(y + f * y_f + l * y_l, tl.load(x + f * x_f + l * x_l, mask), mask)


def _axes(x: Any, y: Any) -> list[tuple[int, int, int]]:
    """(size, step in x, step in y), slowest in y first; axes that are one in both arrays count once."""
    found = sorted(zip(x.shape, x.stride(), y.stride()), key=lambda axis: -axis[2])
    axes: list[tuple[int, int, int]] = []
    for n, x_step, y_step in found:
        if axes and axes[-1][1] == n * x_step and axes[-1][2] == n * y_step:
            axes[-1] = axes[-1][0] * n, x_step, y_step
        elif n != 1:
            axes.append((n, x_step, y_step))
    return axes or [(1, 1, 1)]


def copy(x: Any, y: Any) -> None:
    """y[…] = x: of one shape and dtype, any strides. It reads along x's neighbours and writes along y's."""
    if not x.numel():
        return
    if thread.compiler is not None:  # it fuses copies of its own with what is before and after
        y.copy_(x)
        return
    *axes, last = _axes(x, y)
    along = min(range(len(axes)), key=lambda i: (axes[i][1] or 2**62, -i), default=None)
    first = (1, 0, 0) if along is None else axes.pop(along)
    wide = min(COPIED if first[0] == 1 or last[1] == 1 else 32, next_power_of_2(last[0]))
    high = min(COPIED // wide, next_power_of_2(first[0]))
    sizes, x_steps, y_steps = ([axis[i] for axis in reversed(axes)] or [1] for i in range(3))
    grid = (math.prod(sizes) * cdiv(first[0], high) * cdiv(last[0], wide),)
    launch(
        _copy_kernel, grid, x, y, tuple(sizes), tuple(x_steps), tuple(y_steps),
        first[0], last[0], first[1], last[1], first[2], last[2], AXES=len(axes), BF=high, BL=wide, num_warps=4,
    )  # fmt: skip


def copied(x: Any, axes: tuple[int, ...] | None, empty: Callable) -> Any:
    """A copy of ``x``, dense in this memory order."""
    y = empty(x.shape, x.dtype, axes)
    copy(x, y)
    return y


# --- element by element ----------------------------------------------------------------------------------------------


def order(x: Any) -> tuple[int, ...] | None:
    """Axes from the slowest to the fastest in memory; None for row-major, and for what is not dense."""
    return layout(tuple(x.shape), tuple(x.stride()))[0]


def arranged(x: Any, axes: tuple[int, ...] | None, empty: Callable) -> Any:
    """``x`` dense in this memory order: itself, or a copy."""
    return x if layout(tuple(x.shape), tuple(x.stride())) == (axes, True) else copied(x, axes, empty)


def row_step(x: Any) -> int | None:
    """Elements from one row of the last axis to the next, where that is uniform and rows are contiguous."""
    shape, steps = x.shape, x.stride()
    if x.ndim < 2 or steps[-1] != 1 or any(steps[a] != steps[a + 1] * shape[a + 1] for a in range(x.ndim - 2)):
        return None
    return steps[-2]


class Pointwise(NamedTuple):
    """Arrays of one shape walked together: M rows of N neighbouring elements, in one memory order."""

    arrays: list
    M: int
    N: int
    steps: list
    """From row to row, for each array."""
    tile: dict
    """ROWS, BLOCK and num_warps of a launch."""

    @property
    def grid(self) -> tuple[int]:
        return (cdiv(self.M, self.tile["ROWS"]) * cdiv(self.N, self.tile["BLOCK"]),)


def pointwise(choice: Choice, axes: tuple[int, ...] | None, *xs: Any, empty: Callable) -> Pointwise:
    """``xs`` (of one shape) for a kernel that works element by element in memory order ``axes``.

    Dense arrays are one long row. Row-major walks take slices like ``x[..., :n]`` as they are; what fits neither is
    copied.
    """
    shape, size = tuple(xs[0].shape), xs[0].numel()
    dense_too = [layout(shape, tuple(x.stride())) == (axes, True) for x in xs]
    steps = [None if axes is not None or fits else row_step(x) for x, fits in zip(xs, dense_too)]
    ready = [x if fits or s is not None else copied(x, axes, empty) for x, fits, s in zip(xs, dense_too, steps)]
    entry = choice(device(xs[0]), size)
    if all(step is None for step in steps):
        tile = {"ROWS": 1, "BLOCK": entry.elements, "num_warps": entry.warps}
        return Pointwise(ready, 1, size, [size] * len(xs), tile)
    n = shape[-1]
    steps = [n if s is None else s for s in steps]
    return Pointwise(ready, size // max(n, 1), n, steps, flat_tile(entry, n))


def flat_tile(entry: Row, n: int) -> dict:
    """ROWS, BLOCK and num_warps for rows of ``n`` neighbours: a part of a long one, or several short ones."""
    block = next_power_of_2(n, entry.elements)
    return {"ROWS": entry.elements // block, "BLOCK": block, "num_warps": entry.warps}


@triton.jit
def rows_tile(M, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(row, n, mask): this program's part of M rows of N, shapes (ROWS, 1), (1, BLOCK), (ROWS, BLOCK)."""
    columns = (N - 1) // BLOCK + 1  # tl.cdiv would overflow for N just below 2^31
    pid = tl.program_id(0).to(tl.int64)
    row = pid // columns * ROWS + tl.arange(0, ROWS)[:, None]
    n = pid % columns * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, n, (row < M) & (n < N)
