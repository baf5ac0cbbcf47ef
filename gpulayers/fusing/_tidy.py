"""A recorded graph without what is computed twice, or is known before anything runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from gpulayers.export.recording import Formula, Node, computed, needed
from gpulayers.export.recording.graph import KINDS

_NOT_FOLDED = ("input", "const", "full", "draw", "random_bits", "random_uniform", "random_normal")
DRAWN = ("draw", "random_uniform", "random_normal")
"""Operations that give something else each time that they are done."""
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

    def unique(node: Node) -> Node:
        return known.setdefault(_key(node, node.inputs), node)

    for node in needed(roots, [*given, *loaded]):
        inputs = tuple(stands[i] for i in node.inputs)
        stands[node] = unique(
            _folded(node, inputs)
            or _scanned_back(node, inputs)
            or _viewed(node, inputs, stands)
            or _of_words(node, inputs, unique)
            or _made_of(node, node.op, inputs, node.attributes)
        )
    return stands


def _made_of(node: Node, op: str, inputs: tuple[Node, ...], attributes: dict[str, Any]) -> Node:
    return Node(op, inputs, attributes, node.shape, node.dtype, node.place, node.name, node.index)


# --- random words ----------------------------------------------------------------------------------------------------

_COMPARED = {"greater": "less", "less": "greater", "greater_equal": "less_equal", "less_equal": "greater_equal"}
_COMPARED |= {"equal": "equal", "not_equal": "not_equal"}
"""Comparisons, and what they are with their operands turned round."""
_WORDS = 2**32


def _of_words(node: Node, inputs: tuple[Node, ...], unique: Callable) -> Node | None:
    """What an operation on random words is. They are integers, of the shape that is asked for, compared and shifted as
    such; elsewhere they are cast."""
    if node.op == "random_bits" and "shift" not in node.attributes:
        return _cast_words(node, inputs[0], node.shape, 0, unique)
    if node.op == "reshape":
        return _reshaped(inputs[0], node, unique)
    if node.op in ("floor", "floordiv"):
        return _shifted(node, inputs, unique)
    return _compared(node, inputs, unique) if node.op in _COMPARED else None


def _cast_words(node: Node, draw: Node, shape: tuple, shift: int, unique: Callable) -> Node:
    """Random words as floating-point numbers. They stand where their draw does."""
    words = Node("random_bits", (draw,), {"shift": shift}, shape, KINDS["i"], node.place, "", draw.index)
    return Node("cast", (unique(words),), {}, shape, KINDS["f"], node.place, "", node.index)


def _integers(node: Node, unique: Callable) -> Node | None:
    """The random words that were cast to this."""
    if node.op == "cast" and node.inputs[0].op == "random_bits":
        return node.inputs[0]
    if node.op in ("broadcast", "transpose") and (words := _integers(node.inputs[0], unique)) is not None:
        whole = Node(node.op, (words,), node.attributes, node.shape, words.dtype, node.place, "", node.index)
        return unique(whole)
    return None


def _reshaped(source: Node, node: Node, unique: Callable) -> Node | None:
    """What was computed of flat words alone, at the shape that it gets: an element's word does not follow the shape."""

    found: dict[Node, Node | None] = {}

    def at_shape(n: Node) -> Node | None:
        if n not in found:
            found[n] = made(n)
        return found[n]

    def made(n: Node) -> Node | None:
        if n.op == "random_bits":
            return unique(dataclasses.replace(n, shape=node.shape))
        if (value := number(n)) is not None:
            whole = {"value": value, "shape": node.shape}
            return unique(Node("full", (), whole, node.shape, n.dtype, n.place)) if n.shape else n
        if not n.inputs or n.attributes or n.op == "matmul" or any(i.shape not in ((), n.shape) for i in n.inputs):
            return None
        inputs = tuple(i for i in map(at_shape, n.inputs) if i is not None)
        if len(inputs) < len(n.inputs):
            return None
        return unique(dataclasses.replace(n, inputs=inputs, shape=node.shape))

    return at_shape(source)


def _shifted(node: Node, inputs: tuple[Node, ...], unique: Callable) -> Node | None:
    """Words without their lower bits: of floor(words 2^-k), floor(words / 2^k), words // 2^k."""
    quotient = node if node.op == "floordiv" else inputs[0]
    if quotient.op not in ("mul", "div", "floordiv"):
        return None
    a, b = inputs if node.op == "floordiv" else quotient.inputs
    a, b = (b, a) if quotient.op == "mul" and number(b) is None else (a, b)
    words, factor = _integers(a, unique), number(b)
    if words is None or words.op != "random_bits" or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        return None
    mantissa, power = math.frexp(factor)
    shift = 1 - power if quotient.op == "mul" else power - 1
    if mantissa != 0.5 or not 0 <= shift < 32 - words.attributes["shift"]:
        return None
    return _cast_words(node, words.inputs[0], words.shape, words.attributes["shift"] + shift, unique)


def _compared(node: Node, inputs: tuple[Node, ...], unique: Callable) -> Node | None:
    """A comparison of words with a number, in integers."""
    op, (a, b) = node.op, inputs
    if number(a) is not None:
        op, a, b = _COMPARED[op], b, a
    words, bound = _integers(a, unique), number(b)
    if words is None or not isinstance(bound, int | float) or bound != bound:
        return None
    bound = max(-1, min(bound, _WORDS))
    if bound != math.floor(bound):  # no word is equal to it
        bound, op = math.ceil(bound), {"greater": "greater_equal", "less_equal": "less"}.get(op, op)
        bound = _WORDS if op in ("equal", "not_equal") else bound
    if not 0 <= bound < _WORDS:
        value = bool(getattr(np, op)(0, bound))
        return Node("full", (), {"value": value, "shape": node.shape}, node.shape, KINDS["b"], node.place)
    limit = Node("full", (), {"value": int(bound), "shape": ()}, (), KINDS["i"], node.place)
    return _made_of(node, op, (words, unique(limit)), {})


def _scanned_back(node: Node, inputs: tuple[Node, ...]) -> Node | None:
    """The cumulative sum from the end that three operations are."""
    if node.op != "reverse" or inputs[0].op != "cumsum" or inputs[0].inputs[0].op != "reverse":
        return None
    scan, first = inputs[0], inputs[0].inputs[0]
    if not first.attributes["axes"] == node.attributes["axes"] == (scan.attributes["axis"],):
        return None
    return _made_of(node, "cumsum", first.inputs, {"axis": scan.attributes["axis"], "reverse": True})


def _viewed(node: Node, inputs: tuple[Node, ...], stands: Mapping[Node, Node]) -> Node | None:
    """A part of a given array: loaded as if it were given by itself."""
    whole = node.attributes.get("of")
    if whole is not None and whole in stands:
        return _made_of(node, "input", (), node.attributes | {"of": stands[whole]})
    if node.op != "slice" or inputs[0].op != "input" or "of" in inputs[0].attributes:
        return None
    return _made_of(node, "input", (), {"of": inputs[0], "spans": node.attributes["spans"]})


def _key(node: Node, inputs: tuple[Node, ...]) -> tuple:
    if node.op in DRAWN:
        return node.op, node.index
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
            value = np.asarray(computed(node.op, [np.asarray(v) for v in values], {}, np))
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
