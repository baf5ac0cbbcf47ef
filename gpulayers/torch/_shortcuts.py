"""Rows whose input others read, too, in the graph of a forward: the convolutions that a block begins with, beside its shortcut.
Such a row hands its input on, to them, and adds the gradient that comes back for it where its own is written (``_joined.py``).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch.fx import Graph, Node

from gpulayers.torch import _rows
from gpulayers.torch._beside import act_mul, products
from gpulayers.torch._lowered import lowered
from gpulayers.torch._row import called_by, in_place, module_of

_ROWS: dict[Any, Any] = {_rows.conv_norm_act: _rows.conv_norm_act_joined}
"""{what a row calls: what it calls if it hands its input on}; that is the fourth argument."""
_READERS = {
    *(operator.add, operator.iadd, operator.mul, torch.add, torch.mul, torch.cat, getattr),
    *(_rows.linear_act, _rows.conv_act, _rows.norm_act, _rows.norm_add_act, _rows.conv_norm_act, _rows.add_norm),
    *(act_mul, products, lowered),
}
"""Functions that do not write to what they read, but for a sum's first operand."""


def join(graph: Graph, module: nn.Module) -> Iterator[str]:
    """Let rows hand their inputs on where others read them; gives the names of the rows' convolutions."""
    places = {n: i for i, n in enumerate(graph.nodes)}
    for x in list(graph.nodes):
        users = sorted(x.users, key=lambda n: places.get(n, -1))
        row = next((n for n in users if n.target in _ROWS and _is_owner(n, x, users[0], module)), None)
        if row is None or len(users) == 1 or not _is_only_read(x, module):
            continue
        with graph.inserting_before(users[0]):
            given = [_again(graph, a) for a in row.args]
            pair = graph.call_function(_ROWS[row.target], tuple(given))
            y, other = [graph.call_function(operator.getitem, (pair, i)) for i in range(2)]
        row.replace_all_uses_with(y)
        for node in (row, *row.all_input_nodes):
            if node is row or node.op == "get_attr":
                graph.erase_node(node)
        x.replace_all_uses_with(other, lambda user, pair=pair: user is not pair)
        places |= {pair: places[x], y: places[x], other: places[x]}
        yield str(given[0].target)


def _again(graph: Graph, given: Any) -> Any:
    """A row's argument for one that stands earlier: its modules are looked up there."""
    if isinstance(given, tuple):
        return tuple([_again(graph, a) for a in given])
    is_module = isinstance(given, Node) and given.op == "get_attr"
    return graph.get_attr(str(given.target)) if is_module else given


def _is_owner(row: Node, x: Node, first: Node, module: nn.Module) -> bool:
    """Whether a row begins with a convolution of x whose kernel adds gradients, and may run where x's first user does."""
    conv, norm, _, image, *rest = row.args
    layers: Any = {called_by(n, module) for n in (conv, norm)}
    if image is not x or x in rest or {*called_by(conv, module).stride} != {1}:
        return False
    if first is row:
        return True
    if any(isinstance(a, Node) for a in rest):
        return False
    between = first
    while between is not row:
        called = None if between in row.all_input_nodes else called_by(between, module)
        if called is not None and layers & set(called.modules()):
            return False  # what a module counts depends on which call is the first
        between = between.next
    return True


def _is_only_read(x: Node, module: nn.Module) -> bool:
    """Whether nothing writes to a value, or hands it out: what autograd gives as a second output may not be written to."""
    for user in x.users:
        called = module_of(user, module)
        if called is not None:
            if _may_write(called):
                return False
            if next(called.parameters(), None) is None and not _is_only_read(user, module):
                return False  # it may give what it was given
        elif user.target not in _READERS or (in_place(user) and user.args[0] is x):
            return False
    return True


def _may_write(module: nn.Module) -> bool:
    """Whether a module may write to what it is given: of a row of modules, one before the first that has parameters."""
    if not any(getattr(m, "inplace", False) for m in module.modules()):
        return False
    if getattr(type(module), "_own", type(module)).forward is not nn.Sequential.forward:
        return True
    for part in module.children():
        if _may_write(part):
            return True
        if next(part.parameters(), None) is not None:
            break
    return False
