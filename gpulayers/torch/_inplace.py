"""Ops that write their output over their first input, as torch's functions with ``inplace=True`` do.

The kernel writes there itself: it is handed the input's own memory where it would allocate its output. Autograd hears of
it (``mark_dirty``: the version counter, views and their bases), and refuses what it refuses of torch's own function,
which is then called for its error before anything is written. Where the gradient needs the input as it was, a copy is
made first, in the input's memory layout.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpulayers import launch
from gpulayers.arrays import Spec, float32, int64
from gpulayers.dispatch import Plan
from gpulayers.torch._op import TorchOp, applying, function, in_dynamo

_OVERLAPS = 1
"""torch's word for a tensor that has one place in memory for several elements: an expanded one."""
_creation = torch._C._autograd._get_creation_meta
_ORDINARY = torch._C._autograd.CreationMeta.DEFAULT


class InPlace(TorchOp):
    """``of`` with its first input written over. Its twin must have an argument ``inplace``.

    at_output: (first option, …) → whether the gradient from y in the place of x is the same, and torch keeps y too, so
        that both refuse a backward after y was changed; needed for an op that saves x.
    """

    def __init__(self, of: TorchOp, at_output: Callable[..., bool] | None = None):
        vars(self).update(vars(of), _known={}, _latest={})
        self._of, self._at_output = of, at_output
        seeds = [Spec((2,), int64)] * (self.n - 1)
        options = {k: v for k, v in self.op.options.items() if k not in self.op.dynamic}
        options |= dict.fromkeys(self.op.needed, 0.0)
        rule = self.op.rule(Spec((1,), float32), *seeds, needs=self.op.inputs[:1], **options)
        self._saves_input = self.op.inputs[0] in rule.saved
        self._caller = functools.partial(of.twin, inplace=True)
        self._apply = applying(function(self, _overwrite, over_first=True))
        self._apply_keeping = applying(function(self, _overwrite_after_copy, extra=1))

    def _run(self, known: Any, values: dict[str, Any], args: tuple) -> Any:
        x, apply = args[0], known.apply
        if x.is_inference():
            return self._on_inference(known, values, args)
        if apply is None:
            return super()._run(known, values, args)
        if x.is_leaf or (x._is_view() and not _may_be_written(x)):
            return self._by_torch(args, "autograd lets nobody write to this tensor")
        if apply is self._apply:
            return apply((known, values, args[self.n :], known.saved), *args[: self.n])
        return apply((known, values, args[self.n :], ()), x.clone(), *args[1 : self.n], x)

    def _on_inference(self, known: Any, values: dict[str, Any], args: tuple) -> Any:
        """Tensors made in inference mode count no versions, and are written to there alone."""
        if known.apply is not None or not torch.is_inference_mode_enabled():
            return self._by_torch(args, "a tensor that was made in inference mode")
        known.plan.run_forward(*args[: self.n], **values)
        return args[0]

    def _make_known(self, plan: Plan, args: tuple, **more: Any) -> Any:
        keep = self._saves_input and not (self._at_output is not None and self._at_output(*args[self.n :]))
        known = super()._make_known(over_input(plan), args, **more)
        apply = None if known.apply is None else self._apply_keeping if keep else self._apply
        return known._replace(apply=apply, updated=(0,))

    def _first(self, args: tuple, *rest: Any) -> Any:
        x = args[0]
        if type(x) is Tensor and x.layout is torch.strided and torch._debug_has_internal_overlap(x) == _OVERLAPS:
            return self._by_torch(args, "a tensor with several elements in one place")  # torch raises
        return super()._first(args, *rest)

    def _traced(self, args: Sequence[Any]) -> Any:
        x, *rest = args
        keep = self._saves_input and torch.is_grad_enabled() and x.requires_grad
        y = super()._traced((x.clone() if keep else x, *rest))
        # The backward of copy_ sends zeros, row-major ones, to what was there before; compilers drop them.
        return x.copy_(y) if in_dynamo() or torch.compiler.is_compiling() else _Written.apply(x, y)

    def _elsewhere(self, args: Sequence[Any]) -> Any:
        if isinstance(args[0], torch.fx.Proxy):
            return self._transformed(args)  # nodes call functions that have a name
        return super()._elsewhere(args)

    def _transformed(self, args: Sequence[Any]) -> Any:
        x, *rest = args
        return x.copy_(self._of(x.clone(), *rest))  # not all that torch has in place can be transformed

    def gradients(self, *args: Any) -> list:
        return self._of.gradients(*args)


def _may_be_written(view: Tensor) -> bool:
    """Whether autograd lets a view be written to: not one of several outputs, nor of a leaf, nor made in no_grad()."""
    base = view._base
    return _creation(view) is _ORDINARY and not (base is not None and base.is_leaf and base.requires_grad)


def _overwrite(ctx: Any, known: Any, values: dict[str, Any], ins: tuple) -> tuple[tuple, dict]:
    ctx.mark_dirty(ins[0])
    return known.plan.run_forward(*ins, **values)


def _overwrite_after_copy(ctx: Any, known: Any, values: dict[str, Any], ins: tuple) -> tuple[tuple, dict]:
    """ins: a copy of x, which the gradients go to, all other inputs, and x."""
    kept, *rest, x = ins
    ctx.mark_dirty(x)
    outputs, saved = known.plan.run_forward(x, *rest, **values)
    return outputs, {k: kept if a is x else a for k, a in saved.items()}


class _Written(torch.autograd.Function):
    """(x, y) → x with the values of y; the gradient goes to y as it comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.copy_(y)

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> Any:
        return None, dys[0]


def over_input(plan: Plan) -> Plan:
    """``plan`` with its one output written over the first input, which stands for it among what is returned and saved."""
    assert plan.bridge is not None
    op, launcher, lends = copy.copy(plan.op), plan.forward, bool(plan.bridge.extra) and plan.inputs[0].contiguous
    op.updates = op.inputs[:1]

    def forward(x: Any, *rest: Any, **options: Any) -> tuple[tuple, dict]:
        if lends:
            options["empty"] = _lending(x, options["empty"])
        (y,), saved = launcher(x, *rest, **options)
        if y is not x:  # no kernel, or one that cannot write into memory with gaps
            x[...] = y
        return (x,), saved

    bound = plan._replace(op=op, forward=forward).bound()
    run, places = bound.run_forward, {op.inputs[0], *plan.rule.outputs}

    def run_forward(x: Any, *rest: Any, **values: Any) -> tuple[tuple, dict]:
        _, saved = run(x, *rest, **values)
        return (x,), {k: x if k in places else a for k, a in saved.items()}

    if isinstance(bound.run_forward, launch.Forward):  # a tape returns x in all places
        run_forward.kind = bound.run_forward.kind  # type: ignore[attr-defined]
    return bound._replace(op=plan.op, run_forward=run_forward)


def _lending(x: Any, empty: Callable) -> Callable:
    """``empty`` that hands out the memory of ``x`` first. An element is read before it is written: by one program."""
    left = [x]

    def lent(shape: Sequence[int], dtype: Any, order: tuple[int, ...] | None = None) -> Any:
        return left.pop() if left and tuple(shape) == tuple(x.shape) else empty(shape, dtype, order)

    return lent
