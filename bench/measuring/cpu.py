"""What a CPU can measure: the NumPy side against torch, what dispatch costs, what importing costs."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from gpulayers.bench.cases.case import Case, every_case
from gpulayers.bench.measuring.device import Cpu
from gpulayers.bench.measuring.timing import calls, costs, quantiles, take_turns

from gpulayers import transfer


def ours(case: Case, inputs: list[Any]) -> Callable[[], Any]:
    """Forward and backward of one case with fresh outputs; an update-only op's forward."""
    needs = case.wanted()
    if not needs:
        return lambda: case.op(*inputs, **case.options)
    y, _ = case.op.record(*inputs, needs=needs, **case.options)
    random = np.random.default_rng(1)
    dys = [random.standard_normal(o.shape).astype(o.dtype) for o in (y if isinstance(y, tuple) else (y,))]

    def call() -> Any:
        _, recorded = case.op.record(*inputs, needs=needs, **case.options)
        return recorded.backward(*dys)

    return call


def torchs(case: Case, inputs: list[Any]) -> Callable[[], Any]:
    """The same through torch's autograd."""
    import torch

    assert case.torch is not None
    needs = case.wanted()
    tensors: list[Any] = []
    for name, x in zip(case.op.inputs, inputs):
        t = (
            [transfer.numpy_to_torch(a) for a in x]
            if isinstance(x, list)
            else None
            if x is None
            else transfer.numpy_to_torch(x)
        )
        if name in needs:
            t.requires_grad_()
        tensors.append(t)
    if not needs:
        return lambda: case.torch(*tensors)
    with torch.no_grad():
        y = case.torch(*tensors)
    dys = [torch.randn(o.shape) for o in (y if isinstance(y, tuple) else (y,))]

    def call() -> None:
        for t in tensors:
            if t is not None and t.requires_grad:
                t.grad = None
        torch.autograd.backward(case.torch(*tensors), dys)  # type: ignore[misc]

    return call


def against_torch(
    only: list[str], seconds: float, progress: bool = True, on: Cpu | None = None
) -> list[dict[str, Any]]:
    """Forward and backward in float32 of every case small enough for a CPU, gpulayers and torch taking turns."""
    import torch
    from tqdm.auto import tqdm

    torch.set_num_threads(2)
    random, on = np.random.default_rng(0), on or Cpu(turn=seconds / 4)
    rows = []
    todo = [(f, c) for f, c in every_case(only) if c.cpu and c.torch is not None]
    for family, case in tqdm(todo, disable=not progress, unit="case"):
        inputs = case.draw(random)
        copies = [[a.copy() for a in x] if isinstance(x, list) else None if x is None else x.copy() for x in inputs]
        found = interleaved({"gpulayers": ours(case, inputs), "torch": torchs(case, copies)}, on, seconds)
        mine, theirs = (found[name]["p50"] for name in ("gpulayers", "torch"))
        rows.append(
            {
                "family": family,
                "op": case.op.name,
                "case": case.name,
                "ms": mine * 1e3,
                "p20": found["gpulayers"]["p20"] * 1e3,
                "p80": found["gpulayers"]["p80"] * 1e3,
                "torch_ms": theirs * 1e3,
                "ratio": mine / theirs,
                "most": 1.5 if case.by_gemm else case.most,
                "gemm": case.by_gemm,
            }
        )
    return rows


def interleaved(calls: dict[str, Callable[[], Any]], on: Cpu, seconds: float) -> dict[str, dict[str, float]]:
    """Quantiles of the seconds each call takes, over at least three turns and ``seconds`` of calls for each."""
    replays = {name: on.capture(lambda _, c=call: c(), [None]).replay for name, call in calls.items()}  # type: ignore[misc]
    return {name: quantiles(samples) for name, samples in take_turns(replays, 3, seconds).items()}


def dispatch_cost() -> list[dict[str, Any]]:
    """µs that a dispatched call takes above the function it calls, float32 NumPy arrays."""
    from gpulayers import dispatch
    from gpulayers.ops import linear, softmax

    rows = []
    x, w, b = np.ones((2, 4), np.float32), np.ones((4, 4), np.float32), np.ones(4, np.float32)
    for op, inputs in ((softmax.softmax, (x,)), (linear.linear, (x, w, b))):
        op(*inputs)
        plan = next(p for p in dispatch._plans.values() if p.op is op and not p.needs)
        found = costs(
            {
                "function": calls(lambda f=plan.forward, o=plan.options, i=inputs: f(*i, needs=(), **o)),
                "dispatched": calls(lambda op=op, i=inputs: op(*i)),
            }
        )
        function, dispatched = found["function"], found["dispatched"]
        rows.append(
            {"op": op.name, "function_us": function, "dispatched_us": dispatched, "above_us": dispatched - function}
        )
    return rows


def import_cost(repeats: int = 9) -> dict[str, float]:
    """Seconds to start Python and import numpy, and gpulayers; medians of fresh processes taking turns."""

    # With compiled files, as an installed package has them.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def start(module: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True, env=env)

    start("gpulayers")()  # compiles them
    samples: dict[str, list[float]] = {"numpy": [], "gpulayers": []}
    for _ in range(repeats):
        for module in samples:
            call, begin = start(module), time.perf_counter()
            call()
            samples[module].append(time.perf_counter() - begin)
    medians = {m: statistics.median(v) for m, v in samples.items()}
    return medians | {"above": medians["gpulayers"] - medians["numpy"]}
