"""Rotary positions as a forward writes them out: the halves of a head's numbers times cosines and sines, put together again, in
the graph of that forward. They become one op.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.fx import Node

from gpulayers.torch._row import PRODUCTS, Row, halves_of
from gpulayers.torch.rotary import rotary

_CATS = (torch.cat, torch.concat)
_SUMS = (operator.add, torch.add)
_DIFFERENCES = (operator.sub, torch.sub)


def turned(keeps: bool, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[a cos − b sin, a sin + b cos] for x = [a, b] along the last axis; keeps: in x's dtype."""
    if _fits(x, cos, sin) and (keeps or x.dtype == cos.dtype):
        return rotary(x, None, cos, sin)
    a, b = x.chunk(2, -1)
    y = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return y.to(x.dtype) if keeps else y


def _fits(x: Any, cos: Any, sin: Any) -> bool:
    """Whether the tables have a row for each position of (N, H, T, D), and no gradients."""
    if not all([isinstance(t, Tensor) for t in (x, cos, sin)]) or x.dim() != 4 or cos.dim() != 2:
        return False
    if cos.requires_grad or sin.requires_grad or cos.dtype != sin.dtype or x.shape[3] % 2:
        return False
    if cos.dtype != x.dtype and (cos.dtype is not torch.float32 or x.dtype is torch.float64):
        return False
    return cos.shape == sin.shape == (x.shape[2], x.shape[3] // 2) and cos.device == x.device


def turning(last: Node, module: nn.Module) -> Iterator[Row]:
    """The row that ends in a node: in that which puts the halves together, or in a cast to the dtype of what was cut."""
    keeps = last.op == "call_method" and last.target == "to" and len(last.args) == 2 and not last.kwargs
    joined: Any = last.args[0] if keeps else last
    found = _of(joined) if isinstance(joined, Node) else None
    if found is None or (keeps and {*joined.users} != {last}):
        return
    cut, x, cos, sin, members = found
    if keeps:
        dtype: Any = last.args[1]
        if (
            not isinstance(dtype, Node)
            or dtype.target is not getattr
            or dtype.args != (x, "dtype")
            or len(dtype.users) > 1
        ):
            return
        members |= {dtype, last}
    elif any(user.target == "to" for user in joined.users):
        return
    order = {n: i for i, n in enumerate(last.graph.nodes)}
    inside = [n for n in members if n is not last]
    if all({*n.users} <= members for n in inside) and all(order[n] < order[cut] for n in (x, cos, sin)):
        yield Row(turned, tuple(sorted(members, key=order.__getitem__)), (keeps,), (x, cos, sin), words="rotary")


def _of(joined: Node) -> tuple[Node, Node, Node, Node, set[Node]] | None:
    """(the cut, what it cuts, cos, sin, all nodes from the cut on) of a concatenation."""
    given = dict(zip(("tensors", "dim"), joined.args)) | joined.kwargs
    pair: Any = given.get("tensors", ())
    if joined.target not in _CATS or given.get("dim") != -1 or len(pair) != 2:
        return None
    first, second = pair
    if first.target not in _DIFFERENCES or second.target not in _SUMS or first.kwargs or second.kwargs:
        return None
    products = [*first.args, *second.args]
    if any(getattr(p, "target", None) not in PRODUCTS or p.kwargs or len(p.args) != 2 for p in products):
        return None
    for a, cos in (products[0].args, products[0].args[::-1]):
        for b, sin in (products[1].args, products[1].args[::-1]):
            halves = halves_of(a, b)
            sums = [{*p.args} for p in products[2:]]
            if halves is None or sums not in ([{a, sin}, {b, cos}], [{b, cos}, {a, sin}]):
                continue
            cut, x = halves
            if all(isinstance(n, Node) for n in (x, cos, sin)):
                return cut, x, cos, sin, {cut, a, b, *products, first, second, joined}
    return None
