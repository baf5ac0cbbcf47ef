"""Where a backend's kernels run in a test: on the GPU if there is one, else interpreted or emulated on the CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpulayers import dispatch, transfer

BACKENDS = ("definition", "numpy", "aten", "triton", "cuda")


@functools.cache
def has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


on_gpu: set[tuple[str, str]] = set()
"""(Triton kernel, dtypes of its tensors separated by spaces) of every launch on a GPU inside an arena."""


@contextlib.contextmanager
def arena(backend: str) -> Iterator[Arena]:
    """Only ``backend`` may compute inside; memory it allocates is filled with NaN first.

    Kernels are simulated without a GPU, and within ``interpreting()`` or ``emulating()``, which ask for just that.
    """
    real = backend in ("triton", "cuda") and has_gpu() and not _simulated(backend)
    with contextlib.ExitStack() as stack:
        if backend in ("triton", "cuda"):
            stack.enter_context(_recording(backend) if real else _simulating(backend))
            stack.enter_context(dispatch.policy(simulate=() if real else (backend,)))
        stack.enter_context(dispatch.policy(strict=backend in ("triton", "cuda")))
        stack.enter_context(dispatch.only(backend))
        stack.enter_context(transfer.poisoned())
        yield Arena(transfer.HOME[backend] if real or backend == "aten" else "numpy", "cuda" if real else "cpu")


def _simulated(backend: str) -> bool:
    if backend == "triton":
        from gpulayers.testing import interpreter

        return bool(interpreter._sessions)
    from gpulayers.kernels.cuda import _launch

    return _launch.emulate is not None


@contextlib.contextmanager
def _recording(backend: str) -> Iterator[None]:
    """Write down what is launched on the GPU."""
    if backend == "cuda":
        from gpulayers.kernels.cuda import _launch

        before, _launch.recording = _launch.recording, True
        try:
            yield
        finally:
            _launch.recording = before
        return
    from gpulayers.testing import _launches

    def run(launch: Any, kernel: Any, grid: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        done = launch(kernel, *args, grid=grid, warmup=False, **kwargs)
        given = _launches.arrays((*args, *kwargs.values()))
        on_gpu.add((kernel.fn.__name__, " ".join(map(_launches.dtype_name, given))))
        return done

    with _launches.catching("cuda", run):
        yield


@contextlib.contextmanager
def recording_all() -> Iterator[None]:
    """Write down what is launched on the GPU outside of arenas, too."""
    with contextlib.ExitStack() as stack:
        for backend in filter(dispatch.installed, ("triton", "cuda")):
            stack.enter_context(_recording(backend))
        yield


def _simulating(backend: str) -> contextlib.AbstractContextManager:
    if backend == "triton":
        from gpulayers.testing.interpreter import interpreting

        return interpreting()
    from gpulayers.testing.emulator import emulating

    return emulating()


class Arena:
    """Puts NumPy arrays where the backend takes them, strides kept, and gets results back."""

    def __init__(self, library: str, device: str = "cpu"):
        self.library, self.device = library, device
        self.real = device != "cpu"
        """Whether it is on a GPU."""

    def put(self, x: Any) -> Any:
        """A fresh copy of an array (or list of arrays, or None) with the same strides."""
        if x is None:
            return None
        if isinstance(x, list | tuple):
            return [self.put(a) for a in x]
        if self.library == "numpy":
            return copy_with_strides(x)
        flat, strides = _memory(x, x.dtype)
        there = transfer.lend_to_torch(flat).to(self.device).as_strided(x.shape, strides)
        return there if self.library == "torch" else transfer.torch_to_cupy(there)

    def get(self, x: Any) -> Any:
        if x is None:
            return None
        if isinstance(x, list | tuple):
            return type(x)(self.get(a) for a in x)
        if isinstance(x, dict):
            return {k: self.get(a) for k, a in x.items()}
        return x if self.library == "numpy" else transfer.to_numpy(x)


def copy_with_strides(x: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
    """A copy of ``x``, in its own or another dtype, with its strides in elements, its gaps (NaN) and its overlaps."""
    if x.flags.c_contiguous:
        return x.astype(dtype or x.dtype, order="C")
    return _strided(*_memory(x, dtype or x.dtype), x.shape)


def _strided(flat: np.ndarray, steps: list[int], shape: tuple[int, ...]) -> np.ndarray:
    """A view, made as NumPy's as_strided makes it, in a fifth of its time."""
    return np.ndarray(shape, flat.dtype, flat, strides=[s * flat.itemsize for s in steps])


def _memory(x: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, list[int]]:
    """(a flat copy of the memory that ``x`` spans, its strides in elements); row-major for negative strides."""
    steps = [s // x.itemsize for s in x.strides]
    if x.flags.c_contiguous or x.size == 0 or min(steps) < 0:
        return x.flatten().astype(dtype), [s // x.itemsize for s in x.copy().strides]
    flat = np.empty(1 + sum((n - 1) * s for n, s in zip(x.shape, steps)), dtype)
    flat.view(np.uint8)[...] = 0xFF
    _strided(flat, steps, x.shape)[...] = x
    return flat, steps
