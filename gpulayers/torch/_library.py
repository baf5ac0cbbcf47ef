"""An op as two ``torch.library`` custom ops, forward and backward: for whatever traces.

Forward returns the outputs, then what is saved besides inputs and outputs (empty tensors where nothing is), then fresh
copies of what the op updates. Shapes, dtypes and strides come from the op's rule, so symbolic sizes do too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpulayers import arrays, dispatch
from gpulayers.arrays import Spec
from gpulayers.definition import RuleError
from gpulayers.ops._op import Op
from gpulayers.torch import _inductor
from gpulayers.torch._inductor import spec_of
from gpulayers.torch._layout import in_layout

NAMESPACE = "gpulayers"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_DTYPES = (*arrays.FLOATS, arrays.int64, *map(arrays.np.dtype, ("int8", "int16", "int32", "uint8", "bool")))
_EMPTY = 0
"""Elements of a tensor that stands for nothing: custom ops return no None."""


def pack(specs: Sequence[Spec | None]) -> list:
    """Specs as one list of integers, which a schema can carry; sizes may be symbolic."""
    packed: list = []
    for s in specs:
        if s is None:
            packed.append(-1)
        else:
            order = (-1,) * s.ndim if s.order is None else s.order
            packed += [s.ndim, _DTYPES.index(s.dtype), int(s.contiguous), *order, *s.shape]
    return packed


def unpack(packed: Sequence[Any]) -> list[Spec | None]:
    specs: list[Spec | None] = []
    at = 0
    while at < len(packed):
        ndim = int(packed[at])
        if ndim < 0:
            specs.append(None)
            at += 1
            continue
        dtype, dense = _DTYPES[int(packed[at + 1])], bool(packed[at + 2])
        order, shape = packed[at + 3 : at + 3 + ndim], packed[at + 3 + ndim : at + 3 + 2 * ndim]
        unordered = not ndim or int(order[0]) < 0
        specs.append(Spec(tuple(shape), dtype, None if unordered else tuple(map(int, order)), dense))
        at += 3 + 2 * ndim
    return specs


def _fresh(spec: Spec, like: Tensor) -> Tensor:
    dtype = arrays.to_torch_dtype(spec.dtype)
    return like.new_empty_strided(spec.shape, spec.strides, dtype=dtype)


def _has_gradients(dtype: Any) -> bool:
    """Whether tensors of torch's or NumPy's dtype can have them: a mask of booleans cannot."""
    return dtype.is_floating_point if isinstance(dtype, torch.dtype) else dtype.kind not in "biu"


class LibraryOp:
    """``gpulayers::<op>`` and ``gpulayers::<op>_backward``."""

    def __init__(
        self,
        op: Op,
        schema: str,
        options: Sequence[str],
        outputs: Sequence[str],
        buffers: Sequence[str],
        autocast: Callable,
        updating: str | None = None,
    ):
        self.op, self._cast = op, autocast
        self.options, self.outputs, self.buffers = tuple(options), tuple(outputs), tuple(buffers)
        self.inputs, self.n = op.inputs, len(op.inputs)
        self._switch = None if updating is None else self.n + self.options.index(updating)
        self.updated = [i for i, n in enumerate(op.inputs) if n in op.updates]
        self.gradients = op.differentiable
        tail = f", {schema}" if schema else ""
        ins = ", ".join(f"Tensor{'' if i < op.required else '?'} {n}" for i, n in enumerate(op.inputs))
        count = len(self.outputs) + len(self.buffers) + len(self.updated)
        kept = [*op.inputs, *(f"out_{y}" for y in self.outputs), *self.buffers]
        back = ", ".join([f"Tensor? d_{y}" for y in self.outputs] + [f"Tensor? {k}" for k in kept])
        self.forward = self._define(op.name, f"({ins}{tail}, bool save) -> {_returns(count)}", self._forward)
        name = f"{NAMESPACE}::{op.name}"
        torch.library.register_fake(name, self._fake_forward, lib=LIBRARY)
        torch.library.register_autograd(name, self._differentiate, setup_context=self._keep, lib=LIBRARY)
        _inductor.open_up(name, LIBRARY, self._traced_forward)
        self.backward: Any = None
        if self.gradients:
            schema = f"({back}, SymInt[] specs{tail}, bool[] needs) -> {_returns(len(self.gradients))}"
            self._define_backward(f"{op.name}_backward", schema)
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(op.name, self._autocasting(f"Autocast{device}"), f"Autocast{device}", with_keyset=True)

    def _define_backward(self, own: str, schema: str) -> None:
        self.backward, name = self._define(own, schema, self._backward), f"{NAMESPACE}::{own}"
        torch.library.register_fake(name, self._fake_backward, lib=LIBRARY)
        torch.library.register_autograd(name, self._no_second, setup_context=lambda *a, **k: None, lib=LIBRARY)
        _inductor.open_up(name, LIBRARY, self._traced_backward)

    def _define(self, name: str, schema: str, function: Callable) -> Any:
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(name, function, device)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, args: Sequence[Any], save: bool) -> Any:
        """The outputs; what the op updates is updated."""
        found = self.forward(*args, save)
        if isinstance(found, Tensor):
            return found
        if self.updated:
            news = dict(zip(self.updated, found[len(found) - len(self.updated) :]))
            for i in self.updates(args):
                args[i].copy_(news[i])
        return _one(tuple(found[: len(self.outputs)]))

    def updates(self, args: Sequence[Any]) -> Sequence[int]:
        """Which inputs this call updates."""
        if not self.updated or (self._switch is not None and not args[self._switch]):
            return ()
        return [i for i in self.updated if args[i] is not None]

    # --- computing ---------------------------------------------------------------------------------------------------

    def _values(self, args: Sequence[Any]) -> dict[str, Any]:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in zip(self.options, args)}

    def _present(self, ins: Sequence[Any]) -> tuple[str, ...]:
        named = zip(self.inputs, ins)
        return tuple(n for n, x in named if x is not None and n in self.op.differentiable and _has_gradients(x.dtype))

    def _forward(self, *args: Any) -> Any:
        return self._computed(args, Tensor.clone, _by_dispatch)

    def _traced_forward(self, *args: Any) -> Any:
        return self._computed(args, _inductor.apart, _inductor.forward)

    def _computed(self, args: tuple, copied: Callable[[Tensor], Tensor], run: Callable) -> Any:
        *ins, save = args[: self.n] + args[-1:]
        updates = self.updates(args)
        for i in updates:
            ins[i] = copied(ins[i])
        outputs, saved = run(self.op, ins, self._present(ins) if save else (), self._values(args[self.n : -1]))
        news = [saved[b] if b in saved else ins[0].new_empty(_EMPTY) for b in self.buffers]
        copies = [ins[i] if i in updates else ins[0].new_empty(_EMPTY) for i in self.updated]
        missing = [ins[0].new_empty(_EMPTY)] * (len(self.outputs) - len(outputs))
        return _one((*outputs, *missing, *news, *copies))

    def _split(self, args: Sequence[Any]) -> tuple:
        """(dys, one that is there, what may be saved, specs of the inputs, options, which gradients) of a backward."""
        outs, kept = len(self.outputs), self.n + len(self.outputs) + len(self.buffers)
        dys, tensors, packed, *options, flags = args[:outs], args[outs : outs + kept], *args[outs + kept :]
        return dys, next(dy for dy in dys if dy is not None), tensors, unpack(packed), options, flags

    def gradients_of(self, args: Sequence[Any]) -> tuple[list[str], list[Spec | None], Tensor]:
        """(the gradients that a backward computes, specs of the inputs, a dy) from its arguments."""
        _, dy, _, specs, _, flags = self._split(args)
        return [k for k, wanted in zip(self.op.differentiable, flags) if wanted], specs, dy

    def _backward(self, *args: Any) -> Any:
        return self._differentiated(args, dispatch.plan_for)

    def _traced_backward(self, *args: Any) -> Any:
        return self._differentiated(args, _inductor.plan_for)

    def _differentiated(self, args: tuple, plan_for: Callable) -> Any:
        dys, like, tensors, specs, options, flags = self._split(args)
        names = [*self.inputs, *self.outputs, *self.buffers]
        saved = {k: t for k, t in zip(names, tensors) if t is not None}
        ins = [s if t is None else t for s, t in zip(specs, tensors)]
        needs = tuple(k for k, wanted in zip(self.op.differentiable, flags) if wanted)
        plan, values = plan_for(self.op, ins, self._present(specs), self._values(options), like=like)
        plan = in_layout(plan)
        grads = dict(zip(self.inputs, plan.run_backward(dys[: len(plan.rule.outputs)], saved, needs=needs, **values)))
        return _one(tuple(like.new_empty(_EMPTY) if k is None else grads[k] for k in self._whose(needs, specs)))

    def _whose(self, needs: Sequence[str], specs: Sequence[Spec | None]) -> list[str | None]:
        """The input whose gradient each of the backward's results is; no two results are one array."""
        again = self.op.again(needs, specs)
        return [k if k in needs and k != again else None for k in self.gradients]

    # --- what comes out, without computing ---------------------------------------------------------------------------

    def _rule(self, specs: Sequence[Spec | None], needs: tuple, options: Sequence[Any]) -> Any:
        given = self.op.options | self._values(options)
        try:
            return self.op.rule(*specs, needs=needs, **{k: v for k, v in given.items() if k not in self.op.dynamic})
        except RuleError as error:
            error.where = self.op.name
            raise

    def _fake_forward(self, *args: Any) -> Any:
        *ins, save = args[: self.n] + args[-1:]
        rule = self._rule([*map(spec_of, ins)], self._present(ins) if save else (), args[self.n : -1])
        outputs = [
            _fresh(rule.outputs[y], ins[0]) if y in rule.outputs else ins[0].new_empty(_EMPTY) for y in self.outputs
        ]
        news = [_fresh(rule.saved[b], ins[0]) if b in rule.saved else ins[0].new_empty(_EMPTY) for b in self.buffers]
        updates = self.updates(args)
        copies = [torch.empty_like(ins[i]) if i in updates else ins[0].new_empty(_EMPTY) for i in self.updated]
        return _one((*outputs, *news, *copies))

    def _fake_backward(self, *args: Any) -> Any:
        _, like, _, specs, _, flags = self._split(args)
        by_name = dict(zip(self.inputs, specs))

        def grad(name: str | None) -> Tensor:
            spec = None if name is None else by_name[name]
            return like.new_empty(_EMPTY) if spec is None else _fresh(spec.like(), like)

        needs = [k for k, wanted in zip(self.op.differentiable, flags) if wanted]
        return _one(tuple(map(grad, self._whose(needs, specs))))

    # --- gradients ---------------------------------------------------------------------------------------------------

    def _keep(self, ctx: Any, inputs: tuple, output: Any) -> None:
        *ins, save = inputs[: self.n] + inputs[-1:]
        if not save:
            raise RuntimeError(f"{NAMESPACE}::{self.op.name}: called with save=False, it cannot be differentiated")
        found = (output,) if isinstance(output, Tensor) else tuple(output)
        outputs, news = found[: len(self.outputs)], found[len(self.outputs) : len(self.outputs) + len(self.buffers)]
        ctx.options, ctx.specs = inputs[self.n : -1], [*map(spec_of, ins)]
        needs = tuple(n for n, x, m in zip(self.inputs, ins, ctx.needs_input_grad) if x is not None and m)
        rule = self._rule(ctx.specs, tuple(n for n in needs if n in self.op.differentiable), ctx.options)
        own = dict(zip([*self.inputs, *self.outputs, *self.buffers], [*ins, *outputs, *news]))
        ctx.save_for_backward(*[t if k in rule.saved else None for k, t in own.items()])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[t for t in outputs if not t.is_floating_point()], *found[len(outputs) :])

    def _differentiate(self, ctx: Any, *dys: Any) -> tuple:
        none = (None,) * (len(self.options) + 1)
        dys = dys[: len(self.outputs)]
        if all(dy is None for dy in dys):
            return (None,) * self.n + none
        wanted = dict(zip(self.inputs, ctx.needs_input_grad))
        flags = [wanted[k] for k in self.op.differentiable]
        found = self.backward(*dys, *ctx.saved_tensors, pack(ctx.specs), *ctx.options, flags)
        grads = dict(zip(self.gradients, (found,) if isinstance(found, Tensor) else found))
        needs = [k for k in self.op.differentiable if wanted[k]]
        grads |= {n: grads[self.op.summands[0]] for n in [self.op.again(needs, ctx.specs)] if n}
        return tuple(grads[n] if n in grads and wanted[n] else None for n in self.inputs) + none

    def _no_second(self, ctx: Any, *dys: Any) -> Any:
        raise NotImplementedError(
            f"{NAMESPACE}::{self.op.name}: no gradient of its gradient where it is traced; call it in eager mode"
        )

    def _autocasting(self, key: str) -> Callable:
        off = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(_: Any, *args: Any) -> Any:
            cast = self._cast(*args)
            with torch._C._ExcludeDispatchKeyGuard(off):
                return self.forward(*cast)

        return kernel


def _by_dispatch(op: Op, ins: Sequence[Any], needs: tuple[str, ...], options: dict[str, Any]) -> tuple[tuple, dict]:
    outputs, call = dispatch.forward(op, ins, needs, options)
    return outputs, {} if call is None else call.saved


def _returns(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _one(found: tuple) -> Any:
    return found[0] if len(found) == 1 else found
