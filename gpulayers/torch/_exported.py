"""What ``torch.export`` sees of a wrapped layer: its recorded array code, as torch's own operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpulayers.export.recording import Formula, Node, check_replay, record
from gpulayers.layers._layer import Layer


def run(layer: Layer, training: bool, xs: Sequence[Tensor], weights: dict[str, Tensor]) -> Any:
    """The layer's outputs; weights that it updates are written into. xs: batch first, its other sizes known.

    Raises Unrecordable (with the file, the line and what to write instead) for array code that cannot be read, ValueError
    for other sizes that are dynamic.
    """
    for i, x in enumerate(xs):
        if not all(isinstance(n, int) for n in x.shape[1:]):
            rule = "sizes that are known, but for the batch's"
            raise ValueError(f"{layer.name}: exported: input {i}: the rule is {rule}; got {tuple(x.shape)}")
    shapes = [(None, *x.shape[1:]) for x in xs]
    dtypes = ["float32" if x.is_floating_point() else str(x.dtype).removeprefix("torch.") for x in xs]
    recording = record(layer, shapes, training=training, dtypes=dtypes)
    check_replay(layer, recording, shapes, dtypes)
    graph = recording.forward
    values = dict(zip(graph.inputs, xs)) | {node: weights[name] for name, node in graph.weights.items()}
    floats = next((t.dtype for t in (*xs, *weights.values()) if t.is_floating_point()), torch.float32)
    traced = _Traced(xs[0], floats, values)
    for node in graph.nodes:
        traced.add(node)
    for name, node in graph.states.items():
        weights[name].copy_(values[node])
    ys = tuple(values[node] for node in graph.outputs if node is not None)
    return ys if len(ys) > 1 else ys[0]


def _in_turn(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A reduction that torch offers along one axis, along several."""

    def reduce(x: Tensor, axes: Sequence[int], keepdims: bool) -> Tensor:
        for axis in sorted(axes, reverse=True):
            x = function(x, axis, keepdim=keepdims)
        return x

    return reduce


def _pad(x: Tensor, edges: Sequence[Sequence[int]], value: float) -> Tensor:
    return F.pad(x, [n for side in reversed(edges) for n in side], value=value)


def _sign(x: Tensor) -> Tensor:
    return torch.where(torch.isnan(x), x, torch.sign(x)) if x.is_floating_point() else torch.sign(x)


def _gather(x: Tensor, i: Tensor, axis: int) -> Tensor:
    return torch.index_select(x, axis, i.reshape(-1)).reshape(*x.shape[:axis], *i.shape, *x.shape[axis + 1 :])


def _segment_sum(x: Tensor, i: Tensor, size: int) -> Tensor:
    return x.new_zeros((size, *x.shape[1:])).index_add(0, i, x)


COMPUTED: dict[str, Callable[..., Any]] = {
    "div": torch.true_divide, "floordiv": torch.floor_divide, "mod": torch.remainder, "and": torch.logical_and,
    "or": torch.logical_or, "xor": torch.logical_xor, "not": torch.logical_not, "equal": torch.eq, "not_equal": torch.ne,
    "sign": _sign, "reshape": torch.reshape, "gather": _gather, "pad": _pad, "segment_sum": _segment_sum,
    "broadcast": lambda x, shape: x.expand(shape),
    "transpose": lambda x, axes: x.permute(axes),
    "concat": lambda *xs, axis: torch.cat(xs, axis),
    "reverse": lambda x, axes: torch.flip(x, axes),
    "slice": lambda x, spans: x[tuple(slice(*span) for span in spans)],
    "sum": lambda x, axes, keepdims: x.sum(axes, keepdim=keepdims) if axes else x,
    "mean": lambda x, axes, keepdims: x.mean(axes, keepdim=keepdims) if axes else x,
    "max": lambda x, axes, keepdims: x.amax(axes, keepdim=keepdims) if axes else x,
    "min": lambda x, axes, keepdims: x.amin(axes, keepdim=keepdims) if axes else x,
    "prod": _in_turn(torch.prod), "any": _in_turn(torch.any), "all": _in_turn(torch.all),
    "argmax": lambda x, axis: x.argmax(axis),
    "argmin": lambda x, axis: x.argmin(axis),
    "cumsum": lambda x, axis: x.cumsum(axis),
}  # fmt: skip
"""Each operation of a recorded graph; one that is not here is the function of torch that has its name."""


class _Traced:
    """The values of a graph's nodes, computed one after the other."""

    def __init__(self, first: Tensor, floats: torch.dtype, values: dict[Node, Tensor]):
        self.first, self.floats, self.values = first, floats, values

    def add(self, node: Node) -> None:
        if node.op == "draw":
            return
        xs = [self.values[i] for i in node.inputs if i.op != "draw"]
        attributes = {name: self._number(value) for name, value in node.attributes.items()}
        own = getattr(self, f"_{node.op}", None)
        function = own or COMPUTED.get(node.op) or getattr(torch, node.op)
        y = function(node, *xs, **attributes) if own else function(*xs, **attributes)
        self.values[node] = y.to(self._dtype(node)) if y.dtype != self._dtype(node) else y

    def _dtype(self, node: Node) -> torch.dtype:
        return {"f": self.floats, "i": torch.int64, "b": torch.bool}[node.kind]

    def _number(self, value: Any) -> Any:
        """An attribute; numbers that follow the batch size do so in the exported program, too."""
        if isinstance(value, tuple | list):
            return tuple(map(self._number, value))
        if not isinstance(value, Formula):
            return value
        n = self.first.shape[0]
        if value.is_whole and value.one is None:
            return value.a + value.b * n
        if value.one is not None and n == 1:
            return value.one
        y = (value.a + value.b * n) / (value.d + value.c * n)
        return y**0.5 if value.root else y

    def _cast(self, node: Node, x: Tensor) -> Tensor:
        return x

    def _const(self, node: Node, value: Any) -> Tensor:
        if hasattr(value, "shape"):
            return torch.tensor(value.tolist(), dtype=self._dtype(node), device=self.first.device)
        return self._full(node, value, ())

    def _full(self, node: Node, value: Any, shape: tuple) -> Tensor:
        return torch.full(shape, value, dtype=self._dtype(node), device=self.first.device)

    def _random_bits(self, node: Node, shape: tuple) -> Tensor:
        return torch.randint(2**32, shape, dtype=torch.int64, device=self.first.device)

    def _random_uniform(self, node: Node, shape: tuple, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, dtype=self.floats, device=self.first.device)

    def _random_normal(self, node: Node, shape: tuple, mean: float, std: float) -> Tensor:
        return mean + std * torch.randn(shape, dtype=self.floats, device=self.first.device)
