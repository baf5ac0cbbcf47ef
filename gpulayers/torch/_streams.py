"""The residual stream of blocks whose forward torch.fx cannot trace, those of Hugging Face's transformers: their sums and norms are
found in the source of the forward, which is compiled again with ``_sums.py``'s functions in their place.

Nothing else of it changes, decorators, defaults and globals stay. A sum may be one of anything: what is no pair of tensors is
added as it was.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from typing import Any

import torch.nn as nn
from torch import Tensor

from gpulayers.torch._globals import innermost, rebuilt
from gpulayers.torch._lowered import lowered
from gpulayers.torch._reading import child_called, first_argument, is_reader, read_by, readers_within
from gpulayers.torch._standing import Above, Standing, standing
from gpulayers.torch._sums import add_at_end, is_norm

_ADD, _NORM, _READERS = "_gpulayers_add", "_gpulayers_norm", "_gpulayers_stream_readers"


class Streamed(Above):
    """Stands before a block whose sums look ahead to the norms that take them."""


def streamed(module: nn.Module, own: Any) -> Any:
    """The class before ``own`` for a block with norms; None where its forward adds nothing, or cannot be read."""
    norms = tuple(sorted(name for name, m in module._modules.items() if is_norm(m)))
    return _class_for(own, norms) if norms else None


@functools.cache
def _class_for(own: Any, norms: tuple[str, ...]) -> Any:
    inner = innermost(own.forward)
    if inner is None or inner.__code__.co_freevars:
        return None
    tree = _source(inner)
    if tree is None or len(tree.args.args) < 2:
        return None
    placed = _Placed(tree.args.args[0].arg, norms)
    placed.visit(tree)
    if not (placed.sums or placed.calls):
        return None
    code = _compiled(tree, inner)
    forward = rebuilt(own.forward, {_ADD: _add, _NORM: _norm}, code)
    made = (_again, own._made, norms) if issubclass(own, Standing) else (_class_for, own, norms)
    return standing(Streamed, own, made, forward=forward)


def _again(made: tuple, norms: tuple[str, ...]) -> Any:
    """In another process: before a class that stands before one itself."""
    return _class_for(made[0](*made[1:]), norms)


def keep_readers(module: nn.Module, own: Any) -> None:
    """Of each norm of a block: the modules that read what it gives, and where they are, if linear layers alone do."""
    tree, found = _source(innermost(own.forward)), {}
    for name in [name for name, m in module._modules.items() if is_norm(m)]:
        entries: list[tuple[Any, str, Any]] = []
        for child, keyword in (read_by(tree, name) if tree else None) or ():
            entries += _entries(module, child, keyword) or [(None, "", None)]
        if entries and all(parent is not None for parent, _, _ in entries):
            found[name] = tuple(entries)
    vars(module)[_READERS] = found


def forget(module: nn.Module) -> None:
    vars(module).pop(_READERS, None)


def _entries(module: nn.Module, child: str, keyword: str | None) -> list[tuple[Any, str, Any]]:
    """(parent, name, module) of a reader, or of those within it."""
    reader = module._modules.get(child)
    if reader is None or (keyword is not None and first_argument(reader) != keyword):
        return []
    if is_reader(reader):
        return [(module, child, reader)]
    within = readers_within(reader) if reader._modules else None
    if within is None:
        return []
    found = [(module, child, reader)]
    for name in within:
        above, _, last = name.rpartition(".")
        parent = reader.get_submodule(above)
        found.append((parent, last, parent._modules[last]))
    return found


# --- what a forward calls ------------------------------------------------------------------------------------------------


def _add(block: Any, site: int, a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return add_at_end(block, a, b, site)
    return a + b


def _norm(block: Any, name: str, x: Any) -> Any:
    entries = vars(block).get(_READERS, {}).get(name, ())
    readers = tuple([m for parent, last, m in entries if parent._modules.get(last) is m])
    norm = block._modules[name]
    return lowered(norm, readers if len(readers) == len(entries) else (), x)


# --- the source of a forward ---------------------------------------------------------------------------------------------


def _source(inner: Any) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inner))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


class _Placed(ast.NodeTransformer):
    """Puts our functions in the place of sums that get a name, and of calls of norms with one argument."""

    def __init__(self, own: str, norms: tuple[str, ...]):
        self.own, self.norms, self.sums, self.calls = own, norms, 0, 0

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        value: Any = node.value
        target = node.targets[0]
        adds = isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add) and isinstance(target, ast.Name)
        if adds and any(isinstance(side, ast.Name) for side in (value.left, value.right)):
            node.value = self._call(_ADD, ast.Constant(self.sums), value.left, value.right, at=value)
            self.sums += 1
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = child_called(node, self.own)
        if name not in self.norms or len(node.args) != 1 or node.keywords or isinstance(node.args[0], ast.Starred):
            return node
        self.calls += 1
        return self._call(_NORM, ast.Constant(name), *node.args, at=node)

    def _call(self, name: str, *args: ast.expr, at: ast.expr) -> ast.Call:
        own = ast.Name(self.own, ast.Load())
        call = ast.copy_location(ast.Call(ast.Name(name, ast.Load()), [own, *args], []), at)
        return ast.fix_missing_locations(call)


def _compiled(tree: ast.FunctionDef, inner: Any) -> types.CodeType:
    tree.decorator_list, tree.returns = [], None
    for a in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs, tree.args.vararg, tree.args.kwarg):
        if a is not None:
            a.annotation = None
    tree.args.defaults = [ast.copy_location(ast.Constant(None), d) for d in tree.args.defaults]
    tree.args.kw_defaults = [d and ast.copy_location(ast.Constant(None), d) for d in tree.args.kw_defaults]
    ast.increment_lineno(tree, inner.__code__.co_firstlineno - 1)
    module = compile(ast.Module([tree], []), inner.__code__.co_filename, "exec")
    return next(c for c in module.co_consts if isinstance(c, types.CodeType))
