"""Several runs become one list of nodes, without what does nothing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from gpulayers.export.recording._formulas import common
from gpulayers.export.recording._place import Place, refuse
from gpulayers.export.recording.graph import Node


def joined(runs: list[list[Node]]) -> list[Node]:
    """Node by node what all runs have in common. Raises Unrecordable where they did different things."""
    nodes: list[Node] = []
    for same in itertools.zip_longest(*runs):
        at = next((n.place for n in same if n is not None and n.place), None)
        if None in same or len({(n.op, tuple(i.index for i in n.inputs), n.kind) for n in same}) > 1:
            reason = "what is done follows the batch size (a loop over the batch, or a branch on its size)"
            refuse(reason, "operations on the whole batch: axis 0 stays as it is", at)
        nodes.append(_joined_node(list(same), at, nodes))
    return nodes


def _joined_node(same: list[Node], at: Place | None, before: list[Node]) -> Node:
    first, op = same[0], same[0].op
    attributes = [n.attributes for n in same]
    if op == "const" and len({a["value"].shape for a in attributes}) > 1 and all(map(_is_one_number, attributes)):
        op = "full"  # np.zeros((len(x), 3))
        attributes = [{"value": a["value"].flat[0].item(), "shape": a["value"].shape} for a in attributes]
    shape = common([n.shape for n in same], at, strict=False)
    inputs = tuple(before[i.index] for i in first.inputs)
    merged = common(attributes, at)
    return Node(op, inputs, merged, shape, first.dtype, at, first.name, first.index)


def _is_one_number(constant: dict[str, Any]) -> bool:
    value = constant["value"]
    return value.size > 0 and bool((value == value.flat[0]).all())


def simplified(nodes: list[Node]) -> dict[int, Node]:
    """{index: the node that stands for it}: reshapes to the same shape and sums with fresh zeros do nothing."""
    stands: dict[int, Node] = {}
    for node in nodes:
        node.inputs = tuple(stands[i.index] for i in node.inputs)
        stands[node.index] = _simpler(node)
    return stands


def _is_fresh_zero(node: Node) -> bool:
    return node.op == "full" and node.attributes["value"] == 0


def _simpler(node: Node) -> Node:
    if not node.inputs or None in node.shape:
        return node
    first, attributes = node.inputs[0], node.attributes
    same_shape = node.shape == first.shape
    if node.op in ("reshape", "broadcast"):
        if same_shape:
            return first
        if node.op == "reshape" and first.op == "reshape":
            node.inputs = first.inputs
            return _simpler(node)
    if node.op in ("slice", "reshape", "transpose", "broadcast") and first.op == "full":
        node.op, node.inputs = "full", ()
        node.attributes = {"value": first.attributes["value"], "shape": node.shape}
        return node
    if node.op == "transpose" and attributes["axes"] == tuple(range(len(node.shape))):
        return first
    if node.op == "slice" and all(span == (0, n, 1) for span, n in zip(attributes["spans"], first.shape)):
        return first
    if node.op == "pad" and not any(map(any, attributes["edges"])):
        return first
    if node.op == "add":
        for one, other in (node.inputs, node.inputs[::-1]):
            if _is_fresh_zero(one) and other.shape == node.shape:
                return other
    if node.op == "sub" and _is_fresh_zero(first) and node.inputs[1].shape == node.shape:
        node.op, node.inputs = "neg", node.inputs[1:]
    if node.op == "cast" and first.op == "const" and isinstance(first.attributes["value"], np.ndarray):
        node.op, node.inputs = "const", ()
        node.attributes = {"value": first.attributes["value"].astype(node.dtype)}
    return node
