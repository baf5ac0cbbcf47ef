"""Linear layers beside each other, which take the same input, in the graph of a forward: queries, keys and values, or a gated
unit's halves, whose products are one launch; and gated units: an activation times another tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.fx import Graph, Node

from gpulayers.torch._acts import Act, apply, is_bare, name_of
from gpulayers.torch._arguments import held
from gpulayers.torch._row import PRODUCTS, Row, activation_of, halves_of, module_of, only_used_by, undisturbed
from gpulayers.torch.activation import gated
from gpulayers.torch.linear import Linear, linears
from gpulayers.torch.norm import alike

MOST = 3
"""Weights that one op takes."""


# --- what a fused forward calls --------------------------------------------------------------------------------------


def products(x: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    """layer(x) of each."""
    if not all([type(layer) is Linear and is_bare(layer) for layer in layers]):
        return tuple([layer(x) for layer in layers])
    return linears(x, [held(layer, "weight") for layer in layers], [held(layer, "bias") for layer in layers])


def act_mul(act: Act, x: Tensor, gain: Tensor) -> Tensor:
    """act(x) · gain"""
    name = name_of(act)
    if name is None or not is_bare(act) or not alike(x, gain):
        return apply(act, x) * gain
    return gated(x, gain, name)


def act_mul_halves(act: Act, x: Tensor) -> Tensor:
    """act(a) · b for x = [a, b] along the last axis"""
    name = name_of(act)
    if name is None or not is_bare(act) or x.dim() == 0 or x.shape[-1] % 2:
        a, b = x.chunk(2, -1)
        return apply(act, a) * b
    return gated(x, None, name)


# --- in the graph of a forward ---------------------------------------------------------------------------------------


def gated_unit(last: Node, module: nn.Module) -> Iterator[Row]:
    """act(layer(x)) · other(x), and act(a) · b of a tensor's halves"""
    if last.target not in PRODUCTS or last.kwargs or len(last.args) != 2:
        return
    for first, gain in (last.args, last.args[::-1]):
        if not isinstance(gain, Node) or not only_used_by(first, last):
            continue
        act = activation_of(first, module)
        a: Any = first.args[0] if act is not None else None
        if a is gain or not only_used_by(a, first):
            continue
        if type(module_of(a, module)) is type(module_of(gain, module)) is Linear:
            yield Row(act_mul, (first, last), (act,), (a, gain))
        elif only_used_by(gain, last) and (whole := halves_of(a, gain)) is not None:
            halves = whole[0], *sorted((a, gain), key=list(last.graph.nodes).index)
            yield Row(act_mul_halves, (*halves, first, last), (act,), (whole[1],))


def put_beside(graph: Graph, module: nn.Module) -> Iterator[str]:
    """Put linear layers of one input into one call, as many as the op takes; gives what was fused, in words."""
    for x in list(graph.nodes):
        calls = [n for n in x.users if type(module_of(n, module)) is Linear and n.args == (x,)]
        if len(calls) < 2:
            continue
        places = {n: i for i, n in enumerate(graph.nodes)}
        found = list({str(n.target): n for n in sorted(calls, key=places.__getitem__, reverse=True)}.values())[::-1]
        while len(found) > 1:
            some, found = found[:MOST], found[MOST:]
            if undisturbed(Row(products, tuple(some), (), (x,)), module):
                yield _put(graph, x, some)


def _put(graph: Graph, x: Node, members: list[Node]) -> str:
    with graph.inserting_before(members[0]):
        layers = [graph.get_attr(str(n.target)) for n in members]
        ys = graph.call_function(products, (x, *layers))
        for i, node in enumerate(members):
            node.replace_all_uses_with(graph.call_function(operator.getitem, (ys, i)))
    for node in members:
        graph.erase_node(node)
    return " | ".join(str(n.target) for n in members)
