"""A model's last linear layer and the cross entropy of what it gives, in the graph of a forward: one op, which never holds all
logits. The layer may be the last step of a model that is called there, and the loss the last of a module that calls it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from gpulayers.torch import _autocast, functional
from gpulayers.torch._acts import is_bare
from gpulayers.torch._arguments import held
from gpulayers.torch._linear_cross_entropy import linear_cross_entropy
from gpulayers.torch._op import in_dynamo
from gpulayers.torch._row import module_of, only_used_by, title
from gpulayers.torch.linear import Linear
from gpulayers.torch.loss import CrossEntropyLoss

LEAST = 4096
"""Classes, from which on logits are what a step spends its memory and much of its time on."""
_FUNCTIONS = (F.cross_entropy, functional.cross_entropy)
_OPTIONS: dict[str, Any] = {"ignore_index": int, "reduction": str, "label_smoothing": (int, float)}


class Cut(NamedTuple):
    """The forward of a module without its last layer, or of a loss from a layer on."""

    run: Any
    """(module, *tensors) → what goes into the last layer; or (module, layer, its input, target) → the loss."""
    arguments: int
    """How many the module's own forward takes."""
    lists: tuple[tuple[str, int], ...]
    """Modules with others in them, whose number may not change."""
    head: str = ""
    """The last layer's name."""

    def serves(self, module: Any, inputs: tuple) -> bool:
        if len(inputs) != self.arguments or not is_bare(module) or not all([isinstance(x, Tensor) for x in inputs]):
            return False
        return all([len(module.get_submodule(name)._modules) == count for name, count in self.lists])


# --- what a fused forward calls --------------------------------------------------------------------------------------


def head_loss(source: Any, criterion: Any, view: tuple | None, target: Tensor, *inputs: Tensor) -> Tensor:
    """criterion(view(source(*inputs)), target)"""
    if type(source) is Linear:
        return _closed(criterion, source, inputs[0], view, target)
    cut = _cut(source)
    if cut is None or not cut.head or not cut.serves(source, inputs):
        return _called(criterion, _viewed(source(*inputs), view), target)
    return _closed(criterion, source._modules[cut.head], cut.run(source, *inputs), view, target)


def by_head(criterion: Any, head: Any, x: Tensor, view: tuple | None, target: Tensor) -> Tensor:
    """criterion(view(head(x)), target), for criterion the module or the options of a cross entropy"""
    if not _suits(criterion, head, x, view, target):
        return _called(criterion, _viewed(head(x), view), target)
    given = criterion if isinstance(criterion, dict) else {name: getattr(criterion, name) for name in _OPTIONS}
    classes = None if isinstance(criterion, dict) else held(criterion, "weight")
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    weight, bias = held(head, "weight"), held(head, "bias")
    return linear_cross_entropy(rows, weight, target, linear_bias=bias, weight=classes, **given)


def _closed(criterion: Any, head: Any, x: Tensor, view: tuple | None, target: Tensor) -> Tensor:
    if isinstance(criterion, dict) or type(criterion) is CrossEntropyLoss:
        return by_head(criterion, head, x, view, target)
    cut = _cut(criterion)
    if cut is None or cut.head or view is not None or not cut.serves(criterion, (x, target)):
        return _called(criterion, _viewed(head(x), view), target)
    return cut.run(criterion, head, x, target)


def _cut(module: Any) -> Cut | None:
    if in_dynamo():  # which cannot look at a forward
        return getattr(module, "_gpulayers_without_head", None) or None
    found = getattr(module, "_gpulayers_cut", None)
    return found() if found is not None else None


def _called(criterion: Any, logits: Tensor, target: Tensor) -> Tensor:
    if isinstance(criterion, dict):
        return functional.cross_entropy(logits, target, **criterion)
    return criterion(logits, target)


def _viewed(logits: Tensor, view: tuple | None) -> Tensor:
    if view is None:
        return logits
    name, *sizes = view
    return getattr(logits, name)(*[logits.shape[-1] if n is None else n for n in sizes])


def _suits(criterion: Any, head: Any, x: Tensor, view: tuple | None, target: Tensor) -> bool:
    """Whether the op computes that: a loss of rows, not in float16, where gradients that are not scaled yet are lost."""
    if type(head) is not Linear or not is_bare(head) or head.out_features < LEAST:
        return False
    if not (isinstance(x, Tensor) and isinstance(target, Tensor)):  # torch.fx traces
        return False
    if not isinstance(criterion, dict) and not (type(criterion) is CrossEntropyLoss and is_bare(criterion)):
        return False
    if target.dim() != 1 or target.is_floating_point() or x.numel() != target.shape[0] * x.shape[-1]:
        return False
    device = x.device.type
    if (torch.get_autocast_dtype(device) if _autocast.is_on(device) else x.dtype) is torch.float16:
        return False
    if view is None or view == ("flatten", 0, -2):
        return x.dim() == 2 or (view is not None and x.dim() > 2)
    if view == ("flatten", 0, 1):
        return x.dim() == 3
    return view in (("view", -1, None), ("reshape", -1, None)) or view[1:] == (-1, head.out_features)


# --- in the graph of a forward ---------------------------------------------------------------------------------------


class _Loss(NamedTuple):
    node: Node
    criterion: Any
    """The node of a module, or a cross entropy's options."""
    source: Node
    """What gives the logits."""
    view: tuple | None
    steps: tuple[Node, ...]
    """Between source and loss."""
    target: Any


def put_loss(graph: Graph, module: nn.Module, cut_of: Callable[[Any], Cut | None]) -> Iterator[tuple[str, list[str]]]:
    """Put layer and loss into one call; gives what was fused, in words, and the modules that are cut for that."""
    for node in list(graph.nodes):
        found = _loss_of(node, module, cut_of)
        if found is None or found.source.op != "call_module" or found.source.kwargs:
            continue
        source: Any = module._modules.get(str(found.source.target))
        if source is None or not _comes_before(found):
            continue
        head = source
        if type(source) is not Linear:
            if (cut := cut_of(source)) is None or not cut.head or len(found.source.args) != cut.arguments:
                continue
            head = source._modules[cut.head]
        if head.out_features < LEAST:
            continue
        words = " → ".join(title(n) for n in (found.source, *found.steps, node))
        with graph.inserting_before(node):
            named = [graph.get_attr(str(found.source.target)), found.criterion]
            if isinstance(found.criterion, Node):
                named[1] = graph.get_attr(str(node.target))
            call = graph.call_function(head_loss, (*named, found.view, found.target, *found.source.args))
        node.replace_all_uses_with(call)
        for gone in (node, *reversed(found.steps), found.source):
            graph.erase_node(gone)
        cuts = [found.source] * (type(source) is not Linear) + [node] * (node.op == "call_module")
        yield words, [str(n.target) for n in cuts]


def _comes_before(found: _Loss) -> bool:
    """Whether nothing else stands between source and loss, which might write to what the source takes; but for views of the
    target."""
    node = found.source.next
    while node is not found.node:
        is_view = node.op == "call_method" and node.target in _VIEWS and node.args[0] not in found.steps
        if node not in found.steps and not is_view:
            return False
        node = node.next
    return True


_VIEWS = ("flatten", "view", "reshape")


def _loss_of(node: Node, module: nn.Module, cut_of: Callable[[Any], Cut | None]) -> _Loss | None:
    if len(node.args) != 2 or not isinstance(node.args[0], Node):
        return None
    if node.op == "call_function" and node.target in _FUNCTIONS:
        criterion: Any = {
            k: v for k, v in node.kwargs.items() if v is not None
        }  # as torch's function names all of them
        if not all(k in _OPTIONS and isinstance(v, _OPTIONS[k]) for k, v in criterion.items()):
            return None
    elif node.op == "call_module" and not node.kwargs:
        called = module._modules.get(str(node.target))
        if type(called) is not CrossEntropyLoss and ((cut := cut_of(called)) is None or cut.head):
            return None
        criterion = node
    else:
        return None
    logits, target = node.args
    view, steps, source = _view_of(logits, node)
    if source is None or target is source or target in steps:
        return None
    return _Loss(node, criterion, source, view, steps, target)


def _view_of(logits: Any, user: Node) -> tuple[tuple | None, tuple[Node, ...], Any]:
    """(the view in words, its steps, what it is of); the last None where others use that."""
    if not only_used_by(logits, user):
        return None, (), None
    if logits.op != "call_method" or logits.target not in _VIEWS or logits.kwargs:
        return None, (), logits
    source, *sizes = logits.args
    steps: list[Node] = []
    if not isinstance(source, Node):
        return None, (), None
    for n in [n for n in sizes if isinstance(n, Node)]:
        its = _size_of(n, source, logits)
        if its is None:
            return None, (), None
        steps += its
    view = (logits.target, *[None if isinstance(n, Node) else n for n in sizes])
    return view, (*steps, logits), source if {*source.users} <= {*steps, logits} else None


def _size_of(n: Node, source: Node, user: Node) -> list[Node] | None:
    """The steps to the size of a tensor's last axis."""
    if not only_used_by(n, user):
        return None
    if n.target == "size" and n.args == (source, -1):
        return [n]
    shape = n.args[0] if n.target is operator.getitem and n.args[1] == -1 else None
    is_shape = isinstance(shape, Node) and shape.target is getattr and shape.args == (source, "shape")
    return [shape, n] if is_shape and only_used_by(shape, n) else None


# --- cuts ------------------------------------------------------------------------------------------------------------


def without_head(graph: Graph, module: nn.Module) -> str:
    """Let a graph give what goes into its last step, a linear layer, whose name this gives; "" for others."""
    output = next(iter(reversed(graph.nodes)))
    y: Any = output.args[0]
    if type(module_of(y, module)) is not Linear or not only_used_by(y, output):
        return ""
    output.args = (y.args[0],)
    graph.erase_node(y)
    return str(y.target)


def from_head(graph: Graph, module: nn.Module) -> bool:
    """Let the graph of a loss (logits, target) take (layer, its input, target); whether it is such a loss."""
    output = next(iter(reversed(graph.nodes)))
    node: Any = output.args[0]
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    found = _loss_of(node, module, lambda _: None) if isinstance(node, Node) else None
    if found is None or len(placeholders) != 2 or found.source is not placeholders[0]:
        return False
    with graph.inserting_before(placeholders[0]):
        head = graph.placeholder("head")
    with graph.inserting_before(node):
        criterion = graph.get_attr(str(node.target)) if isinstance(found.criterion, Node) else found.criterion
        call = graph.call_function(by_head, (criterion, head, placeholders[0], found.view, found.target))
    node.replace_all_uses_with(call)
    for gone in (node, *reversed(found.steps)):
        graph.erase_node(gone)
    return True
