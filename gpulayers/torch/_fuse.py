"""Modules that a model runs in a row become one op: convolution → batch norm (+ residual) → activation and its parts,
convolution (+ residual) → activation, group or instance norm (+ residual) → activation, linear → activation, add → norm,
activation · other; and linear layers of one input.

torch.fx traces the forward of each module that has children, one level deep. Where it finds such a row, the module's
forward becomes the traced one with the row in one call, as source that can be read (``print(gt.source(module))``). All
modules, parameters and names stay; ``_rows.py`` runs the modules one by one where hooks want to see them.

A forward is followed only where it is sure to say the same again. Refused are those that torch.fx cannot trace, that
differ between training and evaluation, write to ``self``, draw random numbers for Python or ask for types, other than
whether an argument is a tensor or a list. A call with
other arguments than tensors for those that have no default, and all calls after an attribute of the module was set, run
the module's own forward.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.fx
import torch.nn as nn
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.graph import inplace_methods

from gpulayers.torch import _rows
from gpulayers.torch._beside import gated_unit, put_beside
from gpulayers.torch._chains import chain, chain_act, chain_add, why_left
from gpulayers.torch._head_loss import Cut, from_head, put_loss, without_head
from gpulayers.torch._layer_norm_2d import LayerNorm2d
from gpulayers.torch._lowered import lower
from gpulayers.torch._norm_act import NormAct
from gpulayers.torch._row import Row, activation_of, in_place, module_of, only_used_by, operands, undisturbed
from gpulayers.torch._shortcuts import first_of, hand_on, join
from gpulayers.torch._sums import add_at_end
from gpulayers.torch._turned import turning
from gpulayers.torch.linear import Linear
from gpulayers.torch.loss import CrossEntropyLoss
from gpulayers.torch.norm import LayerNorm, RMSNorm

PLAN, CUT = "_gpulayers_rows", "_gpulayers_without_head"
_ASIDE = {"training", "__class__", "_is_torch_compile", "_compiled_call_impl"}
"""Attributes that a forward's plan does not depend on: torch.compile sets the last two on what it is given."""
_ROW_NORMS = (LayerNorm, RMSNorm)
_KINDS = (Linear, *_rows.CONVOLUTIONS, *_rows.BATCH_NORMS, *_rows.SAMPLE_NORMS, *_ROW_NORMS)


class Unfusable(Exception):
    """Why a module's forward stays as it is."""


class Plan(NamedTuple):
    """The forward of one module, fused."""

    source: str
    run: Any
    """(module, *tensors) → what its own forward gives."""
    arguments: int
    """How many tensors it takes."""
    children: int
    """How many the module had."""
    rows: tuple[str, ...]
    """What was fused, in words."""
    left: dict[str, str] | None
    """{child: why not} of the convolutions and norms that are in no row; None where nothing was read."""
    lowered: tuple[str, ...] = ()
    """The norms that under autocast write what their readers take."""
    cuts: tuple[str, ...] = ()
    """The children whose forward runs without its last layer, or from that on, in a row."""
    joined: tuple[str, ...] = ()
    """The first convolutions of rows that hand their input on, and add what comes back for it to its gradient."""
    handing: Any = None
    """run of a Sequential that gives its input, too, for others that read it (``_shortcuts.through``)."""
    of_list: Any = None
    """run where the one argument is a list of tensors, and the forward asks for that."""


_NONE = Plan("", None, -1, -1, (), None)
"""Of a module whose own forward runs."""


class Fused:
    """Stands before the class of a module whose forward was fused."""

    _own: Any
    _gpulayers_rows: Plan | None = None
    """None: not looked at yet, in a copy."""
    _gpulayers_without_head: Cut | bool | None = False
    """False: not looked at yet; None: there is none."""

    @property
    def _gpulayers_self(self) -> Fused:
        """What a fused forward calls itself."""
        return self

    def _gpulayers_cut(self) -> Cut | None:
        found = self._gpulayers_without_head
        if found is False:
            found = vars(self)[CUT] = cut_of(self)
        return found  # type: ignore[return-value]

    def forward(self, *args: Any, **named: Any) -> Any:
        plan = self._gpulayers_rows
        if plan is None:
            plan = _looked_at(self)
        if len(args) == plan.arguments and not named and len(self._modules) == plan.children:  # type: ignore[attr-defined]
            for x in args:
                if not isinstance(x, Tensor):
                    break
            else:
                return plan.run(self, *args)
            if plan.of_list is not None and type(args[0]) is list and all([isinstance(x, Tensor) for x in args[0]]):
                return plan.of_list(self, *args)
        return super().forward(*args, **named)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name not in _ASIDE:
            self.__dict__.update({PLAN: _NONE, CUT: None})

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.__dict__.update({PLAN: _NONE, CUT: None})

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {k: v for k, v in vars(self).items() if k not in (PLAN, CUT) or v is _NONE or v is None}
        return _new, (self._own,), state

    def __prepare_scriptable__(self) -> Any:
        other = self._own.__new__(self._own)
        other.__dict__ = {k: v for k, v in vars(self).items() if k not in (PLAN, CUT)}
        return other


@functools.cache
def fused_class(own: Any) -> Any:
    one: Any = Fused.forward
    forward = types.FunctionType(one.__code__, one.__globals__, one.__name__, one.__defaults__, one.__closure__)
    functools.update_wrapper(forward, own.forward)  # torch.fx and torch.export read its arguments
    inside = {"_own": own, "__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (Fused, own), inside | {"forward": forward})


def _new(own: type) -> Any:
    c = fused_class(own)
    return c.__new__(c)


def _looked_at(module: Any) -> Plan:
    try:
        plan = plan_of(module, module._own)
    except Unfusable:
        plan = _NONE
    vars(module)[PLAN] = plan
    return plan


def source(module: nn.Module) -> str:
    """The fused forward of a module as Python; "" where its own runs."""
    plan = getattr(module, PLAN, None)
    return plan.source if plan else ""


def plan_of(module: nn.Module, own: Any) -> Plan:
    """The fused forward of ``module``, whose class is ``own``; with ``rows`` empty where nothing is in a row.

    Raises Unfusable.
    """
    is_list = own.forward is nn.Module.forward  # ModuleList, ModuleDict
    judges = any(type(m) is CrossEntropyLoss for child in module._modules.values() if child for m in _near(child))
    layers = [m for m in module._modules.values() if m is not None]
    fuses = judges or any(type(m) in _KINDS or isinstance(m, NormAct | LayerNorm2d) for m in layers)
    if is_list or not (fuses or any(map(first_of, layers))):
        return _NONE
    try:
        names = _tensors_of(own, judges)
        graph, asks = _graph_of(module, own, names, Tensor)
    except Unfusable:
        if fuses:
            raise
        return _NONE
    left, called = why_left(graph, module), {str(n.target) for n in graph.nodes if n.op == "call_module"}
    rows, lowered, joined = _put(graph, module)
    rows += tuple(_put_end(graph, module))
    losses = [*put_loss(graph, module, cut_of)]
    rows += tuple(words for words, _ in losses)
    kept = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    left = {child: why for child, why in left.items() if child in kept or child not in called}
    if not (rows or lowered or joined):
        return _NONE._replace(left=left)
    source, run = _function_of(graph, own)
    cuts = tuple(child for _, children in losses for child in children)
    handing = _function_of(graph, own)[1] if hand_on(graph, module) else None
    of_module = len(names), len(module._modules)
    plan = Plan(source, run, *of_module, rows, left, lowered, cuts, joined, handing)
    if not asks or len(names) > 1:
        return plan
    try:
        graph, _ = _graph_of(module, own, names, list)
    except Unfusable:
        return plan
    alike = _put(graph, module) == (rows, lowered, joined)
    return plan._replace(of_list=_function_of(graph, own)[1]) if alike else plan


def _put(graph: Graph, module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Put all that a graph's modules become into it; gives what a ``Plan`` says of it: rows, lowered, joined."""
    return tuple(_fuse(graph, module)), tuple(lower(graph, module)), tuple(join(graph, module))


def _near(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    yield from module.children()


def cut_of(module: Any) -> Cut | None:
    """The forward of a module without the linear layer at its end, or of a loss from such a layer on; None for others."""
    own = module._own if isinstance(module, Fused) else type(module)
    children = [*module.children()] if isinstance(module, nn.Module) else []
    if not any(type(m) in (Linear, CrossEntropyLoss) for m in children) or "forward" in vars(module):
        return None
    try:
        names = _tensors_of(own)
        graph, _ = _graph_of(module, own, names, Tensor, listed=True)
        if is_loss := from_head(graph, module):
            head = ""
        else:
            _put(graph, module)
            head = without_head(graph, module)
        if not (is_loss or head):
            return None
    except Unfusable:
        return None
    above = {m for node in graph.nodes if node.op in ("call_module", "get_attr") for m in _above(module, node)}
    lists = tuple((name, len(m._modules)) for name, m in module.named_modules() if m in above or m is module)
    return Cut(_function_of(graph, own)[1], len(names), lists, head)


def _function_of(graph: Graph, own: Any) -> tuple[str, Any]:
    graph.lint()
    code = graph.python_code("self")
    scope: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, f"<fused {own.__qualname__}.forward>", "exec"), scope)
    return code.src.strip(), scope["forward"]


def _graph_of(module: nn.Module, own: Any, names: list[str], given: type, listed: bool = False) -> tuple[Graph, bool]:
    """(the graph of its forward, in training and in evaluation; whether that asks if an argument is ``given``).

    listed: modules in lists may be called.
    """
    graph, asks, depends = _traced(module, own, names, True, given)
    if depends and str(graph) != str(_traced(module, own, names, False, given)[0]):
        raise Unfusable("its forward differs between training and evaluation")
    for node in graph.nodes:
        if listed or node.op != "call_module":
            continue
        if any(isinstance(m, nn.ModuleList | nn.ModuleDict) for m in _above(module, node)):
            raise Unfusable("its forward calls modules in a ModuleList or ModuleDict, which may grow")
    return graph, asks


# --- reading a forward -----------------------------------------------------------------------------------------------


class _Proxy(torch.fx.Proxy):
    """Of a tensor: ``y += x`` writes to y, where torch's own proxy makes a sum of it."""


def _writing(name: str) -> Any:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in inplace_methods:
    setattr(_Proxy, f"__{_name}__", _writing(_name))


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: Node) -> _Proxy:
        return _Proxy(node, self)


def _tensors_of(own: Any, judges: bool = False) -> list[str]:
    """The names of the arguments of its forward that have no default; judges: for any number, of an output and a target."""
    names = []
    given = list(inspect.signature(own.forward).parameters.values())[1:]
    if judges and [p.kind for p in given] == [inspect.Parameter.VAR_POSITIONAL]:
        return ["x", "target"]
    for p in given:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise Unfusable("its forward takes any number of arguments")
        if p.default is p.empty:
            if p.kind is p.KEYWORD_ONLY:
                raise Unfusable("its forward needs an argument by name")
            names.append(p.name)
    return names


def _traced(module: nn.Module, own: Any, names: list[str], training: bool, given: type) -> tuple[Graph, bool, bool]:
    """(the graph of a forward, on a copy of the module that nothing can be written to; whether it asks for a type; whether it
    asks if it is in training).

    given: what the arguments are, should it ask.
    """
    for function, word in _words(own.forward, own, set()):
        if word in ("isinstance", "issubclass", "type") and (word != "isinstance" or function is not own.forward):
            raise Unfusable("its forward asks for types")
        if word.startswith(("rand", "bernoulli", "uniform", "normal_", "multinomial")):
            raise Unfusable("its forward draws random numbers")
    forward, asked = _answered(own.forward, given)

    def refuse(self: Any, name: str, *_: Any) -> None:
        raise Unfusable(f"its forward writes to self.{name}")

    reads = []

    def mode(self: Any) -> bool:
        reads.append(self)
        return training

    scope: dict[str, Any] = {"own": forward}
    arguments = ", ".join(["self", *names])
    exec(f"def forward({arguments}):\n    return own({arguments})", scope)
    inside = {"forward": scope["forward"], "__setattr__": refuse, "__delattr__": refuse, "training": property(mode)}
    kind: Any = type(own.__name__, (own,), inside)
    probe = kind.__new__(kind)
    probe.__dict__.update(module.__dict__, training=training)
    lists = {k: v for k, v in vars(module).items() if isinstance(v, list | dict | set)}
    probe.__dict__.update({k: copy.copy(v) for k, v in lists.items()})
    try:
        graph = _Tracer().trace(probe)
        for name, before in lists.items():
            if len(vars(probe)[name]) != len(before):
                raise Unfusable(f"its forward writes to self.{name}")
        return graph, bool(asked), bool(reads)
    except Unfusable:
        raise
    except Exception as error:
        raise Unfusable(
            f"torch.fx cannot trace its forward: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from None


def _answered(function: Any, given: type) -> tuple[Any, list]:
    """(a forward to which ``isinstance`` says of each argument that it is ``given``; fills a list with what it asks)."""
    asked: list[Any] = []

    def is_one(x: Any, kinds: Any) -> bool:
        if not isinstance(x, torch.fx.Proxy):
            return isinstance(x, kinds)
        flat = kinds if isinstance(kinds, tuple) else getattr(kinds, "__args__", (kinds,))
        if x.node.op != "placeholder" or not set(flat) <= {Tensor, list, tuple}:
            raise Unfusable("its forward asks for types")
        asked.append(x)
        return given in flat

    if not isinstance(function, types.FunctionType) or "isinstance" not in set(_names(function.__code__)):
        return function, asked
    scope = {**function.__globals__, "isinstance": is_one}
    made = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made, asked


def _words(function: Any, own: Any, seen: set) -> Iterator[tuple[Any, str]]:
    """(function, name) of the names that a function uses, and those that the model's own functions use which it calls."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    if not isinstance(function, types.FunctionType) or function in seen:
        return
    seen.add(function)
    for name in _names(function.__code__):
        yield function, name
        called = getattr(own, name, None) if not hasattr(nn.Module, name) else None
        for other in (called, function.__globals__.get(name)):
            if inspect.isroutine(other) and not str(getattr(other, "__module__", "")).startswith(
                ("torch", "gpulayers.")
            ):
                yield from _words(other, own, seen)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


def _above(module: nn.Module, node: Node) -> Iterator[nn.Module]:
    """The modules between ``module`` and the one that a node calls."""
    for name in str(node.target).split(".")[:-1]:
        module = module.get_submodule(name)
        yield module


# --- rows ------------------------------------------------------------------------------------------------------------


def _fuse(graph: Graph, module: nn.Module) -> Iterator[str]:
    """Put each row of the graph into one call, the longest ones first; gives what was fused, in words."""
    for finders in (
        (gated_unit, turning),
        (chain_act, _linear_act, _conv_act, _norm_act, _add_norm),
        (chain_add,),
        (chain,),
    ):
        for last in list(graph.nodes):
            rows = (row for find in finders for row in find(last, module))
            row = next((row for row in rows if undisturbed(row, module)), None)
            if row is not None:
                yield row.put(graph)
    yield from put_beside(graph, module)


def _linear_act(last: Node, module: nn.Module) -> Iterator[Row]:
    act = activation_of(last, module)
    first: Any = last.args[0] if act is not None else None
    if type(module_of(first, module)) is Linear and only_used_by(first, last):
        yield Row(_rows.linear_act, (first, last), (first, act), first.args)


def _conv_act(last: Node, module: nn.Module) -> Iterator[Row]:
    act = activation_of(last, module)
    first: Any = last.args[0] if act is not None else None
    if not only_used_by(first, last):
        return
    if isinstance(module_of(first, module), _rows.CONVOLUTIONS):
        yield Row(_rows.conv_act, (first, last), (first, act), first.args)
    for conv, residual in operands(first):
        if isinstance(module_of(conv, module), _rows.CONVOLUTIONS) and only_used_by(conv, first):
            inputs = (*conv.args, residual, *[True] * in_place(first))
            yield Row(_rows.conv_act, (conv, first, last), (conv, act), inputs)


def _norm_act(last: Node, module: nn.Module) -> Iterator[Row]:
    act = activation_of(last, module)
    first: Any = last.args[0] if act is not None else None
    if not only_used_by(first, last):
        return
    norms = (*_rows.BATCH_NORMS, *_rows.SAMPLE_NORMS)
    if isinstance(module_of(first, module), norms):
        yield Row(_rows.norm_act, (first, last), (first, act), first.args)
    for norm, residual in operands(first):
        if isinstance(module_of(norm, module), norms) and only_used_by(norm, first):
            inputs = (*norm.args, residual, *[True] * in_place(first))
            yield Row(_rows.norm_add_act, (norm, first, last), (norm, act), inputs)


def _put_end(graph: Graph, module: nn.Module) -> Iterator[str]:
    """Let a sum that is all that a block gives look ahead to the norm that takes it."""
    last = next(iter(reversed(graph.nodes))).args[0]
    if not isinstance(last, Node) or in_place(last) or not operands(last):
        return
    if any(type(m) in _ROW_NORMS for m in module._modules.values()):
        with graph.inserting_before(last):
            call = graph.call_function(add_at_end, (graph.get_attr("_gpulayers_self"), *last.args))
        last.replace_all_uses_with(call)
        graph.erase_node(last)
        yield "add → next norm"


def _add_norm(last: Node, module: nn.Module) -> Iterator[Row]:
    if not isinstance(module_of(last, module), _ROW_NORMS):
        return
    first: Any = last.args[0]
    if not in_place(first) and operands(first):
        yield Row(_rows.add_norm, (first, last), (last,), first.args, also=first)
