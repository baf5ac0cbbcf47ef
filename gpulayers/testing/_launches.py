"""What interpreting and compiling share: catching Triton launches, and reading their arguments."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpulayers.launch._record import bound

GRID_LIMITS = (2**31 - 1, 65535, 65535)


@contextlib.contextmanager
def catching(home: str, run: Callable[..., Any]) -> Iterator[None]:
    """Route launches whose arrays all live on `home` ("cpu" or "meta") to `run(launch, kernel, grid, args, kwargs)`.

    `launch` is JITFunction.run as it was. For an autotuned kernel the first configuration left by its pruning is taken.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    launch, tune = JITFunction.run, Autotuner.run

    def run_kernel(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if warmup or homes((*args, *kwargs.values())) != {home}:
            return launch(self, *args, grid=grid, warmup=warmup, **kwargs)
        return run(launch, self, grid, args, kwargs)

    def run_tuned(self: Any, *args: Any, **kwargs: Any) -> Any:
        if homes((*args, *kwargs.values())) != {home}:
            return tune(self, *args, **kwargs)
        self.nargs = dict(zip(self.arg_names, args))
        config = self.prune_configs(kwargs)[0]
        if config.pre_hook is not None:
            config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
        return self.fn.run(*args, **kwargs, **config.all_kwargs())

    JITFunction.run, Autotuner.run = run_kernel, run_tuned
    try:
        yield
    finally:
        JITFunction.run, Autotuner.run = launch, tune


def corners(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The indices of a grid's programs that are first or last along each axis."""
    return itertools.product(*(range(0, n, max(n - 1, 1)) for n in sizes))


def arrays(args: Sequence[Any]) -> Iterator[Any]:
    """The arrays among launch arguments, those inside tuples and tensor descriptors included."""
    for arg in args:
        if isinstance(arg, tuple):
            yield from arrays(arg)
        elif type(arg).__name__ == "TensorDescriptor":
            yield arg.base
        elif isinstance(arg, np.ndarray) or hasattr(arg, "data_ptr"):
            yield arg


def homes(args: Sequence[Any]) -> set[str]:
    """The kinds of device that the arrays among the arguments live on."""
    return {"cpu" if isinstance(a, np.ndarray) else a.device.type for a in arrays(args)}


def dtype_name(array: Any) -> str:
    """`float32`, `bfloat16`, … of a NumPy array or torch tensor."""
    return _name(array.dtype)


@functools.cache
def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def bind(kernel: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults filled in. Launch options (num_warps, …) are left out; an unknown one is an error."""
    from triton.backends.nvidia.compiler import CUDAOptions

    names = set(kernel.arg_names)
    unknown = [k for k in kwargs if k not in names and k not in CUDAOptions.__dataclass_fields__]
    if unknown:
        raise KeyError(f"{kernel.fn.__name__} has no parameter, and Triton no launch option, named {unknown[0]!r}")
    return bound(kernel, args, kwargs)


def constexprs(kernel: Any, bound: dict[str, Any]) -> dict[str, Any]:
    """The compile-time arguments among bound ones."""
    return {p.name: bound[p.name] for p in kernel.params if p.is_constexpr}


def grid_sizes(name: str, grid: Any, bound: dict[str, Any]) -> tuple[int, int, int]:
    """The grid as three sizes; ValueError beyond what CUDA launches."""
    sizes = tuple(grid(bound) if callable(grid) else grid)
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"{name}: a grid has one to three dimensions, not {sizes}")
    x, y, z = (int(n) for n in (*sizes, 1, 1)[:3])
    if any(n < 0 or n > limit for n, limit in zip((x, y, z), GRID_LIMITS)):
        raise ValueError(f"{name}: CUDA launches no grid of {(x, y, z)}: the limits are {GRID_LIMITS}")
    return x, y, z
