"""What a launcher does in one thread is told to a recorder: Triton's launches, CuPy's, and torch's operations."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

_one = threading.Lock()


class Busy(RuntimeError):
    """Another thread is recording."""


@contextmanager
def watching(recorder: Any) -> Iterator[None]:
    """Within, ``recorder.told`` hears of what this thread does. Raises Busy before anything has happened."""
    if not _one.acquire(blocking=False):
        raise Busy
    try:
        with ExitStack() as stack:
            if "triton" in sys.modules:
                stack.enter_context(_triton(recorder))
            if (module := sys.modules.get("gpulayers.kernels.cuda._launch")) is not None:
                stack.enter_context(_cuda(recorder, module))
            if "torch" in sys.modules:
                stack.enter_context(_operations()(recorder))
            yield
    finally:
        _one.release()


@contextmanager
def _triton(recorder: Any) -> Iterator[None]:
    """Every launch goes through JITFunction.run, those of autotuned kernels and of one's own, too."""
    from triton.runtime.jit import JITFunction

    launch, thread = JITFunction.run, threading.get_ident()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=warmup, **options)
        if not warmup and threading.get_ident() == thread:
            recorder.told("triton", self, compiled, grid, args, options)
        return compiled

    from gpulayers.kernels.triton import _tile

    JITFunction.run, _tile.recorder = run, recorder
    try:
        yield
    finally:
        JITFunction.run, _tile.recorder = launch, None


@contextmanager
def _cuda(recorder: Any, module: Any) -> Iterator[None]:
    thread = threading.get_ident()

    def told(*launch: Any) -> None:
        if threading.get_ident() == thread:
            recorder.told("cuda", *launch)

    module.told = told
    try:
        yield
    finally:
        module.told = None


@cache
def _operations() -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operations(TorchDispatchMode):
        def __init__(self, recorder: Any):
            super().__init__()
            self.recorder = recorder

        def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            self.recorder.told("called", function)
            return function(*args, **(kwargs or {}))

    return Operations
