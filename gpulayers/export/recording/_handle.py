"""A handle of a recorded value: a real NumPy array, the node that it came from, and what it is a view of.

The real value is why no shape, dtype or error has to be worked out here: NumPy says them.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np

from gpulayers import arrays
from gpulayers.export.recording._place import place, refuse
from gpulayers.export.recording.graph import KINDS, Node
from gpulayers.layers._weight import Weight

_trace: contextvars.ContextVar[Trace] = contextvars.ContextVar("trace")


class Trace:
    """What one run does, as it does it."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.values: list[np.ndarray] = []
        self.bits: dict[tuple, Any] = {}
        """Random bits drawn so far: a backward draws its forward's again."""
        self.kept: dict[int, dict] = {}
        """What ops that are kept whole saved for their backward, by the call's index."""

    def add(self, op: str, inputs: tuple, value: np.ndarray, name: str = "", /, **attributes: Any) -> Any:
        at = None if op == "input" else place()
        dtype, nodes = KINDS[kind_of(value)], tuple(x.node for x in inputs)
        if any(n.index >= len(self.nodes) or self.nodes[n.index] is not n for n in nodes):
            refuse("an array that was kept from another call", "self.save(…) for backward, add_weight(…) for state")
        self.nodes.append(Node(op, nodes, attributes, value.shape, dtype, at, name, len(self.nodes)))
        self.values.append(value)
        return Handle.concrete(self.nodes[-1], value)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        token = _trace.set(self)
        try:
            yield
        finally:
            _trace.reset(token)


def trace() -> Trace:
    return _trace.get()


def kind_of(value: Any) -> str:
    """ "f", "i" or "b"."""
    letter = "f" if value.dtype == arrays.bfloat16 else value.dtype.kind
    if letter not in "fiub":
        refuse(f"an array of dtype {value.dtype}", "real numbers, integers or booleans")
    return "i" if letter == "u" else letter


def of_node(node: Node) -> Any:
    """A handle of what a node gave."""
    return Handle.concrete(node, trace().values[node.index])


def plain(x: Any) -> Any:
    """The value itself, of a handle, a weight or anything else."""
    x = x.data if isinstance(x, Weight) else x
    return x.value if isinstance(x, Handle) else x


def lift(x: Any, kind: str | None = None) -> Any:
    """Any operand as a handle, of this kind."""
    x = x.data if isinstance(x, Weight) else x
    if not isinstance(x, Handle):
        value = np.asarray(x)
        x = trace().add("const", (), value if kind is None else value.astype(KINDS[kind]), value=value)
    return cast(x, kind or x.kind)


def cast(x: Any, kind: str) -> Any:
    return x if x.kind == kind else emit("cast", [x], x.value.astype(KINDS[kind]))


def emit(op: str, inputs: list, value: Any, /, **attributes: Any) -> Any:
    """The result of an operation on handles."""
    if any(x.mask is not None for x in inputs):
        rule = "only element-wise operations, sum, and y[mask] = … may follow x[mask]"
        refuse(f"{op} of what a mask selected: {rule}", "np.where(mask, …, …), which keeps the shape")
    return trace().add(op, tuple(inputs), np.asarray(value), **attributes)


def full(shape: Any, value: Any, dtype: Any) -> Any:
    """A fresh array of one number."""
    filled = np.full(shape, value, dtype)
    number = filled.reshape(-1)[0].item() if filled.size else value
    return trace().add("full", (), filled, value=number, shape=filled.shape)


def select(condition: Any, a: Any, b: Any) -> Any:
    """np.where. In one dimension where there are more than four: WebGL knows no more."""
    value = np.where(*map(plain, (condition, a, b)))
    if value.ndim > 4:
        parts = [lift(x) for x in (condition, a, b)]
        flat = [x.broadcast_to(value.shape).reshape(-1) if x.ndim else x for x in parts]
        return select(*flat).reshape(value.shape)
    kind = kind_of(value)
    return emit("where", [lift(condition, "b"), lift(a, kind), lift(b, kind)], value)


def spread(mask: Any, x: Any) -> Any:
    """A mask over x's first axes, with x's rank."""
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


class Handle(np.lib.mixins.NDArrayOperatorsMixin):
    """A write in place gives the handle a new node. A view knows its base, how it is taken ``again`` where the base was
    written after it, and how a write into it goes ``back`` into the base."""

    concrete: ClassVar[type]
    """The class of all handles, which has the array's methods."""
    mask: Any
    """What selected it, where it is x[mask]; its node and value are then x's."""

    def __init__(
        self,
        node: Node,
        value: np.ndarray,
        base: Any = None,
        again: Callable | None = None,
        back: Callable | None = None,
        index: Any = None,
    ):
        self._node, self._value, self.base, self._again, self._back, self.index = node, value, base, again, back, index
        self.mask, self.root, self.version = None, base.root if base is not None else self, 0
        self.seen = self.root.version

    def _fresh(self) -> Handle:
        if self.base is not None and self.seen != self.root.version:
            assert self._again is not None
            fresh = self._again(self.base)
            self._node, self._value, self.seen = fresh._node, fresh._value, self.root.version
        return self

    @property
    def node(self) -> Node:
        return self._fresh()._node

    @property
    def value(self) -> np.ndarray:
        return self._fresh()._value

    @property
    def kind(self) -> str:
        return kind_of(self._value)

    def write(self, new: Any) -> Any:
        """In place: these values from now on."""
        target: Any = self
        new = cast(lift(new).broadcast_to(target.shape), self.kind)
        if self.base is not None:
            if self._back is None:
                refuse("a write into a view that NumPy makes read-only", "a copy of it: x.copy()")
            self.base.write(self._back(self.base, new))
        self.root.version += 1
        self._node, self._value = new.node, new.value.astype(self._value.dtype)
        self.seen = self.root.version
        return self

    def bare(self) -> Any:
        """The same value by itself: no view, no mask."""
        return Handle.concrete(self.node, self.value)

    def as_view(self, new: Any, again: Callable, back: Callable | None, index: Any = None) -> Any:
        """``new`` as a view of this one, where NumPy's shares memory."""
        if self.mask is not None or not np.may_share_memory(new.value, self.value):
            return new
        return Handle.concrete(new.node, new.value, self, again, back, index)
