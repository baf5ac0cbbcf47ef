"""Blocks whose forward torch.fx cannot trace, those of Hugging Face's transformers: the sums and norms of their residual stream,
their products of one input and gated units are found in the source of the forward, which is compiled again with
``_sums.py``'s and ``_beside.py``'s functions in their place.

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

from gpulayers.torch._acts import name_of
from gpulayers.torch._beside import act_mul, products
from gpulayers.torch._globals import innermost, rebuilt
from gpulayers.torch._lowered import lowered
from gpulayers.torch._reading import child_called, first_argument, is_reader, read_by, readers_within
from gpulayers.torch._standing import Above, Standing, standing
from gpulayers.torch._sums import add_at_end, is_norm
from gpulayers.torch._written import ACT_MUL, PRODUCTS, put_beside, put_gated
from gpulayers.torch.linear import Linear

_ADD, _NORM, _READERS = "_gpulayers_add", "_gpulayers_norm", "_gpulayers_stream_readers"


class Streamed(Above):
    """Stands before a block whose sums look ahead to the norms that take them, or whose products are beside each other."""

    _rows: tuple[str, ...]
    """What was fused, in words."""


def streamed(module: nn.Module, own: Any) -> Any:
    """The class before ``own`` for a block; None where its forward has nothing of all this, or cannot be read."""
    children = sorted(module._modules.items())
    norms, linears, acts = (
        tuple([name for name, m in children if m is not None and asked(m)]) for asked in (is_norm, _is_linear, name_of)
    )
    return _class_for(own, norms, linears, acts) if norms or len(linears) > 1 else None


def _is_linear(module: Any) -> bool:
    return type(module) is Linear


@functools.cache
def _class_for(own: Any, norms: tuple[str, ...], linears: tuple[str, ...], acts: tuple[str, ...]) -> Any:
    inner = innermost(own.forward)
    if inner is None or inner.__code__.co_freevars:
        return None
    tree = _source(inner)
    if tree is None or len(tree.args.args) < 2:
        return None
    block = tree.args.args[0].arg
    rows = [*put_gated(tree, block, {*acts}), *put_beside(tree, block, {*linears})]
    placed = _Placed(block, norms)
    placed.visit(tree)
    if norms and (placed.sums or placed.calls):
        rows.append("add → next norm")
    if not rows:
        return None
    code = _compiled(tree, inner)
    functions = {_ADD: _add, _NORM: _norm, PRODUCTS: products, ACT_MUL: act_mul}
    forward = rebuilt(own.forward, functions, code)
    named = norms, linears, acts
    made = (_again, own._made, *named) if issubclass(own, Standing) else (_class_for, own, *named)
    return standing(Streamed, own, made, forward=forward, _rows=tuple(rows))


def _again(made: tuple, *named: tuple[str, ...]) -> Any:
    """In another process: before a class that stands before one itself."""
    return _class_for(made[0](*made[1:]), *named)


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
        adds = (
            self.norms
            and isinstance(value, ast.BinOp)
            and isinstance(value.op, ast.Add)
            and isinstance(target, ast.Name)
        )
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
