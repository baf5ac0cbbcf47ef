"""Lets plain Python run the body of a `@triton.jit` function as the compiler takes it.

Where the compiler's meaning is not Python's, the body is rewritten: what is assigned becomes a tensor, a loop's variable
is one, `and`, `or` and `not` work on blocks, `min` and `max` are Triton's. What the compiler refuses is refused.

A loop that runs no time is gone through once all the same, touching no memory: the compiler begins the loads of the
first rounds before it asks whether there are any. A division by zero there is undefined (`_integers.py`), and what
happens then is that the code which kept it from running is dropped as needless.
"""

from __future__ import annotations

import ast
import builtins
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, cast

import numpy as np
import triton.language as tl
from triton.compiler.code_generator import CodeGenerator

from gpulayers.testing._builder import BUILDER, SEMANTIC
from gpulayers.testing._values import INT32, made, storage
from gpulayers.testing.memory import Nowhere

LIBDEVICE = "triton.language.extra.libdevice"


# --- the rewriting ---------------------------------------------------------------------------------------------------


def _call(name: str, *args: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(args), [])


def _later(value: ast.expr) -> ast.Lambda:
    nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    return ast.Lambda(nothing, value)


class _AsCompiled(ast.NodeTransformer):
    """Each construct's value is what the compiler's `visit_…` of the same name gives it."""

    def __init__(self, variables: set[str]):
        self.variables = variables
        self.bodies: list[ast.stmt] = []
        """One function for each loop's body."""

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        self.generic_visit(node)
        node.value = ast.copy_location(_call("__assigned", node.value), node.value)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        if node.value is None or ast.unparse(node.annotation).endswith("constexpr"):
            return cast(ast.stmt, self.generic_visit(node))
        return self.visit_Assign(ast.copy_location(ast.Assign([node.target], node.value), node))

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.Assign:
        before = copy.deepcopy(node.target)
        before.ctx = ast.Load()
        value = ast.copy_location(ast.BinOp(before, node.op, node.value), node)
        return self.visit_Assign(ast.copy_location(ast.Assign([node.target], value), node))

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.Call:
        self.generic_visit(node)
        name = ast.Constant("logical_and" if isinstance(node.op, ast.And) else "logical_or")
        return ast.copy_location(_call("__logical", name, *map(_later, node.values)), node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        return ast.copy_location(_call("__not", node.operand), node) if isinstance(node.op, ast.Not) else node

    def visit_IfExp(self, node: ast.IfExp) -> ast.Call:
        self.generic_visit(node)
        return ast.copy_location(_call("__either", node.test, _later(node.body), _later(node.orelse)), node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if len(node.ops) > 1:
            raise SyntaxError(f"Triton compiles no chain of comparisons: {ast.unparse(node)}")
        return self.generic_visit(node)

    def visit_Break(self, node: ast.AST) -> Any:
        raise SyntaxError("Triton compiles neither break nor continue")

    visit_Continue = visit_Break

    def visit_For(self, node: ast.For) -> list[ast.stmt]:
        """The loop, and behind it `__carried(loop, …)` and `__speculate(loop, its body as a function, the variable, …)`."""
        self.generic_visit(node)
        body, target = f"__body_{len(self.bodies)}", cast(ast.Name, node.target).id
        loop = body.replace("body", "loop")
        used = {n.id for part in node.body for n in ast.walk(part) if isinstance(n, ast.Name)}
        names = [ast.arg(name) for name in sorted(used & self.variables | {target})]
        given = ast.arguments(posonlyargs=[], args=names, kwonlyargs=[], kw_defaults=[], defaults=[])
        self.bodies.append(ast.FunctionDef(body, given, node.body, decorator_list=[]))  # the same nodes, in both places
        first = ast.Assign([ast.Name(loop, ast.Store())], node.iter)
        node.iter = ast.Name(loop, ast.Load())
        stored = {
            n.id
            for part in node.body
            for n in ast.walk(part)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        types, assigned = body.replace("body", "types"), ast.Constant(" ".join(sorted(stored & self.variables)))
        before = ast.Assign([ast.Name(types, ast.Store())], _call("__types", assigned, _call("locals")))
        after = [
            _call("__carried", ast.Name(loop, ast.Load()), ast.Name(types, ast.Load()), _call("locals")),
            _call("__speculate", ast.Name(loop, ast.Load()), ast.Name(body, ast.Load()), ast.Constant(target), _call("locals")),
        ]  # fmt: skip
        around = [first, before, node, *map(ast.Expr, after)]
        return [ast.copy_location(part, node) for part in around]


@cache
def rewritten(function: Callable[..., Any]) -> Callable[..., Any]:
    """The body of a jitted function as a plain one: same globals, closure and line numbers.

    It is compiled inside a factory whose parameters stand in for the closure, for Triton's builtins that the kernel's
    module imported by name, and for Python's that mean something else to the compiler.
    """
    lines, start = inspect.getsourcelines(function)
    skipped = next(i for i, line in enumerate(lines) if line.lstrip().startswith("def "))  # decorators
    tree = ast.increment_lineno(ast.parse(textwrap.dedent("".join(lines[skipped:]))), start + skipped - 1)
    rewriting = _AsCompiled(set(function.__code__.co_varnames + function.__code__.co_cellvars))
    definition = cast(ast.FunctionDef, rewriting.visit(tree.body[0]))
    definition.decorator_list = []
    free = {**MEANINGS, **_closure(function), **_shadows(function)}
    module = ast.parse(f"def __factory({', '.join(free)}): pass")
    result = ast.Return(ast.Name(function.__name__, ast.Load()))
    cast(ast.FunctionDef, module.body[0]).body = [*rewriting.bodies, definition, result]
    ast.fix_missing_locations(module)
    scope: dict[str, Any] = {}
    exec(compile(module, inspect.getfile(function), "exec", dont_inherit=True), function.__globals__, scope)
    return scope["__factory"](**free)


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, function.__closure__ or ())}


def _shadows(function: Callable[..., Any]) -> dict[str, Any]:
    """Interpreted stand-ins for libdevice, for builtins that the kernel's module imported by name, and for Python's."""
    shadows: dict[str, Any] = {}
    for name in function.__code__.co_names:
        value: Any = function.__globals__.get(name)
        if getattr(value, "__name__", "").endswith(".libdevice"):
            shadows[name] = _Libdevice()
        elif getattr(value, "__module__", None) == LIBDEVICE:
            shadows[name] = getattr(_Libdevice(), value.__name__)
        elif tl.core.is_builtin(value):
            shadows[name] = interpreted(value)
        elif name not in function.__globals__ and hasattr(builtins, name):
            shadows[name] = _python(name)
    return shadows


def _python(name: str) -> Any:
    """What a name of Python's own means to the compiler."""
    if name == "range":
        return Loop
    known = CodeGenerator.builtin_namespace.get(name)
    if known is None:
        return partial(_unknown, name)
    return interpreted(known) if tl.core.is_builtin(known) else known


def _unknown(name: str, *_: Any, **__: Any) -> Any:
    raise NameError(f"Triton's compiler does not know Python's {name}")


class _Libdevice:
    """The module triton.language.extra.libdevice, computing at once."""

    def __getattr__(self, name: str) -> Any:
        from triton.language.extra.cuda import libdevice

        return partial(getattr(libdevice, name), _semantic=SEMANTIC)


triton_asks = False
"""Triton's own code is running: where it asks for a tensor's truth (`if other`), it means whether there is one."""


def interpreted(builtin: Callable[..., Any]) -> Callable[..., Any]:
    """A builtin that computes at once; as a plain function, so that it also binds as a method."""
    body = getattr(builtin, "__wrapped__", builtin)  # without the guard that asks for a compiler
    if "_semantic" not in inspect.signature(body).parameters:
        body = builtin

    def call(*args: Any, _semantic: Any = SEMANTIC, **kwargs: Any) -> Any:
        global triton_asks
        before, triton_asks = triton_asks, True
        try:
            return body(*args, _semantic=SEMANTIC, **kwargs)
        finally:
            triton_asks = before

    setattr(call, tl.core.TRITON_BUILTIN, True)
    return call


# --- what the rewritten code calls -----------------------------------------------------------------------------------


def _assigned(value: Any) -> Any:
    """A number that gets a name is a tensor, in a tuple, too."""
    if type(value) is tl.tensor:
        return value
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(map(_assigned, value))
    return SEMANTIC.to_tensor(value, False)


def _logical(name: str, *operands: Callable[[], Any]) -> Any:
    """`and`, `or`: Python's on constants, element by element on tensors."""
    tensors, value = [], None
    for operand in operands:
        value = operand()
        if isinstance(value, tl.tensor):
            tensors.append(value)
        elif bool(value) is (name == "logical_or"):
            return value
    while len(tensors) > 1:
        right, left = tensors.pop(), tensors.pop()
        tensors.append(getattr(left, name)(right))
    return tensors[0] if tensors else value


def _not(value: Any) -> Any:
    return value.__not__() if isinstance(value, tl.tensor) else not value


def _either(test: Any, first: Callable[[], Any], second: Callable[[], Any]) -> Any:
    value = (first if test else second)()
    return SEMANTIC.to_tensor(value) if isinstance(test, tl.tensor) else value


_speculating = False


class Loop:
    """`range` and `tl.range`: the values of a loop's variable, as tensors of the type that the compiler gives it."""

    def __init__(self, start: Any, stop: Any = None, step: Any = 1, **_: Any):
        bounds = [tl.core._unwrap_if_constexpr(n) for n in ((0, start, step) if stop is None else (start, stop, step))]
        self.constant = not any(isinstance(n, tl.tensor) for n in bounds)
        self.type, whole = INT32, bounds
        if not all(type(n) is int and -(2**31) <= n < 2**31 for n in bounds):
            tensors = [SEMANTIC.to_tensor(n) for n in bounds]
            if not all(t.dtype.is_int() and not t.type.is_block() for t in tensors):
                kinds = ", ".join(str(t.type) for t in tensors)
                raise TypeError(f"a loop's bounds and step are whole numbers, not {kinds}")
            if any(t.dtype is not INT32 for t in tensors):
                promote = SEMANTIC.integer_promote_impl
                self.type = promote(promote(tensors[0].dtype, tensors[1].dtype), tensors[2].dtype)
            whole = [int(t.handle.data.item()) for t in tensors]
        self.first, last, by = whole
        self.values = self._checked(range(self.first, last, by), bounds[2])

    def _checked(self, values: range, step: Any) -> range:
        if values.step <= 0 and isinstance(step, tl.tensor):
            raise ValueError(f"a loop's step is {values.step}: at run time it has to be positive")
        most = 2 ** (self.type.int_bitwidth - 1) - 1  # unsigned ones are compared as signed, too
        if any(abs(n) > most for n in (values.start, values.stop)) or (values and values[-1] + values.step > most):
            raise OverflowError(f"a loop's variable of type {self.type} passes {most}, and never ends")
        return values

    def tensor(self, value: int) -> Any:
        return made(np.array([value], storage(self.type)), self.type, self.type)

    def __iter__(self) -> Iterator[Any]:
        for value in self.values:
            yield self.tensor(value)
            if _speculating:
                break


class StaticLoop(Loop):
    """`tl.static_range`: unrolled, so that its variable is a constant."""

    def __init__(self, start: Any, stop: Any = None, step: Any = 1, **_: Any):
        super().__init__(start, stop, step)
        if not self.constant:
            raise TypeError("static_range unrolls a loop, so its bounds must be constexprs")

    def __iter__(self) -> Iterator[int]:
        return iter(self.values)


def _speculate(loop: Loop, body: Callable[..., Any], variable: str, scope: dict[str, Any]) -> None:
    """Go once through a loop that ran no time, as its compiled beginning does; whatever it assigns is forgotten."""
    global _speculating
    if loop.values or loop.constant:
        return
    names = body.__code__.co_varnames[: body.__code__.co_argcount]
    before, memory = _speculating, BUILDER.memory
    _speculating, BUILDER.memory = True, Nowhere()  # type: ignore[assignment]
    try:
        body(**{name: scope.get(name) for name in names} | {variable: loop.tensor(loop.first)})
    except Exception as error:
        error.add_note("in a loop that runs no time, of which the compiler begins the first rounds even so")
        raise
    finally:
        _speculating, BUILDER.memory = before, memory


def _types(names: str, scope: dict[str, Any]) -> dict[str, Any]:
    """The types of the tensors among these variables."""
    return {name: scope[name].type for name in names.split() if isinstance(scope.get(name), tl.tensor)}


def _carried(loop: Loop, before: dict[str, Any], scope: dict[str, Any]) -> None:
    """What a loop carries from round to round has one type; an unrolled loop carries nothing."""
    if isinstance(loop, StaticLoop):
        return
    for name, type in before.items():
        now = scope[name]
        if isinstance(now, tl.tensor) and now.type != type:
            raise TypeError(f"{name} is {type} before a loop and {now.type} after a round: the compiler refuses it")


MEANINGS = {
    "__types": _types,
    "__carried": _carried,
    "__assigned": _assigned,
    "__logical": _logical,
    "__not": _not,
    "__either": _either,
    "__speculate": _speculate,
    "locals": locals,
}
