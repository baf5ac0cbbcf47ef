"""A program in array code, on NumPy and CuPy: what its kernels are held against."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpulayers.arrays import namespace, up
from gpulayers.export.recording import Formula, Node, computed
from gpulayers.export.recording.graph import at_batch
from gpulayers.fusing._axes import counting
from gpulayers.fusing._program import Program
from gpulayers.fusing._tidy import number
from gpulayers.ops._random import random_bits


def compute(program: Program, given: dict[Node, Any], batch: int) -> dict[str, Any]:
    """{output: its value}, 16-bit numbers computed in float32."""
    raised = {node: up(x) if node.kind == "f" else x for node, x in given.items()}
    like = next(iter(raised.values()))
    work = next((x.dtype for node, x in raised.items() if node.kind == "f"), np.dtype(np.float32))
    xp = namespace(like)
    values: dict[Node, Any] = program.arrays(raised, batch)
    for node in program.nodes:
        if node not in values:
            values[node] = _typed(value_of(node, [values[i] for i in node.inputs], xp, work, batch), node, work)
    found = {}
    for output in program.outputs:
        y = values[output.node]
        shape = at_batch(output.shape, batch)
        y = xp.full(shape, y, work) if isinstance(y, float | int) else y
        found[output.name] = xp.array(xp.broadcast_to(y, shape))
    for name in dict.fromkeys(o.of for o in program.outputs if o.of):
        found[name] = xp.concatenate([found[o.name] for o in program.outputs if o.of == name], axis=-1)
    return found


def _typed(value: Any, node: Node, work: np.dtype) -> Any:
    return value.astype(work, copy=False) if node.kind == "f" and not isinstance(value, float | int) else value


def value_of(node: Node, xs: list[Any], xp: Any, work: np.dtype, batch: int) -> Any:
    """What an operation gives: numbers are computed in ``work``; one that is the same everywhere is a number."""
    value, attributes = number(node), {k: at_batch(v, batch) for k, v in node.attributes.items()}
    if value is not None:
        value = value(batch) if isinstance(value, Formula) else value
        return float(value) if node.kind == "f" else value
    match node.op:
        case "const":
            if (counted := counting(node)) is None:
                return xp.asarray(node.attributes["value"])
            start, step = counted
            (n,) = [n for n in node.shape if n != 1]
            return (start + step * xp.arange(n)).reshape(node.shape)
        case "random_bits":
            words = random_bits(xs[0], math.prod(at_batch(node.shape, batch))) >> attributes["shift"]
            return words.astype(np.int64).reshape(at_batch(node.shape, batch))
        case "cast":
            return xs[0].astype({"f": work, "i": np.dtype(np.int64), "b": np.dtype(bool)}[node.kind])
        case "cumsum" if "reverse" in attributes:
            axis = attributes["axis"]
            return xp.flip(xp.cumsum(xp.flip(xs[0], axis), axis), axis)
    return computed(node.op, xs, attributes, xp)
