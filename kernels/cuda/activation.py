"""Activations in CUDA C++: what ``activation.cu`` is launched with. Arrays are CuPy's (NumPy's while emulated)."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import spec

from . import _launch

FROM_Y = ("relu", "sigmoid", "tanh")
"""Activations whose gradient is computed from y; the others' from x."""
THREADS, PACKS_A_THREAD = 256, 4


def _launch_over(name: str, arrays: tuple, a: float, b: float) -> None:
    """Launch over dense arrays of one shape and one memory order."""
    x = arrays[0]
    pointers = [v.ctypes.data if isinstance(v, np.ndarray) else v.data.ptr for v in arrays]
    aligned = all(p % 16 == 0 for p in pointers)
    each = PACKS_A_THREAD * (16 // x.itemsize if aligned else 1)
    grid = (min(2**31 - 1, -(-x.size // (THREADS * each))),)
    kernel = f"{name}_{x.dtype}_{'packs' if aligned else 'single'}"
    _launch.launch("activation", kernel, grid, (THREADS,), (*arrays, x.size, float(a), float(b)))


def _symbol(name: str) -> str:
    """The functor's name: C++ has functions called sigmoid and tanh."""
    return f"{name}_" if name in ("sigmoid", "tanh") else name


def _forward(name: str, x: Any, needs: tuple, empty: Any, a: float = 0.0, b: float = 0.0) -> tuple[tuple, dict]:
    order = spec(x).like().order
    y = empty(x.shape, x.dtype, order)
    _launch_over(f"{_symbol(name)}_forward", (_launch.dense(x, order, empty), y), a, b)
    if not needs:
        return (y,), {}
    return (y,), {"y": y} if name in FROM_Y else {"x": x}


def _backward(name: str, dys: tuple, saved: dict, empty: Any, a: float = 0.0, b: float = 0.0) -> tuple:
    kept = saved["y" if name in FROM_Y else "x"]
    order = spec(kept).like().order
    dx = empty(kept.shape, kept.dtype, order)
    dy, kept = (_launch.dense(v, order, empty) for v in (dys[0], kept))
    _launch_over(f"{_symbol(name)}_backward", (dy, kept, dx), a, b)
    return (dx,)


def _gelu_name(approximate: str) -> str:
    return "gelu" if approximate == "none" else "gelu_tanh"


def relu_forward(x: Any, *, needs: tuple = (), empty: Any) -> tuple[tuple, dict]:
    return _forward("relu", x, needs, empty)


def relu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, empty: Any) -> tuple:
    return _backward("relu", dys, saved, empty)


def leaky_relu_forward(x: Any, *, needs: tuple = (), negative_slope: float = 0.01, empty: Any) -> tuple[tuple, dict]:
    return _forward("leaky_relu", x, needs, empty, negative_slope)


def leaky_relu_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, negative_slope: float = 0.01, empty: Any
) -> tuple:
    return _backward("leaky_relu", dys, saved, empty, negative_slope)


def gelu_forward(x: Any, *, needs: tuple = (), approximate: str = "none", empty: Any) -> tuple[tuple, dict]:
    return _forward(_gelu_name(approximate), x, needs, empty)


def gelu_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, approximate: str = "none", empty: Any
) -> tuple:
    return _backward(_gelu_name(approximate), dys, saved, empty)


def silu_forward(x: Any, *, needs: tuple = (), empty: Any) -> tuple[tuple, dict]:
    return _forward("silu", x, needs, empty)


def silu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, empty: Any) -> tuple:
    return _backward("silu", dys, saved, empty)


def sigmoid_forward(x: Any, *, needs: tuple = (), empty: Any) -> tuple[tuple, dict]:
    return _forward("sigmoid", x, needs, empty)


def sigmoid_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, empty: Any) -> tuple:
    return _backward("sigmoid", dys, saved, empty)


def tanh_forward(x: Any, *, needs: tuple = (), empty: Any) -> tuple[tuple, dict]:
    return _forward("tanh", x, needs, empty)


def tanh_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, empty: Any) -> tuple:
    return _backward("tanh", dys, saved, empty)


def softplus_forward(
    x: Any, *, needs: tuple = (), beta: float = 1.0, threshold: float = 20.0, empty: Any
) -> tuple[tuple, dict]:
    return _forward("softplus", x, needs, empty, beta, threshold)


def softplus_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, beta: float = 1.0, threshold: float = 20.0, empty: Any
) -> tuple:
    return _backward("softplus", dys, saved, empty, beta, threshold)


def elu_forward(x: Any, *, needs: tuple = (), alpha: float = 1.0, empty: Any) -> tuple[tuple, dict]:
    return _forward("elu", x, needs, empty, alpha)


def elu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, alpha: float = 1.0, empty: Any) -> tuple:
    return _backward("elu", dys, saved, empty, alpha)


def hardswish_forward(x: Any, *, needs: tuple = (), empty: Any) -> tuple[tuple, dict]:
    return _forward("hardswish", x, needs, empty)


def hardswish_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, empty: Any) -> tuple:
    return _backward("hardswish", dys, saved, empty)


def mish_forward(x: Any, *, needs: tuple = (), empty: Any) -> tuple[tuple, dict]:
    return _forward("mish", x, needs, empty)


def mish_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, empty: Any) -> tuple:
    return _backward("mish", dys, saved, empty)
