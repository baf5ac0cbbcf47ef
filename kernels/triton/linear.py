"""Linear. Bound by arithmetic: forward 2 M N K flops with bias and activation in the epilogue, backward twice that.

Backward first makes dz = dy f'(z) and the column sums that are dbias, in one pass; without an activation dz is dy, whose
columns are summed by the product that is dweight, where it can.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .._activation import FROM_Y, numbers_of
from .._budget import Budget
from .._linears import BIASES, WEIGHTS, kept, named
from . import _configs, _linears, _matmul, _tile
from ._batched import matmul_backward as matmul_backward
from ._batched import matmul_forward as matmul_forward
from .activation import gradient

BUDGETS = {
    # Rows of a length that 16 does not divide.
    "_linear_backward_columns_kernel": Budget(
        registers=96, blocks=5, narrow=lambda c: "loads, stores" if c["odd"] & {"N", "dy_m"} else ""
    ),
}


@triton.jit
def _linear_backward_columns_kernel(
    dy, kept, dz, parts, M, N, dy_m, dy_n, each, a, b, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """dz = dy f'(z), and this program's partial sum of dz over ``each`` rows of BLOCK columns."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    start = tl.program_id(1).to(tl.int64) * each
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, each, ROWS):
        m = start + first + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
        mask = (m < tl.minimum(start + each, M)) & (n < N)
        g = tl.load(dy + m * dy_m + n.to(tl.int64) * dy_n, mask, other=0.0).to(tl.float32)
        if ACTIVATION is not None:
            v = tl.load(kept + m * N + n, mask, other=0.0).to(tl.float32)
            g = tl.where(mask, gradient(g, v, ACTIVATION, a, b), 0.0)
            tl.store(dz + m * N + n, g.to(dz.dtype.element_ty), mask)
        if parts is not None:
            total += g
    if parts is not None:
        tl.store(parts + tl.program_id(1).to(tl.int64) * N + n, tl.sum(total, 0, keep_dims=True), n < N)


BACKWARD_COLUMNS = _configs.rows("linear_backward_columns")


def _matrix(x: Any, columns: int, empty: Any = None) -> Any:
    """All rows of the last axis; a copy where they do not lie evenly."""
    m = math.prod(x.shape[:-1])
    try:
        return x.view(m, columns)
    except RuntimeError:
        return _tile.copied(x, None, empty).view(m, columns)


def linear_forward(
    x: Any, weight: Any, bias: Any = None, *, needs: tuple = (), activation: str | None = None, empty: Any
) -> tuple[tuple, dict]:
    out, features = weight.shape
    y = empty((*x.shape[:-1], out), x.dtype)
    saved = {"x": x} if "weight" in needs else {}
    if "x" in needs:
        saved["weight"] = weight
    z, b = None, None if bias is None else _tile.dense(bias, empty)
    if activation in FROM_Y and needs:
        saved["y"] = y
    elif activation is not None and needs:
        z = empty(y.shape, x.dtype)
        saved |= {"z": z, "weight": weight} | ({} if bias is None else {"bias": bias})
    if y.numel():
        _matmul.matmul(
            _matrix(x, features, empty), weight, _matrix(y, out), empty,
            bias=b, z=z if z is None else _matrix(z, out), f=activation, numbers=numbers_of(activation, 2),
        )  # fmt: skip
    return (y,), saved


def _backward_columns(dy: Any, kept: Any, activation: str | None, want_sum: bool, empty: Any) -> tuple[Any, Any]:
    """(dz, partial column sums of it (P, 1, N) or None) from dy (M, N)."""
    m, n = dy.shape
    device = _tile.device(dy)
    entry = BACKWARD_COLUMNS(device, n)
    block, rows = min(128, max(16, _tile.next_power_of_2(n))), max(1, entry.elements // 128)
    columns = _tile.cdiv(n, block)
    programs, each = _tile.split(m, max(1, min(8 * device.sms // max(columns, 1), _tile.cdiv(m, rows))))
    dz = dy if activation is None else empty((m, n), dy.dtype)
    parts = empty((programs, 1, n), "float32") if want_sum else None
    _tile.launch(
        _linear_backward_columns_kernel, (columns, programs), dy, kept, dz, parts, m, n, *dy.stride(), each,
        *numbers_of(activation, 2), ACTIVATION=activation, ROWS=rows, BLOCK=block, num_warps=entry.warps,
    )  # fmt: skip
    return dz, parts


def linear_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, activation: str | None = None, empty: Any
) -> tuple:
    x, weight = inputs[:2]
    out, features = weight.shape
    dz = _matrix(dys[0], out, empty)
    kept = None if activation is None else saved["y" if activation in FROM_Y else "z"]
    dx = empty(x.shape, dz.dtype) if "x" in needs else None
    dw = empty(weight.shape, dz.dtype) if "weight" in needs else None
    db = sums = empty((out,), dz.dtype) if "bias" in needs else None
    rows = None if dw is None else _matrix(saved["x"], features, empty).T
    if activation is not None or rows is None or db is None or not _matmul.by_tma(dz.T, rows):
        sums = None
    if activation is not None or (db is not None and sums is None):
        dz, parts = _backward_columns(dz, kept, activation, db is not None, empty)
        if parts is not None:
            _matmul.finish(parts, db)
    if dx is not None and dx.numel():
        _matmul.matmul(dz, saved["weight"].T, _matrix(dx, features), empty)
    if dw is not None and dw.numel():
        _matmul.matmul(dz.T, rows, dw, empty, sums=sums, weights=True)
    return dx, dw, db


# --- several weights of one x ----------------------------------------------------------------------------------------


def linears_forward(
    x: Any, weight: Any, weight_2: Any, weight_3: Any = None, bias: Any = None, bias_2: Any = None, bias_3: Any = None,
    *, needs: tuple = (), empty: Any,
) -> tuple[tuple, dict]:  # fmt: skip
    given = named((weight, weight_2, weight_3))
    weights = [*given.values()]
    ys = tuple([empty((*x.shape[:-1], w.shape[0]), x.dtype) for w in weights])
    biases = [b if b is None else _tile.dense(b, empty) for b in (bias, bias_2, bias_3)]
    rows = _matrix(x, x.shape[-1], empty)
    some = [i for i, y in enumerate(ys) if y.numel()]
    _linears.products(
        "N", [rows] * len(some), [weights[i] for i in some], [_matrix(ys[i], weights[i].shape[0]) for i in some], empty,
        [biases[i] for i in some],
    )  # fmt: skip
    return ys, kept(x, given, needs)


def linears_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, empty: Any) -> tuple:
    features = inputs[0].shape[-1]
    dtype = next(dy for dy in dys if dy is not None).dtype
    grads = {n: empty(s.shape, dtype) for n, s in zip(("x", *WEIGHTS, *BIASES), inputs) if n in needs}
    flat = [dy if dy is None else _matrix(dy, dy.shape[-1], empty) for dy in dys]
    used = [i for i, dy in enumerate(flat) if dy is not None and dy.shape[1]]
    if "x" in needs and grads["x"].numel():
        pairs = [flat[i] for i in used], [saved[WEIGHTS[i]].T for i in used]
        if used:
            _linears.products("K", *pairs, [_matrix(grads["x"], features)], empty)
        else:
            _matmul.zero(grads["x"].view(1, -1), empty)
    for i, dy in enumerate(flat):
        for name in (WEIGHTS[i], BIASES[i]):
            if dy is None and name in grads:
                _matmul.zero(grads[name].view(1, -1), empty)
    wanted = [i for i in used if WEIGHTS[i] in grads and features]
    turned = [flat[i].T for i in wanted]
    rows = [_matrix(saved["x"], features, empty).T] * len(wanted) if wanted else []
    outs, sums = [grads[WEIGHTS[i]] for i in wanted], [grads.get(BIASES[i]) for i in wanted]
    apart = [i for i in used if BIASES[i] in grads]
    if _linears.by_one_launch(turned, rows, outs):
        apart = [i for i in apart if i not in wanted]
    else:
        sums = [None] * len(sums)
    for i in apart:
        _matmul.finish(_backward_columns(flat[i], None, None, True, empty)[1], grads[BIASES[i]])
    if wanted:
        _linears.products("M", turned, rows, outs, empty, sums=sums)
    return tuple([grads.get(n) for n in ("x", *WEIGHTS, *BIASES)])
