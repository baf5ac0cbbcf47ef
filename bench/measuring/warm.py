"""Compiles what the next cases, or a model, will launch, by all processors: the process that measures would do it one by one, with the
GPU waiting. It is done before they are measured, not beside it, which would show in the host's times."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from gpulayers.bench.cases.uses import Use, directions, precision, uses_of
from gpulayers.bench.measuring.lab import Task
from gpulayers.bench.measuring.pool import pool
from gpulayers.bench.models.kind import Kind
from torch._subclasses.fake_tensor import FakeTensorMode

import gpulayers.torch as gt
from gpulayers.inventory import ops
from gpulayers.testing.audit_op import launchers
from gpulayers.testing.compiling import compiling
from gpulayers.testing.gpus import GPUS
from gpulayers.torch import _library

FEWEST = 8
"""Cases for which the processes are worth their start."""


def compile_use(use: Use, arch: int) -> None:
    """Into Triton's cache. What cannot be compiled so is left to who launches it."""
    forward, backward = directions(use)
    with contextlib.suppress(Exception), compiling(arch), precision(use.dtype):
        _, saved = forward()
        if use.direction == "backward":
            backward(saved)


def warm(tasks: Sequence[Task], arch: int, until: float) -> None:
    """Compile ours of these tasks for an architecture; no longer than ``until`` of time.monotonic()."""
    uses = [use for t in tasks if not t.slow for use in uses_of(t.family, t.case, str(t.dtype))]
    if len(uses) >= FEWEST and arch in GPUS:
        _by_all(compile_use, uses, arch, until)


def warm_model(kind: Kind, half: bool, until: float, arch: int, device: str = "cuda") -> None:
    """Compile what a step of this model, patched, will launch; the update's own kernels are left to it."""
    if arch in GPUS:
        _by_all(compile_call, calls_of(kind, half, device), arch, until)


def _by_all(compiled: Callable[[Any, int], None], given: Sequence[Any], arch: int, until: float) -> None:
    with contextlib.suppress(TimeoutError, concurrent.futures.BrokenExecutor), pool(os.cpu_count() or 1) as workers:
        for done in [workers.submit(compiled, each, arch) for each in given]:
            done.result(timeout=max(0.0, until - time.monotonic()))


# --- what a model calls ----------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """Of an op, in metadata."""

    op: str
    specs: tuple
    needs: tuple[str, ...]
    options: dict[str, Any]


def calls_of(kind: Kind, half: bool, device: str) -> list[Call]:
    """Each that a step of the patched model makes, once, found with fake tensors. half: under autocast in bfloat16."""
    found: dict[str, Call] = {}
    rule = _library.LibraryOp._rule

    def noted(self: Any, specs: Sequence[Any], needs: tuple, options: Sequence[Any]) -> Any:
        call = Call(self.op.name, tuple(specs), needs, self._values(options))
        found.setdefault(repr(call), call)
        return rule(self, specs, needs, options)

    model, batch = kind.on_meta()
    gt.patch(model, fuse=True)
    _library.LibraryOp._rule = noted  # type: ignore[method-assign]
    try:
        with FakeTensorMode(), torch.autocast(device, torch.bfloat16, half):
            for held in (store for m in model.modules() for store in (m._parameters, m._buffers)):
                held.update({name: _faked(t, device) for name, t in held.items() if t is not None})
            model(*[_faked(t, device) for t in batch])
    finally:
        _library.LibraryOp._rule = rule  # type: ignore[method-assign]
    return list(found.values())


def _faked(x: Any, device: str) -> Any:
    there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return there.requires_grad_(x.requires_grad)


def launch(call: Call) -> None:
    """What the call launches, forward and backward, on torch's meta device."""
    op = next(op for op in ops() if op.name == call.op)
    forward, backward = launchers(op, call.specs, call.needs, call.options)
    _, saved = forward()
    if call.needs:
        backward(saved)


def compile_call(call: Call, arch: int) -> None:
    """Into Triton's cache. What cannot be compiled so is left to who launches it."""
    with contextlib.suppress(Exception), compiling(arch):
        launch(call)
