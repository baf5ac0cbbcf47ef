"""``torch.compile`` sees what an op's launchers do, not the op: Inductor's code launches the Triton kernels itself.

As with ``torch.library.triton_op``: where AOTAutograd makes its functional graph, a call that Triton serves is replaced by
its launcher's own steps, traced over tensors without memory; on the CPU, one that torch's kernels serve by their calls.
Inductor then plans their memory with all else, fuses around them, and captures them. What can't be written down so stays
one custom op, whose body launches as ever: ``OPAQUE``.

torch.export keeps every op whole, as it does triton_op's.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from gpulayers import arrays, dispatch, kernels
from gpulayers.arrays import Spec
from gpulayers.definition import Definition

_is_torch_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
OPAQUE = {
    "backend": "neither Triton nor ATen computes it",
    "values": "what computes it on the CPU looks at values",
    "loop": "it is a launch a step, and there may be many",
    "tuple": "a kernel takes a tuple",
    "table": "a kernel finds arrays through a table of addresses",
    "descriptor": "a kernel takes tensor descriptors, which this torch does not write down",
    "writes": "torch does not see what a kernel writes",
}
"""Why a call stays one op."""


class Opaque(Exception):
    """A call that stays one op; the text says why."""

    def __init__(self, reason: str):
        super().__init__(OPAQUE[reason])


def open_up(name: str, library: Any, function: Callable) -> None:
    """Let compilers see into the op ``name`` of a torch.library: ``function`` computes it by traced launches."""
    mode = _functional_mode()
    if mode is None:
        return

    def traced(mode: Any, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if _is_seen() and not _is_exporting():
            try:
                with mode:
                    return function(*args, **(kwargs or {}))
            except Opaque:
                pass
        return mode.__torch_dispatch__(op, types, args, kwargs or {})

    torch.library.register_torch_dispatch(name, mode, traced, lib=library)
    torch._library.triton.triton_ops_to_kernels[name] = [_STATE]


class _State:
    """Stands for the op's kernels where torch asks for their source: what is compiled is kept on disk by it, and must not be
    found again where launches are made otherwise."""

    __name__ = "gpulayers"

    def fn(self) -> None:
        """The look for what a kernel calls ends here."""

    @property
    def src(self) -> str:
        if not dispatch.installed("triton"):
            return "\n".join(map(repr, (_sources(), dispatch._policy.get())))
        from gpulayers.kernels.triton import _configs, _tile

        tables = _files(os.environ.get("GPULAYERS_CONFIGS", ""))
        return "\n".join(map(repr, (_sources(), tables, _configs._replaced, _tile.pretend, dispatch._policy.get())))


_STATE = _State()


@functools.cache
def _sources() -> str:
    """A digest of all that decides about launches."""
    return _files(str(Path(__file__).parents[1]), str(Path(kernels.__file__).parent))


def _files(*folders: str) -> str:
    found = hashlib.sha256()
    for folder in filter(None, folders):
        for path in sorted(p for p in Path(folder).rglob("*") if p.suffix in (".py", ".json")):
            found.update(path.read_bytes())
    return found.hexdigest()


def _functional_mode() -> Any:
    """The mode of AOTAutograd's functional graphs; None where this torch has no way to trace launches in it."""
    try:
        from torch import _functionalize_mutation_counter, _sync  # noqa: F401
        from torch._library.triton import triton_ops_to_kernels  # noqa: F401
        from torch._subclasses.functional_tensor import FunctionalTensorMode
        from torch.library import register_torch_dispatch, wrap_triton  # noqa: F401
    except ImportError:
        return None
    return FunctionalTensorMode


@functools.cache
def _is_seen() -> bool:
    """Whether this torch has all else that is needed: looked at late, since it loads Triton."""
    try:
        from torch._higher_order_ops.triton_kernel_wrap import TraceableTritonKernelWrapper  # noqa: F401
        from torch.export._trace import custom_triton_ops_decomposition_disabled  # noqa: F401
    except ImportError:
        return False
    return True


def _is_exporting() -> bool:
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    return custom_triton_ops_decomposition_disabled()


def spec_of(x: Any) -> Spec | None:
    """The Spec of a tensor, of a fake one too: sizes may be symbolic."""
    if x is None:
        return None
    shape, dtype = tuple(x.shape), arrays.from_torch_dtype(x.dtype)
    if x.is_contiguous():
        return Spec(shape, dtype)
    return Spec(shape, dtype, *arrays.layout(shape, tuple(x.stride())))


def fuses(x: Any) -> bool:
    """Whether a layer that works element by element is left to Inductor: alone its code is as fast as a kernel of ours (both
    copy at the GPU's bandwidth), and beside an addition, a cast or a layer like it, it saves a pass over memory."""
    return x.is_cuda and not _is_torch_exporting()


# --- a call -----------------------------------------------------------------------------------------------------------


def forward(op: Definition, ins: Sequence[Any], needs: tuple[str, ...], options: dict[str, Any]) -> tuple[tuple, dict]:
    """(outputs, what backward needs by name) of a call, traced. Raises Opaque."""
    plan, values = plan_for(op, ins, needs, options)
    return plan.run_forward(*ins, **values)


def plan_for(
    op: Definition, ins: Sequence[Any], needs: tuple[str, ...], options: dict[str, Any], like: Any = None
) -> tuple[dispatch.Plan, dict[str, Any]]:
    """As ``dispatch.plan_for``, where sizes may be symbols: a plan whose functions trace what Triton's launchers
    or torch's own kernels do.

    Raises Opaque where another backend computes the call, or its kernel looks at values.
    """
    like = ins[0] if like is None else like
    if op.guard is not None:
        op.guard(*ins, **options)
    fixed = {k: v for k, v in options.items() if k not in op.dynamic}
    specs = [x if x is None or isinstance(x, Spec) else spec_of(x) for x in ins]
    plan = dispatch._make_plan(op, specs, needs, fixed, like, quiet=True)
    if plan.backend not in ("triton", "aten"):
        raise Opaque("backend")
    module = dispatch.kernels(plan.backend, op)
    if op.name in getattr(module, "LOOKS", ()):
        raise Opaque("values")
    if op.name in getattr(module, "LOOPS", ()):
        raise Opaque("loop")
    launches = plan.backend == "triton"
    given: dict[str, Any] = plan.options | ({"empty": _allocator(like)} if launches else {})
    run_forward: Callable = functools.partial(plan.forward, needs=plan.needs, **given)
    run_backward: Callable = functools.partial(plan.backward or _nothing, inputs=plan.inputs, **given)
    if launches:
        updated = [x for n, x in zip(op.inputs, ins) if n in op.updates]
        run_forward, run_backward = _traced(run_forward, updated), _traced(run_backward, ())
    values = {k: v for k, v in options.items() if k in op.dynamic}
    return plan._replace(run_forward=run_forward, run_backward=run_backward), values


def _nothing(*args: Any, **options: Any) -> Any:
    raise Opaque("backend")


def _allocator(like: Tensor) -> Callable:
    def empty(shape: Sequence[Any], dtype: Any, order: tuple[int, ...] | None = None) -> Tensor:
        if not len(shape):  # Inductor would fill a number with zero
            return empty((1,), dtype).view(())
        axes = range(len(shape)) if order is None else order
        kind = arrays.to_torch_dtype(arrays.dtype(dtype))
        # Of all that allocates, aten.empty alone is never taken for another call of it.
        fresh = torch.empty([shape[a] for a in axes], dtype=kind, device=like.device)
        return fresh if order is None else fresh.permute([order.index(a) for a in range(len(shape))])

    return empty


def _traced(launcher: Callable, updated: Sequence[Any]) -> Callable:
    """``launcher``, whose launches are written down. It may write to what it allocates, and to ``updated``."""

    def run(*args: Any, **options: Any) -> Any:
        given: list[Tensor] = []

        def lent(x: Any) -> Any:
            if not isinstance(x, Tensor) or any(x is y for y in updated):
                return x
            given.append(apart(x))
            return given[-1]

        with _compiling():
            found = launcher(*pytree.tree_map(lent, args), **options)
        if _writes(given):
            raise Opaque("writes")
        return found

    return run


def apart(x: Tensor) -> Tensor:
    """What stands for a copy of ``x``: writes to it are not writes to ``x``, as nothing is written in a functional graph."""
    from torch._subclasses.functional_tensor import FunctionalTensor

    if not isinstance(x, FunctionalTensor):
        return x.clone()
    torch._sync(x)
    return FunctionalTensor.to_functional(FunctionalTensor.from_functional(x))


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    from gpulayers.kernels.triton._tracing import thread

    before, thread.compiler = thread.compiler, _Compiler()
    try:
        yield
    finally:
        thread.compiler = before


class _Described(NamedTuple):
    """Stands for a tensor descriptor."""

    tensor: Tensor
    block: list[int]


class _Compiler:
    """See ``kernels/triton/_tracing.py``."""

    def launch(self, kernel: Any, grid: tuple, args: Sequence[Any], options: dict[str, Any]) -> None:
        given = dict(zip(kernel.arg_names, args)) | options
        given.pop("maxnreg", None)  # not Inductor's to ask for
        given = {
            k: float(v) if isinstance(v, torch.SymFloat) else v for k, v in given.items()
        }  # no kernel takes a symbol of one
        described = {k: v.block for k, v in given.items() if isinstance(v, _Described)}
        if any(isinstance(v, tuple | list) for k, v in given.items() if k not in described):
            self.refuse("tuple")
        constants = {p.name for p in kernel.params if p.is_constexpr}
        singles = tuple(k for k, v in given.items() if isinstance(v, float) and k not in constants)
        given |= {k: given[k].tensor for k in described}
        before = _writes(given.values())
        _wrapper(described)(_in_single(kernel, singles) if singles else kernel, grid, given)
        if _writes(given.values()) == before:
            self.refuse("writes")

    def describe(self, x: Any, block: Sequence[int]) -> Any:
        return _Described(x, list(block))

    def refuse(self, reason: str) -> None:
        raise Opaque(reason)

    def hint(self, n: Any) -> Any:
        return n if isinstance(n, int | bool) else n.node.hint


def _writes(xs: Iterable[Any]) -> int:
    """How often tensors of a functional graph have been written to."""
    return sum(torch._functionalize_mutation_counter(x.elem) for x in xs if isinstance(x, Tensor))


def _wrapper(described: dict[str, list[int]]) -> Callable[[Any, tuple, dict], None]:
    """(kernel, grid, arguments) → the launch in the graph, as by ``wrap_triton``; which takes no descriptors.

    described: the blocks of arguments that are to be tensor descriptors.
    """
    from torch._higher_order_ops import triton_kernel_wrap as wrap

    if not described:
        return lambda kernel, grid, given: torch.library.wrap_triton(kernel)[grid](**given)
    if not hasattr(wrap, "create_tma_stable_metadata") or not hasattr(wrap, "TracingTritonHOPifier"):
        raise Opaque("descriptor")
    blocks = {k: wrap.create_tma_stable_metadata(block) for k, block in described.items()}

    class Writer(wrap.TracingTritonHOPifier):
        def call_HOP(self, variable: Any, grids: Any, combined_args: Any, tx: Any) -> None:
            graphable, constants = self.store_non_graphable_args(combined_args)
            wrap.triton_kernel_wrapper_mutation(
                kernel_idx=variable.kernel_idx,
                constant_args_idx=constants,
                grid=grids,
                tma_descriptor_metadata=blocks,
                kwargs=graphable,
            )

    def write(kernel: Any, grid: tuple, given: dict[str, Any]) -> None:
        Writer().call_triton_kernel(wrap.TraceableTritonKernelWrapper(kernel, None, grid), (), given, None)

    return write


@functools.cache
def _in_single(kernel: Any, names: tuple[str, ...]) -> Any:
    """A copy of ``kernel`` that casts these numbers to float32 first: Inductor hands them over in float64."""
    from triton.runtime.jit import JITFunction

    lines = kernel.src.splitlines()
    body = ast.parse(kernel.src).body[0].body  # type: ignore[attr-defined]
    first = body[0] if len(body) == 1 or not isinstance(body[0], ast.Expr) else body[1]
    margin = lines[first.lineno - 1][: first.col_offset]
    lines[first.lineno - 1 : first.lineno - 1] = [f"{margin}{n} = {n}.to(tl.float32)" for n in names]
    own = JITFunction(kernel.fn, do_not_specialize=kernel.do_not_specialize)
    own._unsafe_update_src("\n".join(lines) + "\n")
    return own
