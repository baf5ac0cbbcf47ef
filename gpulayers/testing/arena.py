"""Where a backend's kernels run in a test: on the GPU if there is one, else interpreted or emulated on the CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpulayers import arrays, dispatch

BACKENDS = ("definition", "numpy", "triton", "cuda")


@functools.cache
def has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


@contextlib.contextmanager
def arena(backend: str) -> Iterator[Arena]:
    """Only ``backend`` may compute inside; memory it allocates is filled with NaN first."""
    real = backend in ("triton", "cuda") and has_gpu()
    with contextlib.ExitStack() as stack:
        if backend in ("triton", "cuda") and not real:
            stack.enter_context(_simulating(backend))
            stack.enter_context(dispatch.policy(simulate=(backend,)))
        stack.enter_context(dispatch.policy(strict=backend in ("triton", "cuda")))
        stack.enter_context(dispatch.only(backend))
        stack.enter_context(dispatch.poisoned())
        yield Arena("numpy" if not real else dispatch.HOME[backend])


def _simulating(backend: str) -> contextlib.AbstractContextManager:
    if backend == "triton":
        from gpulayers.testing.interpreter import interpreting

        return interpreting()
    from gpulayers.testing.emulator import emulating

    return emulating()


class Arena:
    """Puts NumPy arrays where the backend takes them, strides kept, and gets results back."""

    def __init__(self, library: str):
        self.library = library

    def put(self, x: Any) -> Any:
        """A fresh copy of an array (or list of arrays, or None) with the same strides."""
        if x is None:
            return None
        if isinstance(x, list | tuple):
            return [self.put(a) for a in x]
        span = copy_with_strides(x)
        if self.library == "numpy":
            return span
        if any(s < 0 for s in x.strides):
            span = np.ascontiguousarray(x)
        base = span if span.base is None else span.base
        flat = arrays.lend_to_torch(base).cuda()
        on_gpu = flat.as_strided(span.shape, [s // span.itemsize for s in span.strides])
        return on_gpu if self.library == "torch" else arrays.torch_to_cupy(on_gpu)

    def get(self, x: Any) -> Any:
        if x is None:
            return None
        if isinstance(x, list | tuple):
            return type(x)(self.get(a) for a in x)
        if isinstance(x, dict):
            return {k: self.get(a) for k, a in x.items()}
        return x if self.library == "numpy" else arrays.to_numpy(x)


def copy_with_strides(x: np.ndarray) -> np.ndarray:
    """A copy of ``x`` with its strides, gaps and overlaps, in memory of its own (the gaps are NaN)."""
    if x.flags.c_contiguous or x.size == 0 or any(s < 0 for s in x.strides):
        return x.copy()
    steps = [s // x.itemsize for s in x.strides]
    flat = np.empty(1 + sum((n - 1) * s for n, s in zip(x.shape, steps)), x.dtype)
    flat.view(np.uint8)[...] = 0xFF
    view = np.lib.stride_tricks.as_strided(flat, x.shape, x.strides)
    view[...] = x
    return view
