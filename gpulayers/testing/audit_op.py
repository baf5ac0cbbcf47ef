"""``audit_op``: compiles the kernels that an op's launchers would launch, for GPUs that need not be there, and audits
their machine code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from gpulayers import arrays, dispatch
from gpulayers.arrays import FLOATS, Spec
from gpulayers.ops._op import Op
from gpulayers.testing.audit import Report, audit_cubin, audit_launches, budget_of
from gpulayers.testing.check_op import CheckError
from gpulayers.testing.compiling import Planned, planning

ARCHS = (80, 90, 100)
compiled_for: set[tuple[str, str, int]] = set()
"""(kernel, dtypes, architecture) of every kernel that passed its audit in this process."""


def audit_op(
    op: Op,
    *inputs: Spec | list[Spec] | None,
    needs: Sequence[str] | None = None,
    archs: Sequence[int] = ARCHS,
    backend: str = "triton",
    **options: Any,
) -> list[Report]:
    """Compile forward and backward of one call for each architecture; returns each kernel's report.

    inputs: the metadata of the call (nothing is filled, so sizes may be as large as you like). backend: "triton" or
    "cuda", whose kernels are compiled by NVRTC.

    Raises CheckError for spills, too much shared memory, 16-bit products without tensor cores, floating-point atomics,
    and of Triton's kernels for narrow accesses to aligned arrays, and for what is above the budget (``BUDGETS`` in
    their file).
    """
    if needs is None:
        given = zip(op.inputs, inputs)
        needs = [n for n, x in given if n in op.differentiable and all(s.dtype in FLOATS for s in arrays.lists([x]))]
        needs = [n for n in needs if inputs[op.inputs.index(n)] is not None]
    if backend == "cuda":
        return _audited_cuda(op, inputs, tuple(needs), archs, options)
    launches = [p for arch in archs for p in launched(op, inputs, tuple(needs), options, arch)]
    reports, faults = audit_launches(launches), []
    for launch, report in zip(launches, reports):
        wrong = judge(launch, report, aligned(inputs))
        faults += [f"{launch.kernel} for sm_{launch.arch} {launch.constexprs}: {w}" for w in wrong]
    if faults:
        raise CheckError("\n".join([f"{op.name} ({', '.join(map(str, inputs))}; {options}):", *faults]))
    return reports


def _audited_cuda(op: Op, inputs: Sequence, needs: tuple, archs: Sequence[int], options: dict) -> list[Report]:
    from gpulayers.testing.nvrtc import compile_source

    launches = _cuda_launches(op, inputs, needs, options)
    reports, faults = [], []
    for arch in archs:
        for (source, name), (threads, shared) in launches.items():
            found = audit_cubin(compile_source(source, arch), arch)[name].launched(threads, shared)
            faults += [f"{name} for sm_{arch}: {fault}" for fault in found.faults()]
            reports.append(found)
    if faults:
        raise CheckError("\n".join([f"{op.name} ({', '.join(map(str, inputs))}; {options}):", *faults]))
    return reports


def _cuda_launches(op: Op, inputs: Sequence, needs: tuple, options: dict) -> dict[tuple[str, str], tuple[int, int]]:
    """{(source, kernel): (threads, dynamic shared bytes of a block)} of one call's CUDA launchers, none of which runs."""
    from gpulayers.kernels.cuda import _launch

    found: dict[tuple[str, str], tuple[int, int]] = {}

    def note(source: str, name: str, grid: tuple, block: tuple, args: Any, shared: int, cooperative: bool) -> None:
        found[source, name] = math.prod(block), shared

    before, _launch.emulate = _launch.emulate, note
    try:
        with dispatch.policy(simulate=("cuda",)), dispatch.only("cuda"):
            xs = [x if x is None else arrays.empty_numpy(x) for x in inputs]
            outputs, call = dispatch.forward(op, xs, needs, options)
            if call is not None:
                call.backward(*(y if y.dtype in FLOATS else None for y in outputs))
    finally:
        _launch.emulate = before
    if not found:
        raise CheckError(f"{op.name}: its launchers launched no CUDA kernel")
    return found


def launched(
    op: Op, inputs: Sequence, needs: tuple, options: dict[str, Any], arch: int, joined: bool = False
) -> list[Planned]:
    """What forward and backward of one call would have compiled. CheckError if that is nothing.

    joined: backward is given a gradient to which it adds the one that the op ``joins`` to others.
    """
    with planning(arch) as session:
        _launch(op, inputs, needs, options, joined)
    if not session.planned:
        raise CheckError(f"{op.name}: its launchers launched no kernel for sm_{arch}")
    return session.planned


def aligned(inputs: Sequence[Spec | list[Spec] | None]) -> bool:
    """Whether the rows of the first array begin at multiples of 16 bytes, so that 128 bits can be moved at a time."""
    return all(s.shape[s.order[-1] if s.order else -1] * s.dtype.itemsize % 16 == 0 for s in arrays.lists(inputs[:1]))


def judge(launch: Planned, report: Report, is_aligned: bool) -> list[str]:
    """The faults of a launch's machine code, its budget considered. One without any counts as compiled."""
    budget = budget_of(launch)
    wrong = report.faults(is_aligned, budget, budget.rightly_narrow(launch.constants | {"odd": launch.odd}))
    if not wrong:
        compiled_for.add((launch.kernel, " ".join(launch.dtypes), launch.arch))
    return wrong


def _launch(op: Op, inputs: Sequence, needs: tuple, options: dict[str, Any], joined: bool) -> None:
    """Run the Triton launchers of one call on torch's meta device."""
    forward, backward = launchers(op, inputs, needs, options, joined)
    _, saved = forward()
    if needs:
        backward(saved)


def launchers(
    op: Op, inputs: Sequence, needs: tuple, options: dict[str, Any], joined: bool = False
) -> tuple[Callable[[], tuple], Callable[[dict], Any]]:
    """(forward() → outputs and what it saved, backward(saved)) of one call's Triton launchers, on torch's meta device."""
    module = dispatch.kernels("triton", op)
    padded = [*inputs, *[None] * (len(op.inputs) - len(inputs))]
    fixed = {k: v for k, v in (op.options | options).items() if k not in op.dynamic}
    rule = op.rule(*padded, needs=needs, **fixed)
    given = (fixed if rule.options is None else rule.options) | {k: v for k, v in options.items() if k in op.dynamic}
    if (refuses := getattr(module, f"{op.name}_refuses", None)) and (reason := refuses(*padded, needs=needs, **fixed)):
        raise CheckError(f"{op.name}: its Triton launcher refuses the call: {reason}")

    def forward() -> tuple:
        return getattr(module, f"{op.name}_forward")(*map(_meta, padded), needs=needs, empty=_meta_empty, **given)

    def backward(saved: dict) -> Any:
        outputs = [*rule.outputs.values()]
        if joined:
            outputs.append(padded[op.inputs.index(op.joins)])
        dys = tuple(_meta(o) if o.dtype in FLOATS else None for o in outputs)
        run = getattr(module, f"{op.name}_backward")
        return run(dys, saved, inputs=tuple(padded), needs=needs, empty=_meta_empty, **given)

    return forward, backward


def _meta(x: Any) -> Any:
    """A meta tensor with a spec's shape, dtype and strides."""
    if x is None:
        return None
    if isinstance(x, list):
        return [_meta(s) for s in x]
    return _meta_empty(x.shape, x.dtype, x.order)


def _meta_empty(shape: Sequence[int], dtype: Any, order: tuple[int, ...] | None = None) -> Any:
    return arrays.TORCH.empty(Spec(tuple(shape), arrays.dtype(dtype), order), "meta")
