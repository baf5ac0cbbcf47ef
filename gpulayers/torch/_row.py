"""A row of modules in the graph of a forward: what its nodes call, and the one call that they become."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.fx import Graph, Node

from gpulayers.torch import functional
from gpulayers.torch._acts import name_of
from gpulayers.torch._epilogue import TWINS

PRODUCTS = (operator.mul, torch.mul)
_HALVINGS = (torch.chunk, "chunk")
_ADDS = (operator.add, operator.iadd, torch.add)


class Row(NamedTuple):
    function: Any
    members: tuple[Node, ...]
    """In the order in which they run; the last one's place is the row's."""
    layers: tuple[Any, ...]
    """Names of modules, of activations, that the function takes first."""
    inputs: tuple[Node, ...]
    also: Node | None = None
    """The member whose value is the row's second output."""
    steps: tuple[Any, ...] = ()
    """All that the function would run one after the other, which it takes last; where its layers and inputs do not say it."""

    words: str = ""
    """What it is called; else by its members."""

    def put(self, graph: Graph) -> str:
        last = self.members[-1]
        with graph.inserting_before(last):
            nodes = [a for a in (*self.layers, *self.steps) if isinstance(a, Node)]
            named = {node: graph.get_attr(str(node.target)) for node in dict.fromkeys(nodes)}
            layers, steps = (tuple([named.get(a, a) for a in of]) for of in (self.layers, self.steps))
            row = graph.call_function(self.function, (*layers, *self.inputs, *[steps] * bool(steps)))
            y = row if self.also is None else graph.call_function(operator.getitem, (row, 0))
            if self.also is not None:
                self.also.replace_all_uses_with(graph.call_function(operator.getitem, (row, 1)))
        last.replace_all_uses_with(y)
        for node in reversed(self.members):
            graph.erase_node(node)
        return self.words or " → ".join(map(title, self.members))


def title(node: Node) -> str:
    return node.target if isinstance(node.target, str) else node.target.__name__.removeprefix("i")


def module_of(node: Any, module: nn.Module) -> Any:
    """The child that a node calls with one argument, else None."""
    if not isinstance(node, Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    return module._modules.get(str(node.target))


def activation_of(node: Node, module: nn.Module) -> Any:
    """The activation that a node applies to its first argument: the node of a module, a name in ACTIVATIONS, or None."""
    if not node.args or not isinstance(node.args[0], Node):
        return None
    if node.op == "call_module":
        return node if name_of(module_of(node, module)) is not None else None
    named = dict(node.kwargs)
    named.pop("inplace", None)
    if node.op == "call_method" and len(node.args) == 1 and not named:
        return {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "tanh": "tanh"}.get(str(node.target))
    if node.op != "call_function":
        return None
    name = _FUNCTIONS.get(node.target)
    if name == "gelu" and set(named) <= {"approximate"}:
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(str(named.pop("approximate", "none")))
    return name if len(node.args) == 1 and not named else None


def _functions() -> dict[Any, str]:
    """{a function, torch's or ours: the activation's name}, of those that need no argument but x."""
    found: dict[Any, str] = {torch.relu: "relu", torch.sigmoid: "sigmoid", torch.tanh: "tanh"}
    for name in TWINS.keys() - {"gelu_tanh", "threshold"}:
        found |= {getattr(home, name): name for home in (F, functional) if hasattr(home, name)}
    return found


_FUNCTIONS = _functions()


def only_used_by(node: Any, user: Node) -> bool:
    return isinstance(node, Node) and list(node.users) == [user]


def operands(node: Node) -> list[tuple[Any, Any]]:
    """(the operand that may be written to, the other) of a sum: both orders, unless it is written into its first; none
    where a node is no sum of two tensors."""
    if node.target not in _ADDS or node.kwargs or len(node.args) != 2:
        return []
    a, b = node.args
    if not (isinstance(a, Node) and isinstance(b, Node)) or a is b:
        return []
    return [(a, b)] if in_place(node) else [(a, b), (b, a)]


def halves_of(a: Any, b: Any) -> tuple[Any, Any] | None:
    """(the call, what it cuts into these two halves along the last axis); None where it does not, or more is made of it."""
    if any(getattr(n, "target", None) is not operator.getitem for n in (a, b)):
        return None
    cut = a.args[0]
    if not isinstance(cut, Node) or cut is not b.args[0] or {*cut.users} != {a, b}:
        return None
    how = dict(zip(("input", "chunks", "dim"), cut.args)) | cut.kwargs
    if cut.target not in _HALVINGS or (how.get("chunks"), how.get("dim")) != (2, -1):
        return None
    return (cut, how["input"]) if (a.args[1], b.args[1]) == (0, 1) else None


def in_place(node: Any) -> bool:
    """Whether a sum is written into its first operand, whose dtype and shape it keeps."""
    return isinstance(node, Node) and node.target is operator.iadd


def undisturbed(row: Row, module: nn.Module) -> bool:
    """Whether nothing between the row's first and last member, which now runs later, may write to what it reads, or calls
    a module of the row: what a module counts depends on which call is the first."""
    layers = {called_by(n, module) for n in row.members} - {None}
    node = row.members[0]
    while node is not row.members[-1]:
        if node not in row.members:
            called = called_by(node, module)
            if any(x in row.inputs for x in node.all_input_nodes):
                return False
            if called is not None and layers & set(called.modules()):
                return False
        node = node.next
    return True


def called_by(node: Node, module: nn.Module) -> Any:
    """The module that a node calls, or hands to a row."""
    found = operator.attrgetter(str(node.target))(module) if node.op in ("call_module", "get_attr") else None
    return found if isinstance(found, nn.Module) else None
