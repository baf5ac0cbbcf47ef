"""The time loop of a recurrent layer in torch's own operations: what torch.func, forward-mode differentiation and batched
gradients go through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpulayers.kernels._recurrent import GATES, walk


def by_steps(
    x: Tensor, weight: Tensor, h0: Tensor, c0: Any, bias: Any, projection: Any, lengths: Any, mode: str, reverse: bool
) -> tuple[Tensor, ...]:
    """As the op ``recurrent``."""
    ys: dict[int, Tensor] = {}
    h, c = h0, c0
    for t, _ in walk(x.shape[0], reverse):
        new, c_new = _cell(mode, x[t], torch.nn.functional.linear(h, weight, bias), h, c)
        new = new if projection is None else new @ projection.t()
        if lengths is not None:
            there = (lengths > t).unsqueeze(1)
            new, c_new = torch.where(there, new, h), c if c is None else torch.where(there, c_new, c)
        h = ys[t] = new
        c = c_new
    y = torch.stack([ys[t] for t in range(x.shape[0])])
    return (y, h) if c is None else (y, h, c)


def _cell(mode: str, x: Tensor, z: Tensor, h: Tensor, c: Any) -> tuple[Tensor, Any]:
    if mode == "lstm":
        i, f, g, o = (x + z).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if mode == "gru":
        (x_r, x_u, x_n), (z_r, z_u, z_n) = x.chunk(3, 1), z.chunk(3, 1)
        new = (x_n + (x_r + z_r).sigmoid() * z_n).tanh()
        return new + (x_u + z_u).sigmoid() * (h - new), None
    return ((x + z).tanh() if mode == "rnn_tanh" else (x + z).relu()), None


def again(dys: Any, saved: dict, inputs: tuple, options: dict) -> list:
    """The gradients from what the forward kept. x is not among it, so they cannot be differentiated again."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "recurrent: it has no gradient of its gradient, as torch's own LSTM on a GPU; torch.nn's layers have one on a CPU"
        )
    mode, reverse, (steps, _, rows) = options["mode"], options["reverse"], inputs[0].shape
    weight, h0, y = (saved[n] for n in ("weight", "h0", "y"))
    lengths, projection = saved.get("lengths"), saved.get("projection")
    dy, dh, dc = (*dys, None, None)[:3]
    dh, dc = 0 if dh is None else dh, 0 if dc is None else dc
    dx: dict[int, Tensor] = {}
    dz: dict[int, Tensor] = {}
    dp: dict[int, Tensor] = {}
    before = {t: h0 if earlier is None else y[earlier] for t, earlier in walk(steps, reverse)}
    for t, earlier in reversed([*walk(steps, reverse)]):
        dh = dh + (dy[t] if dy is not None else torch.zeros_like(y[t]))
        through = dh if projection is None else dh @ projection
        c = None if mode != "lstm" else (saved["cells"][t], saved["c0"] if earlier is None else saved["cells"][earlier])
        gates = saved["gates"][t] if "gates" in saved else None
        dx[t], dz[t], direct, dc_before = _cell_gradient(mode, through, dc, y[t], gates, before[t], c)
        dp[t] = dh
        if lengths is not None:
            there = (lengths > t).unsqueeze(1)
            dx[t], dz[t], dp[t] = (torch.where(there, a, torch.zeros_like(a)) for a in (dx[t], dz[t], dp[t]))
            after = torch.where(there, dz[t] @ weight + direct, dh)
            dc = None if dc_before is None else torch.where(there, dc_before, torch.as_tensor(dc).to(dc_before))
        else:
            after, dc = dz[t] @ weight + direct, dc_before
        dh = after
    stacked = lambda of: torch.stack([of[t] for t in range(steps)])  # noqa: E731
    flat = lambda x: x.reshape(-1, x.shape[-1]).to(y.dtype)  # noqa: E731
    rows_of_dz = flat(stacked(dz))
    grads = [stacked(dx), rows_of_dz.t() @ flat(stacked(before)), dh, dc, rows_of_dz.sum(0), None, None]
    if projection is not None:
        made = saved["gates"][..., 3 * (rows // GATES[mode]) :] * saved["cells"].tanh()
        grads[5] = flat(stacked(dp)).t() @ flat(made)
    return [None if g is None or s is None else g.to(h0.dtype) for g, s in zip(grads, inputs)]


def _cell_gradient(mode: str, dh: Any, dc: Any, y: Tensor, gates: Any, h: Tensor, c: Any) -> tuple[Any, Any, Any, Any]:
    """(dx, dz, what goes to the h before directly, dc before or None)."""
    if mode == "lstm":
        (i, f, g, o), tanh_c = gates.chunk(4, 1), c[0].tanh()
        d = dc + dh * o * (1 - tanh_c * tanh_c)
        parts = d * g * i * (1 - i), d * c[1] * f * (1 - f), d * i * (1 - g * g), dh * tanh_c * o * (1 - o)
        dx = torch.cat(parts, 1).to(y.dtype)
        return dx, dx, 0, d * f
    if mode == "gru":
        r, u, new, z = gates.chunk(4, 1)
        d = dh * (1 - u) * (1 - new * new)
        ends = d * z * r * (1 - r), dh * (h - new) * u * (1 - u)
        return torch.cat([*ends, d], 1), torch.cat([*ends, d * r], 1), dh * u, None
    dx = dh * (1 - y * y) if mode == "rnn_tanh" else dh * (y > 0)
    return dx, dx, 0, None
