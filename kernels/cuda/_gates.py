"""prelu, rrelu and glu in CUDA C++: what ``_gates.cu`` is launched with. Arrays are CuPy's (NumPy's while emulated).

They serve where Triton or torch is not installed; where both are, Triton's kernels are faster and stand first.
"""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import spec

from .._budget import Budget
from .._gates import rrelu
from .._layout import around, halved, row_major_steps
from . import _launch
from ._copy import copy, dense

THREADS = 256

BUDGETS = {
    "prelu_forward_*": Budget(registers=40, blocks=6, threads=THREADS),
    "prelu_backward_places_*": Budget(registers=40, blocks=6, threads=THREADS),
    "prelu_backward_channels_*": Budget(registers=56, blocks=4, threads=THREADS),
    "add_up_*": Budget(registers=40, blocks=6, threads=THREADS),
    "rrelu_*": Budget(registers=40, blocks=6, threads=THREADS),
    "glu_forward_*": Budget(registers=40, blocks=6, threads=THREADS),
    "glu_backward_*": Budget(registers=48, blocks=5, threads=THREADS),
}


def _order(x: Any) -> tuple[int, ...] | None:
    return spec(x).like().order


def _width(n: int, *arrays: Any) -> tuple[int, str]:
    """(elements that move together, the kernels' suffix): packs of 16 bytes where n is a multiple and all lie so."""
    pack = 16 // arrays[0].itemsize
    aligned = n % pack == 0 and all(_launch.pointer(a) % 16 == 0 for a in arrays if a is not None)
    return (pack, f"{arrays[0].dtype}_packs") if aligned else (1, f"{arrays[0].dtype}_single")


def _grid(packs: int) -> tuple[int]:
    return (min(2**31 - 1, -(-packs // (THREADS * 4))),)


# --- prelu -----------------------------------------------------------------------------------------------------------


def _channels(x: Any, weight: Any, order: tuple | None) -> tuple[int, int, int]:
    return around(x.shape, order, 1) if weight.size != 1 else (1, 1, x.size)


def prelu_forward(x: Any, weight: Any, *, needs: tuple = (), empty: Any) -> tuple[tuple, dict]:
    order = _order(x)
    y = empty(x.shape, x.dtype, order)
    _, c, b = _channels(x, weight, order)
    arrays = dense(x, order, empty), dense(weight, None, empty), y
    each, suffix = _width(b if b > 1 or c == 1 else c, arrays[0], y)
    grid = _grid(x.size // each)
    _launch.launch("_gates", f"prelu_forward_{suffix}", grid, (THREADS,), (*arrays, x.size, c, b))
    return (y,), {"x": x, "weight": weight} if needs else {}


def prelu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, empty: Any) -> tuple:
    x, weight = saved["x"], saved["weight"]
    order = _order(x)
    a, c, b = _channels(x, weight, order)
    dx = empty(x.shape if "x" in needs else (0,), x.dtype, order if "x" in needs else None)
    dy, x = (dense(v, order, empty) for v in (dys[0], x))
    neighbours = b == 1 and c > 1
    pack, suffix = _width(c if neighbours else b, x, dy, dx)
    groups = -(-c // (pack * 32)) if neighbours else c
    items = a if neighbours else a * (b // pack)  # of one group
    most = -(-_launch.resident_blocks(x, THREADS) // max(groups, 1))
    each = max(1, -(-items // most))
    count = -(-items // each)
    parts = empty((count, c), "float32")
    arguments = (dy, x, dense(weight, None, empty), dx, parts)
    if neighbours:
        kernel, block, sizes = f"prelu_backward_channels_{suffix}", (32, 8), (a, c)
    else:
        kernel, block, sizes = f"prelu_backward_places_{suffix}", (THREADS,), (a, c, b)
    _launch.launch("_gates", kernel, (groups * count,), block, (*arguments, *sizes, each, "x" in needs))
    dweight = None
    if "weight" in needs:
        dweight = empty(weight.shape, weight.dtype)
        _launch.launch("_gates", f"add_up_{x.dtype}", (-(-c // 32),), (32, 8), (parts, dweight, count, c))
    return dx if "x" in needs else None, dweight


# --- rrelu -----------------------------------------------------------------------------------------------------------


def _rrelu(dy: Any, x: Any, seed: Any, order: tuple | None, lower: float, upper: float, empty: Any) -> Any:
    """dy times the slope at x, dense in this order; the mean slope where there is no seed."""
    axes = row_major_steps(x.shape, order or range(x.ndim))
    out = empty(x.shape, x.dtype, order)
    if len(axes) > 3:  # a rare permutation of four axes or more
        copy(_rrelu(dy, x, seed, None, lower, upper, empty), out)
        return out
    dy, x = (dense(v, order, empty) for v in (dy, x))
    drawn = seed is not None
    seed = dense(seed, None, empty) if drawn else empty((0,), "int64")
    arguments = (dy, x, seed, out, x.size, float(lower), float(upper), drawn)
    each, suffix = _width(x.size if order is None else 1, dy, x, out)
    if each == 1:
        (_, step0), (n1, step1), (n2, step2) = [(1, 0)] * (3 - len(axes)) + axes
        arguments += (n1, n2, step0, step1, step2)
    _launch.launch("_gates", f"rrelu_{suffix}", _grid(x.size // each), (THREADS,), arguments)
    return out


def _sloped(dy: Any, x: Any, seed: Any, lower: float, upper: float, empty: Any) -> Any:
    return _rrelu(x if dy is None else dy, x, seed, _order(x), lower, upper, empty)


rrelu_forward, rrelu_backward = rrelu(_sloped)


# --- glu -------------------------------------------------------------------------------------------------------------


def _launch_over_halves(kernel: str, x: Any, order: tuple | None, axis: int, *arrays: Any) -> None:
    _, c, b = around(x.shape, order, axis)
    n, size = c // 2 * b, x.size // 2
    each, suffix = _width(n, *arrays)
    _launch.launch("_gates", f"{kernel}_{suffix}", _grid(size // each), (THREADS,), (*arrays, size, n))


def glu_forward(x: Any, *, needs: tuple = (), axis: int = -1, empty: Any) -> tuple[tuple, dict]:
    order, axis = _order(x), axis % x.ndim
    y = empty(halved(x.shape, axis), x.dtype, order)
    _launch_over_halves("glu_forward", x, order, axis, dense(x, order, empty), y)
    return (y,), {"x": x} if needs else {}


def glu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, axis: int = -1, empty: Any) -> tuple:
    x, order = saved["x"], _order(saved["x"])
    dx = empty(x.shape, x.dtype, order)
    dy, x = (dense(v, order, empty) for v in (dys[0], x))
    _launch_over_halves("glu_backward", x, order, axis % x.ndim, dy, x, dx)
    return (dx,)
