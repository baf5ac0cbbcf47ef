"""The operations of a recorded graph as calls of TensorFlow.js."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from gpulayers.export.recording import Formula, Node, Unrecordable

TYPES = {"f": "'float32'", "i": "'int32'", "b": "'bool'"}

_ONE = "neg abs exp expm1 log log1p sqrt tanh sin cos tan sinh cosh asin acos atan asinh acosh atanh floor ceil erf round reciprocal"
_TWO = "add sub mul div mod pow maximum minimum greater less equal"
_REDUCE = "sum prod max min mean any all"
_CALLS = (
    {name: f"tf.{name}({{0}})" for name in _ONE.split()}
    | {name: f"tf.{name}({{0}}, {{1}})" for name in _TWO.split()}
    | {name: f"tf.{name}({{0}}, {{axes}}, {{keepdims}})" for name in _REDUCE.split()}
    | {
        "floordiv": "tf.floorDiv({0}, {1})", "greater_equal": "tf.greaterEqual({0}, {1})",
        "less_equal": "tf.lessEqual({0}, {1})", "not_equal": "tf.notEqual({0}, {1})", "and": "tf.logicalAnd({0}, {1})",
        "or": "tf.logicalOr({0}, {1})", "xor": "tf.logicalXor({0}, {1})", "not": "tf.logicalNot({0})",
        "isnan": "tf.isNaN({0})", "isinf": "tf.isInf({0})", "isfinite": "tf.isFinite({0})",
        "where": "tf.where({0}, {1}, {2})", "cast": "tf.cast({0}, {type})", "argmax": "tf.argMax({0}, {axis})",
        "argmin": "tf.argMin({0}, {axis})", "cumsum": "tf.cumsum({0}, {axis})", "matmul": "tf.matMul({0}, {1})",
        "reshape": "tf.reshape({0}, {shape})", "transpose": "tf.transpose({0}, {axes})",
        "broadcast": "tf.broadcastTo({0}, {shape})", "concat": "tf.concat([{all}], {axis})",
        "pad": "tf.pad({0}, {edges}, {value})", "reverse": "tf.reverse({0}, {axes})",
        "gather": "tf.gather({0}, {1}, {axis})", "full": "tf.fill({shape}, {value}, {type})",
        "random_bits": "tf.randomUniform({shape}, 0, 4294967296)",
        "random_uniform": "tf.randomUniform({shape}, {low}, {high})",
        "random_normal": "tf.randomNormal({shape}, {mean}, {std})",
    }
)  # fmt: skip


def number(value: Any) -> str:
    """A number, a Formula, or a list of them, in JavaScript."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(number, value))}]"
    if isinstance(value, Formula):
        return _formula(value)
    if isinstance(value, np.generic):
        value = float(str(value)) if value.dtype.kind == "f" else value.item()  # as short as its dtype allows
    if isinstance(value, float):
        if not math.isfinite(value):
            return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
        value = int(value) if value == int(value) and abs(value) < 2**53 and str(value) != "-0.0" else value
    return json.dumps(value)


def _formula(f: Formula) -> str:
    text = _line(f.a, f.b)
    if f.c or f.d != 1:
        text = f"{text} / {_line(f.d, f.c)}"
    text = f"Math.sqrt({text})" if f.root else text
    return text if f.one is None else f"(N > 1 ? {text} : {number(f.one)})"


def _line(a: float, b: float) -> str:
    times = "N" if b == 1 else f"{number(b)} * N"
    if not b or not a:
        return times if b else number(a)
    return f"({times} {'-' if a < 0 else '+'} {number(abs(a))})"


def _difference(start: Any, stop: Any) -> str:
    if isinstance(start, int) and isinstance(stop, int):
        return number(stop - start)
    return f"{number(stop)} - {number(start)}" if start else number(stop)


def _constant(node: Node) -> str:
    value = node.attributes["value"]
    if isinstance(value, Formula) or not value.shape:
        text = number(value if isinstance(value, Formula) else value[()])
        return text if node.kind == "f" else f"tf.scalar({text}, {TYPES[node.kind]})"
    if node.kind == "i" and np.abs(value).max(initial=0) > 2**31 - 1:
        raise Unrecordable("an integer beyond int32, which TensorFlow.js has no type for", "", node.place)
    return f"tf.tensor({number(list(value.reshape(-1)))}, {number(value.shape)}, {TYPES[node.kind]})"


def _slice(node: Node, x: str) -> str:
    spans = node.attributes["spans"]
    starts, stops, steps = zip(*spans)
    if set(steps) == {1}:
        return f"tf.slice({x}, {number(starts)}, [{', '.join(_difference(a, b) for a, b, _ in spans)}])"
    strided = f"{number(starts)}, {number(stops)}, {number(steps)}"
    if node.kind == "f":
        return f"tf.stridedSlice({x}, {strided})"
    return (
        f"tf.cast(tf.stridedSlice(tf.cast({x}, 'float32'), {strided}), {TYPES[node.kind]})"  # wasm's forgets the type
    )


def _segment_sum(node: Node, x: str, indices: str) -> str:
    """As a product: the wasm backend has no unsortedSegmentSum."""
    size, shape = node.attributes["size"], node.shape
    rows = f"tf.reshape({x}, [{indices}.shape[0], -1])"
    hot = f"tf.oneHot({indices}, {number(size)})"
    product = f"tf.matMul(tf.cast({hot}, 'float32'), {rows}, true)"
    return product if len(shape) == 2 else f"tf.reshape({product}, {number(shape)})"


def takes_twice(node: Node) -> bool:
    """Whether the call names an operand more than once, which then needs a name."""
    return node.op in ("segment_sum", "sign") or (node.op == "floordiv" and node.kind == "f")


def call(node: Node, operands: list[str]) -> str:
    """The expression for a node. Raises Unrecordable where TensorFlow.js has none."""
    match node.op:
        case "const":
            return _constant(node)
        case "slice":
            return _slice(node, operands[0])
        case "segment_sum":
            return _segment_sum(node, *operands)
        case "sign":  # tf.sign(NaN) is 0
            return "tf.where(tf.isNaN({0}), {0}, tf.sign({0}))".format(*operands)
        case "floordiv" if node.kind == "f":  # tf.floorDiv goes through int32
            return "tf.round(tf.div(tf.sub({0}, tf.mod({0}, {1})), {1}))".format(*operands)
    template = _CALLS.get(node.op)
    if template is None:
        raise Unrecordable(f"{node.op} has no counterpart in TensorFlow.js", "", node.place)
    if node.op == "matmul" and node.kind != "f":
        product = "tf.matMul(tf.cast({}, 'float32'), tf.cast({}, 'float32'))".format(*operands)
        return f"tf.cast({product}, {TYPES[node.kind]})"
    named = {name: number(value) for name, value in node.attributes.items()}
    return template.format(*operands, all=", ".join(operands), type=TYPES[node.kind], **named)
