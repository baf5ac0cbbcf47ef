"""What a layer does, as a graph of named operations: what every writer of an export reads.

The operations, with their attributes; x is the first input, and numbers in attributes may be a ``Formula`` of the batch
size N, which is the size of axis 0 of the first input:

    input                                    name: an input, a weight or a gradient that comes in
    const value                              a NumPy array, or a number that follows N
    full value shape                         one number everywhere
    cast                                     to the node's dtype
    neg abs exp expm1 log log1p sqrt tanh … erf   of one operand; add sub mul div floordiv mod pow maximum minimum, comparisons
                                             (greater less greater_equal less_equal equal not_equal), and or xor: of two
    where                                    condition, a, b
    sum mean max min prod any all axes keepdims; argmax argmin axis; cumsum axis
    matmul                                   equal ranks ≥ 2, equal leading sizes
    reshape shape; transpose axes; broadcast shape; concat axis; pad edges value; reverse axes
    slice spans                              (start, stop, step) an axis, all ≥ 0
    gather axis                              x, integers ≥ 0
    segment_sum size                         rows of x summed by the integers of the second input
    draw                                     a fresh seed of gpulayers.random
    random_bits shape                        whole numbers in [0, 2³²) under a draw
    random_uniform low high shape; random_normal mean std shape   from the generator of a draw

Where the reader asks for it (``record(…, keeps=…)``), ops of the library's are kept whole:

    call op given options needs              given says which of the op's inputs came
    call_backward given                      of a call, and the gradients of those of its outputs that given says
    result at                                one of the outputs of a call, or of the gradients of its backward

Elementwise operands broadcast as NumPy's do.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from gpulayers.export.recording._place import Place

KINDS: dict[str, np.dtype] = {"f": np.dtype(np.float32), "i": np.dtype(np.int64), "b": np.dtype(bool)}
"""A node's dtype: what the exports know. float16, bfloat16 and float64 are float32 there."""

RANDOM = ("draw", "random_bits", "random_uniform", "random_normal")
"""Operations that yield something else each time."""


@dataclasses.dataclass(frozen=True)
class Formula:
    """A number that follows the batch size N: (a + b N) / (d + c N), or the square root of that; ``one`` where N = 1."""

    a: float
    b: float
    d: float = 1
    c: float = 0
    root: bool = False
    one: float | None = None

    def __call__(self, n: int) -> float:
        if n == 1 and self.one is not None:
            return self.one
        below = self.d + self.c * n or math.nan
        y = self.a + self.b * n if below == 1 else (self.a + self.b * n) / below
        return math.sqrt(max(y, 0)) if self.root else y

    @property
    def is_whole(self) -> bool:
        return isinstance(self.a, int) and isinstance(self.b, int) and not self.root and (self.d, self.c) == (1, 0)


def at_batch(value: Any, n: int) -> Any:
    """An attribute with its formulas' values for a batch of ``n``."""
    if isinstance(value, tuple | list):
        return tuple(at_batch(v, n) for v in value)
    return value(n) if isinstance(value, Formula) else value


@dataclasses.dataclass(eq=False)
class Node:
    op: str
    inputs: tuple[Node, ...]
    attributes: dict[str, Any]
    shape: tuple
    """Sizes: integers, Formulas, and None where a size follows the batch in no known way."""
    dtype: np.dtype
    place: Place | None
    name: str = ""
    """An input's or weight's."""
    index: int = -1
    """Where it stands among the nodes of its recording."""

    @property
    def kind(self) -> str:
        """ "f", "i" or "b"."""
        return self.dtype.kind


@dataclasses.dataclass(eq=False)
class Graph:
    """A forward: (inputs, weights) → outputs, and states, what becomes of weights that it updates. Or a backward:
    (inputs, the gradients of the outputs; weights; saved, values of the forward) → outputs, the gradients of the
    forward's inputs, None for integers; and gradients, those of its trainable weights.
    """

    inputs: list[Node]
    weights: dict[str, Node]
    outputs: list[Node | None]
    saved: list[Node] = dataclasses.field(default_factory=list)
    states: dict[str, Node] = dataclasses.field(default_factory=dict)
    gradients: dict[str, Node] = dataclasses.field(default_factory=dict)
    nodes: list[Node] = dataclasses.field(default_factory=list)
    """All that these come from, without what is given, each after its inputs."""

    @property
    def roots(self) -> list[Node]:
        """All that it yields."""
        return [n for n in (*self.outputs, *self.states.values(), *self.gradients.values()) if n is not None]


@dataclasses.dataclass(eq=False)
class Recording:
    """A layer's forward and backward in one mode. Every value that backward takes from forward is in ``forward.nodes``."""

    name: str
    forward: Graph
    backward: Graph
    trainable: dict[str, bool]
    """By the weight's name."""
    output_shapes: list[tuple]
    """None where a size is not known, as the batch is."""
    training: bool


def needed(roots: Iterable[Node], given: Iterable[Node]) -> list[Node]:
    """The nodes that ``roots`` come from, in order, without ``given`` and what those come from."""
    seen = {id(n) for n in given}
    found: list[Node] = []
    todo = list(roots)
    while todo:
        node = todo.pop()
        if id(node) not in seen:
            seen.add(id(node))
            found.append(node)
            todo += node.inputs
    return sorted(found, key=lambda n: n.index)


def authors_name(node: Node, users: Iterable[Node]) -> str:
    """What the author's line calls this value; "" where it is only a part of that line."""
    if node.place is None or any(user.place == node.place for user in users):
        return ""
    assigned = re.match(r"(?:self\.)?([A-Za-z]\w*)(?:\[.*?\])? [-+*/@&|]?= ", node.place.text, re.ASCII)
    return assigned[1] if assigned else ""
