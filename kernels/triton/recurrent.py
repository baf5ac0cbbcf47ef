"""Recurrent layers, a kernel a step: the product of the state with the weights of a few units, and their cells, in one.

What bounds a step is the time that the weights take from L2, and a launch; both are the same for any batch that one tile
of rows holds. Backward is alike: the product of the gradients of the step after, then the cells'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from .._budget import Budget
from .._recurrent import GATES, walk
from . import _configs, _matmul, _tile
from ._configs import Tile
from ._special import sigmoid
from .activation import _tanh
from .linear import linear_backward

BUDGETS = {
    # Weights are read by rows where they are a product's columns, and units by a few.
    "_recurrent_forward_kernel": Budget(registers=255, blocks=1, narrow="loads, stores"),
    "_recurrent_backward_kernel": Budget(registers=255, blocks=1, narrow="loads, stores"),
}


@triton.jit
def _rounded(v, like):
    return v.to(like.dtype.element_ty)


@triton.jit
def _add(acc, left, weight, k, n, K, N, w_r, w_k, PRECISION: tl.constexpr):
    """acc + left Wᵀ over the columns k of the rows n of a weight."""
    at = weight + n.to(tl.int64) * w_r + k.to(tl.int64)[:, None] * w_k
    return tl.dot(left, tl.load(at, (k < K)[:, None] & (n < N), other=0.0), acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["t"])
def _recurrent_forward_kernel(
    x, state, weight, bias, h, c, lengths, y, cells, gates, h_n, c_n, t, B, N, K, x_b, x_k, w_r, w_k,
    MODE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (B, N) of one step: of x (B, gates · N), the state (B, K), and h and c before (B, N). MODE None: y = state Wᵀ.

    cells, gates: (B, N) and (B, 4 N), to be kept. h_n, c_n: y and cells again; the last step's stay. Past its length a sequence
    keeps h and c. All but x and weight are row-major.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    n = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    mask = (m < B) & (n < N)
    acc = tl.zeros((BM, BN), tl.float32)
    acc_1, acc_2, acc_3 = acc, acc, acc
    whole = tl.full((), 1, tl.int64) * N
    rows = whole * w_r
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(state + m.to(tl.int64) * K + k[None, :], (m < B) & (k < K)[None, :], other=0.0)
        acc = _add(acc, left, weight, k, n, K, N, w_r, w_k, PRECISION)
        if MODE == "lstm" or MODE == "gru":
            acc_1 = _add(acc_1, left, weight + rows, k, n, K, N, w_r, w_k, PRECISION)
            acc_2 = _add(acc_2, left, weight + 2 * rows, k, n, K, N, w_r, w_k, PRECISION)
        if MODE == "lstm":
            acc_3 = _add(acc_3, left, weight + 3 * rows, k, n, K, N, w_r, w_k, PRECISION)
    if bias is not None:
        acc += tl.load(bias + n, n < N, other=0.0).to(tl.float32)
        if MODE == "lstm" or MODE == "gru":
            acc_1 += tl.load(bias + N + n, n < N, other=0.0).to(tl.float32)
            acc_2 += tl.load(bias + 2 * N + n, n < N, other=0.0).to(tl.float32)
        if MODE == "lstm":
            acc_3 += tl.load(bias + 3 * N + n, n < N, other=0.0).to(tl.float32)
    at = m.to(tl.int64) * N + n
    kept = m.to(tl.int64) * 4 * N + n
    there = mask
    if lengths is not None:
        there = mask & (tl.load(lengths + m, m < B, other=0) > t)
    from_x = x if x is None else x + m.to(tl.int64) * x_b + n.to(tl.int64) * x_k
    if MODE == "lstm":
        step = whole * x_k
        i = sigmoid(acc + tl.load(from_x, mask, other=0.0).to(tl.float32))
        f = sigmoid(acc_1 + tl.load(from_x + step, mask, other=0.0).to(tl.float32))
        g = _tanh(acc_2 + tl.load(from_x + 2 * step, mask, other=0.0).to(tl.float32))
        o = sigmoid(acc_3 + tl.load(from_x + 3 * step, mask, other=0.0).to(tl.float32))
        carried = tl.load(c + at, mask, other=0.0).to(tl.float32)
        cell = f * carried + i * g
        new = o * _tanh(cell)
        cell = tl.where(there, cell, carried)
        tl.store(cells + at, cell, mask)
        if c_n is not None:
            tl.store(c_n + at, _rounded(cell, c_n), mask)
        if gates is not None:
            tl.store(gates + kept, _rounded(i, gates), mask)
            tl.store(gates + kept + N, _rounded(f, gates), mask)
            tl.store(gates + kept + 2 * N, _rounded(g, gates), mask)
            tl.store(gates + kept + 3 * N, _rounded(o, gates), mask)
    elif MODE == "gru":
        step = whole * x_k
        r = sigmoid(acc + tl.load(from_x, mask, other=0.0).to(tl.float32))
        u = sigmoid(acc_1 + tl.load(from_x + step, mask, other=0.0).to(tl.float32))
        fresh = _tanh(r * acc_2 + tl.load(from_x + 2 * step, mask, other=0.0).to(tl.float32))
        new = fresh + u * (tl.load(h + at, mask, other=0.0).to(tl.float32) - fresh)
        if gates is not None:
            tl.store(gates + kept, _rounded(r, gates), mask)
            tl.store(gates + kept + N, _rounded(u, gates), mask)
            tl.store(gates + kept + 2 * N, _rounded(fresh, gates), mask)
            tl.store(gates + kept + 3 * N, _rounded(acc_2, gates), mask)
    else:
        new = acc
        if x is not None:
            new += tl.load(from_x, mask, other=0.0).to(tl.float32)
        if MODE == "rnn_tanh":
            new = _tanh(new)
        elif MODE == "rnn_relu":
            new = tl.where(new <= 0, 0.0, new)
    new = _rounded(new, y)
    if lengths is not None:  # noqa: SIM102
        if h is not None:
            new = tl.where(there, new, tl.load(h + at, mask, other=0.0))
    tl.store(y + at, new, mask)
    if h_n is not None:
        tl.store(h_n + at, new, mask)


@triton.jit(do_not_specialize=["t"])
def _recurrent_backward_kernel(
    dz_after, weight, carry, dy, dc, y, gates, h, cell, c, lengths, dx, dz, carried, dc_before, made, t,
    B, N, K, w_r, w_k, dy_b, dy_n,
    MODE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx and dz (B, gates · N) of one step, from those of the step after it (B, K), what it hands on directly (B, N), dy and
    dc. MODE None: dx = dh itself.

    y, gates, cell: of this step; h, c: before it. carried, dc_before: what this step hands on; made: o tanh(cell) again.
    weight: (K, N). All but weight and dy are row-major.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    n = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    mask = (m < B) & (n < N)
    at = m.to(tl.int64) * N + n
    dh = tl.zeros((BM, BN), tl.float32)
    if dz_after is not None:
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            left = tl.load(dz_after + m.to(tl.int64) * K + k[None, :], (m < B) & (k < K)[None, :], other=0.0)
            dh = _add(dh, left, weight, k, n, K, N, w_r, w_k, PRECISION)
    if carry is not None:
        dh += tl.load(carry + at, mask, other=0.0).to(tl.float32)
    if dy is not None:
        dh += tl.load(dy + m.to(tl.int64) * dy_b + n.to(tl.int64) * dy_n, mask, other=0.0).to(tl.float32)
    there = mask
    if lengths is not None:
        there = mask & (tl.load(lengths + m, m < B, other=0) > t)
    direct = tl.zeros((BM, BN), tl.float32)
    if MODE == "lstm":
        wide = m.to(tl.int64) * 4 * N + n
        i = tl.load(gates + wide, mask, other=0.0).to(tl.float32)
        f = tl.load(gates + wide + N, mask, other=0.0).to(tl.float32)
        g = tl.load(gates + wide + 2 * N, mask, other=0.0).to(tl.float32)
        o = tl.load(gates + wide + 3 * N, mask, other=0.0).to(tl.float32)
        tanh_c = _tanh(tl.load(cell + at, mask, other=0.0))
        d = dh * o * (1 - tanh_c * tanh_c)
        d_after = tl.zeros((BM, BN), tl.float32)
        if dc is not None:
            d_after = tl.load(dc + at, mask, other=0.0).to(tl.float32)
        d += d_after
        before = tl.load(c + at, mask, other=0.0).to(tl.float32)
        tl.store(dx + wide, _rounded(tl.where(there, d * g * i * (1 - i), 0.0), dx), mask)
        tl.store(dx + wide + N, _rounded(tl.where(there, d * before * f * (1 - f), 0.0), dx), mask)
        tl.store(dx + wide + 2 * N, _rounded(tl.where(there, d * i * (1 - g * g), 0.0), dx), mask)
        tl.store(dx + wide + 3 * N, _rounded(tl.where(there, dh * tanh_c * o * (1 - o), 0.0), dx), mask)
        if dc_before is not None:
            tl.store(dc_before + at, _rounded(tl.where(there, d * f, d_after), dc_before), mask)
        if made is not None:
            tl.store(made + at, _rounded(o * tanh_c, made), mask)
    elif MODE == "gru":
        kept = m.to(tl.int64) * 4 * N + n
        wide = m.to(tl.int64) * 3 * N + n
        r = tl.load(gates + kept, mask, other=0.0).to(tl.float32)
        u = tl.load(gates + kept + N, mask, other=0.0).to(tl.float32)
        fresh = tl.load(gates + kept + 2 * N, mask, other=0.0).to(tl.float32)
        z = tl.load(gates + kept + 3 * N, mask, other=0.0).to(tl.float32)
        d_fresh = dh * (1 - u) * (1 - fresh * fresh)
        d_r = _rounded(tl.where(there, d_fresh * z * r * (1 - r), 0.0), dx)
        before = tl.load(h + at, mask, other=0.0).to(tl.float32)
        d_u = _rounded(tl.where(there, dh * (before - fresh) * u * (1 - u), 0.0), dx)
        tl.store(dx + wide, d_r, mask)
        tl.store(dx + wide + N, d_u, mask)
        tl.store(dx + wide + 2 * N, _rounded(tl.where(there, d_fresh, 0.0), dx), mask)
        tl.store(dz + wide, d_r, mask)
        tl.store(dz + wide + N, d_u, mask)
        tl.store(dz + wide + 2 * N, _rounded(tl.where(there, d_fresh * r, 0.0), dx), mask)
        direct = dh * u
    else:
        d = dh
        if MODE == "rnn_tanh":
            v = tl.load(y + at, mask, other=0.0).to(tl.float32)
            d = dh * (1 - v * v)
        elif MODE == "rnn_relu":
            d = tl.where(tl.load(y + at, mask, other=0.0).to(tl.float32) > 0, dh, 0.0)
        tl.store(dx + at, _rounded(tl.where(there, d, 0.0), dx), mask)
    if carried is not None:
        if lengths is not None:
            direct = tl.where(there, direct, dh)
        tl.store(carried + at, direct, mask)


# --- launchers -------------------------------------------------------------------------------------------------------


def _choose(entries: Sequence[Tile], device: Any, batch: int) -> tuple[int, Tile]:
    """The first whose rows hold the batch, else the last."""
    return next(((i, e) for i, e in enumerate(entries) if batch <= e.BM), (len(entries) - 1, entries[-1]))


LOOPS = ("recurrent",)
"""Ops with as many launches as an axis is long: a compiler would write each down."""
HALF = _configs.tiles("recurrent.half", _choose, inner=())
SINGLE = _configs.tiles("recurrent.single", _choose, inner=())


def _tiled(x: Any, batch: int, units: int) -> tuple[tuple[int, int], dict]:
    """(grid, constants) of a step's launch."""
    half = x.element_size() == 2
    c = (HALF if half else SINGLE)(_tile.device(x), batch)
    precision = "tf32" if not half and _tile.tf32("cudnn.rnn", "cuda.matmul") else "ieee"
    tile = dict(BM=c.BM, BN=c.BN, BK=c.BK, PRECISION=precision, num_warps=c.warps, num_stages=c.stages)
    return (_tile.cdiv(batch, c.BM), _tile.cdiv(units, c.BN)), tile


def recurrent_forward(
    x: Any, weight: Any, h0: Any, c0: Any = None, bias: Any = None, projection: Any = None, lengths: Any = None,
    *, needs: tuple = (), mode: str, reverse: bool = False, empty: Any,
) -> tuple[tuple, dict]:  # fmt: skip
    (steps, batch, rows), out, dtype = x.shape, weight.shape[1], x.dtype
    hidden = rows // GATES[mode]
    given = {n: a for n, a in (("projection", projection), ("lengths", lengths)) if a is not None}
    saved = {"weight": weight, "h0": h0} | ({} if c0 is None else {"c0": c0})
    h0, c0, bias, lengths = (a if a is None else _tile.dense(a, empty) for a in (h0, c0, bias, lengths))
    y, h_n = empty((steps, batch, out), dtype), empty((batch, out), dtype)
    cells = gates = c_n = made = None
    if mode == "lstm":
        cells, c_n = empty((steps if needs else 1, batch, hidden), "float32"), empty((batch, hidden), dtype)
        saved["cells"] = cells
    if needs and mode in ("lstm", "gru"):
        gates = saved["gates"] = empty((steps, batch, 4 * hidden), dtype)
    made = None if projection is None else empty((batch, hidden), dtype)
    grid, tile = _tiled(x, batch, hidden)
    for t, earlier in walk(steps, reverse):
        h = h0 if earlier is None else y[earlier]
        c = c0 if earlier is None else cells if cells is None else cells[earlier if needs else 0]
        now = None if cells is None else cells[t if needs else 0]
        kept = None if gates is None else gates[t]
        _tile.launch(
            _recurrent_forward_kernel, grid, x[t], h, weight, bias, h if projection is None else None, c, lengths,
            y[t] if projection is None else made, now, kept, h_n if projection is None else None, c_n,
            t, batch, hidden, out, *x.stride()[1:], *weight.stride(), MODE=mode, **tile,
        )  # fmt: skip
        if projection is not None:
            across, wide = _tiled(x, batch, out)
            _tile.launch(
                _recurrent_forward_kernel, across, None, made, projection, None, h, None, lengths, y[t], None, None, h_n, None,
                t, batch, out, hidden, 0, 0, *projection.stride(), MODE=None, **wide,
            )  # fmt: skip
    outputs = (y, h_n) if c_n is None else (y, h_n, c_n)
    return outputs, saved | {"y": y} | given if needs else {}


def recurrent_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, mode: str, reverse: bool = False, empty: Any
) -> tuple:
    weight, y, gates, projection = (saved.get(n) for n in ("weight", "y", "gates", "projection"))
    (steps, batch, rows), out = inputs[0].shape, weight.shape[1]
    hidden, dtype, cells = rows // GATES[mode], y.dtype, saved.get("cells")
    h0, c0, lengths = (None if saved.get(n) is None else _tile.dense(saved[n], empty) for n in ("h0", "c0", "lengths"))
    dy, dh_n, dc = (*dys, None)[:3]
    carry, dc = (a if a is None else _tile.dense(a, empty) for a in (dh_n, dc))
    dx = empty((steps, batch, rows), dtype)
    dz = empty(dx.shape, dtype) if mode == "gru" else dx
    new = lambda name, *shape: empty(shape, dtype) if name in needs else None  # noqa: E731
    dh0, dc0 = new("h0", batch, out), new("c0", batch, hidden)
    dp = made = None
    if projection is not None:
        dp, made = empty((steps, batch, out), dtype), new("projection", steps, batch, hidden)
    beside = empty((batch, out), "float32") if mode == "gru" or lengths is not None else None
    dc_room = empty((batch, hidden), "float32") if mode == "lstm" else None
    (grid, tile), (across, wide) = _tiled(y, batch, hidden), _tiled(y, batch, out)
    dy_steps = (0, 0) if dy is None else dy.stride()[1:]
    after, turned = None, (weight.stride(1), weight.stride(0))
    for t, earlier in reversed([*walk(steps, reverse)]):
        h, now = h0 if earlier is None else y[earlier], None if dy is None else dy[t]
        cell, c = (None, None) if cells is None else (cells[t], c0 if earlier is None else cells[earlier])
        dc_before = dc0 if earlier is None else dc_room
        kept, both = None if gates is None else gates[t], (dx[t], dz[t] if mode == "gru" else None)
        if projection is None:
            _tile.launch(
                _recurrent_backward_kernel, grid, after, weight, carry, now, dc, y[t], kept, h, cell, c, lengths, *both,
                beside, dc_before, None, t, batch, hidden, rows, *turned, *dy_steps, MODE=mode, **tile,
            )  # fmt: skip
        else:
            _tile.launch(
                _recurrent_backward_kernel, across, after, weight, carry, now, *[None] * 6, lengths, dp[t], None, beside, None,
                None, t, batch, out, rows, *turned, *dy_steps, MODE=None, **wide,
            )  # fmt: skip
            _tile.launch(
                _recurrent_backward_kernel, grid, dp[t], projection, None, None, dc, None, kept, None, cell, c, lengths, *both,
                None, dc_before, None if made is None else made[t], t, batch, hidden, out,
                projection.stride(1), projection.stride(0), 0, 0, MODE=mode, **tile,
            )  # fmt: skip
        after, carry, dc = dz[t], beside, dc_before
    if dh0 is not None:
        _tile.launch(
            _recurrent_backward_kernel, across, after, weight, carry, *[None] * 8, dh0, *[None] * 4, 0, batch, out, rows,
            *turned, 0, 0, MODE=None, **wide,
        )  # fmt: skip
    dw, db = _of_all_steps(dz, saved["h0"], y, inputs, needs, reverse, empty)
    d_projection = None if made is None else empty((out, hidden), dtype)
    if d_projection is not None:
        _matmul.matmul(dp.view(-1, out).T, made.view(-1, hidden).T, d_projection, empty, weights=True)
    return dx if "x" in needs else None, dw, dh0, dc0, db, d_projection, None


def _of_all_steps(dz: Any, h0: Any, y: Any, inputs: tuple, needs: tuple, reverse: bool, empty: Any) -> tuple[Any, Any]:
    """(dW, db): the product and the sum over all steps and the batch."""
    wanted = tuple(n for n in ("weight", "bias") if n in needs)
    if not wanted:
        return None, None
    steps, batch, rows = dz.shape
    out, before = y.shape[2], None
    if "weight" in needs:
        before = empty((steps, batch, out), y.dtype)
        first = steps - 1 if reverse else 0
        _tile.copy(h0, before[first])
        if steps > 1:
            _tile.copy(y[1:] if reverse else y[:-1], before[:-1] if reverse else before[1:])
        before = before.view(-1, out)
    linear = (before if before is not None else y.view(-1, out)), inputs[1]
    _, dw, db = linear_backward(
        (dz.view(-1, rows),), {"x": before}, inputs=linear, needs=wanted, activation=None, empty=empty
    )
    return dw, db
