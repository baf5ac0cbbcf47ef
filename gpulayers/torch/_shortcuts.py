"""Rows whose input others read, too, in the graph of a forward: the convolutions that a block begins with, beside its shortcut.
Such a row hands its input on, to them, and adds the gradient that comes back for it where its own is written (``_joined.py``).
So do modules in a Sequential that begins with such a row.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.fx import Graph, Node

from gpulayers.torch import _rows
from gpulayers.torch._acts import is_bare
from gpulayers.torch._beside import act_mul, products
from gpulayers.torch._conv_norm import NORMS
from gpulayers.torch._lowered import lowered
from gpulayers.torch._norm_act import NormAct
from gpulayers.torch._op import in_dynamo
from gpulayers.torch._row import called_by, in_place, module_of

_ROWS: dict[Any, Any] = {_rows.conv_norm_act: _rows.conv_norm_act_joined}
"""{what a row calls: what it calls if it hands its input on}; that is the fourth argument."""
_READERS = {
    *(operator.add, operator.iadd, operator.mul, torch.add, torch.mul, torch.cat, getattr),
    *(_rows.linear_act, _rows.conv_act, _rows.norm_act, _rows.norm_add_act, _rows.conv_norm_act, _rows.add_norm),
    *(act_mul, products, lowered),
}
"""Functions that do not write to what they read, but for a sum's first operand."""


def through(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(module(x), x for all others that read it) of a Sequential that may begin with a row that hands its input on."""
    if type(x) is not Tensor or not x.requires_grad or not torch.is_grad_enabled() or in_dynamo():
        return module(x), x
    plan = vars(module).get("_gpulayers_rows")
    if not is_bare(module) or (plan is not None and (plan.handing is None or len(module._modules) != plan.children)):
        return module(x), x
    if plan is not None:
        return plan.handing(module, x)
    if type(module).forward is not nn.Sequential.forward or "forward" in vars(module):
        return module(x), x
    first, *others = module._modules.values()
    y, x = through(first, x)
    for layer in others:
        y = layer(y)
    return y, x


# --- in the graph of a forward ---------------------------------------------------------------------------------------


def hand_on(graph: Graph, module: nn.Module) -> bool:
    """Let the forward of a module, if it is a Sequential's, give its input, too, where it begins with what hands that on."""
    if _own(module).forward is not nn.Sequential.forward:
        return False
    x, (output,) = next(iter(graph.nodes)), [n for n in graph.nodes if n.op == "output"]
    if len(x.users) != 1 or x.op != "placeholder":
        return False
    (first,) = x.users
    if not _name_of_owner(first, x, first, module):
        return False
    _, other = _put_pair(graph, first, first)
    with graph.inserting_before(output):
        output.args = ((output.args[0], other),)
    return True


def join(graph: Graph, module: nn.Module) -> Iterator[str]:
    """Let rows hand their inputs on where others read them; gives the names of the rows' convolutions."""
    places = {n: i for i, n in enumerate(graph.nodes)}
    for x in list(graph.nodes):
        users = sorted(x.users, key=lambda n: places.get(n, -1))
        named = ((n, name) for n in users if (name := _name_of_owner(n, x, users[0], module)))
        row, name = next(named, (None, ""))
        if row is None or len(users) == 1 or not _is_only_read(x, module):
            continue
        pair, other = _put_pair(graph, row, users[0])
        x.replace_all_uses_with(other, lambda user, pair=pair: user is not pair)
        places |= dict.fromkeys((pair, *pair.users), places[x])
        yield name


def _put_pair(graph: Graph, row: Node, first: Node) -> tuple[Node, Node]:
    """(the call that gives a row's output and its input, the latter) in the row's place, before ``first``."""
    with graph.inserting_before(first):
        if row.op == "call_module":
            pair = graph.call_function(through, (graph.get_attr(str(row.target)), *row.args))
        else:
            pair = graph.call_function(_ROWS[row.target], tuple([_again(graph, a) for a in row.args]))
        y, other = [graph.call_function(operator.getitem, (pair, i)) for i in range(2)]
    row.replace_all_uses_with(y)
    for node in (row, *row.all_input_nodes):
        if node is row or node.op == "get_attr":
            graph.erase_node(node)
    return pair, other


def _name_of_owner(node: Node, x: Node, first: Node, module: nn.Module) -> str:
    """The convolution of x whose kernel of dx may add what comes back for x, if a node begins with such a one; else ""."""
    if node.target in _ROWS:
        return str(node.args[0].target) if _is_owner(node, x, first, module) else ""  # type: ignore[union-attr]
    called = module_of(node, module)
    inner = "" if called is None or node is not first else first_of(called)
    return f"{node.target}.{inner}" if inner else ""


def _own(module: nn.Module) -> Any:
    return getattr(type(module), "_own", type(module))


def first_of(module: nn.Module) -> str:
    """The name of the convolution that a Sequential begins with, if a norm follows it and its kernel adds gradients; else ""."""
    if _own(module).forward is not nn.Sequential.forward or not module._modules:
        return ""
    (name, first), *others = module._modules.items()
    if type(first) not in NORMS:
        inner = "" if first is None else first_of(first)
        return f"{name}.{inner}" if inner else ""
    norm = others[0][1] if others else None
    follows = type(norm) is NORMS[type(first)] or isinstance(norm, NormAct)
    return name if follows and {*first.stride} == {1} else ""  # type: ignore[union-attr]


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
    if _own(module).forward is not nn.Sequential.forward:
        return True
    for part in module.children():
        if _may_write(part):
            return True
        if next(part.parameters(), None) is not None:
            break
    return False
