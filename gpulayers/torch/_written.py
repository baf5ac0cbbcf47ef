"""Linear layers of one input, and gated units, in the source of a forward that torch.fx cannot trace.

They are followed through statements that give names values, one after the other: what may not run, or may write to what
is read, ends a row. Each layer is called for as it was, where it is not a plain one when the forward runs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Set
from typing import Any

from gpulayers.torch._beside import MOST
from gpulayers.torch._reading import METADATA, child_called

PRODUCTS, ACT_MUL = "_gpulayers_products", "_gpulayers_act_mul"
"""What a forward calls: ``_beside.py``'s functions."""


def put_beside(tree: ast.FunctionDef, own: str, linears: Set[str]) -> list[str]:
    """Put calls of layers with one name's value into one call, as many as the op takes; gives what was fused, in words."""
    found = []
    for body in _bodies(tree):
        for statement, calls in [*_groups(body, own, linears)]:
            while len(calls) > 1:
                some, calls = calls[:MOST], calls[MOST:]
                names = [f"_gpulayers_{call.func.attr}" for call in some]
                layers = [call.func for call in some]
                targets: list[ast.expr] = [ast.Name(name, ast.Store()) for name in names]
                value = ast.Call(ast.Name(PRODUCTS, ast.Load()), [some[0].args[0], *layers], [])
                row = ast.copy_location(ast.Assign([ast.Tuple(targets, ast.Store())], value), statement)
                body.insert(body.index(statement), ast.fix_missing_locations(row))
                for name, call in zip(names, some, strict=True):
                    _Replaced(call, ast.Name(name, ast.Load())).visit(tree)
                found.append(" | ".join(layer.attr for layer in layers))
    return found


def put_gated(tree: ast.FunctionDef, own: str, acts: Set[str]) -> list[str]:
    """Let a product of two names, of which one is an activation's value that nothing else reads, take both; in words."""
    found = []
    for body in _bodies(tree):
        values: dict[str, Any] = {}
        for statement in body:
            target = _target(statement)
            if target is None or _disturbs(statement, "", []):
                values = {}
                continue
            assert isinstance(statement, ast.Assign)
            sides = _sides(statement.value)
            a = next((name for name in sides if name in values), None)
            if a is not None and _uses(tree, a) == (1, 1):
                first = values[a]
                (b,) = [name for name in sides if name != a]
                layer, first.value = first.value.func, first.value.args[0]
                given: list[ast.expr] = [layer, ast.Name(a, ast.Load()), ast.Name(b, ast.Load())]
                call = ast.Call(ast.Name(ACT_MUL, ast.Load()), given, [])
                statement.value = ast.fix_missing_locations(ast.copy_location(call, statement.value))
                found.append(f"{layer.attr} → mul")
            values = {k: v for k, v in values.items() if k not in target}
            if _calls_child(statement.value, own, acts) and len(target) == 1:
                inside: Any = statement.value.args[0]  # type: ignore[attr-defined]
                if isinstance(inside, ast.Call) and child_called(inside, own):
                    values[target[0]] = statement
    return found


class _Replaced(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return ast.copy_location(self.new, self.old) if node is self.old else self.generic_visit(node)


def _bodies(tree: ast.AST) -> Iterator[list[Any]]:
    """Lists of statements, each of which runs from its first to its last."""
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            if isinstance(body := getattr(node, field, None), list):
                yield body


def _groups(body: list[Any], own: str, linears: Set[str]) -> Iterator[tuple[Any, list[Any]]]:
    """(the statement of the first, calls) of those that may run where the first does."""
    first, x, calls = None, "", list[Any]()
    for statement in body:
        target = _target(statement)
        new = [] if target is None else [*_sure(statement.value, own, linears)]
        of = {call.args[0].id for call in new}
        again = {call.func.attr for call in calls} & {call.func.attr for call in new}
        if target is None or _disturbs(statement, x, new) or (of and of != {x}) or again:
            yield first, calls
            first, x, calls = None, "", []
            if len(of) == 1 and not _disturbs(statement, min(of), new) and len({c.func.attr for c in new}) == len(new):
                first, x, calls = statement, min(of), new
        else:
            calls += new
        if target is not None and x in target:
            yield first, calls
            first, x, calls = None, "", []
    yield first, calls


def _target(statement: Any) -> list[str] | None:
    """The names that a statement gives values, and does nothing else; None for all other statements."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) > 1:
        return None
    target: Any = statement.targets[0]
    names: list[Any] = target.elts if isinstance(target, ast.Tuple) else [target]
    return [name.id for name in names] if all(isinstance(name, ast.Name) for name in names) else None


def _sure(value: Any, own: str, linears: Set[str]) -> Iterator[Any]:
    """The calls of layers with a name alone, in an expression, that are sure to run."""
    if _calls_child(value, own, linears) and isinstance(value.args[0], ast.Name):
        yield value
    elif isinstance(value, ast.Call | ast.Attribute | ast.BinOp | ast.Tuple | ast.Starred | ast.keyword):
        for child in ast.iter_child_nodes(value):
            yield from _sure(child, own, linears)


def _calls_child(value: Any, own: str, names: Set[str]) -> bool:
    """Whether an expression is a call of one of these modules with one argument."""
    if child_called(value, own) not in names or len(value.args) != 1 or value.keywords:
        return False
    return not isinstance(value.args[0], ast.Starred)


def _disturbs(statement: Any, x: str, calls: list[Any]) -> bool:
    """Whether a statement may write to a name's value: it reads more of it than layers and shapes do, or anything in place."""
    read = {id(call.args[0]) for call in calls}
    for node in ast.walk(statement):
        if isinstance(node, ast.Attribute):
            if node.attr in METADATA:
                read.add(id(node.value))
            if node.attr.endswith("_") and not node.attr.endswith("__"):
                return True
        if isinstance(node, ast.NamedExpr | ast.Lambda | ast.Await | ast.Yield | ast.YieldFrom):
            return True
    names = (node for node in ast.walk(statement.value) if isinstance(node, ast.Name))
    return any(name.id == x and id(name) not in read for name in names)


def _sides(value: Any) -> list[str]:
    """The two names of a product of two."""
    if not isinstance(value, ast.BinOp) or not isinstance(value.op, ast.Mult):
        return []
    sides = [side.id for side in (value.left, value.right) if isinstance(side, ast.Name)]
    return sides if len({*sides}) == 2 else []


def _uses(tree: ast.AST, name: str) -> tuple[int, int]:
    """How often a name is read, and how often it gets a value."""
    uses = [node.ctx for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name]
    return sum(isinstance(ctx, ast.Load) for ctx in uses), sum(isinstance(ctx, ast.Store) for ctx in uses)
