"""Activations: one pair of kernels for all of them, bound by memory (2 and 3 elements moved for each element of x).

``value`` and ``gradient`` compute an activation by name on a float32 tile; linear's epilogue uses them too.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from . import _tile

FROM_Y = ("relu", "sigmoid", "tanh")
"""Activations whose gradient is computed from y; the others' from x."""
NUMBERS = {"leaky_relu": (0.01, 0.0), "elu": (1.0, 0.0), "softplus": (1.0, 20.0)}
"""Defaults of the numbers a and b."""


@triton.jit
def _tanh(x):
    """Exact to a few ulp near 0 too, where 1 − 2/(exp(2x) + 1) cancels (the polynomial is a minimax fit to 0.55)."""
    a = tl.abs(x)
    s = x * x
    near = ((0.0157394409 * s - 0.052302558) * s + 0.133152977) * s - 0.333327681
    far = 1 - 2 / (tl.exp(2 * a) + 1)
    return tl.where(a < 0.55, near * s * x + x, tl.where(x < 0, -far, far))


@triton.jit
def _expm1(x):
    """exp(x) − 1 for x ≤ 0, exact to a few ulp near 0 too."""
    t = _tanh(0.5 * x)
    return 2 * t / (1 - t)


@triton.jit
def _log1p(e):
    """log(1 + e) for 0 ≤ e ≤ 1, without losing a small e (Kahan): the rounding of 1 + e is divided out."""
    u = 1 + e
    d = u - 1
    return tl.where(d == 0, e, tl.log(u) * (e / tl.where(d == 0, 1.0, d)))


@triton.jit
def _tanh_of_softplus(x):
    """tanh(log(1 + e)) = n / (n + 2) with e = exp(x), n = e (e + 2); and σ(x). Past 20 both are 1."""
    e = tl.exp(tl.minimum(x, 20.0))
    n = e * (e + 2)
    return n / (n + 2), e / (e + 1)


@triton.jit
def value(x, NAME: tl.constexpr, a, b):
    """f(x); a and b are the activation's numbers."""
    if NAME == "relu":
        y = tl.where(x < 0, 0.0, x)  # NaN stays
    elif NAME == "leaky_relu":
        y = tl.where(x > 0, x, x * a)
    elif NAME == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # (1 + tanh u) / 2 = σ(2u)
        y = x * tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
    elif NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "sigmoid":
        y = tl.sigmoid(x)
    elif NAME == "tanh":
        y = _tanh(x)
    elif NAME == "softplus":
        z = x * a
        y = tl.where(z > b, x, (tl.maximum(z, 0.0) + _log1p(tl.exp(-tl.abs(z)))) / a)
    elif NAME == "elu":
        y = tl.where(x > 0, x, a * _expm1(tl.where(x > 0, 0.0, x)))
    elif NAME == "hardswish":
        y = x * tl.minimum(tl.maximum(x + 3, 0.0), 6.0) / 6
    else:
        tl.static_assert(NAME == "mish", "unknown activation")
        t, _ = _tanh_of_softplus(x)
        y = x * t
    return y


@triton.jit
def gradient(dy, s, NAME: tl.constexpr, a, b):
    """dy f'(x); s is y for the activations in FROM_Y, else x."""
    if NAME == "relu":
        dx = tl.where(s <= 0, 0.0, dy)
    elif NAME == "leaky_relu":
        dx = tl.where(s > 0, dy, dy * a)
    elif NAME == "gelu":
        dx = dy * (0.5 * (1 + tl.erf(s * 0.7071067811865476)) + s * tl.exp(-0.5 * s * s) * 0.3989422804014327)
    elif NAME == "gelu_tanh":
        p = tl.sigmoid(1.5957691216057308 * s * (1 + 0.044715 * s * s))
        dx = dy * (p + s * p * (1 - p) * 1.5957691216057308 * (1 + 0.134145 * s * s))
    elif NAME == "silu":
        p = tl.sigmoid(s)
        dx = dy * p * (1 + s * (1 - p))
    elif NAME == "sigmoid":
        dx = dy * s * (1 - s)
    elif NAME == "tanh":
        dx = dy * (1 - s * s)
    elif NAME == "softplus":
        z = s * a
        dx = tl.where(z > b, dy, dy * tl.sigmoid(z))
    elif NAME == "elu":
        dx = tl.where(s > 0, dy, dy * a * tl.exp(tl.where(s > 0, 0.0, s)))
    elif NAME == "hardswish":
        dx = tl.where(s <= -3, 0.0, tl.where(s >= 3, dy, dy * (s / 3 + 0.5)))
    else:
        tl.static_assert(NAME == "mish", "unknown activation")
        t, p = _tanh_of_softplus(s)
        dx = dy * (t + s * p * (1 - t * t))
    return dx


@triton.jit
def _activation_forward_kernel(
    x, y, M, N, x_row, y_row, a, b, NAME: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, n, mask = _tile.tile(M, N, ROWS, BLOCK)
    v = tl.load(x + row * x_row + n, mask, other=0.0).to(tl.float32)
    tl.store(y + row * y_row + n, value(v, NAME, a, b).to(y.dtype.element_ty), mask)


@triton.jit
def _activation_backward_kernel(
    dy, s, dx, M, N, dy_row, s_row, dx_row, a, b, NAME: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, n, mask = _tile.tile(M, N, ROWS, BLOCK)
    g = tl.load(dy + row * dy_row + n, mask, other=0.0).to(tl.float32)
    v = tl.load(s + row * s_row + n, mask, other=0.0).to(tl.float32)
    tl.store(dx + row * dx_row + n, gradient(g, v, NAME, a, b).to(dx.dtype.element_ty), mask)


def _forward(name: str, x: Any, needs: tuple, empty: Any, a: float = 0.0, b: float = 0.0) -> tuple[tuple, dict]:
    axes = _tile.order(x)
    y = empty(x.shape, x.dtype, axes)
    walk = _tile.pointwise(axes, x, y)
    sizes = dict(NAME=name, ROWS=walk.ROWS, BLOCK=walk.BLOCK)
    _tile.launch(_activation_forward_kernel, walk.grid, *walk.arrays, walk.M, walk.N, *walk.steps, a, b, **sizes)
    if not needs:
        return (y,), {}
    return (y,), {"y": y} if name in FROM_Y else {"x": x}


def _backward(name: str, dys: tuple, saved: dict, empty: Any, a: float = 0.0, b: float = 0.0) -> tuple:
    kept = saved["y" if name in FROM_Y else "x"]
    axes = _tile.order(kept)
    dx = empty(kept.shape, kept.dtype, axes)
    walk = _tile.pointwise(axes, dys[0], kept, dx)
    sizes = dict(NAME=name, ROWS=walk.ROWS, BLOCK=walk.BLOCK)
    _tile.launch(_activation_backward_kernel, walk.grid, *walk.arrays, walk.M, walk.N, *walk.steps, a, b, **sizes)
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
