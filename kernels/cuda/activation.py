"""Activations in CUDA C++: what ``activation.cu`` is launched with. Arrays are CuPy's (NumPy's while emulated).

prelu, rrelu and glu are in _gates.py.
"""

from __future__ import annotations

from typing import Any

from gpulayers._named import named
from gpulayers.arrays import spec

from .._budget import Budget
from . import _launch
from ._gates import glu_backward as glu_backward
from ._gates import glu_forward as glu_forward
from ._gates import prelu_backward as prelu_backward
from ._gates import prelu_forward as prelu_forward
from ._gates import rrelu_backward as rrelu_backward
from ._gates import rrelu_forward as rrelu_forward

FROM_Y = ("relu", "relu6", "sigmoid", "tanh")
"""Activations whose gradient is computed from y; the others' from x."""
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


def _forward(name: str, x: Any, needs: tuple, empty: Any, a: float = 0.0, b: float = 0.0) -> tuple[tuple, dict]:
    order = spec(x).like().order
    y = empty(x.shape, x.dtype, order)
    _launch_over(name, "forward", (_launch.dense(x, order, empty), y), a, b)
    if not needs:
        return (y,), {}
    return (y,), {"y": y} if name in FROM_Y else {"x": x}


def _backward(name: str, dys: tuple, saved: dict, empty: Any, a: float = 0.0, b: float = 0.0) -> tuple:
    kept = saved["y" if name in FROM_Y else "x"]
    order = spec(kept).like().order
    dx = empty(kept.shape, kept.dtype, order)
    dy, kept = (_launch.dense(v, order, empty) for v in (dys[0], kept))
    _launch_over(name, "backward", (dy, kept, dx), a, b)
    return (dx,)


def _pair(name: str, /, **numbers: float) -> tuple[Any, Any]:
    """The launchers of one activation, with its op's options. Both are called with every option."""

    def forward(x: Any, *, needs: tuple = (), empty: Any, **given: float) -> tuple[tuple, dict]:
        return _forward(name, x, needs, empty, *(numbers | given).values())

    def backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, empty: Any, **given: float) -> tuple:
        return _backward(name, dys, saved, empty, *(numbers | given).values())

    return named(forward, f"{name}_forward", numbers), named(backward, f"{name}_backward", numbers)


relu_forward, relu_backward = _pair("relu")
leaky_relu_forward, leaky_relu_backward = _pair("leaky_relu", negative_slope=0.01)
relu6_forward, relu6_backward = _pair("relu6")
hardtanh_forward, hardtanh_backward = _pair("hardtanh", min_val=-1.0, max_val=1.0)
hardsigmoid_forward, hardsigmoid_backward = _pair("hardsigmoid")
hardswish_forward, hardswish_backward = _pair("hardswish")
hardshrink_forward, hardshrink_backward = _pair("hardshrink", lambd=0.5)
softshrink_forward, softshrink_backward = _pair("softshrink", lambd=0.5)
threshold_forward, threshold_backward = _pair("threshold", threshold=0.0, value=0.0)
silu_forward, silu_backward = _pair("silu")
sigmoid_forward, sigmoid_backward = _pair("sigmoid")
logsigmoid_forward, logsigmoid_backward = _pair("logsigmoid")
tanh_forward, tanh_backward = _pair("tanh")
tanhshrink_forward, tanhshrink_backward = _pair("tanhshrink")
softsign_forward, softsign_backward = _pair("softsign")
softplus_forward, softplus_backward = _pair("softplus", beta=1.0, threshold=20.0)
elu_forward, elu_backward = _pair("elu", alpha=1.0)
celu_forward, celu_backward = _pair("celu", alpha=1.0)
selu_forward, selu_backward = _pair("selu")
mish_forward, mish_backward = _pair("mish")


def _gelu_name(approximate: str) -> str:
    return "gelu" if approximate == "none" else "gelu_tanh"


def gelu_forward(x: Any, *, needs: tuple = (), approximate: str = "none", empty: Any) -> tuple[tuple, dict]:
    return _forward(_gelu_name(approximate), x, needs, empty)


def gelu_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, approximate: str = "none", empty: Any
) -> tuple:
    return _backward(_gelu_name(approximate), dys, saved, empty)
