"""Recurrent layers: ``torch.nn.RNN``, ``LSTM`` and ``GRU``, and their cells.

The inputs of all steps are one product; the steps are one op for each layer and direction. Sequences of different lengths
stay packed between layers, and are padded for the steps alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gpulayers.layers._recurrent import Weights, kinds, stacked, suffix
from gpulayers.ops import recurrent as ops
from gpulayers.torch import _autocast
from gpulayers.torch._arguments import held
from gpulayers.torch._op import TorchOp
from gpulayers.torch._recurrent import again, by_steps
from gpulayers.torch.dropout import dropout
from gpulayers.torch.linear import linear


def _flops(x: Sequence[int], weight: Sequence[int], h0: Sequence[int], *_: Any) -> dict[str, int]:
    return dict.fromkeys(("y", "x", "weight"), 2 * math.prod(x) * weight[1])


_recurrent = TorchOp(
    ops.recurrent,
    by_steps,
    "str mode, bool reverse",
    outputs=("y", "h_n", "c_n"),
    buffers=("cells", "gates"),
    cast=_autocast.LOWER,
    again=again,
    flops=_flops,
)


class RNN(nn.RNN):
    """``torch.nn.RNN`` over gpulayers' kernels."""

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        return _forward(self, input, hx, super().forward)


class LSTM(nn.LSTM):
    """``torch.nn.LSTM`` over gpulayers' kernels."""

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        return _forward(self, input, hx, super().forward)


class GRU(nn.GRU):
    """``torch.nn.GRU`` over gpulayers' kernels."""

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        return _forward(self, input, hx, super().forward)


def _forward(m: Any, input: Any, hx: Any, theirs: Callable) -> Any:
    """What torch's own forward gives; that one raises for calls that are wrong."""
    packed = isinstance(input, PackedSequence)
    given: tuple = tuple(input) if packed else (input, None, None, None)
    x, sizes, order, back = given
    if not isinstance(x, Tensor) or x.dim() not in ((2,) if packed else (2, 3)) or x.is_nested:
        return theirs(input, hx)
    single = not packed and x.dim() == 2
    if not packed:
        x = x.unsqueeze(1) if single else x.transpose(0, 1) if m.batch_first else x
    cells = m.mode == "LSTM"
    batch = int(sizes[0]) if packed else x.shape[1]
    states = _states(m, hx, x, batch, single, order, cells)
    if states is None or not _fits(m, x, states, batch):
        return theirs(input, hx)
    y, h_n, c_n = _stacked(m, x, states[0], states[1], sizes)
    hidden = (torch.stack(h_n), *([torch.stack(c_n)] if cells else []))
    if m.mode == "GRU":
        y, hidden = _promoted((y,), states[0])[0], _promoted(hidden, states[0])
    if packed:
        y = PackedSequence(y, sizes, order, back)
        hidden = hidden if back is None else tuple(t.index_select(1, back) for t in hidden)
    elif single:
        y, hidden = y.squeeze(1), tuple(t.squeeze(1) for t in hidden)
    elif m.batch_first:
        y = y.transpose(0, 1)
    return y, hidden if cells else hidden[0]


def _states(m: Any, hx: Any, x: Tensor, batch: int, single: bool, order: Any, cells: bool) -> tuple | None:
    """(h0, c0 or ()), a batch in the order of the packed one; None where torch's forward must look at them."""
    count = m.num_layers * (2 if m.bidirectional else 1)
    if hx is None:
        widths = (m.proj_size or m.hidden_size, *([m.hidden_size] if cells else []))
        zeros = [torch.zeros(count, batch, n, dtype=x.dtype, device=x.device) for n in widths]
        return (*zeros, *([] if cells else [()]))
    given = hx if cells else (hx,)
    if not isinstance(given, (tuple, list)) or len(given) != 1 + cells or not all(isinstance(t, Tensor) for t in given):
        return None
    if any(t.dim() != (2 if single else 3) for t in given):
        return None
    given = [t.unsqueeze(1) if single else t if order is None else t.index_select(1, order) for t in given]
    return (*given, *([] if cells else [()]))


def _fits(m: Any, x: Tensor, states: tuple, batch: int) -> bool:
    count, widths = m.num_layers * (2 if m.bidirectional else 1), (m.proj_size or m.hidden_size, m.hidden_size)
    shaped = all(isinstance(t, tuple) or t.shape == (count, batch, n) for t, n in zip(states, widths))
    of_weight = held(m, "weight_ih_l0").dtype
    typed = _autocast.is_on(x.device.type) or all(t.dtype == of_weight for t in (x, *states) if isinstance(t, Tensor))
    return shaped and typed and x.shape[-1] == m.input_size and x.shape[0] > 0


def _promoted(found: tuple, state: Tensor) -> tuple:
    """In what torch's own operations give under autocast on a CPU: they add 16 bits to a state that is as it was given."""
    if not (state.is_cpu and _autocast.is_on("cpu")):
        return found
    return tuple(t.to(torch.promote_types(t.dtype, state.dtype)) for t in found)


def _stacked(m: Any, x: Tensor, h0: Any, c0: Any, sizes: Any) -> tuple:
    directions = 2 if m.bidirectional else 1
    names = kinds(m.bias, m.proj_size > 0)
    ends = [[suffix(layer, d) for d in range(directions)] for layer in range(m.num_layers)]
    weights: list[list[Weights]] = [[{n: held(m, n + end) for n in names} for end in layer] for layer in ends]
    return stacked(
        x, h0, c0, weights,
        linear=linear,
        recurrent=_steps(m.mode.lower(), sizes),
        join=lambda ys: torch.cat(ys, -1),
        drop=lambda x: dropout(x, m.dropout, m.training),
    )  # fmt: skip


def _steps(mode: str, sizes: Any) -> Callable[..., tuple]:
    """The op for a layer and direction; sizes: of the batch at each step, where sequences are packed."""
    if sizes is None:
        return lambda gates, w, h, c, b, p, direction: _outputs(
            _recurrent(gates, w, h, c, b, p, None, mode, direction > 0)
        )
    _, lengths = torch._VF._pad_packed_sequence(sizes.new_zeros(int(sizes.sum()), 1), sizes, False, 0.0, -1)
    there: list = []

    def run(gates: Tensor, w: Tensor, h: Tensor, c: Any, b: Any, p: Any, direction: int) -> tuple:
        if not there:
            there.append(lengths.to(gates.device))
        padded, _ = torch._VF._pad_packed_sequence(gates, sizes, False, 0.0, -1)
        y, *states = _outputs(_recurrent(padded, w, h, c, b, p, there[0], mode, direction > 0))
        return torch._VF._pack_padded_sequence(y, lengths, False)[0], *states

    return run


def _outputs(found: tuple) -> tuple:
    """Without the cells that a compiler's op has of a layer that has none."""
    return found[:2] if len(found) == 3 and not found[2].numel() and found[1].numel() else found


# --- cells -----------------------------------------------------------------------------------------------------------


class RNNCell(nn.RNNCell):
    """``torch.nn.RNNCell`` over gpulayers' kernels."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return _cell(self, f"rnn_{self.nonlinearity}", input, hx, super().forward)


class LSTMCell(nn.LSTMCell):
    """``torch.nn.LSTMCell`` over gpulayers' kernels."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return _cell(self, "lstm", input, hx, super().forward)


class GRUCell(nn.GRUCell):
    """``torch.nn.GRUCell`` over gpulayers' kernels."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return _cell(self, "gru", input, hx, super().forward)


def _cell(m: Any, mode: str, x: Any, hx: Any, theirs: Callable) -> Any:
    """One step."""
    cells = mode == "lstm"
    if mode not in ops.GATES or not isinstance(x, Tensor) or x.dim() not in (1, 2) or x.is_nested:
        return theirs(x, hx)
    single = x.dim() == 1
    rows = x.unsqueeze(0) if single else x
    if hx is None:
        zeros = torch.zeros(rows.shape[0], m.hidden_size, dtype=x.dtype, device=x.device)
        states: tuple = (zeros,) * (1 + cells)
    else:
        given = hx if cells else (hx,)
        if len(given) != 1 + cells or not all(isinstance(t, Tensor) and t.dim() == x.dim() for t in given):
            return theirs(x, hx)
        states = tuple(t.unsqueeze(0) if single else t for t in given)
    shape, of_weight = (rows.shape[0], m.hidden_size), held(m, "weight_ih").dtype
    typed = _autocast.is_on(x.device.type) or all(t.dtype == of_weight for t in (x, *states))
    if not typed or x.shape[-1] != m.input_size or any(t.shape != shape for t in states):
        return theirs(x, hx)
    gates = linear(rows, held(m, "weight_ih"), held(m, "bias_ih")).unsqueeze(0)
    c0 = states[1] if cells else None
    _, *found = _recurrent(gates, held(m, "weight_hh"), states[0], c0, held(m, "bias_hh"), None, None, mode, False)
    if not mode.startswith("rnn"):
        found = list(_promoted(tuple(found), states[0]))
    found = [t.squeeze(0) if single else t for t in found]
    return tuple(found) if cells else found[0]
