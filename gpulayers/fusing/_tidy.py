"""A recorded graph without what is computed twice, or is known before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gpulayers.export.recording import Formula, Node, needed
from gpulayers.export.recording.replay import COMPUTED

_NOT_FOLDED = ("input", "const", "full", "draw", "random_bits", "random_uniform", "random_normal")
_ONE_VALUE = ("reshape", "broadcast", "transpose", "cast", "slice")
"""Operations that leave a number, filled in everywhere, what it is."""


def tidy(roots: Iterable[Node], given: Iterable[Node], loaded: Mapping[Node, Node] | None = None) -> dict[Node, Node]:
    """{node: what stands for it} for all that ``roots`` come from: equal operations on equal operands are one node, and
    numbers that follow from numbers are constants.

    loaded: {node: the given one that is loaded in its place}.
    """
    given, loaded = list(given), loaded or {}
    stands: dict[Node, Node] = {node: node for node in given} | dict(loaded)
    known: dict[tuple, Node] = {_key(node, ()): node for node in given}
    for node in needed(roots, [*given, *loaded]):
        inputs = tuple(stands[i] for i in node.inputs)
        fresh = (
            _folded(node, inputs)
            or _scanned_back(node, inputs)
            or _viewed(node, inputs)
            or _made_of(node, node.op, inputs, node.attributes)
        )
        stands[node] = known.setdefault(_key(fresh, fresh.inputs), fresh)
    return stands


def _made_of(node: Node, op: str, inputs: tuple[Node, ...], attributes: dict[str, Any]) -> Node:
    return Node(op, inputs, attributes, node.shape, node.dtype, node.place, node.name, node.index)


def _scanned_back(node: Node, inputs: tuple[Node, ...]) -> Node | None:
    """The cumulative sum from the end that three operations are."""
    if node.op != "reverse" or inputs[0].op != "cumsum" or inputs[0].inputs[0].op != "reverse":
        return None
    scan, first = inputs[0], inputs[0].inputs[0]
    if not first.attributes["axes"] == node.attributes["axes"] == (scan.attributes["axis"],):
        return None
    return _made_of(node, "cumsum", first.inputs, {"axis": scan.attributes["axis"], "reverse": True})


def _viewed(node: Node, inputs: tuple[Node, ...]) -> Node | None:
    """A part of a given array: loaded as if it were given by itself."""
    if node.op != "slice" or inputs[0].op != "input" or "of" in inputs[0].attributes:
        return None
    return _made_of(node, "input", (), {"of": inputs[0], "spans": node.attributes["spans"]})


def _key(node: Node, inputs: tuple[Node, ...]) -> tuple:
    if node.op == "input":
        return "input", node.attributes.get("of", id(node)), node.attributes.get("spans")
    return node.op, tuple(map(id, inputs)), node.shape, node.kind, *(_hashable(v) for v in node.attributes.values())


def _hashable(value: Any) -> Any:
    return (value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


def number(node: Node) -> Any:
    """The one number that a constant is everywhere (a Formula where it follows the batch size); None for other nodes."""
    if node.op == "full":
        return node.attributes["value"]
    if node.op == "const":
        value = node.attributes["value"]
        if isinstance(value, Formula):
            return value
        if value.size and (value == value.flat[0]).all():
            return value.flat[0].item()
        if value.size and value.dtype.kind == "f" and np.isnan(value).all():
            return float("nan")
    return None


def _folded(node: Node, inputs: tuple[Node, ...]) -> Node | None:
    """The constant that an operation on constants is."""
    if not inputs or node.op in _NOT_FOLDED:
        return None
    values = [number(i) for i in inputs]
    if any(v is None or isinstance(v, Formula) for v in values):
        return None
    if node.op in ("sum", "mean", "max", "min"):
        value = values[0] if node.op != "sum" else _times(count(node), values[0])
        if isinstance(value, Formula) and node.shape:
            return None
        attributes = {"value": value, "shape": node.shape}
        return _made_of(node, "full", (), attributes)
    if node.op in _ONE_VALUE:
        value = np.asarray(values[0])
    elif all(not i.shape for i in inputs) and not node.attributes:
        with np.errstate(all="ignore"):
            value = np.asarray((COMPUTED.get(node.op) or getattr(np, node.op))(*map(np.asarray, values)))
    else:
        return None
    attributes = {"value": value.astype(np.float64 if node.kind == "f" else node.dtype).item(), "shape": node.shape}
    return _made_of(node, "full", (), attributes)


def count(node: Node) -> int | Formula:
    """How many numbers a reduction takes for each that it gives."""
    sizes = [node.inputs[0].shape[a] for a in node.attributes["axes"]]
    product: int | Formula = 1
    for size in sizes:
        product = _times(product, size)
    return product


def _times(a: Any, b: Any) -> Any:
    """A product in which one factor at most is a Formula."""
    f, k = (a, b) if isinstance(a, Formula) else (b, a)
    return dataclasses.replace(f, a=f.a * k, b=f.b * k) if isinstance(f, Formula) else a * b
