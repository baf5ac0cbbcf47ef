"""Activations: one pair of kernels for all of them, bound by memory (2 and 3 elements moved for each element of x).

``value`` and ``gradient`` compute an activation by name on a float32 tile; linear's epilogue uses them too. Those that
are more than a function of x (prelu, rrelu, glu) are in _gates.py.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._activation import FROM_Y, launchers, numbers_of
from .._budget import Budget
from . import _configs, _tile
from ._gates import glu_backward as glu_backward
from ._gates import glu_forward as glu_forward
from ._gates import prelu_backward as prelu_backward
from ._gates import prelu_forward as prelu_forward
from ._gates import rrelu_backward as rrelu_backward
from ._gates import rrelu_forward as rrelu_forward
from ._special import log1p, normal, opened, sigmoid
from ._tile import rows_tile

BUDGETS = {
    "_activation_forward_kernel": Budget(registers=96, blocks=5),
    # On sm_120 elu puts two registers aside.
    "_activation_backward_kernel": Budget(registers=64, blocks=8, spills=4),
    "_gated_forward_kernel": Budget(registers=96, blocks=5),
    "_gated_backward_kernel": Budget(registers=128, blocks=4),
}


@triton.jit
def _tanh(x):
    """Exact to a few ulp near 0 too, where 1 − 2/(exp(2x) + 1) cancels (the polynomial is a minimax fit to 0.55)."""
    a = tl.abs(x)
    s = x * x
    near = ((0.0157394409 * s - 0.052302558) * s + 0.133152977) * s - 0.333327681
    far = 1 - 2 / (tl.exp(2 * a) + 1)
    return tl.where(a < 0.55, near * s * x + x, tl.where(x < 0, -far, far))


@triton.jit
def _tanhshrink(x):
    """x − tanh(x), exact to a few ulp near 0 too, where the two cancel (the polynomial is a Chebyshev fit to 1)."""
    a = tl.abs(x)
    s = x * x
    near = ((0.00042069549 * s - 0.0025104594) * s + 0.00821892172) * s - 0.0216601156
    near = ((near * s + 0.0539347902) * s - 0.133331284) * s + 0.333333313
    far = (a - 1) + 2 / (tl.exp(2 * a) + 1)
    return tl.where(a < 1, near * s * x, tl.where(x < 0, -far, far))


@triton.jit
def _expm1(x):
    """exp(x) − 1 for x ≤ 0, exact to a few ulp near 0 too."""
    t = _tanh(0.5 * x)
    return 2 * t / (1 - t)


@triton.jit
def _clip(x, low, high):
    """min(max(x, low), high); NaN stays."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


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
    elif NAME == "relu6":
        y = _clip(x, 0.0, 6.0)
    elif NAME == "relu_squared":
        y = tl.where(x < 0, 0.0, x * x)
    elif NAME == "hardtanh":
        y = _clip(x, a, b)
    elif NAME == "hardsigmoid":
        y = _clip(x + 3, 0.0, 6.0) / 6
    elif NAME == "hardswish":
        y = x * tl.minimum(tl.maximum(x + 3, 0.0), 6.0) / 6
    elif NAME == "hardshrink":
        y = tl.where((x >= -a) & (x <= a), 0.0, x)
    elif NAME == "softshrink":
        y = tl.where(x > a, x - a, tl.where(x < -a, x + a, x * 0))  # NaN stays
    elif NAME == "threshold":
        y = tl.where(x <= a, b, x)
    elif NAME == "gelu":
        p, _ = normal(x)
        y = x * p
    elif NAME == "gelu_tanh":  # (1 + tanh u) / 2 = σ(2u)
        y = opened(x, 1.5957691216057308 * x * (1 + 0.044715 * x * x))
    elif NAME == "silu":
        y = opened(x, x)
    elif NAME == "quick_gelu":
        y = opened(x, 1.702 * x)
    elif NAME == "sigmoid":
        y = sigmoid(x)
    elif NAME == "logsigmoid":
        y = tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))
    elif NAME == "tanh":
        y = _tanh(x)
    elif NAME == "tanhshrink":
        y = _tanhshrink(x)
    elif NAME == "softsign":
        y = x / (1 + tl.abs(x))
    elif NAME == "softplus":
        z = x * a
        y = tl.where(z > b, x, (tl.maximum(z, 0.0) + log1p(tl.exp(-tl.abs(z)))) / a)
    elif NAME == "elu":
        y = tl.where(x > 0, x, a * _expm1(tl.where(x > 0, 0.0, x)))
    elif NAME == "celu":
        z = tl.where(x > 0, 0.0, x) / a  # positive where a is negative
        y = tl.where(x > 0, x, a * tl.where(z > 1, tl.exp(z) - 1, _expm1(tl.where(z > 1, 1.0, z))))
    elif NAME == "selu":
        e = 1.7580993408473766 * _expm1(tl.where(x > 0, 0.0, x))
        y = tl.where(x > 0, 1.0507009873554805 * x, e)
    else:
        tl.static_assert(NAME == "mish", "unknown activation")
        t, _ = _tanh_of_softplus(x)
        y = x * t
    return y


@triton.jit
def gradient(dy, s, NAME: tl.constexpr, a, b):
    """dy f'(x); s is y for the activations in FROM_Y, else x. dy passes NaN where it does in torch."""
    if NAME == "relu":
        dx = tl.where(s <= 0, 0.0, dy)
    elif NAME == "leaky_relu":
        dx = tl.where(s > 0, dy, dy * a)
    elif NAME == "relu6":
        dx = tl.where((s <= 0) | (s >= 6), 0.0, dy)
    elif NAME == "relu_squared":
        dx = tl.where(s <= 0, 0.0, 2 * s * dy)
    elif NAME == "hardtanh":
        dx = tl.where((s <= a) | (s >= b), 0.0, dy)
    elif NAME == "hardsigmoid":
        dx = tl.where((s > -3) & (s < 3), dy / 6, 0.0)
    elif NAME == "hardswish":
        dx = tl.where(s <= -3, 0.0, tl.where(s < 3, dy * (s / 3 + 0.5), dy))
    elif NAME == "hardshrink" or NAME == "softshrink":
        dx = tl.where((s >= -a) & (s <= a), 0.0, dy)
    elif NAME == "threshold":
        dx = tl.where(s <= a, 0.0, dy)
    elif NAME == "gelu":
        p, e = normal(s)
        dx = dy * (p + s * e * 0.3989422804014327)
    elif NAME == "gelu_tanh":
        p = sigmoid(1.5957691216057308 * s * (1 + 0.044715 * s * s))
        dx = dy * (p + s * p * (1 - p) * 1.5957691216057308 * (1 + 0.134145 * s * s))
    elif NAME == "silu":
        p = sigmoid(s)
        dx = dy * p * (1 + s * (1 - p))
    elif NAME == "quick_gelu":
        p = sigmoid(1.702 * s)
        dx = dy * p * (1 + 1.702 * s * (1 - p))
    elif NAME == "sigmoid":
        dx = dy * s * (1 - s)
    elif NAME == "logsigmoid":
        dx = dy * sigmoid(-s)
    elif NAME == "tanh":
        dx = dy * (1 - s * s)
    elif NAME == "tanhshrink":
        t = _tanh(s)
        dx = dy * t * t
    elif NAME == "softsign":
        d = 1 + tl.abs(s)
        dx = tl.where(d == float("inf"), float("nan"), dy / d / d)
    elif NAME == "softplus":
        z = s * a
        dx = tl.where(z > b, dy, dy * sigmoid(z))
    elif NAME == "elu":
        dx = tl.where(s <= 0, dy * a * tl.exp(tl.where(s > 0, 0.0, s)), dy)
    elif NAME == "celu":
        dx = tl.where(s <= 0, dy * tl.exp(tl.where(s > 0, 0.0, s) / a), dy)
    elif NAME == "selu":
        dx = dy * tl.where(s <= 0, 1.7580993408473766 * tl.exp(tl.where(s > 0, 0.0, s)), 1.0507009873554805)
    else:
        tl.static_assert(NAME == "mish", "unknown activation")
        t, p = _tanh_of_softplus(s)
        dx = dy * (t + s * p * (1 - t * t))
    return dx


@triton.jit
def _activation_forward_kernel(
    x, y, M, N, x_row, y_row, a, b, NAME: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, n, mask = rows_tile(M, N, ROWS, BLOCK)
    v = tl.load(x + row * x_row + n, mask, other=0.0).to(tl.float32)
    tl.store(y + row * y_row + n, value(v, NAME, a, b).to(y.dtype.element_ty), mask)


@triton.jit
def _activation_backward_kernel(
    dy, s, dx, M, N, dy_row, s_row, dx_row, a, b, NAME: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, n, mask = rows_tile(M, N, ROWS, BLOCK)
    g = tl.load(dy + row * dy_row + n, mask, other=0.0).to(tl.float32)
    v = tl.load(s + row * s_row + n, mask, other=0.0).to(tl.float32)
    tl.store(dx + row * dx_row + n, gradient(g, v, NAME, a, b).to(dx.dtype.element_ty), mask)


FORWARD = _configs.rows("activation_forward")
BACKWARD = _configs.rows("activation_backward")


def _forward(name: str, x: Any, empty: Any, a: float = 0.0, b: float = 0.0) -> Any:
    axes = _tile.order(x)
    y = empty(x.shape, x.dtype, axes)
    walk = _tile.pointwise(FORWARD, axes, x, y, empty=empty)
    sizes = (walk.M, walk.N, *walk.steps, a, b)
    _tile.launch(_activation_forward_kernel, walk.grid, *walk.arrays, *sizes, NAME=name, **walk.tile)
    return y


def _backward(name: str, dy: Any, kept: Any, empty: Any, a: float = 0.0, b: float = 0.0) -> Any:
    axes = _tile.order(kept)
    dx = empty(kept.shape, kept.dtype, axes)
    walk = _tile.pointwise(BACKWARD, axes, dy, kept, dx, empty=empty)
    sizes = (walk.M, walk.N, *walk.steps, a, b)
    _tile.launch(_activation_backward_kernel, walk.grid, *walk.arrays, *sizes, NAME=name, **walk.tile)
    return dx


globals().update(launchers(_forward, _backward, "empty"))  # relu_forward, relu_backward and so on


# --- gated units: f(a) b, of two arrays or of the halves of one, which are read where they lie ------------------------


@triton.jit
def _gated_forward_kernel(
    a,
    b,
    y,
    M,
    N,
    a_row,
    b_row,
    y_row,
    number_a,
    number_b,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, n, mask = rows_tile(M, N, ROWS, BLOCK)
    v = tl.load(a + row * a_row + n, mask, other=0.0).to(tl.float32)
    u = tl.load(b + row * b_row + n, mask, other=0.0).to(tl.float32)
    tl.store(y + row * y_row + n, (value(v, ACTIVATION, number_a, number_b) * u).to(y.dtype.element_ty), mask)


@triton.jit
def _gated_backward_kernel(
    dy, a, b, da, db, M, N, dy_row, a_row, b_row, da_row, db_row, number_a, number_b,
    ACTIVATION: tl.constexpr, BY_Y: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, n, mask = rows_tile(M, N, ROWS, BLOCK)
    g = tl.load(dy + row * dy_row + n, mask, other=0.0).to(tl.float32)
    v = tl.load(a + row * a_row + n, mask, other=0.0).to(tl.float32)
    f = value(v, ACTIVATION, number_a, number_b)
    if da is not None:
        u = tl.load(b + row * b_row + n, mask, other=0.0).to(tl.float32)
        slope = gradient(g * u, f if BY_Y else v, ACTIVATION, number_a, number_b)
        tl.store(da + row * da_row + n, slope.to(da.dtype.element_ty), mask)
    if db is not None:
        tl.store(db + row * db_row + n, (g * f).to(db.dtype.element_ty), mask)


GATED_FORWARD = _configs.rows("gated_forward")
GATED_BACKWARD = _configs.rows("gated_backward")


def _halves(x: Any, gain: Any, empty: Any) -> tuple[Any, Any]:
    if gain is not None:
        return x, gain
    x, half = x if x.ndim < 2 or _tile.row_step(x) is not None else _tile.dense(x, empty), x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def gated_forward(x: Any, gain: Any = None, *, needs: tuple = (), activation: str, empty: Any) -> tuple[tuple, dict]:
    a, b = _halves(x, gain, empty)
    y = empty(tuple(a.shape), x.dtype)
    walk = _tile.pointwise(GATED_FORWARD, None, a, b, y, empty=empty)
    _tile.launch(
        _gated_forward_kernel, walk.grid, *walk.arrays, walk.M, walk.N, *walk.steps, *numbers_of(activation, 2),
        ACTIVATION=activation, **walk.tile,
    )  # fmt: skip
    return (y,), ({"x": x} | ({} if gain is None else {"gain": gain})) if needs else {}


def gated_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, activation: str, empty: Any) -> tuple:
    x, gain = saved["x"], saved.get("gain")
    a, b = _halves(x, gain, empty)
    if gain is None:
        dx = empty(tuple(x.shape), x.dtype)
        grads: tuple = (dx, None)
        da, db = _halves(dx, None, empty)
    else:
        grads = da, db = tuple(empty(tuple(x.shape), x.dtype) if n in needs else None for n in ("x", "gain"))
    there = [t for t in (da, db) if t is not None]
    walk = _tile.pointwise(GATED_BACKWARD, None, dys[0], a, b, *there, empty=empty)
    given, steps = [*walk.arrays[:3]], [*walk.steps[:3]]
    results, left = iter(walk.arrays[3:]), iter(walk.steps[3:])
    for t in (da, db):
        given.append(None if t is None else next(results))
        steps.append(0 if t is None else next(left))
    _tile.launch(
        _gated_backward_kernel, walk.grid, *given, walk.M, walk.N, *steps, *numbers_of(activation, 2), ACTIVATION=activation,
        BY_Y=activation in FROM_Y, **walk.tile,
    )  # fmt: skip
    return grads
