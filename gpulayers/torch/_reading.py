"""Who reads what a module is given: whether its own forward hands its first argument to linear layers, and to nothing else.

Read from the source of its forward, so that it need not be one that torch.fx can trace.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import torch.nn as nn

from gpulayers.torch._activation_like import Conv1DLike
from gpulayers.torch._acts import is_bare
from gpulayers.torch._conv_act import CONVOLUTIONS
from gpulayers.torch.linear import Flatten, Linear

READERS = (Linear, *CONVOLUTIONS)
PASSING = (Flatten, nn.Identity)
"""Modules that hand on the numbers that they are given."""
METADATA = {"shape", "device", "ndim", "size", "dim", "numel"}
"""Of a tensor, which tell no dtype."""


def is_reader(module: Any) -> bool:
    """Whether autocast makes 16 bits of what it is called with, and it reads nothing else of that."""
    return type(module) in READERS or isinstance(module, Conv1DLike)


def reads(module: Any) -> bool:
    """Whether a reader, or a module that was found to hand on what it is given to readers alone, is as it was then."""
    return is_bare(module) and (bool(module._modules) or type(module) in PASSING or is_reader(module))


def readers_within(module: nn.Module) -> list[str] | None:
    """The names of a module's layers that read its first argument, those of modules within it too; None where it may go
    elsewhere. A module's own name is among them, for hooks on it would see the argument."""
    if "forward" in vars(module):
        return None
    if isinstance(module, nn.Sequential):
        children: list[str] | None = [*module._modules][:1]
    else:
        children = _children(inspect.unwrap(type(module).forward))
    if children is None:
        return None
    found = []
    for name in children:
        child = module._modules.get(name)
        if child is None:
            if hasattr(module, name):  # a method, or what is no module
                return None
        elif is_reader(child):
            found.append(name)
        elif (within := readers_within(child) if child._modules else None) is None:
            return None
        else:
            found += [name, *(f"{name}.{inner}" for inner in within)]
    return found or None


@functools.cache
def _children(forward: Any) -> list[str] | None:
    """The attributes of self that a forward calls with its first argument alone, or with it first; None where it does
    anything else with that."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) < 2:
        return None
    own, x = (a.arg for a in function.args.args[:2])
    found: list[str] = []
    for statement in function.body:
        for node, parents in _walk(statement, ()):
            if isinstance(node, ast.Name) and node.id in ("locals", "vars", "eval", "exec"):
                return None
            if not isinstance(node, ast.Name) or node.id != x or isinstance(node.ctx, ast.Store):
                continue
            reader = _reader(node, parents, own)
            if reader is None:
                return None
            found += [reader] * bool(reader)
        stores = [
            n for n in ast.walk(statement) if isinstance(n, ast.Name) and n.id == x and isinstance(n.ctx, ast.Store)
        ]
        if stores:  # from there on it names another tensor, if that is sure to run, and does not read it
            return found if isinstance(statement, ast.Assign) else None
    return found


def first_argument(module: nn.Module) -> str:
    """The name of what its forward takes first."""
    return next(iter([*inspect.signature(type(module).forward).parameters][1:]), "")


def read_by(function: ast.FunctionDef, norm: str) -> list[tuple[str, str | None]] | None:
    """(child, the name by which it is given) of the modules that read what ``self.norm(…)`` gives, where that gets a name and
    is read until the name gets another value; None where it may go elsewhere."""
    own = function.args.args[0].arg
    bodies = [getattr(n, "body", None) for n in ast.walk(function)]
    for body in [b for b in bodies if isinstance(b, list)]:
        for i, statement in enumerate(body):
            if isinstance(statement, ast.Assign) and child_called(statement.value, own) == norm:
                target = statement.targets[0]
                if len(statement.targets) > 1 or not isinstance(target, ast.Name):
                    return None
                return _reads_of(body[i + 1 :], target.id, own)
    return None


def _reads_of(body: list[ast.stmt], name: str, own: str) -> list[tuple[str, str | None]] | None:
    """Of a name's value at the begin of these statements; None unless one of them is sure to give it another."""
    found: list[tuple[str, str | None]] = []
    for statement in body:
        for node, parents in _walk(statement, ()):
            if not isinstance(node, ast.Name) or node.id != name or isinstance(node.ctx, ast.Store):
                continue
            user = parents[0]
            keyword = user.arg if isinstance(user, ast.keyword) else None
            reader = _reader(node, parents, own) if keyword is None else child_called(parents[1], own)
            if reader is None:
                return None
            found += [(reader, keyword)] * bool(reader)
        stores = [
            n for n in ast.walk(statement) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store)
        ]
        if stores:
            return found if isinstance(statement, ast.Assign) else None
        if isinstance(statement, ast.Return):
            return found
    return None


def _walk(node: ast.AST, parents: tuple[ast.AST, ...]) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
    yield node, parents
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, (node, *parents))


def _reader(node: ast.Name, parents: tuple[ast.AST, ...], own: str) -> str | None:
    """The child that is called with it; "" where nothing but metadata is read; None for all else."""
    user = parents[0]
    if isinstance(user, ast.Attribute) and user.attr in METADATA:
        return ""
    if isinstance(user, ast.Call) and user.args[:1] == [node]:
        return child_called(user, own)
    return None


def child_called(call: ast.AST, own: str) -> str | None:
    """The name of a call's function, where that is an attribute of self."""
    f = getattr(call, "func", None)
    return f.attr if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id == own else None
