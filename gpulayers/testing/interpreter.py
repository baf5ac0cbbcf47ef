"""Runs Triton kernels on the CPU, checked: `with interpreting(): kernel[grid](cpu_tensor, …)`.

A launch whose pointer arguments are CPU torch tensors or NumPy arrays (bfloat16 through ml_dtypes) runs here, program
by program, on NumPy; every other launch goes on as usual. No environment variable, and nothing stays patched.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gpulayers.kernels.triton._tile import Device

GRID_LIMITS = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Launch:
    """One interpreted launch: the kernel's name, the dtype of each tensor argument, constexprs and grid."""

    kernel: str
    dtypes: tuple[str, ...]
    constexprs: dict[str, Any]
    grid: tuple[int, int, int]


@dataclass
class Session:
    """One `interpreting()` block: what it checks, and what it ran."""

    races: bool = True
    poison: bool = True
    launches: list[Launch] = field(default_factory=list)


proven: set[tuple[str, tuple[str, ...]]] = set()
"""(kernel, dtypes of its tensors) of every launch that ran to its end in this process."""
_sessions: list[Session] = []


@contextlib.contextmanager
def interpreting(device: Device | None = None, *, races: bool = True, poison: bool = True) -> Iterator[Session]:
    """Within, Triton launches on CPU arrays are interpreted, with every memory access checked (`memory.py`).

    device: the GPU that launchers are told they run on; by default an sm_90 with 4 multiprocessors.
    races: two programs of a launch that touch one element, one of them writing, are an error.
    poison: lanes masked off in a load without `other` come back as NaN; otherwise as 0.

    Yields the session, whose `launches` lists what ran. Blocks nest; the innermost one's settings hold, and every
    one's list grows. Raises `KernelMemoryError` for a bad access; an exception from a kernel carries a note that
    says which program of which kernel raised it.
    """
    from gpulayers.kernels.triton import _tile

    session = Session(races, poison)
    outermost = not _sessions
    before = _tile.pretend
    _tile.pretend = device or _tile.Device(90, 4, 232448)
    _sessions.append(session)
    try:
        with _catching_launches() if outermost else contextlib.nullcontext():
            yield session
    finally:
        _sessions.remove(session)
        _tile.pretend = before


def register_inline_asm(text: str, function: Callable[..., Any]) -> None:
    """Give a `tl.inline_asm_elementwise` text its meaning: a NumPy function of the operands' arrays."""
    from gpulayers.testing._builder import Builder

    Builder.inline_asm[" ".join(text.split())] = function


@contextlib.contextmanager
def _catching_launches() -> Iterator[None]:
    """Route launches on CPU arrays to `_run`; for an autotuned kernel, the first configuration that is left."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    launch, tune = JITFunction.run, Autotuner.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if warmup or not _on_cpu((*args, *kwargs.values())):
            return launch(self, *args, grid=grid, warmup=warmup, **kwargs)
        return _run(self, grid, args, kwargs)

    def run_tuned(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _on_cpu((*args, *kwargs.values())):
            return tune(self, *args, **kwargs)
        self.nargs = dict(zip(self.arg_names, args))
        config = self.prune_configs(kwargs)[0]
        if config.pre_hook is not None:
            config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
        return self.fn.run(*args, **kwargs, **config.all_kwargs())

    JITFunction.run, Autotuner.run = run, run_tuned
    try:
        yield
    finally:
        JITFunction.run, Autotuner.run = launch, tune


def _arrays(args: Sequence[Any]) -> Iterator[Any]:
    """The arrays among launch arguments, those inside tuples and tensor descriptors included."""
    for arg in args:
        if isinstance(arg, tuple):
            yield from _arrays(arg)
        elif type(arg).__name__ == "TensorDescriptor":
            yield arg.base
        elif isinstance(arg, np.ndarray) or hasattr(arg, "data_ptr"):
            yield arg


def _on_cpu(args: Sequence[Any]) -> bool:
    """Whether there are arrays among the arguments, and all of them live on the CPU."""
    homes = {"cpu" if isinstance(a, np.ndarray) else a.device.type for a in _arrays(args)}
    return homes == {"cpu"}


def _run(kernel: Any, grid: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Interpret one launch: bind, check the grid, run its programs one after another."""
    from gpulayers.testing._builder import BUILDER
    from gpulayers.testing._language import patched, rewritten
    from gpulayers.testing.memory import Memory

    name = kernel.fn.__name__
    bound = _bind(kernel, args, kwargs)
    for hook in kernel.pre_run_hooks:
        hook(*args, **kwargs)
    x, y, z = _grid(name, grid, bound)
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    session = _sessions[-1]
    memory = Memory(name, (x, y, z), session.races, session.poison)
    function = rewritten(kernel.fn)
    before = getattr(BUILDER, "memory", None)
    BUILDER.memory = memory
    BUILDER.grid_dim = (x, y, z)
    try:
        with patched(), np.errstate(all="ignore"):
            types = {p.name: p.annotation_type for p in kernel.params}
            values = {k: v if k in constexprs else _value(v, k, types[k], memory) for k, v in bound.items()}
            for index in np.ndindex(x, y, z):
                BUILDER.grid_idx = index
                memory.program += 1
                function(**values)
    except Exception as error:
        error.add_note(f"in program {memory.index} of the grid {(x, y, z)} of {name}")
        raise
    finally:
        BUILDER.memory = before  # type: ignore[assignment]
    dtypes = tuple(region.dtype for region in memory.regions)
    launch = Launch(name, dtypes, {k: v for k, v in bound.items() if k in constexprs}, (x, y, z))
    for each in _sessions:
        each.launches.append(launch)
    proven.add((name, dtypes))


def _bind(kernel: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name. Launch options (num_warps, …) say nothing here, but an unknown one is an error as usual."""
    from triton.backends.nvidia.compiler import CUDAOptions

    names = set(kernel.arg_names)
    unknown = [k for k in kwargs if k not in names and k not in CUDAOptions.__dataclass_fields__]
    if unknown:
        raise KeyError(f"{kernel.fn.__name__} has no parameter, and Triton no launch option, named {unknown[0]!r}")
    return inspect.getcallargs(kernel.fn, *args, **{k: v for k, v in kwargs.items() if k in names})


def _grid(name: str, grid: Any, bound: dict[str, Any]) -> tuple[int, int, int]:
    """The grid as three sizes; ValueError beyond what CUDA launches."""
    sizes = tuple(grid(bound) if callable(grid) else grid)
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"{name}: a grid has one to three dimensions, not {sizes}")
    x, y, z = (int(n) for n in (*sizes, 1, 1)[:3])
    if any(n < 0 or n > limit for n, limit in zip((x, y, z), GRID_LIMITS)):
        raise ValueError(f"{name}: CUDA launches no grid of {(x, y, z)}: the limits are {GRID_LIMITS}")
    return x, y, z


def _value(arg: Any, name: str, annotation: str, memory: Any) -> Any:
    """A launch argument as the kernel sees it: typed as a real launch would type it."""
    import triton.language as tl

    from gpulayers.testing._builder import SEMANTIC, STORAGE, Handle

    if isinstance(arg, np.ndarray) or hasattr(arg, "data_ptr"):
        ty = tl.pointer_type(_element_type(arg))
        return tl.tensor(Handle(np.array([memory.add(name, arg)], np.uint64), ty), ty)
    if isinstance(arg, np.generic):
        arg = arg.item()
    if isinstance(arg, tuple):
        items = [_value(item, f"{name}[{i}]", "", memory) for i, item in enumerate(arg)]
        return type(arg)(*items) if hasattr(arg, "_fields") else tl.tuple(items)
    if type(arg).__name__ == "TensorDescriptor":
        base = _value(arg.base, name, "", memory)
        shape = [_value(int(n), name, "", memory) for n in arg.shape]
        strides = [_value(int(n), name, "", memory) for n in arg.strides[:-1]] + [tl.constexpr(1)]
        block = [tl.constexpr(n) for n in arg.block_shape]
        return SEMANTIC.make_tensor_descriptor(base, shape, strides, block, arg.padding)
    if not isinstance(arg, bool | int | float):
        return arg
    if annotation:
        ty = tl.str_to_ty(annotation, None)
    else:  # a float is float32 whatever its value, an int as wide as it needs
        ty = tl.float32 if isinstance(arg, float) else SEMANTIC.to_tensor_type(arg)
        ty = tl.int64 if ty == tl.uint32 else ty
    return tl.tensor(Handle(np.array([arg]).astype(STORAGE[ty.name]), ty), ty)


def _element_type(array: Any) -> Any:
    """The Triton type of an array's elements."""
    import triton.language as tl

    if isinstance(array.dtype, tl.dtype):  # triton.reinterpret
        return array.dtype
    name = str(array.dtype).removeprefix("torch.")
    return getattr(tl, {"bool": "int1", "float8_e4m3fn": "float8e4nv", "float8_e5m2": "float8e5"}.get(name, name))
