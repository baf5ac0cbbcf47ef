"""Recurrent layers: the time loop of one layer in one direction, behind the product of all its inputs with their weights."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, compute_dtype, int64, namespace, up
from gpulayers.definition import ArgumentError, Rule, ShapeError
from gpulayers.kernels._recurrent import GATES, walk
from gpulayers.ops._op import Op, require_float, require_same_dtype, require_shape
from gpulayers.ops._special import sigmoid


def recurrent_rule(
    x: Spec,
    weight: Spec,
    h0: Spec,
    c0: Spec | None = None,
    bias: Spec | None = None,
    projection: Spec | None = None,
    lengths: Spec | None = None,
    *,
    needs: tuple = (),
    mode: str,
    reverse: bool = False,
) -> Rule:
    require_float("x", x)
    if mode not in GATES:
        raise ArgumentError("mode", f"one of {', '.join(GATES)}", repr(mode))
    if x.ndim != 3 or x.shape[0] == 0:
        raise ShapeError("x", "x.shape = [T ≥ 1, B, gates · H]", list(x.shape))
    if weight.ndim != 2 or (projection is not None and projection.ndim != 2):
        wrong = "weight" if weight.ndim != 2 else "projection"
        raise ShapeError(wrong, "weight.shape = [gates · H, P], projection.shape = [P, H]", wrong)
    if mode != "lstm" and projection is not None:
        raise ArgumentError("projection", 'None where mode is not "lstm"', list(projection.shape))
    if (c0 is None) == (mode == "lstm"):
        raise ArgumentError("c0", 'given where mode is "lstm", else None', c0 and list(c0.shape))
    (steps, batch, _), out = x.shape, weight.shape[1]
    hidden = out if projection is None else projection.shape[1]
    rows = GATES[mode] * hidden
    require_shape("weight", weight, (rows, out), "weight.shape = [gates · H, P]")
    require_shape("x", x, (steps, batch, rows), "x.shape = [T, B, gates · H]")
    require_shape("h0", h0, (batch, out), "h0.shape = [B, P]")
    for name, given, shape, rule in (
        ("c0", c0, (batch, hidden), "c0.shape = [B, H]"),
        ("bias", bias, (rows,), "bias.shape = [gates · H]"),
        ("projection", projection, (out, hidden), "projection.shape = [P, H]"),
        ("lengths", lengths, (batch,), "lengths.shape = [B]"),
    ):
        if given is not None:
            require_shape(name, given, shape, rule)
    require_same_dtype(x, weight=weight, h0=h0, c0=c0, bias=bias, projection=projection)
    if lengths is not None and lengths.dtype != int64:
        raise ShapeError("lengths", "lengths.dtype = int64", lengths.dtype)
    return _rule(x, weight, h0, c0, bias, projection, lengths, needs, mode, reverse)


def _rule(
    x: Spec, weight: Spec, h0: Spec, c0: Any, bias: Any, projection: Any, lengths: Any, needs: tuple, mode: str, reverse: bool
) -> Rule:  # fmt: skip
    """Of specs that fit."""
    (steps, batch, _), out, dtype = x.shape, weight.shape[1], x.dtype
    hidden = out if projection is None else projection.shape[1]
    outputs = {"y": Spec((steps, batch, out), dtype), "h_n": Spec((batch, out), dtype)}
    saved = {"weight": weight, "h0": h0, "y": outputs["y"]}
    if mode == "lstm":
        outputs["c_n"] = Spec((batch, hidden), dtype)
        saved |= {"c0": c0, "cells": Spec((steps, batch, hidden), compute_dtype(dtype))}
    if mode in ("lstm", "gru"):
        saved["gates"] = Spec((steps, batch, 4 * hidden), dtype)
    saved |= {n: s for n, s in (("projection", projection), ("lengths", lengths)) if s is not None}
    given = {"x": x, "weight": weight, "h0": h0, "c0": c0, "bias": bias, "projection": projection}
    grads = {name: Spec(s.shape, s.dtype) for name, s in given.items() if s is not None}
    return Rule(outputs, saved if needs else {}, {"mode": mode, "reverse": bool(reverse)}, grads)


def _cell(mode: str, x: Any, z: Any, h: Any, c: Any) -> tuple[Any, Any, Any]:
    """(h, c or None, gates to keep or None) of x, of z = h Wᵀ + b and the state before."""
    xp, n = namespace(x), h.shape[1] if c is None else c.shape[1]
    part = lambda a, i: a[:, i * n : (i + 1) * n]  # noqa: E731
    if mode == "lstm":
        a = x + z
        i, f, g, o = sigmoid(part(a, 0)), sigmoid(part(a, 1)), xp.tanh(part(a, 2)), sigmoid(part(a, 3))
        c = f * c + i * g
        return o * xp.tanh(c), c, xp.concatenate([i, f, g, o], 1)
    if mode == "gru":
        r, u = sigmoid(part(x, 0) + part(z, 0)), sigmoid(part(x, 1) + part(z, 1))
        new = xp.tanh(part(x, 2) + r * part(z, 2))
        return new + u * (h - new), None, xp.concatenate([r, u, new, part(z, 2)], 1)
    a = x + z
    return (xp.tanh(a) if mode == "rnn_tanh" else xp.where(a <= 0, xp.zeros_like(a), a)), None, None


def recurrent_forward(
    x: Any,
    weight: Any,
    h0: Any,
    c0: Any = None,
    bias: Any = None,
    projection: Any = None,
    lengths: Any = None,
    *,
    needs: tuple = (),
    mode: str,
    reverse: bool = False,
) -> tuple[tuple, dict]:
    """The steps of one recurrent layer in one direction: h = cell(x_t, h Wᵀ + b), from the first to the last.

    x: (T, B, gates · H), what the inputs of all steps give, with their bias; weight W: (gates · H, P); h0: (B, P), the state
    before; bias b: (gates · H,) or None; all of one float dtype. P = H, except with a ``projection`` (P, H) of an LSTM's
    output. mode: "lstm" (gates i, f, g, o; it has a cell c, too, which begins as c0: (B, H)), "gru" (r, z, n),
    "rnn_tanh", "rnn_relu". lengths: (B,) int64 on x's device: past its length a sequence keeps its state. reverse: from the
    last step to the first.

    Returns y: (T, B, P), the state after each step, h_n: (B, P), the one after the last, and c_n: (B, H) of an LSTM. 16-bit
    states are rounded at each step; c is kept in float32. As torch.nn.LSTM, GRU and RNN. Hochreiter, Schmidhuber: Long
    Short-Term Memory (1997); Cho et al.: Learning Phrase Representations using RNN Encoder-Decoder (2014).
    Raises ShapeError, ArgumentError.
    """
    xp, steps = namespace(x), x.shape[0]
    turned, kept, cells, b = up(weight).T, {}, {}, None if bias is None else up(bias)
    ys, h, c = {}, h0, None if c0 is None else up(c0)
    for t, _ in walk(steps, reverse):
        z = up(h) @ turned
        new, c_new, kept[t] = _cell(mode, up(x[t]), z if b is None else z + b, up(h), c)
        new = new.astype(x.dtype, copy=False)
        if projection is not None:
            new = (up(new) @ up(projection).T).astype(x.dtype, copy=False)
        if lengths is not None:
            there = (lengths > t)[:, None]
            new = xp.where(there, up(new), up(h)).astype(x.dtype, copy=False)
            c_new = c_new if c is None else xp.where(there, c_new, c)
        h = ys[t] = new
        c = cells[t] = c_new
    y = xp.stack([ys[t] for t in range(steps)])
    outputs = (y, h.copy()) if c is None else (y, h.copy(), c.astype(x.dtype))
    if not needs:
        return outputs, {}
    saved = {"weight": weight, "h0": h0, "y": y}
    if mode == "lstm":
        saved |= {"c0": c0, "cells": xp.stack([cells[t] for t in range(steps)])}
    if mode in ("lstm", "gru"):
        saved["gates"] = xp.stack([kept[t] for t in range(steps)]).astype(x.dtype, copy=False)
    return outputs, saved | {n: a for n, a in (("projection", projection), ("lengths", lengths)) if a is not None}


def _cell_gradient(mode: str, dh: Any, dc: Any, y: Any, gates: Any, before: Any, c: Any, c_before: Any) -> tuple:
    """(dx, dz or None where it is dx, what goes to the h before directly or None, dc before or None) of one step."""
    xp = namespace(dh)
    if mode == "lstm":
        n = gates.shape[1] // 4
        i, f, g, o = (gates[:, k * n : (k + 1) * n] for k in range(4))
        tanh_c = xp.tanh(c)
        d = dc + dh * o * (1 - tanh_c * tanh_c)
        parts = d * g * i * (1 - i), d * c_before * f * (1 - f), d * i * (1 - g * g), dh * tanh_c * o * (1 - o)
        return xp.concatenate(parts, 1), None, None, d * f
    if mode == "gru":
        n = gates.shape[1] // 4
        r, u, new, z_new = (gates[:, k * n : (k + 1) * n] for k in range(4))
        d_new = dh * (1 - u) * (1 - new * new)
        d_r, d_u = d_new * z_new * r * (1 - r), dh * (before - new) * u * (1 - u)
        return xp.concatenate([d_r, d_u, d_new], 1), xp.concatenate([d_r, d_u, d_new * r], 1), dh * u, None
    return (dh * (1 - y * y) if mode == "rnn_tanh" else xp.where(y > 0, dh, xp.zeros_like(dh))), None, None, None


def recurrent_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, mode: str, reverse: bool = False
) -> tuple:
    """From the last computed step to the first: dh comes from dy, and from dz W of the step after it.

    dx_t is what the cell gives, dz_t the same but for a GRU's n, where dz = r · dx. dW = Σ dz_tᵀ h before, db = Σ dz, one
    product and one sum over all steps; 16-bit dx and dz are rounded before they go on.
    """
    x, xp = inputs[0], namespace(saved["y"])
    (steps, batch, rows), dtype, work = x.shape, x.dtype, compute_dtype(x.dtype)
    dy, dh_n, dc_n = (*dys, None)[:3]
    weight, y, lengths, projection = saved["weight"], saved["y"], saved.get("lengths"), saved.get("projection")
    hidden = rows // GATES[mode]
    zeros = lambda n: xp.zeros((batch, n), work)  # noqa: E731
    dh_next = zeros(weight.shape[1]) if dh_n is None else up(dh_n)
    dc = (zeros(hidden) if dc_n is None else up(dc_n)) if mode == "lstm" else None
    dx, dz, dp, before = {}, {}, {}, {}
    for t, earlier in reversed([*walk(steps, reverse)]):
        before[t] = saved["h0"] if earlier is None else y[earlier]
        dh = dh_next if dy is None else dh_next + up(dy[t])
        through = dh
        if projection is not None:
            dp[t] = dh.astype(dtype, copy=False)
            through = up(dp[t]) @ up(projection)
        c_before = None if dc is None else up(saved["c0"]) if earlier is None else saved["cells"][earlier]
        gates, c = up(saved["gates"][t]) if "gates" in saved else None, saved["cells"][t] if dc is not None else None
        dx_t, dz_t, direct, dc_before = _cell_gradient(mode, through, dc, up(y[t]), gates, up(before[t]), c, c_before)
        there = None if lengths is None else (lengths > t)[:, None]
        masked = lambda a, there=there: a if there is None else xp.where(there, a, xp.zeros_like(a))  # noqa: E731
        dx[t] = masked(dx_t).astype(dtype, copy=False)
        dz[t] = dx[t] if dz_t is None else masked(dz_t).astype(dtype, copy=False)
        dp[t] = masked(up(dp[t])).astype(dtype, copy=False) if projection is not None else None
        dh_next = up(dz[t]) @ up(weight)
        dh_next = dh_next if direct is None else dh_next + direct
        if there is not None:
            dh_next = xp.where(there, dh_next, dh)
            dc_before = dc_before if dc is None else xp.where(there, dc_before, dc)
        dc = dc_before
    joined = lambda a: up(xp.stack([a[t] for t in range(steps)])).reshape(steps * batch, a[0].shape[1])  # noqa: E731
    flat = joined(dz)
    grads = {"x": xp.stack([dx[t] for t in range(steps)]), "h0": dh_next, "c0": dc}
    grads["weight"] = flat.T @ joined(before)
    grads["bias"] = flat.sum(0, dtype=work)
    if projection is not None:
        made = _before_projection(saved, dtype).reshape(steps * batch, hidden)
        grads["projection"] = joined(dp).T @ made
    names = ("x", "weight", "h0", "c0", "bias", "projection")
    return (*[xp.ascontiguousarray(grads[n]).astype(dtype, copy=False) if n in needs else None for n in names], None)


def _before_projection(saved: dict, dtype: Any) -> Any:
    """o tanh(c) of all steps, as the forward rounds it."""
    n, xp = saved["cells"].shape[2], namespace(saved["cells"])
    return up((up(saved["gates"][:, :, 3 * n :]) * xp.tanh(saved["cells"])).astype(dtype, copy=False))


recurrent = Op(
    recurrent_rule,
    recurrent_forward,
    recurrent_backward,
    differentiable=("x", "weight", "h0", "c0", "bias", "projection"),
    rounds=True,
    first="cuda",
)
