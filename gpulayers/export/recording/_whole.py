"""Ops of the library's that a recording keeps whole: what they compute is theirs to know."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpulayers import arrays
from gpulayers.export.recording._handle import Handle, lift, plain, trace
from gpulayers.export.recording.graph import Node
from gpulayers.ops._op import Op

_NOTHING = np.zeros(())
"""The value of a call: its results have values."""


@functools.cache
def definitions(keeps: Callable[[Op], bool]) -> Callable[[Op], tuple[Callable, Callable | None]]:
    """(forward, backward) that stand for an op's own: one operation of the graph each, for those that ``keeps`` names."""

    @functools.cache
    def of(op: Op) -> tuple[Callable, Callable | None]:
        if op.updates or not keeps(op):
            return op.forward, op.backward
        return functools.partial(_forward, op), functools.partial(_backward, op)

    return of


def _forward(op: Op, *xs: Any, needs: tuple = (), **options: Any) -> tuple[tuple, dict]:
    values = [None if x is None else plain(x) for x in xs]
    outputs, saved = op.forward(*values, needs=needs, **options)
    if not any(isinstance(x, Handle) for x in xs):
        return outputs, saved
    given = tuple(x is not None for x in xs)
    named = tuple(sorted(options.items()))
    call = trace().add(
        "call", tuple(lift(x) for x in xs if x is not None), _NOTHING, op=op, given=given, options=named, needs=needs
    )
    trace().kept[call.node.index] = saved
    return tuple(trace().add("result", (call,), y, at=i) for i, y in enumerate(outputs)), {"": call}


def _backward(op: Op, dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, **options: Any) -> tuple:
    assert op.backward is not None
    if "" not in saved:
        return op.backward(dys, saved, inputs=inputs, needs=needs, **options)
    call, given = saved[""], tuple(dy is not None for dy in dys)
    values = tuple(None if dy is None else plain(dy) for dy in dys)
    grads = op.backward(values, trace().kept[call.node.index], inputs=inputs, needs=needs, **options)
    back = trace().add("call_backward", (call, *(lift(dy) for dy in dys if dy is not None)), _NOTHING, given=given)
    return tuple(None if g is None else trace().add("result", (back,), g, at=i) for i, g in enumerate(grads))


# --- what such operations give ---------------------------------------------------------------------------------------


Ran = tuple[tuple, Any]
"""A call of an op, or of its backward, that has run: what it gave, and what computes the gradients."""


def spaced(node: Node, xs: Sequence[Any]) -> list[Any]:
    """The inputs of a call, None where the op got none."""
    rest = iter(xs)
    return [next(rest) if came else None for came in node.attributes["given"]]


def called(node: Node, xs: Sequence[Any], attributes: dict[str, Any], record: bool) -> Ran:
    """The call of an op. record: its backward may follow."""
    op, options, needs = attributes["op"], dict(attributes["options"]), attributes["needs"]
    if needs and record:
        y, call = op.record(*spaced(node, xs), needs=needs, **options)
    else:
        y, call = op(*spaced(node, xs), **options), None
    return (y if isinstance(y, tuple) else (y,)), call


def called_back(node: Node, xs: Sequence[Any]) -> Ran:
    """The backward of the call that the first of ``xs`` is."""
    _, call = xs[0]
    outputs = call.plan.rule.outputs.values()
    dys = [dy if dy is None else arrays.cast(dy, out.dtype) for dy, out in zip(spaced(node, xs[1:]), outputs)]
    return call.backward(*dys), None
