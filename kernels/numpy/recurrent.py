"""Recurrent layers through BLAS: a product a step, and the cells in place on what it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpulayers.arrays import guests

from .._recurrent import GATES, walk
from ._smooth import sigmoid

REFUSALS = {"float64": "float64 is left to the definition"}


def recurrent_refuses(
    x: Any, weight: Any, h0: Any, c0: Any = None, bias: Any = None, projection: Any = None, lengths: Any = None,
    *, needs: tuple = (), mode: str, reverse: bool = False,
) -> str | None:  # fmt: skip
    return REFUSALS["float64"] if x.dtype == np.float64 else None


def _single(x: Any) -> Any:
    return None if x is None else x.astype(np.float32, copy=False)


def _there(lengths: Any, t: int) -> Any:
    """(B, 1): whether each sequence is as long as this."""
    return None if lengths is None else (lengths > t)[:, None]


# --- forward: cell(z, x, h, c, c_new, gates or None) → the new h, in place of z or a part of it ----------------------


def _lstm(z: Any, x: Any, h: Any, c: Any, c_new: Any, kept: Any) -> Any:
    n = z.shape[1] // 4
    z += x
    i, f, g, o = (z[:, k * n : (k + 1) * n] for k in range(4))
    sigmoid(z[:, : 2 * n], z[:, : 2 * n]), np.tanh(g, g), sigmoid(o, o)
    if kept is not None:
        kept[:] = z
    np.multiply(f, c, c_new)
    i *= g
    c_new += i
    np.tanh(c_new, g)
    g *= o
    return g


def _gru(z: Any, x: Any, h: Any, c: Any, c_new: Any, kept: Any) -> Any:
    n = z.shape[1] // 3
    if kept is not None:
        kept[:, 3 * n :] = z[:, 2 * n :]
    ends, r, u, new = z[:, : 2 * n], z[:, :n], z[:, n : 2 * n], z[:, 2 * n :]
    ends += x[:, : 2 * n]
    sigmoid(ends, ends)
    new *= r
    new += x[:, 2 * n :]
    np.tanh(new, new)
    if kept is not None:
        kept[:, : 3 * n] = z
    np.subtract(h, new, r)
    r *= u
    new += r
    return new


def _tanh(z: Any, x: Any, *_: Any) -> Any:
    z += x
    return np.tanh(z, z)


def _relu(z: Any, x: Any, *_: Any) -> Any:
    z += x
    np.copyto(z, 0, where=z <= 0)
    return z


CELLS: dict[str, Callable[..., Any]] = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _tanh, "rnn_relu": _relu}


def recurrent_forward(
    x: np.ndarray, weight: np.ndarray, h0: np.ndarray, c0: Any = None, bias: Any = None, projection: Any = None,
    lengths: Any = None, *, needs: tuple = (), mode: str, reverse: bool = False,
) -> tuple[tuple, dict]:  # fmt: skip
    (steps, batch, rows), out, dtype = x.shape, weight.shape[1], x.dtype
    hidden, cell = rows // GATES[mode], CELLS[mode]
    turned, b, down = _single(weight).T, _single(bias), None if projection is None else _single(projection).T
    y, z, cells = np.empty((steps, batch, out), dtype), np.empty((batch, rows), np.float32), None
    if mode == "lstm":
        cells = np.empty((steps if needs else 1, batch, hidden), np.float32)
    gates = np.empty((steps, batch, 4 * hidden), dtype) if needs and mode in ("lstm", "gru") else None
    h, c = _single(h0), _single(c0)
    for t, earlier in walk(steps, reverse):
        guests.matmul(h, turned, out=z)
        if b is not None:
            z += b
        c_new = None if cells is None else cells[t] if needs else np.empty_like(c)
        new = cell(z, x[t], h, c, c_new, None if gates is None else gates[t])
        y[t] = new if down is None else guests.matmul(_single(new.astype(dtype, copy=False)), down)
        there = _there(lengths, t)
        if there is not None:
            np.copyto(y[t], h0 if earlier is None else y[earlier], where=~there)
            if c_new is not None:
                np.copyto(c_new, c, where=~there)
        h, c = _single(y[t]), c_new
    h_n = y[0 if reverse else -1].copy()
    outputs = (y, h_n) if c is None else (y, h_n, c.astype(dtype))
    if not needs:
        return outputs, {}
    given = {"c0": c0, "cells": cells, "gates": gates, "projection": projection, "lengths": lengths}
    return outputs, {"weight": weight, "h0": h0, "y": y} | {n: a for n, a in given.items() if a is not None}


# --- backward --------------------------------------------------------------------------------------------------------


def _lstm_gradient(dh: Any, dc: Any, gates: Any, c: Any, c_before: Any, dx: Any) -> None:
    """Fills dx (B, 4 H) and makes dc that of the cell before."""
    n = dh.shape[1]
    i, f, g, o = (gates[:, k * n : (k + 1) * n] for k in range(4))
    d_i, d_f, d_g, d_o = (dx[:, k * n : (k + 1) * n] for k in range(4))
    tanh_c = np.tanh(c)
    np.multiply(dh, o, d_g)
    d_g *= 1 - tanh_c * tanh_c
    dc += d_g
    np.multiply(dc, g * i * (1 - i), d_i)
    np.multiply(dc, c_before * f * (1 - f), d_f)
    np.multiply(dc, i * (1 - g * g), d_g)
    np.multiply(dh, tanh_c * o * (1 - o), d_o)
    dc *= f


def _gru_gradient(dh: Any, gates: Any, before: Any, dx: Any, dz: Any) -> Any:
    """Fills dx and dz (B, 3 H); what goes to the state before directly."""
    n = dh.shape[1]
    r, u, new, z = (gates[:, k * n : (k + 1) * n] for k in range(4))
    d_r, d_u, d_new = (dx[:, k * n : (k + 1) * n] for k in range(3))
    np.multiply(dh, (1 - u) * (1 - new * new), d_new)
    np.multiply(d_new, z * r * (1 - r), d_r)
    np.multiply(dh, (before - new) * u * (1 - u), d_u)
    dz[:, : 2 * n] = dx[:, : 2 * n]
    np.multiply(d_new, r, dz[:, 2 * n :])
    return dh * u


def recurrent_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, mode: str, reverse: bool = False
) -> tuple:
    y, gates, cells, lengths = (saved.get(n) for n in ("y", "gates", "cells", "lengths"))
    (steps, batch, rows), dtype = inputs[0].shape, inputs[0].dtype
    dy, dh_n, dc_n = (*dys, None)[:3]
    hidden, out, weight, projection = rows // GATES[mode], y.shape[2], _single(saved["weight"]), saved.get("projection")
    up, c0 = _single(projection), _single(saved.get("c0"))
    dh = np.zeros((batch, out), np.float32) if dh_n is None else dh_n.astype(np.float32)
    dc = (
        (np.zeros((batch, hidden), np.float32) if dc_n is None else dc_n.astype(np.float32)) if mode == "lstm" else None
    )
    dx = np.empty((steps, batch, rows), dtype)
    dz = np.empty_like(dx) if mode == "gru" else dx
    dp = None if projection is None else np.empty((steps, batch, out), dtype)
    d, e = (np.empty((batch, rows), np.float32) for _ in range(2))
    before = np.empty((steps, batch, out), dtype)
    for t, earlier in reversed([*walk(steps, reverse)]):
        before[t] = saved["h0"] if earlier is None else y[earlier]
        if dy is not None:
            dh = dh + dy[t]
        there, direct, to = _there(lengths, t), None, d
        through, c_after = dh, dc
        if dp is not None:
            dp[t] = dh
            through = guests.matmul(_single(dp[t]), up)
            if there is not None:
                np.copyto(dp[t], 0, where=~there)
        if mode == "lstm":
            c_after = dc.copy() if there is not None else dc
            _lstm_gradient(through, dc, _single(gates[t]), cells[t], c0 if earlier is None else cells[earlier], d)
        elif mode == "gru":
            direct, to = _gru_gradient(through, _single(gates[t]), _single(before[t]), d, e), e
        elif mode == "rnn_tanh":
            v = _single(y[t])
            np.multiply(through, 1 - v * v, d)
        else:
            d[:] = np.where(y[t] > 0, through, 0)
        if there is not None:
            np.copyto(d, 0, where=~there)
            np.copyto(to, 0, where=~there)
        dx[t] = d
        if to is not d:
            dz[t] = to
        following = guests.matmul(_single(dz[t]), weight)
        if direct is not None:
            following += direct
        if there is not None:
            np.copyto(following, dh, where=~there)
            if dc is not None:
                np.copyto(dc, c_after, where=~there)
        dh = following
    flat = _single(dz).reshape(steps * batch, rows)
    found: dict[str, Any] = {"x": dx, "h0": dh, "c0": dc}
    if "weight" in needs:
        found["weight"] = guests.matmul(flat.T, _single(before).reshape(-1, out))
    if "bias" in needs:
        found["bias"] = flat.sum(0)
    if "projection" in needs:
        made = _single((_single(gates[:, :, 3 * hidden :]) * np.tanh(cells)).astype(dtype, copy=False))
        found["projection"] = guests.matmul(_single(dp).reshape(-1, out).T, made.reshape(-1, hidden))
    names = ("x", "weight", "h0", "c0", "bias", "projection")
    return (*[found[n].astype(dtype, order="C", copy=False) if n in needs else None for n in names], None)
