"""Recurrent layers: LSTM, GRU, RNN, over sequences (N, L, features)."""

from __future__ import annotations

from typing import Any

from gpulayers import arrays, random, transfer
from gpulayers.arrays import namespace
from gpulayers.definition import ArgumentError, ShapeError
from gpulayers.layers._initial import uniform
from gpulayers.layers._layer import Layer, _Cast
from gpulayers.layers._recurrent import kinds, stacked, suffix
from gpulayers.layers._weight import Weight
from gpulayers.ops.dropout import dropout as dropout_op
from gpulayers.ops.linear import linear
from gpulayers.ops.recurrent import GATES, recurrent


class Recurrent(Layer):
    """The recurrent neuron type: what a step gives goes into the next one, (N, L, input_size) → (N, L, features).

    features: hidden_size (an LSTM's proj_size where it has one), twice as many where bidirectional. ``layer(x)`` begins with
    zeros. ``layer(x, h0)``, of an LSTM ``layer(x, h0, c0)``, begins there: (num_layers · directions, N, features of one),
    cells with hidden_size; it returns (y, h_n) or (y, h_n, c_n). ``layer(x, None, None, lengths)``: (N,) integers, how many
    steps of each sequence count; behind them y is 0.

    dropout: of what goes from one layer to the next, in training. input_size may be None: it is then read from the first
    input. Weights: torch's, by torch's names, ``weight_ih_l0`` (gates · hidden_size, input_size), …, uniform in
    ±1/√hidden_size.
    """

    neuron_type = "recurrent"
    mode = "lstm"

    def __init__(
        self,
        input_size: int | None,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        *,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ):
        for name, value in (("hidden_size", hidden_size), ("num_layers", num_layers)):
            if value < 1:
                raise ArgumentError(name, f"{name} ≥ 1", value)
        if not 0 <= dropout <= 1:
            raise ArgumentError("dropout", "0 ≤ dropout ≤ 1", dropout)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.dropout, self.bidirectional, self._with_bias = dropout, bidirectional, bias
        if input_size is not None:
            self.ensure_built((None, None, input_size))

    @property
    def _out(self) -> int:
        """Features of the state."""
        return self.hidden_size

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def build(self, *input_shapes: Any) -> None:
        self.input_size = input_shapes[0][-1]
        rows, start = GATES[self.mode] * self.hidden_size, uniform(self.hidden_size**-0.5)
        for layer in range(self.num_layers):
            features = self._directions * self._out if layer else self.input_size
            shapes = {
                "weight_ih": (rows, features), "weight_hh": (rows, self._out), "bias_ih": (rows,), "bias_hh": (rows,),
                "weight_hr": (self._out, self.hidden_size),
            }  # fmt: skip
            for direction in range(self._directions):
                for kind in self._kinds():
                    name = kind + suffix(layer, direction)
                    setattr(self, name, self.add_weight(name, shapes[kind], start))

    def _kinds(self) -> list[str]:
        return kinds(self._with_bias, self._out != self.hidden_size)

    def output_shape(self, *input_shapes: Any) -> tuple:
        x, *states = input_shapes
        if len(x) != 3 or (self.input_size is not None and x[2] != self.input_size):
            error = ShapeError("x", f"x.shape = [N, L, input_size] = [N, L, {self.input_size}]", list(x))
            error.where = self.name
            raise error
        y = *x[:2], self._directions * self._out
        if not states or states[0] is None:
            return y
        lead = self._directions * self.num_layers, x[0]
        return y, (*lead, self._out), *([(*lead, self.hidden_size)] if self.mode == "lstm" else [])

    def _weights_in(self, dtype: Any) -> list[list[dict[str, Any]]]:
        """By layer and direction; in x's dtype, as mixed precision has it."""

        def seen(name: str) -> Weight:
            weight: Weight = getattr(self, name)
            return weight if weight.dtype == dtype else _Cast(weight, dtype)

        each = [[suffix(layer, d) for d in range(self._directions)] for layer in range(self.num_layers)]
        return [[{kind: seen(kind + end) for kind in self._kinds()} for end in ends] for ends in each]

    def forward(self, x: Any, h0: Any = None, c0: Any = None, lengths: Any = None) -> Any:
        self.output_shape(x.shape)
        xp, dtype, batch = namespace(x), x.dtype, x.shape[0]
        count, has_cells = self._directions * self.num_layers, self.mode == "lstm"
        zeros = lambda n: xp.zeros((count, batch, n), dtype)  # noqa: E731
        given = h0 is not None
        h0 = zeros(self._out) if h0 is None else h0
        c0 = (zeros(self.hidden_size) if c0 is None else c0) if has_cells else ()
        mask = None
        if lengths is not None:
            lengths = transfer.beside(lengths, x)
            mask = (xp.arange(x.shape[1])[:, None] < lengths[None, :])[:, :, None].astype(dtype)
        p = self.dropout if self.training else 0.0
        y, h_n, c_n = stacked(
            x.swapaxes(0, 1), h0, c0, self._weights_in(dtype),
            linear=lambda x, w, b: self.run(linear, x, w, b),
            recurrent=lambda gates, w, h, c, b, projection, direction: self.run(
                recurrent, gates, w, h, c, b, projection, lengths, mode=self.mode, reverse=bool(direction)
            ),
            join=lambda ys: arrays.concatenate(ys, 2),
            drop=lambda x: self.run(dropout_op, x, transfer.beside(random.draw(), x), p=p) if p else x,
        )  # fmt: skip
        self.save(mask, p, given)
        y = (y if mask is None else y * mask).swapaxes(0, 1)
        return (y, xp.stack(h_n), *([xp.stack(c_n)] if has_cells else [])) if given else y

    def backward(self, dy: Any, dh: Any = None, dc: Any = None) -> Any:
        mask, p, given = self.saved
        has_cells, directions = self.mode == "lstm", self._directions
        dy = None if dy is None else dy.swapaxes(0, 1) if mask is None else dy.swapaxes(0, 1) * mask
        dh0: list = [None] * (directions * self.num_layers)
        dc0: list = [None] * (directions * self.num_layers)
        for layer in reversed(range(self.num_layers)):
            dx: Any = None
            for direction in reversed(range(directions)):
                at = layer * directions + direction
                mine = dy if dy is None else dy[:, :, direction * self._out : (direction + 1) * self._out]
                dys = [mine, None if dh is None else dh[at], *([None if dc is None else dc[at]] if has_cells else [])]
                gates, dh0[at], *rest = self.run_backward(*dys)
                dc0[at] = rest[0] if rest else None
                more = self.run_backward(gates)
                dx = more if dx is None else dx + more
            dy = self.run_backward(dx) if layer and p else dx
        dx = dy.swapaxes(0, 1)
        if not given:
            return dx
        stack = namespace(dx).stack
        return dx, stack(dh0), stack(dc0) if has_cells else None, None


class LSTM(Recurrent):
    """As torch.nn.LSTM, with the batch first; see Recurrent. Gates i, f, g, o.

    proj_size: features of the state, a product of the cells' output with ``weight_hr_l0`` (proj_size, hidden_size); 0: none.
    """

    def __init__(
        self,
        input_size: int | None,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        *,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
    ):
        if not 0 <= proj_size < hidden_size:
            raise ArgumentError("proj_size", "0 ≤ proj_size < hidden_size", proj_size)
        self.proj_size = proj_size
        super().__init__(input_size, hidden_size, num_layers, bias, dropout=dropout, bidirectional=bidirectional)

    @property
    def _out(self) -> int:
        return self.proj_size or self.hidden_size


class GRU(Recurrent):
    """As torch.nn.GRU, with the batch first; see Recurrent. Gates r, z, n."""

    mode = "gru"


class RNN(Recurrent):
    """As torch.nn.RNN, with the batch first; see Recurrent. h = f(x W_ihᵀ + b_ih + h W_hhᵀ + b_hh).

    nonlinearity: f, "tanh" or "relu".
    """

    def __init__(
        self,
        input_size: int | None,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        *,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ):
        if nonlinearity not in ("tanh", "relu"):
            raise ArgumentError("nonlinearity", 'nonlinearity ∈ {"tanh", "relu"}', repr(nonlinearity))
        self.nonlinearity = nonlinearity
        super().__init__(input_size, hidden_size, num_layers, bias, dropout=dropout, bidirectional=bidirectional)

    @property
    def mode(self) -> str:  # type: ignore[override]
        return f"rnn_{self.nonlinearity}"
