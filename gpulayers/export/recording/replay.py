"""A graph run in NumPy, in float32 as in the exports, and held against the layer before anything is written."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpulayers import dispatch, random
from gpulayers.definition import RuleError
from gpulayers.export.recording._computed import computed
from gpulayers.export.recording._place import Unrecordable
from gpulayers.export.recording._whole import called, called_back
from gpulayers.export.recording.graph import Graph, Node, Recording, at_batch
from gpulayers.export.recording.record import as_float32, mode_of, normal, quiet, sample
from gpulayers.layers._frames import by_itself
from gpulayers.layers._layer import Layer

BATCHES = (1, 2, 5, 13)
TOLERANCE = 1e-5
"""Of the largest number in the array, or of 1 where that is larger."""


_OF_WORDS = ("mul", "div", "floor", "floordiv", "reshape", "broadcast", "cast")
"""After these, random words are still numbers of 32 bits, which are more than float32 has."""


class Replay:
    """The values of a recording's nodes at one batch size, from the given ones."""

    def __init__(self, batch: int, given: dict[Node, np.ndarray]):
        self.batch = batch
        self.values: dict[Node, Any] = dict(given)
        self.generators: dict[Node, np.random.Generator] = {}
        self.words: set[Node] = set()
        """Random words, and what they are multiplied by: float64."""

    def run(self, graph: Graph) -> Replay:
        for node in graph.nodes:
            if node not in self.values:
                value = self._value(node)
                if node.op == "random_bits" or (node.op in _OF_WORDS and self.words.intersection(node.inputs)):
                    self.words.add(node)
                kind = np.float64 if node in self.words else node.dtype
                self.values[node] = value if node.op.startswith("call") else np.asarray(value).astype(kind)
        return self

    def _value(self, node: Node) -> Any:
        attributes = {name: at_batch(a, self.batch) for name, a in node.attributes.items()}
        if node.op == "draw":
            return random.draw()
        xs = [self.values[n] for n in node.inputs]
        match node.op:
            case "call":
                return called(node, xs, attributes, True)
            case "call_backward":
                return called_back(node, xs)
            case "result":
                return xs[0][0][attributes["at"]]
        if self.words.intersection(node.inputs):
            exact = [at_batch(n.attributes.get("value"), self.batch) for n in node.inputs]
            xs = [x if n.op != "const" else value for n, x, value in zip(node.inputs, xs, exact)]
        if node.op in ("random_uniform", "random_normal"):
            if node.inputs[0] not in self.generators:
                self.generators[node.inputs[0]] = np.random.default_rng(xs[0])
            return from_generator(self.generators[node.inputs[0]], **attributes)
        return computed(node.op, xs, attributes, np)


def from_generator(generator: np.random.Generator, shape: tuple, **numbers: float) -> np.ndarray:
    """What random_uniform and random_normal give, float64."""
    if "low" in numbers:
        return numbers["low"] + (numbers["high"] - numbers["low"]) * generator.random(shape)
    return numbers["mean"] + numbers["std"] * generator.standard_normal(shape)


def check_replay(
    layer: Layer, recording: Recording, input_shapes: Sequence[tuple], dtypes: Sequence[Any] = ()
) -> float:
    """Runs the recording and the layer on the same random inputs, weights and draws, at several batch sizes.

    Compares outputs, states and all gradients; returns the largest error, relative to the largest number of each array
    (or 1). Raises Unrecordable where that is above ``TOLERANCE``, and above what rounding the inputs costs: the layer
    does what arrays do not show (a branch on a size, state outside of its weights).
    """
    state = random.get_state()
    try:
        with random.drawn_from(None):
            return _worst_error(layer, recording, input_shapes, dtypes)
    finally:
        random.set_state(state)


def _worst_error(layer: Layer, recording: Recording, input_shapes: Sequence[tuple], dtypes: Sequence[Any]) -> float:
    worst = 0.0
    for batch in BATCHES:
        rng = np.random.default_rng(batch)
        kinds = [np.dtype(d) for d in dtypes] + [np.dtype(np.float32)] * (len(input_shapes) - len(dtypes))
        xs = [sample(tuple(shape), kind, batch, rng) for shape, kind in zip(input_shapes, kinds)]
        with by_itself(), quiet():
            try:
                wanted = _reference(layer, recording.training, xs, rng)
            except (ArithmeticError, RuleError):
                if batch > 1:
                    raise
                continue  # it has no batch of one
            for what, (want, got) in _compared(recording, xs, wanted, batch).items():
                error = _error(want, got)
                worst = max(worst, error)
                if not error <= TOLERANCE and not error <= 4 * _spread(recording, xs, wanted, batch)[what]:
                    reason = f"the recorded {what} is off by {error:.1e} for a batch of {batch} (training={recording.training})"
                    raise Unrecordable(
                        f"{recording.name}: {reason}", "no branch on a size, no state but weights, one dtype"
                    )
    return worst


@contextlib.contextmanager
def _same_draws(batch: int) -> Iterator[None]:
    """Draws inside are the same ones each time, and none of the caller's."""
    count = itertools.count(batch << 32)
    with random.drawn_by(None), random.drawn_from(lambda: int(random.mixed(0, next(count))[0])):
        yield


class _Wanted(NamedTuple):
    """What a layer itself gave."""

    weights: dict[str, np.ndarray]
    outputs: list[np.ndarray]
    dys: list[np.ndarray]
    dxs: list[Any]
    after: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]


def _reference(layer: Layer, training: bool, xs: list[np.ndarray], rng: np.random.Generator) -> _Wanted:
    subject = as_float32(copy.deepcopy(layer))
    named = subject.named_weights()
    for w in named.values():
        if w.data.dtype.kind == "f":  # away from their start, variances stay positive
            w.data = (w.data + 0.3 * np.abs(rng.standard_normal(w.shape))).astype(np.float32)
        w.zero_grad()
    weights = {name: w.data.copy() for name, w in named.items()}
    with dispatch.only("numpy", "definition"), mode_of(layer, training), _same_draws(len(xs[0])):
        ys = subject.forward(*xs)
        outputs = [np.array(y) for y in (ys if isinstance(ys, tuple) else (ys,))]
        after = {name: w.data.copy() for name, w in named.items()}
        dys = [normal(y.shape, rng).astype(y.dtype, copy=False) for y in outputs]
        dxs = subject.backward(*dys)
    given = list(dxs if isinstance(dxs, tuple) else (dxs,))
    gradients = {name: np.asarray(w.grad) for name, w in named.items() if w.trainable}
    return _Wanted(weights, outputs, dys, given, after, gradients)


def _compared(recording: Recording, xs: list[np.ndarray], wanted: _Wanted, batch: int) -> dict[str, tuple]:
    """{what: (what it should be, what it is)}."""
    forward, backward = recording.forward, recording.backward
    given = dict(zip(forward.inputs, xs)) | {node: wanted.weights[name] for name, node in forward.weights.items()}
    with _same_draws(batch):
        replay = Replay(batch, given).run(forward)
        replay.values |= dict(zip(backward.inputs, wanted.dys))
        values = replay.run(backward).values
    found = {f"output {i}": (y, values[n]) for i, (y, n) in enumerate(zip(wanted.outputs, forward.outputs)) if n}
    found |= {f"state {name}": (wanted.after[name], values[n]) for name, n in forward.states.items()}
    found |= {
        f"gradient of input {i}": (dx, values[n]) for i, (dx, n) in enumerate(zip(wanted.dxs, backward.outputs)) if n
    }
    found |= {f"gradient of {name}": (wanted.gradients[name], values[n]) for name, n in backward.gradients.items()}
    unchanged = wanted.after.keys() - forward.states.keys()
    return found | {f"state {name}": (wanted.after[name], wanted.weights[name]) for name in unchanged}


def _spread(recording: Recording, xs: list[np.ndarray], wanted: _Wanted, batch: int) -> dict[str, float]:
    """What inputs that are one rounding away change: of two numbers that batch norm takes apart, float32 knows little."""
    base = _compared(recording, xs, wanted, batch)
    found = dict.fromkeys(base, 0.0)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        moved = [
            x
            if x.dtype.kind != "f"
            else (x * (1 + np.finfo(x.dtype).eps * rng.choice([-1, 1], x.shape))).astype(x.dtype)
            for x in xs
        ]
        for what, (_, got) in _compared(recording, moved, wanted, batch).items():
            found[what] = max(found[what], _error(base[what][1], got))
    return found


def _error(want: np.ndarray, got: np.ndarray) -> float:
    if want.shape != got.shape:
        return float("inf")
    want, got = want.astype(np.float64), got.astype(np.float64)
    same = (want == got) | (np.isnan(want) & np.isnan(got))
    finite = np.abs(want[np.isfinite(want)])
    off = np.where(same, 0.0, np.abs(want - got)) / max(1.0, finite.max(initial=0.0))
    return float(np.nan_to_num(off, nan=np.inf).max(initial=0.0))
