"""Activations in CUDA C++: what ``activation.cu`` is launched with. Arrays are CuPy's (NumPy's while emulated).

They serve where Triton or torch is not installed; where both are, Triton's kernels are faster and stand first.
prelu, rrelu and glu are in _gates.py.
"""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import spec

from .._activation import launchers
from .._budget import Budget
from . import _launch
from ._copy import dense
from ._gates import glu_backward as glu_backward
from ._gates import glu_forward as glu_forward
from ._gates import prelu_backward as prelu_backward
from ._gates import prelu_forward as prelu_forward
from ._gates import rrelu_backward as rrelu_backward
from ._gates import rrelu_forward as rrelu_forward

THREADS, PACKS_A_THREAD = 256, 4

BUDGETS = {  # by patterns of names: kernels are made for each activation and dtype
    "*_forward_*": Budget(registers=48, blocks=5, threads=THREADS),
    "*_backward_*": Budget(registers=56, blocks=4, threads=THREADS),
}


def _launch_over(name: str, direction: str, arrays: tuple, a: float, b: float) -> None:
    """Launch over dense arrays of one shape and one memory order."""
    functor = f"{name}_" if name in ("sigmoid", "tanh") else name  # C++ has functions of these names
    x = arrays[0]
    aligned = all(_launch.pointer(v) % 16 == 0 for v in arrays)
    each = PACKS_A_THREAD * (16 // x.itemsize if aligned else 1)
    grid = (min(2**31 - 1, -(-x.size // (THREADS * each))),)
    kernel = f"{functor}_{direction}_{x.dtype}_{'packs' if aligned else 'single'}"
    _launch.launch("activation", kernel, grid, (THREADS,), (*arrays, x.size, float(a), float(b)), only=functor)


def _forward(name: str, x: Any, empty: Any, a: float = 0.0, b: float = 0.0) -> Any:
    order = spec(x).like().order
    y = empty(x.shape, x.dtype, order)
    _launch_over(name, "forward", (dense(x, order, empty), y), a, b)
    return y


def _backward(name: str, dy: Any, kept: Any, empty: Any, a: float = 0.0, b: float = 0.0) -> Any:
    order = spec(kept).like().order
    dx = empty(kept.shape, kept.dtype, order)
    _launch_over(name, "backward", (*(dense(v, order, empty) for v in (dy, kept)), dx), a, b)
    return dx


globals().update(launchers(_forward, _backward, "empty"))  # relu_forward, relu_backward and so on
