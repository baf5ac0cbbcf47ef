"""One op as a torch function. Two roads lead to it:

- plain tensors in eager mode take the short one: the plan of ``dispatch``, and with gradients an ``autograd.Function``;
- whatever traces (``torch.compile``, export, fake tensors, dispatch modes) meets the same op as a ``torch.library``
  custom op (``_library.py``).

Under ``torch.func`` and forward-mode differentiation torch's own function computes, and so it does for a call that the
op's rule refuses: torch serves it or raises its own error, with the rule as a note. Each such call is logged once.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from gpulayers import dispatch, launch
from gpulayers.definition import RuleError
from gpulayers.ops._op import Op
from gpulayers.torch import _autocast, _flops, _inductor, _sharded
from gpulayers.torch._arguments import is_a
from gpulayers.torch._guards import checker, never_known
from gpulayers.torch._layout import in_layout
from gpulayers.torch._library import LibraryOp

in_dynamo = torch.compiler.is_dynamo_compiling
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_any_autocast = torch._C._is_any_autocast_enabled
_transforming = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack
_scripting = torch._C._is_tracing
_overridden = torch.overrides.has_torch_function
_policy = dispatch._policy.get
_written = torch.autograd.graph.increment_version
_PLAIN = {Tensor, torch.nn.Parameter, torch.nn.Buffer, type(None)}
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MOST_KNOWN, _MOST_LATEST = 256, 1024
"""Calls of an op that are remembered, with their plans; and weights (the layers of a model) that have a latest one."""
_NO_VALUES: dict[str, Any] = {}
_REFUSED = (object(),)


class _Known(NamedTuple):
    """What a repeated call needs."""

    check: Callable[..., bool]
    """Whether the ``leading`` inputs and torch's state are those of the call that was planned."""
    leading: int
    options: tuple
    """All but the dynamic ones."""
    policy: dispatch.Policy
    grad: bool
    """Whether grad mode was on."""
    plan: dispatch.Plan
    apply: Callable | None
    """Where autograd records the call: the function that it goes through."""
    updated: tuple[int, ...]
    """The inputs that the call writes to: autograd must be told."""
    kind: Callable[[dict[str, Any]], launch.Kind]
    """(dynamic options) → who plays tapes of such calls."""
    plain: launch.Kind
    """That of no dynamic options."""
    outputs: int
    saved: tuple[str, ...]
    backwards: dict[Any, tuple]
    """Tapes of the backward by the gradients that are wanted; see ``launch.Backward``."""
    cast: tuple[tuple[int, torch.dtype], ...] = ()
    """The inputs that autocast casts before."""
    direct: Callable | None = None
    """torch's own function, where it is what the plan runs, forward and backward: it records itself at less cost."""


_UNTAPED = launch.Kind()


def _no_tape(_: Any) -> launch.Kind:
    return _UNTAPED


def is_plain(t: Any) -> bool:
    """Whether the memory of ``t`` holds its values: not of sparse, nested, lazily negated and symbolic zero tensors."""
    if t is None:
        return True
    dense = type(t) in _PLAIN and t.layout is torch.strided
    return dense and not (t.is_nested or t.is_neg() or t._is_zerotensor())


def in_memory(x: Any) -> Any:
    """``x`` with its values in its memory: autograd itself makes gradients that are lazily negated."""
    return x if x is None or is_plain(x) else x.clone() if x._is_zerotensor() else x.resolve_neg()


def _requires_grad(ins: Sequence[Any]) -> bool:
    for t in ins:  # noqa: SIM110 - compilers look into loops faster than into comprehensions
        if t is not None and t.requires_grad:
            return True
    return False


def is_transformed(dys: Sequence[Any]) -> bool:
    """Whether a backward is torch.func's, forward-mode differentiation's or that of is_grads_batched=True."""
    batched = torch._C._functorch.is_legacy_batchedtensor
    return _transforming() or forward_ad._current_level >= 0 or any([dy is not None and batched(dy) for dy in dys])


class TorchOp:
    """A torch function made from an op.

    twin: torch's own function of the same positional arguments, the op's inputs and then ``options``.
    options: those the function passes on, in the words of a torch.library schema ("float eps, bool training").
    outputs: the names of what it returns; options may leave out the last.
    updating: the option without which the op updates none of its inputs.
    buffers: what the op may save besides its inputs and outputs.
    cast: what autocast does to the inputs, see ``_autocast.py``; to the first ``casts`` of them, where that is given.
    again: gradients in torch's own operations, for gradients of gradients: (dys, saved, inputs, options) → one gradient
        or None for each input. Needed where what is saved is not the inputs; else the twin is differentiated.
    flops: what an op counts that is a product of matrices, see ``_flops.py``; by the required inputs, or so many (``counted``).
    direct: the twin is what the kernels of "aten" call, forward and backward, and keeps layouts as they do.
    pointwise: it works element by element, so that Inductor fuses torch's own function with what is around it.
    """

    def __init__(
        self,
        op: Op,
        twin: Callable,
        options: str = "",
        *,
        outputs: Sequence[str] = ("y",),
        buffers: Sequence[str] = (),
        cast: str | dict[str, str] | None = None,
        casts: int | None = None,
        again: Callable | None = None,
        updating: str | None = None,
        flops: Callable[..., dict[str, int]] | None = None,
        counted: int | None = None,
        direct: bool = False,
        pointwise: bool = False,
    ):
        self.op, self.twin, self.cast, self.again = op, twin, cast, again
        self.direct, self.pointwise = direct, pointwise
        self.name, self.n = op.name, len(op.inputs)
        self._casts = self.n if casts is None else casts
        # Subclasses of tensors ask for its name, torch.fx and pickle for where it is.
        self.__name__ = self.__qualname__ = f"_{op.name}"
        self.__module__ = f"gpulayers.torch.{op.family}"
        declared = [o.split() for o in options.split(",") if o.strip()]
        self.options = tuple(name for _, name in declared)
        self._kinds = tuple(kind.replace("SymInt", "int") for kind, _ in declared)
        self.library = LibraryOp(op, options, self.options, outputs, buffers, self._autocast, updating)
        if flops is not None:
            _flops.declare(self.library, flops, op.required if counted is None else counted)
        self._differentiable = tuple((i, n) for i, n in enumerate(op.inputs) if n in op.differentiable)
        self._constant = tuple(i for i, n in enumerate(op.inputs) if n not in op.differentiable)
        self._dynamic = tuple((self.n + i, k) for i, k in enumerate(self.options) if k in op.dynamic)
        fixed = [self.n + i for i, k in enumerate(self.options) if k not in op.dynamic]
        self._fixed = operator.itemgetter(*fixed) if len(fixed) > 1 else lambda args: tuple([args[i] for i in fixed])
        self._weight = op.inputs.index("weight") if "weight" in op.inputs else 0
        self._paired = op.required > 1 and self._weight != 1
        """Whether the second input is as free as the first: targets."""
        self._known: dict[tuple, _Known] = {}
        """By all that a plan depends on: a repeated call costs one look-up."""
        self._latest: dict[int, _Known] = {}
        """The latest call with a weight (by its id; 0 for ops without one), to be checked before it is used."""
        self._apply = applying(function(self, _compute))
        self._caller = twin
        """torch's own function that is called in the place of this one."""
        self.in_place: Any = None
        """The op that writes over its first input, where there is one."""

    def __call__(self, *args: Any) -> Any:
        """The outputs, from the op's inputs and then its options, all positional."""
        if in_dynamo():  # first: the compiler must not look into what follows
            return self._compiled(args)
        hint = self._weight and id(args[self._weight])
        known = self._latest.get(hint)
        if known is not None and forward_ad._current_level < 0 and not _modes():
            check, count, options, policy, grad = known[:5]
            if (
                getattr(args[0], "is_nested", True) is False
                and check(*args[:count])
                and policy is _policy()
                and grad is _grad_enabled()
            ):
                now, values = self._split(args) if self._dynamic else (args[self.n :], _NO_VALUES)
                if now == options and (count == self.n or args[count : self.n].count(None) == self.n - count):
                    return self._run(known, values, _autocast.applied(known.cast, args) if known.cast else args)
        return self._slowly(args, hint)

    def _run(self, known: _Known, values: dict[str, Any], args: tuple) -> Any:
        if known.direct is not None:
            return known.direct(*args)
        ins = args[: self.n]
        if known.apply is not None:
            return known.apply((known, values, args[self.n :], known.saved), *ins)
        outputs = (known.kind(values) if values else known.plain).play(*ins)
        if outputs is NotImplemented:
            outputs, _ = known.plan.run_forward(*ins, **values)
        for i in known.updated:
            _written(args[i])
        return outputs[0] if known.outputs == 1 else outputs

    def _compiled(self, args: Sequence[Any]) -> Any:
        left = (self.pointwise and _inductor.fuses(args[0])) or _sharded.is_sharded(args[: self.n])
        return self._traced(args) if self._serves(args[: self.n]) and not left else self._caller(*args)

    def _split(self, args: tuple) -> tuple[tuple, dict[str, Any]]:
        """(options that a plan depends on, dynamic options). Where the op's guard refuses the dynamic ones, those that no
        known call has: planning a first one tells why."""
        values = {k: args[i] for i, k in self._dynamic}
        if self.op.guard is not None:
            try:
                self.op.guard(*args[: self.n], **values)
            except (RuleError, TypeError):
                return _REFUSED, values
        return self._fixed(args), values

    def _slowly(self, args: tuple, hint: int) -> Any:
        """A call that is not like the latest one."""
        if _is_compiling():
            return self._compiled(args)
        if _transforming() or _modes() or _scripting() or forward_ad._current_level >= 0 or _overridden(args[: self.n]):
            return self._elsewhere(args)
        cast, given = self.cast is not None and _any_autocast(), args
        if cast:
            args = _autocast.cast(self.cast, args, self._casts)
        grad = _grad_enabled()
        options, values = self._split(args) if self._dynamic else (args[self.n :], _NO_VALUES)
        try:
            key = (
                options,
                *map(type, options),  # 1 == 1.0 == True, and torch takes not each for each
                _policy(),
                *[
                    t
                    if t is None
                    else (
                        type(t),
                        t.shape,
                        t.is_contiguous() or t.stride(),
                        t.dtype,
                        t.layout,
                        t.is_neg() or t._is_zerotensor(),
                        -1 if t.is_cpu else t.device,  # comparing devices costs more than the rest
                        grad and t.requires_grad,
                    )
                    for t in args[: self.n]
                ],
            )
            known = self._known.pop(key, None)
        except (AttributeError, TypeError, RuntimeError):  # no tensor, an option that is a list, a sparse tensor
            return self._first(args, grad, None, values)
        if known is None:
            return self._first(args, grad, key, values)
        _remember(self._known, key, known, _MOST_KNOWN)
        if not cast:
            _remember(self._latest, hint, known, _MOST_LATEST)
        elif hint:  # a layer's own: its calls are mostly alike
            _remember(self._latest, hint, self._cast_before(known, given, args), _MOST_LATEST)
        return self._run(known, values, args)

    def _cast_before(self, known: _Known, given: tuple, args: tuple) -> _Known:
        """``known`` for calls with ``given``, which autocast makes ``args`` of."""
        leading = given[: known.leading]
        check, as_before = checker(leading, self._paired), _autocast.state(leading[0])
        casts = tuple([(i, t.dtype) for i, t in enumerate(args[: known.leading]) if t is not given[i]])
        return known._replace(check=lambda *now: as_before() and check(*now), cast=casts)

    def _first(self, args: tuple, grad: bool, key: tuple | None, values: dict[str, Any]) -> Any:
        """The outputs of a call that is not known yet; makes it known if it is an ordinary one."""
        ins = args[: self.n]
        if ins[0] is None or not all(map(is_plain, ins)) or not (ins[0].is_cpu or ins[0].is_cuda):
            return self._elsewhere(args)
        if not all(map(is_a, self._kinds, args[self.n :])):
            return self._by_torch(args, "an option is not of its type")
        wanted = [grad and t is not None and t.requires_grad for t in ins]
        needs = tuple(n for i, n in self._differentiable if wanted[i])
        try:
            plan, _ = dispatch.plan_for(self.op, ins, needs, dict(zip(self.options, args[self.n :])))
        except (RuleError, dispatch.Refused, RuntimeError, TypeError) as why:
            return self._by_torch(args, why)
        if any(wanted[i] for i in self._constant):
            return self._by_torch(args, "an input that has no gradient requires one")  # torch raises
        known = self._make_known(plan, args, grad=grad, never=key is None, recorded=bool(needs))
        if key is not None:
            _remember(self._known, key, known, _MOST_KNOWN)
        return self._run(known, values, args)

    def _make_known(self, plan: dispatch.Plan, args: tuple, *, grad: bool, never: bool, recorded: bool) -> _Known:
        ins = args[: self.n]
        count = max(i for i, t in enumerate(ins, 1) if t is not None)
        check = never_known if never else checker(ins[:count], self._paired)
        options, updated = self._split(args)[0], tuple(self.library.updates(args))
        apply = self._apply if recorded else None
        plan = in_layout(plan)
        kind = getattr(plan.run_forward, "kind", _no_tape)
        saved = tuple(plan.rule.saved) if plan.needs else ()
        how = (check, count, options, dispatch._policy.get(), grad, plan, apply, updated)
        direct = self.direct and plan.backend == "aten" and all(t is None or t.is_contiguous() for t in ins)
        known = _Known(*how, kind, kind(_NO_VALUES), len(plan.rule.outputs), saved, {})
        return known._replace(direct=self.twin) if direct else known

    def _serves(self, ins: Sequence[Any]) -> bool:
        """Whether a compiler should see the op: by dtypes, and by what requires a gradient."""
        wrong = self._constant and _grad_enabled() and _requires_grad([ins[i] for i in self._constant])
        return ins[0].dtype in _FLOATS and not _transforming() and not wrong

    def _traced(self, args: Sequence[Any]) -> Any:
        args = _autocast.cast(self.cast, args, self._casts)
        return self.library(args, _grad_enabled() and _requires_grad(args[: self.n]))

    def _elsewhere(self, args: Sequence[Any]) -> Any:
        """All that is not plain dense tensors in plain eager mode."""
        ins = args[: self.n]
        if _overridden(ins):
            return torch.overrides.handle_torch_function(self, ins, *args)
        if not isinstance(ins[0], Tensor):
            return self._caller(*args)
        if _transforming() or forward_ad._current_level >= 0:
            return self._transformed(args)
        if _scripting():
            return self._by_torch(args, "torch.jit.trace records torch's own function")
        _flops.tell()
        try:
            if _sharded.is_sharded(ins):
                return _sharded.call(self, args)
            return self._traced(args) if self._serves(ins) else self._caller(*args)
        except NotImplementedError as why:  # no rule for DTensors, another tensor subclass, a device of its own
            return self._by_torch(args, why)

    def _transformed(self, args: Sequence[Any]) -> Any:
        return self._by_torch(args, "torch.func and forward-mode differentiation go through torch's own function")

    def _by_torch(self, args: Sequence[Any], why: Exception | str) -> Any:
        """torch's own function: it raises what torch.nn raises, or serves what the op does not."""
        policy = dispatch._policy.get()
        if isinstance(why, dispatch.Refused) and (policy.strict or "definition" not in policy.backends):
            raise why
        try:
            outputs = self._caller(*args)
        except Exception as error:
            if isinstance(why, RuleError):
                why.where = why.where or self.name
            error.add_note(f"gpulayers.torch: {why}")
            raise
        if policy.strict and isinstance(why, Exception):
            raise dispatch.Refused(f"{self.name}: strict mode forbids torch's own function ({why})") from None
        key = (self.name, str(why))
        if key not in fallbacks:
            fallbacks.add(key)
            dispatch.log.log(logging.INFO, "%s runs on torch's own function (%s)", *key)
        return outputs

    def _autocast(self, *args: Any) -> tuple:
        return _autocast.cast(self.cast, args, self._casts)

    def gradients(
        self, dys: Sequence[Any], saved: dict[str, Any], plan: dispatch.Plan, options: Sequence[Any], needs: tuple
    ) -> list:
        """The gradients as torch's own operations on ``dys`` and ``saved``: they can be differentiated again."""
        if self.again is not None:
            return list(self.again(dys, saved, plan.inputs, plan.options | dict(zip(self.options, options))))
        if self.op.adds:  # the sum and 0 give what both summands gave
            saved = saved | {self.op.summands[0]: saved[self.op.adds]}
        with torch.enable_grad():
            # An input that is not saved has no influence on the gradients; views keep equal tensors apart.
            like = next(t for t in (*dys, *saved.values()) if t is not None)
            named = [*zip(self.op.inputs, plan.inputs)]
            ins = [None if s is None else _input(saved.get(n), s, like, n in needs) for n, s in named]
            found = self.twin(*ins, *options)
            pairs = [(y, dy) for y, dy in zip([found] if isinstance(found, Tensor) else found, dys) if dy is not None]
            wanted: list = [t for t, n in zip(ins, self.op.inputs) if n in needs]
            grads = torch.autograd.grad([y for y, _ in pairs], wanted, [dy for _, dy in pairs], create_graph=True)
        left = iter(grads)
        return [next(left) if n in needs else None for n in self.op.inputs]

    def __repr__(self) -> str:
        return f"<gpulayers.torch op {self.name}>"

    def __reduce__(self) -> str:
        return self.__qualname__


def _remember(cache: dict, key: Any, value: Any, most: int) -> None:
    """Put an entry last in a cache; where that is full, the one that was put there before all others goes."""
    if key not in cache and len(cache) >= most:
        with contextlib.suppress(RuntimeError, StopIteration):  # another thread changes it
            cache.pop(next(iter(cache)), None)
    cache[key] = value


fallbacks: set[tuple[str, str]] = set()
"""(op, reason) of the calls that torch's own function computed."""


def _input(x: Tensor | None, spec: Any, like: Tensor, needed: bool) -> Tensor:
    if x is None:
        from gpulayers.arrays import to_torch_dtype

        return torch.zeros(spec.shape, dtype=to_torch_dtype(spec.dtype), device=like.device, requires_grad=needed)
    if needed and not x.requires_grad:
        return x.detach().requires_grad_()
    return x.view_as(x)


def applying(of: Any) -> Callable:
    """The C++ function: the Python one above it looks for functorch levels once more."""
    return super(torch.autograd.Function, of).apply  # type: ignore[misc]


def function(of: TorchOp, compute: Callable, extra: int = 0, over_first: bool = False) -> type[torch.autograd.Function]:
    """The op's ``autograd.Function`` of ((known, dynamic options, all options, names of what is saved), *inputs): each
    argument costs. In the old form: ``setup_context`` costs 14 µs a call.

    compute: (ctx, known, dynamic options, inputs) → outputs, saved, for what no tape serves. extra: inputs after the op's
    own, without gradients; such calls have no tape. over_first: the first input is written over.
    """
    none, tail = (None,) * (of.n + 1 + extra), (None,) * extra

    def forward(ctx: Any, call: tuple, *ins: Any) -> Any:
        known, values, options, _ = call
        outputs = NotImplemented if extra else (known.kind(values) if values else known.plain).play(*ins)
        # What save_for_backward, set_materialize_grads and mark_dirty do, without their calls.
        if outputs is NotImplemented:
            outputs, saved = compute(ctx, known, values, ins)
            ctx.call, ctx.to_save = (known, values, options, tuple(saved)), tuple(saved.values())
        else:
            if over_first:
                ctx.dirty_tensors = ins[:1]
            else:
                for i in known.updated:
                    _written(ins[i])
            ctx.call, ctx.to_save = call, outputs[known.outputs :]
        ctx.materialize_grads = False
        if known.outputs == 1:
            return outputs[0]
        outputs = outputs[: known.outputs]
        ctx.mark_non_differentiable(*[y for y in outputs if not y.is_floating_point()])
        return outputs

    def backward(ctx: Any, *dys: Any) -> tuple:
        known, values, options, names = ctx.call
        wanted, kept = ctx.needs_input_grad, ctx.saved_tensors
        key = (wanted, len(dys), *values.values()) if values or len(dys) > known.outputs else wanted
        taped = known.backwards.get(key, ())
        if (
            taped
            and dys[0] is not None
            and not _grad_enabled()
            and not _transforming()
            and forward_ad._current_level < 0
        ):
            given = *dys, *kept
            for check, kind in taped:
                if check(*given):  # so they are plain tensors
                    grads = kind.play(*given)
                    if grads is not NotImplemented:
                        return (None, *grads, *tail)
        if dys[0] is None and all(dy is None for dy in dys):
            return none
        needs = tuple([name for i, name in of._differentiable if wanted[i + 1]])
        dys = tuple(map(in_memory, dys))
        saved = dict(zip(names, kept))
        if _grad_enabled() or is_transformed(dys):  # create_graph=True, or dys that are no plain tensors
            return (None, *of.gradients(dys, saved, known.plan, options, needs), *tail)
        grads = known.plan.run_backward(dys, saved, needs=needs, **values)
        if isinstance(known.plan.run_backward, launch.Backward):
            known.backwards[key] = known.plan.run_backward.alike(len(dys), needs, names, values)
        return (None, *grads, *tail)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(of.name, (torch.autograd.Function,), members)


def _compute(ctx: Any, known: _Known, values: dict[str, Any], ins: tuple) -> tuple[tuple, dict]:
    outputs, saved = known.plan.run_forward(*ins, **values)
    for i in known.updated:
        _written(ins[i])
    if any([y._is_view() for y in outputs]):  # torch lets nobody write into what a Function gives as a view
        owned = {id(y): y.new_empty(0).set_(y) if y._is_view() else y for y in outputs}
        outputs, saved = tuple(owned.values()), {k: owned.get(id(t), t) for k, t in saved.items()}
    return outputs, saved
