"""A layer runs on arrays that record, at several batch sizes, and becomes a graph."""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpulayers import dispatch, random, transfer
from gpulayers.arrays import FLOATS
from gpulayers.definition import RuleError
from gpulayers.export.recording._asarray import arrays_stay_recorded
from gpulayers.export.recording._chance import Chance
from gpulayers.export.recording._formulas import BATCHES
from gpulayers.export.recording._handle import Trace, full, lift
from gpulayers.export.recording._join import joined, simplified
from gpulayers.export.recording._place import Unrecordable, none_swallowed, place_of, refuse
from gpulayers.export.recording._whole import definitions
from gpulayers.export.recording.graph import RANDOM, Graph, Node, Recording, needed
from gpulayers.layers._calls import each_shape
from gpulayers.layers._frames import by_itself, mode
from gpulayers.layers._layer import Layer
from gpulayers.ops._op import Op


def record(
    layer: Layer,
    input_shapes: Sequence[tuple],
    *,
    training: bool = True,
    dtypes: Sequence[Any] = (),
    keeps: Callable[[Op], bool] | None = None,
) -> Recording:
    """What the layer's forward and backward do, as graphs.

    input_shapes: one for each input, batch first and None there; other sizes are known. dtypes: of the inputs, float32
    where not said. training: the mode. keeps: whether an op that the layer runs stays one operation (see ``graph.py``); by
    default all are read through. The layer itself is left as it is.

    Raises Unrecordable for array code that cannot be read (with file, line, text, and what to write instead), ValueError
    for unknown sizes.
    """
    shapes = [tuple(shape) for shape in input_shapes]
    if not all(shape and shape[0] is None and all(isinstance(n, int) for n in shape[1:]) for shape in shapes):
        raise ValueError(f"{layer.name}: record: the rule is shapes (None, known sizes …); got {shapes}")
    layer.ensure_built(*shapes)
    subject = _subject(layer)
    kinds = [np.dtype(d) for d in itertools.islice(itertools.chain(dtypes, itertools.repeat(np.float32)), len(shapes))]
    own = dispatch.policy(backends=("definition",), definitions=None if keeps is None else definitions(keeps))
    with own, mode_of(layer, training), by_itself(), random.drawn_by(Chance()), quiet():
        runs = [_run(subject, shapes, kinds, n) for n in BATCHES[:-1]]
        with contextlib.suppress(ArithmeticError, RuleError):  # it may have no batch of one
            runs.append(_run(subject, shapes, kinds, BATCHES[-1]))
    said = each_shape(layer.output_shape(*shapes))
    trainable = {name: w.trainable for name, w in layer.named_weights().items()}
    return Recording(layer.name, *_graphs(runs), trainable, [tuple(s) for s in said], training)


def _subject(layer: Layer) -> Layer:
    """A copy of what the layer says an export reads in its place, on the CPU, its weights float32 where they are floats."""
    try:
        subject = copy.deepcopy(layer.exported())
    except TypeError as error:
        raise Unrecordable(f"{layer.name} cannot be copied: {error}", "attributes that copy.deepcopy takes") from error
    shapes, theirs = ({n: w.shape for n, w in one.named_weights().items()} for one in (layer, subject))
    if list(shapes.items()) != list(theirs.items()):
        raise ValueError(f"{layer.name}: exported(): the rule is the same weights, {shapes}; got {theirs}")
    return as_float32(subject)


def as_float32(layer: Layer) -> Layer:
    """Its weights on the CPU, float32 where they are floats."""
    for w in layer.weights:
        value = transfer.to_numpy(w.data)
        w.data = value.astype(np.float32) if value.dtype in FLOATS else value
    return layer


def mode_of(layer: Layer, training: bool) -> contextlib.AbstractContextManager:
    """As in ``fit``: parts that were set to evaluation stay so; what is in evaluation as a whole trains as a whole."""
    return mode((None if layer.training else True) if training else False)


@contextlib.contextmanager
def quiet() -> Any:
    """Inputs are random: a logarithm of them may warn."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def sample(shape: tuple, dtype: np.dtype, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers for an input; integers are 0 and 1, which are indices of anything."""
    value = normal([batch if n is None else n for n in shape], rng)
    return value.astype(dtype, copy=False) if dtype.kind == "f" else (value > 0).astype(dtype)


def normal(shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def _run(layer: Layer, shapes: list[tuple], dtypes: list[np.dtype], batch: int) -> _Run:
    try:
        return _Run(layer, shapes, dtypes, batch)
    except (Unrecordable, RuleError, ArithmeticError):
        raise
    except Exception as error:  # of whatever took the array for another
        if own := _raised_by_itself(layer, shapes, dtypes, batch):
            reason = f"on NumPy's own arrays, too, it raises {type(own).__name__}: {own}"
            raise Unrecordable(reason, "what `gpulayers check` passes", place_of(own)) from error
        reason = f"on an array that records, it raised {type(error).__name__}: {error}"
        raise Unrecordable(reason, "NumPy's functions, and methods, of the array", place_of(error)) from error


def _raised_by_itself(layer: Layer, shapes: list[tuple], dtypes: list[np.dtype], batch: int) -> Exception | None:
    own, rng = copy.deepcopy(layer), np.random.default_rng(batch)
    with random.drawn_by(None), random.drawn_from(lambda: 0):
        try:
            y = own.forward(*(sample(shape, dtype, batch, rng) for shape, dtype in zip(shapes, dtypes)))
            own.backward(*(np.ones_like(part) for part in (y if isinstance(y, tuple) else (y,))))
        except Exception as error:
            return error
    return None


class _Run:
    """One run at one batch size; its nodes, and which of them are what."""

    def __init__(self, layer: Layer, shapes: list[tuple], dtypes: list[np.dtype], batch: int):
        self.trace, rng = Trace(), np.random.default_rng(batch)
        self.weights: dict[str, Node] = {}
        self.ys: list[Any] = []
        weights = layer.named_weights()
        held = {name: (w._data, w._grad) for name, w in weights.items()}
        with self.trace.running(), arrays_stay_recorded(), none_swallowed():
            try:
                xs = [sample(shape, dtype, batch, rng) for shape, dtype in zip(shapes, dtypes)]
                handles = [self.trace.add("input", (), x, f"x{i}" if len(xs) > 1 else "x") for i, x in enumerate(xs)]
                self.inputs = [x.node for x in handles]
                for name, w in weights.items():
                    w._data = self.trace.add("input", (), np.asarray(w._data), name)
                    w._grad = full(w._data.shape, 0, w._data.dtype)
                    self.weights[name] = w._data.node
                self._forward(layer, handles, weights)
                self._backward(layer, handles, weights, rng)
            finally:
                for name, w in weights.items():
                    w._data, w._grad = held[name]
                layer._waiting.frames.clear()
                self.trace.values.clear()  # images are large; what is compared stands in the nodes
                self.ys.clear()

    def _forward(self, layer: Layer, xs: list[Any], weights: dict[str, Any]) -> None:
        ys = layer.forward(*xs)
        _refuse_writes("forward", self.inputs, xs)
        self.ys = [lift(y) for y in (ys if isinstance(ys, tuple) else (ys,))]
        self.outputs = [y.node for y in self.ys]
        self.states = {n: w._data.node for n, w in weights.items() if w._data.node is not self.weights[n]}
        self.split = len(self.trace.nodes)

    def _backward(self, layer: Layer, xs: list[Any], weights: dict[str, Any], rng: np.random.Generator) -> None:
        after = {n: w._data.node for n, w in weights.items()}
        dys: list[Any] = []
        for i, y in enumerate(self.ys):
            dy = normal(y.shape, rng).astype(y.dtype, copy=False)
            dys.append(self.trace.add("input", (), dy, f"dy{i}" if len(self.ys) > 1 else "dy"))
        self.dys = [dy.node for dy in dys]
        dxs = layer.backward(*dys)
        _refuse_writes("backward", self.dys, dys)
        dxs = dxs if isinstance(dxs, tuple) else (dxs,)
        self.dxs = [
            None if x.kind != "f" or dx is None else lift(dx, "f").node for x, dx in itertools.zip_longest(xs, dxs)
        ]
        for name, w in weights.items():
            if w._data.node is not after[name]:
                refuse(f"backward writes into the weight {name}", "self.w.grad += … there, and w.data = … in forward")
        self.gradients = {n: lift(w._grad, "f").node for n, w in weights.items() if w.trainable}


def _refuse_writes(what: str, given: list[Node], arrays: list[Any]) -> None:
    for node, x in zip(given, arrays):
        if x.node is not node:
            refuse(
                f"{what} writes into {node.name}, which is its caller's",
                f"{node.name} = {node.name}.copy()",
                x.node.place,
            )


def _graphs(runs: list[_Run]) -> tuple[Graph, Graph]:
    first = runs[0]
    stands = simplified(joined([run.trace.nodes for run in runs]))

    def of(node: Any) -> Any:
        return None if node is None else stands[node.index]

    def named(nodes: dict[str, Node]) -> dict[str, Node]:
        return {name: of(node) for name, node in nodes.items()}

    weights = named(first.weights)
    inputs, dys = ([of(n) for n in nodes] for nodes in (first.inputs, first.dys))
    outputs, dxs = ([of(n) for n in nodes] for nodes in (first.outputs, first.dxs))
    forward = Graph(inputs, weights, outputs, states=named(first.states))
    backward = Graph(dys, weights, dxs, gradients=named(first.gradients))
    given = [*inputs, *weights.values(), *dys]
    whole = needed(backward.roots, given)
    known = {id(n) for n in (*inputs, *weights.values())}
    before = [n for n in whole if n.index < first.split and n.op not in ("const", "full")]
    taken = {id(i) for n in whole if n.index >= first.split for i in n.inputs} | {id(n) for n in backward.roots}
    _refuse_bits(whole, first.split)
    backward.saved = [n for n in (*inputs, *weights.values(), *before) if id(n) in taken]
    chance = [n for n in stands.values() if n.op in RANDOM]  # in their order, used or not
    early = [n for n in chance if n.index < first.split]
    late = [n for n in chance if min(i.index for i in (n, *n.inputs)) >= first.split]
    backward.nodes = needed([*backward.roots, *late], [*dys, *weights.values(), *backward.saved])
    forward.nodes = needed([*forward.roots, *(n for n in backward.saved if id(n) not in known), *early], given)
    return forward, backward


def _refuse_bits(nodes: list[Node], split: int) -> None:
    """A backward that asks a draw of forward's for other random numbers: in an export those cannot be had again."""
    for node in nodes:
        if node.index >= split and any(i.op == "draw" and i.index < split for i in node.inputs):
            reason = f"backward takes {node.op} of a draw that forward made, and forward did not take them"
            refuse(reason, "them in forward, and self.save(…)", node.place)
