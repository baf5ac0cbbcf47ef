"""Norms whose result only convolutions and linear layers read. Under autocast on a GPU torch computes norms in float32, and
casts x up before and y down after, and their gradients the other way. Where x has autocast's 16 bits already, and the
readers make those of y, the norm's kernel reads and writes them itself: it computes in float32 anyway, so the readers get the
same numbers, without four passes over memory, and x is saved as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn as nn
from torch import Tensor
from torch.fx import Graph, Node

from gpulayers.torch import _autocast, _rows, _sums
from gpulayers.torch._acts import Act, is_bare, name_of
from gpulayers.torch._arguments import held
from gpulayers.torch._beside import products
from gpulayers.torch._layer_norm_2d import LayerNorm2d
from gpulayers.torch._op import in_dynamo
from gpulayers.torch._reading import PASSING, is_reader, readers_within, reads
from gpulayers.torch._row import module_of
from gpulayers.torch.norm import GroupNorm, LayerNorm, RMSNorm

_NORMS = (LayerNorm, RMSNorm, GroupNorm)
_VIEWS = {"flatten", "permute", "transpose", "reshape", "view", "movedim", "squeeze", "unsqueeze", "contiguous"}
_ROWS: dict[Any, int] = {_rows.linear_act: 2, _rows.conv_act: 2, _rows.conv_norm_act: 3, products: 0}
"""Rows that begin with a reader, or with several: the place of x among their arguments."""

_autocasting = torch._C._is_any_autocast_enabled
_transforming = torch._C._are_functorch_transforms_active


def lowered(norm: Any, readers: tuple, x: Tensor, act: Act | None = None) -> Tensor:
    """norm(x), or act(norm(x)), for ``readers`` and nobody else: in the 16 bits that they would make of it."""
    if act is None and type(x) in _autocast.KINDS and (found := _sums.taken(norm, x, readers)) is not None:
        return found
    widened = _autocast.WIDENED
    if in_dynamo():
        if torch.is_autocast_enabled(widened) and _serves(norm, readers, x, act):
            with torch.autocast(widened, enabled=False):
                return norm.forward(x) if act is None else _rows.norm_act(norm, act, x)
    elif _autocasting() and not _transforming() and forward_ad._current_level < 0 and _serves(norm, readers, x, act):
        device = x.device.type  # as the context manager would, at a tenth of its cost
        torch.set_autocast_enabled(device, False)
        try:
            return norm.forward(x) if act is None else _rows.norm_act(norm, act, x)
        finally:
            torch.set_autocast_enabled(device, True)
    return norm(x) if act is None else _rows.norm_act(norm, act, x)


def _serves(norm: Any, readers: tuple, x: Tensor, act: Act | None) -> bool:
    """Whether autocast would widen x, its numbers of 16 bits, and nobody looks on."""
    widened = _autocast.WIDENED
    if type(x) not in _autocast.KINDS or x.device.type != widened or not torch.is_autocast_enabled(widened):
        return False
    if x.dtype != torch.get_autocast_dtype(widened):
        return False
    if not (_is_norm(norm) and is_bare(norm)) or not (act is None or (name_of(act) is not None and is_bare(act))):
        return False
    weights = [w for k in ("weight", "bias") if (w := held(norm, k) if k in norm._parameters else None) is not None]
    if any([w.dtype is not torch.float32 for w in weights]):
        return False
    return all(map(reads, readers))


def _is_norm(module: Any) -> bool:
    return type(module) in _NORMS or isinstance(module, LayerNorm2d)


# --- in the graph of a forward ---------------------------------------------------------------------------------------


def lower(graph: Graph, module: nn.Module) -> Iterator[str]:
    """Put ``lowered`` in the place of each such norm; gives their names."""
    for node in list(graph.nodes):
        norm, act, x = _norm_of(node, module)
        y: Any = node if node.target is not _rows.add_norm else _item(node, 0)
        readers = {} if norm is None or y is None else _readers(y, module)
        if not readers:
            continue
        with graph.inserting_before(node):
            parts = tuple(map(graph.get_attr, readers))
            if y is not node:
                node.args = (*node.args, parts)
                yield norm
                continue
            call = graph.call_function(lowered, (graph.get_attr(norm), parts, x, *[act] * (act is not None)))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        yield norm


def _norm_of(node: Node, module: nn.Module) -> tuple[Any, Any, Any]:
    """(name, activation, x) of the norm that a node calls; the name is None for others."""
    if _is_norm(module_of(node, module)):
        return str(node.target), None, node.args[0]
    if node.target is _rows.norm_act and _is_norm(module._modules.get(str(node.args[0].target))):  # type: ignore[union-attr]
        return str(node.args[0].target), node.args[1], node.args[2]  # type: ignore[union-attr]
    if node.target is _rows.add_norm:
        return str(node.args[0].target), None, None  # type: ignore[union-attr]
    return None, None, None


def _item(pair: Node, i: int) -> Node | None:
    """The node that takes a pair's first or second."""
    return next((n for n in pair.users if n.target is operator.getitem and n.args[1] == i), None)


def _readers(node: Node, module: nn.Module) -> dict[str, None]:
    """The modules that read what a node gives, and those that hand it on; none where anything else does."""
    found: dict[str, None] = {}
    for user in node.users:
        called = module_of(user, module)
        if called is None and user.op == "call_module" and [a for a in user.all_input_nodes if a is node] == [node]:
            called = module._modules.get(str(user.target)) if user.args[:1] == (node,) else None
        if user.target in _ROWS and not _begins(user, node):
            return {}
        if is_reader(called):
            found[str(user.target)] = None
        elif called is not None and called._modules:
            within = readers_within(called)
            if within is None:
                return {}
            found |= dict.fromkeys([str(user.target), *(f"{user.target}.{name}" for name in within)])
        elif user.target in _ROWS:
            layers: Any = user.args[1:] if user.target is products else user.args[:1]
            found |= dict.fromkeys([str(layer.target) for layer in layers])
        elif type(called) in PASSING or _is_view(user, node):
            more = _readers(user, module)
            if not more:
                return {}
            found |= more | ({} if called is None else {str(user.target): None})
        else:
            return {}
    return found


def _begins(row: Node, node: Node) -> bool:
    """Whether a node is a row's x, and nothing else of it."""
    return [i for i, a in enumerate(row.args) if a is node] == [_ROWS[row.target]]


def _is_view(user: Node, node: Node) -> bool:
    name = user.target if user.op == "call_method" else getattr(user.target, "__name__", "")
    own = user.op == "call_method" or getattr(torch, str(name), None) is user.target
    return own and name in _VIEWS and user.args[:1] == (node,)
