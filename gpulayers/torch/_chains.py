"""Convolution → batch norm (+ residual) → activation in the graph of a forward; and why a convolution or a norm is in none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn as nn
from torch.fx import Graph, Node

from gpulayers.torch import _rows
from gpulayers.torch._acts import is_bare
from gpulayers.torch._conv_norm import NORMS
from gpulayers.torch._norm_act import NormAct
from gpulayers.torch._row import Row, activation_of, in_place, module_of, only_used_by, operands, undisturbed

NORMALISES = (*_rows.BATCH_NORMS, NormAct)
"""What a chain may have after its convolution."""
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_SAMPLE_NORMS = (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
_WHY_NO_SAMPLE_NORM = (
    "no activation follows it in the same forward, nor its sum with another tensor, and no op computes it with a convolution:"
    " its statistics are those of each image"
)


def _before(node: Any, user: Node, module: nn.Module) -> tuple[Any, list[Node]]:
    """(the node whose value ``user`` takes by way of ``node``, the modules between them that do nothing)."""
    between: list[Node] = []
    while only_used_by(node, user) and type(module_of(node, module)) is nn.Identity:
        between.insert(0, node)
        node, user = node.args[0], node
    return node, between


def _row(normed: Any, residual: Any, tail: list[Node], act: Any, module: nn.Module) -> Iterator[Row]:
    """The row that ends with ``tail``: an addition, an activation, both, or nothing after a norm."""
    norm, after = _before(normed, tail[0], module) if tail else (normed, [])
    if tail and not only_used_by(norm, [*after, *tail][0]):
        return
    if not isinstance(module_of(norm, module), NORMALISES):
        return
    conv, before = _before(norm.args[0], norm, module)
    if not only_used_by(conv, [*before, norm][0]):
        return
    if _pair(conv, norm, module):
        members, steps = (conv, *before, norm, *after, *tail), ()
        inputs = (*conv.args, residual) if residual is not None else conv.args
        if before or after:
            steps = (conv, *before, norm, *after, *[None] * (residual is not None), *[act] * (act is not None))
            inputs = (*conv.args, residual, residual is not None and in_place(tail[0]))
        elif residual is not None and in_place(tail[0]):
            inputs = (*inputs, True)
        yield Row(_rows.conv_norm_act, members, (conv, norm, act), inputs, steps=steps)


def _pair(conv: Any, norm: Any, module: nn.Module) -> bool:
    """Whether one call computes both, by their classes."""
    first, second = (module_of(node, module) for node in (conv, norm))
    kind = second.kind if isinstance(second, NormAct) else type(second)
    return any(isinstance(first, c) and issubclass(kind, n) for c, n in NORMS.items())


def chain_act(last: Node, module: nn.Module) -> Iterator[Row]:
    """act(norm(conv(x))), act(norm(conv(x)) + residual)"""
    act = activation_of(last, module)
    if act is None:
        return
    first: Any = last.args[0]
    yield from _row(first, None, [last], act, module)
    if only_used_by(first, last):
        for normed, residual in operands(first):
            yield from _row(normed, residual, [first, last], act, module)


def chain_add(last: Node, module: nn.Module) -> Iterator[Row]:
    """norm(conv(x)) + residual"""
    for normed, residual in operands(last):
        yield from _row(normed, residual, [last], None, module)


def chain(last: Node, module: nn.Module) -> Iterator[Row]:
    """norm(conv(x))"""
    if isinstance(module_of(last, module), NORMALISES):
        yield from _row(last, None, [], None, module)


# --- why not ---------------------------------------------------------------------------------------------------------


def is_link(module: Any) -> bool:
    """Whether a chain could have a module of this class."""
    return isinstance(module, (*_CONVOLUTIONS, *_BATCH_NORMS, *_SAMPLE_NORMS))


def why_alone(module: Any) -> str:
    """Why a convolution or a norm is in no chain, whatever its parent's forward says; "" if that decides."""
    if isinstance(module, nn.SyncBatchNorm):
        return "a SyncBatchNorm waits for the statistics of other processes"
    if getattr(module, "transposed", False):
        return "no op computes a transposed convolution with a norm"
    served = (*NORMS, *NORMALISES, *_rows.SAMPLE_NORMS)
    return "" if isinstance(module, served) else f"it is no drop-in of {_known()}"


def _known() -> str:
    return ", ".join(c.__name__ for c in (*NORMS, *NORMS.values(), *_rows.SAMPLE_NORMS))


def why_unlinked(name: str, layer: nn.Module, left: dict[str, str] | None, parent: nn.Module, refused: str) -> str:
    """Why a parent's convolution or norm is in no chain; "" if it is in one.

    left: what ``why_left`` gave; None where the parent's forward was not read, because of ``refused``.
    """
    if why := why_alone(layer):
        return why
    if type(parent).forward is nn.Module.forward:
        return "it stands in a ModuleList or ModuleDict, which calls nothing"
    if refused or left is None:
        return refused or "nothing follows it in the same forward that an op computes with it"
    return left.get(name, "") or ("" if is_bare(layer) else "it has hooks, which see it run alone while they are there")


def why_left(graph: Graph, module: nn.Module) -> dict[str, str]:
    """{child: why it is in no chain}, if it is in none: of each convolution and each norm among the children."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        child = module_of(node, module)
        if child is not None and is_link(child):
            found[str(node.target)] = why_alone(child) or _why(node, child, module)
    others = {k for k, child in module._modules.items() if is_link(child)} - found.keys()
    return found | dict.fromkeys(others, "the forward of its parent does not call it with one argument")


def _why(node: Node, child: nn.Module, module: nn.Module) -> str:
    if isinstance(child, _SAMPLE_NORMS):
        return _WHY_NO_SAMPLE_NORM
    if isinstance(child, _BATCH_NORMS):
        conv, before = _before(node.args[0], node, module)
        if not isinstance(module_of(conv, module), tuple(NORMS)):
            return "what it normalises comes from no convolution of the same forward"
        return _why_not_both(conv, node, before, module)
    if len(node.users) != 1:
        return f"{len(node.users)} steps use its output" if node.users else "nothing in this forward uses its output"
    norm, before = next(iter(node.users)), []
    while len(norm.users) == 1 and type(module_of(norm, module)) is nn.Identity:
        before.append(norm)
        norm = next(iter(norm.users))
    if not isinstance(module_of(norm, module), _BATCH_NORMS):
        return "no batch norm follows it in the same forward"
    return why_alone(module_of(norm, module)) or _why_not_both(node, norm, before, module)


def _why_not_both(conv: Node, norm: Node, before: list[Node], module: nn.Module) -> str:
    if not only_used_by(conv, [*before, norm][0]):
        return "more steps than the norm use the convolution's output"
    if not _pair(conv, norm, module):
        return "the norm is one of another number of axes"
    rows = _row(norm, None, [], None, module)
    if not any(undisturbed(row, module) for row in rows):
        return "a step between convolution and norm takes what the convolution takes, too, and may write to it"
    return ""
