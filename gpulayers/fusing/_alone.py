"""The steps of a cut layer that are no fused kernel: the library's ops, views, and array code for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpulayers import arrays, dispatch, random, transfer
from gpulayers.arrays import FLOATS, Spec, compute_dtype, namespace, up
from gpulayers.export.recording import Node, Ran, called, called_back, computed, from_generator, spaced
from gpulayers.export.recording.graph import at_batch
from gpulayers.fusing._cuts import VIEWS
from gpulayers.fusing._definition import value_of
from gpulayers.fusing._tidy import number
from gpulayers.layers._frames import recording
from gpulayers.ops._op import Op
from gpulayers.ops.linear import linear


class Around(NamedTuple):
    """The call that a step belongs to."""

    layer: str
    like: Any
    """An array of the call."""
    batch: int
    dtype: Any
    """Of the layer's inputs: wide values are rounded to it."""


class Alone:
    """A node that is computed by itself."""

    def __init__(self, node: Node):
        self.node = node
        self.loads: tuple[Node, ...] = node.inputs
        self.outputs: tuple[Node, ...] = (node,)

    @property
    def what(self) -> str:
        """Who computes it, in a word or two."""
        raise NotImplementedError

    def plan(self, specs: Sequence[Any], around: Around) -> tuple[str, dict[str, str]]:
        """(backend, reasons), as ``dispatch.explain`` has them."""
        return "definition", {}

    def spec(self, specs: Sequence[Any], around: Around) -> Any:
        """Of what it gives."""
        dtype = _rounding(specs, self.node) if self.node.kind == "f" else self.node.dtype
        return Spec(tuple(at_batch(self.node.shape, around.batch)), dtype)

    def run(self, xs: Sequence[Any], around: Around) -> Any:
        raise NotImplementedError

    def attributes(self, around: Around) -> dict[str, Any]:
        return _at(self.node, around)


def _at(node: Node, around: Around) -> dict[str, Any]:
    """Its attributes, with numbers for formulas."""
    return {name: at_batch(value, around.batch) for name, value in node.attributes.items()}


def drawn(nodes: Sequence[Node], around: Around) -> dict[Node, Any]:
    """Draws, in their order, and what NumPy's generators gave, where the call's arrays live."""
    found: dict[Node, np.ndarray] = {}
    generators: dict[Node, np.random.Generator] = {}
    for node in nodes:
        if node.op == "draw":
            found[node] = random.draw()
            continue
        (draw,) = node.inputs
        if draw not in generators:
            generators[draw] = np.random.default_rng(found[draw])
        numbers = from_generator(generators[draw], **_at(node, around))
        found[node] = numbers.astype(compute_dtype(around.dtype))
    return {node: transfer.beside(value, around.like) for node, value in found.items()}


def alone(node: Node) -> Alone:
    """The step for a node."""
    if node.op in ("call", "call_backward", "result"):
        return {"call": OpCall, "call_backward": OpBackward, "result": Result}[node.op](node)
    if node.op in VIEWS:
        return View(node)
    if node.op == "matmul" and node.kind == "f" and len(node.shape) == 2:
        return Product(node)
    return ArrayCode(node)


class View(Alone):
    """What moves no element, where memory allows it."""

    what = "a view"

    def __init__(self, node: Node):
        super().__init__(node)
        if node.op == "input":
            self.loads = (node.attributes["of"],)

    def run(self, xs: Sequence[Any], around: Around) -> Any:
        (x,), attributes = xs, self.attributes(around)
        attributes.pop("of", None)
        return computed("slice" if self.node.op == "input" else self.node.op, [x], attributes, namespace(x))


class ArrayCode(Alone):
    """An operation in array code, 16-bit numbers computed in float32."""

    what = "array code"

    def run(self, xs: Sequence[Any], around: Around) -> Any:
        backend, reasons = self.plan(xs, around)
        if backend != "definition":
            raise dispatch.Refused(f"{around.layer}: {self.node.op}, {self.node.place}: {reasons['definition']}")
        xp, work = namespace(around.like), compute_dtype(around.dtype)
        raised = [up(x) if arrays.library(x).dtype(x) in FLOATS else x for x in xs]
        y = value_of(self.node, raised, xp, work, around.batch)
        if number(self.node) is not None:
            y = xp.full(at_batch(self.node.shape, around.batch), y)
        dtype = self.node.dtype if self.node.kind != "f" else _rounding([arrays.spec(x) for x in xs], self.node)
        return xp.asarray(y).astype(dtype, copy=False)

    def plan(self, specs: Sequence[Any], around: Around) -> tuple[str, dict[str, str]]:
        device = arrays.library(around.like).device(around.like)
        if "definition" not in dispatch.permitted():
            return "", {"definition": "array code is not permitted"}
        if dispatch._policy.get().strict and device != "cpu":
            return "", {"definition": "strict mode forbids array code"}
        return "definition", {}


def _rounding(specs: Sequence[Any], node: Node) -> Any:
    """The dtype of a floating-point result: 16 bits where all that it comes from has, and nothing was summed up."""
    floats = [s.dtype for s in specs if s is not None and s.dtype in FLOATS]
    dtype = np.result_type(*floats) if len({*floats}) > 1 else floats[0] if floats else arrays.float32
    return compute_dtype(dtype) if "axes" in node.attributes and "keepdims" in node.attributes else dtype


class Product(Alone):
    """A product of two matrices, by the kernels of ``linear``."""

    what = "linear"

    def run(self, xs: Sequence[Any], around: Around) -> Any:
        a, b = (arrays.cast(x, around.dtype) for x in xs)
        return linear(a, b.T)

    def plan(self, specs: Sequence[Any], around: Around) -> tuple[str, dict[str, str]]:
        a, b = (Spec(s.shape, around.dtype) for s in specs)
        return _planned(linear, (a, Spec(b.shape[::-1], b.dtype)), (), {}, around)

    def spec(self, specs: Sequence[Any], around: Around) -> Any:
        return super().spec(specs, around)._replace(dtype=around.dtype)


def _planned(op: Op, specs: Sequence[Any], needs: tuple, options: dict, around: Around) -> tuple[str, dict[str, str]]:
    plan, _ = dispatch.plan_for(op, specs, needs, options, around.like)
    return plan.backend, plan.reasons


class OpCall(Alone):
    """An op of the library's, or one of the author's with kernels of its own."""

    def __init__(self, node: Node):
        super().__init__(node)
        self.op: Op = node.attributes["op"]
        self.needs: tuple = node.attributes["needs"]

    @property
    def what(self) -> str:
        return self.op.name

    def run(self, xs: Sequence[Any], around: Around) -> Ran:
        xs = [arrays.cast(x, around.dtype) if arrays.library(x).dtype(x) in FLOATS else x for x in xs]
        return called(self.node, xs, self.attributes(around), recording.get())

    def plan(self, specs: Sequence[Any], around: Around) -> tuple[str, dict[str, str]]:
        inputs = spaced(self.node, [Spec(x.shape, around.dtype if x.dtype in FLOATS else x.dtype) for x in specs])
        return _planned(self.op, inputs, self.needs, dict(self.attributes(around)["options"]), around)

    def spec(self, specs: Sequence[Any], around: Around) -> Any:
        return None


class OpBackward(Alone):
    """The backward of such a call."""

    @property
    def what(self) -> str:
        return f"backward of {self.node.inputs[0].attributes['op'].name}"

    def run(self, xs: Sequence[Any], around: Around) -> Ran:
        return called_back(self.node, xs)

    def spec(self, specs: Sequence[Any], around: Around) -> Any:
        return None


class Result(Alone):
    """One array of what an op gave."""

    what = ""

    def run(self, xs: Sequence[Any], around: Around) -> Any:
        return xs[0][0][self.node.attributes["at"]]

    def spec(self, specs: Sequence[Any], around: Around) -> Any:
        return super().spec([Spec((), around.dtype)], around)
