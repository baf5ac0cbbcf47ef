"""What a drop-in costs on the host, above the launch: kernels and allocations are stubs that hand out ready tensors.

torch.nn's own layer stands beside it, with its kernel on the same few numbers: a yardstick for this machine's Python.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from gpulayers.bench.measuring.timing import CALLS, calls, costs
from torch import Tensor

import gpulayers.torch as gt
from gpulayers import dispatch, transfer
from gpulayers.inventory import families
from gpulayers.torch._op import TorchOp


def _layers() -> dict[str, tuple[Callable[[Any], nn.Module], tuple[int, ...]]]:
    """name → (from torch.nn or gpulayers.torch, shape of x)."""
    return {
        "ReLU": (lambda m: m.ReLU(), (8, 64)),
        "GELU": (lambda m: m.GELU(), (8, 64)),
        "Linear": (lambda m: m.Linear(64, 64), (8, 64)),
        "LayerNorm": (lambda m: m.LayerNorm(64), (8, 64)),
        "RMSNorm": (lambda m: m.RMSNorm(64), (8, 64)),
        "Softmax": (lambda m: m.Softmax(-1), (8, 64)),
        "BatchNorm2d": (lambda m: m.BatchNorm2d(8).eval(), (2, 8, 4, 4)),
        "Conv2d": (lambda m: m.Conv2d(8, 8, 3), (2, 8, 6, 6)),
        "MaxPool2d": (lambda m: m.MaxPool2d(2), (2, 8, 4, 4)),
    }


class _Open(transfer.Bridge):
    """Tensors for a function that takes tensors, as on a GPU."""

    def __init__(self) -> None:
        self.extra: dict[str, Any] = {}
        self.open = True


def forget() -> None:
    """Let every drop-in plan its calls anew."""
    for family in set(families()) - {"optim"}:
        for op in vars(importlib.import_module(f"gpulayers.torch.{family}")).values():
            if isinstance(op, TorchOp):
                op._known.clear()
                op._latest.clear()


def _stub(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """Make the plans of ``module(x)`` hand out what they gave, without computing it; returns how to undo that."""
    before = dict(dispatch._plans)
    dispatch._plans.clear()
    forget()
    with torch.no_grad():
        module(x)
    module(x).sum().backward()
    for key, plan in dispatch._plans.items():
        dispatch._plans[key] = _ready(plan)
    forget()

    def undo() -> None:
        dispatch._plans.clear()
        dispatch._plans.update(before)
        forget()

    return undo


def _ready(plan: dispatch.Plan) -> dispatch.Plan:
    def empty(spec: Any) -> Any:
        return plan.home.empty(spec, plan.device)

    outputs = tuple(map(empty, plan.rule.outputs.values()))
    kept = {k: empty(s) for k, s in plan.rule.saved.items()}
    grads = tuple(empty(s.like()) if n in plan.needs else None for n, s in zip(plan.op.inputs, plan.inputs))

    def forward(*inputs: Any, **options: Any) -> tuple:
        # A view, or autograd would see one tensor as the output of many calls.
        return tuple(y.detach() for y in outputs), kept

    def backward(*args: Any, **options: Any) -> tuple:
        return grads

    return plan._replace(forward=forward, backward=backward, bridge=_Open()).bound()


def _backwards(module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], float]:
    """() → seconds of a backward alone."""

    def sample() -> float:
        outputs = [module(x) for _ in range(CALLS)]
        begin = time.perf_counter()
        for y in outputs:
            y.backward(dy)
        return (time.perf_counter() - begin) / CALLS

    return sample


def yardstick() -> dict[str, float]:
    """What this machine's Python takes, µs: an empty call of a function, and torch's relu of 64 numbers.

    Costs of different machines can be compared as multiples of these.
    """
    torch.set_num_threads(1)
    x = torch.ones(64)

    def nothing() -> None: ...

    found = costs({"call": calls(nothing), "relu": calls(lambda: torch.nn.functional.relu(x))})
    return {"call_us": found["call"], "relu_us": found["relu"]}


def host_cost() -> list[dict[str, Any]]:
    """One row a layer: µs of forward without and with gradients, less the stub's own; backward against torch.nn's."""
    torch.set_num_threads(1)
    rows = []
    gc.disable()
    try:
        for name, (make, shape) in _layers().items():
            rows.append({"layer": name, **_measure(make, shape)})
    finally:
        gc.enable()
    return rows


def _measure(make: Callable[[Any], nn.Module], shape: tuple[int, ...]) -> dict[str, float]:
    x, ours, theirs = torch.randn(shape, requires_grad=True), make(gt), make(nn)
    dy = torch.randn_like(theirs(x))
    undo = _stub(ours, x)
    plan = next(p for p in dispatch._plans.values() if not p.needs)
    inputs = [None] * len(plan.inputs)

    def without() -> float:
        with torch.no_grad():
            return calls(lambda: ours.forward(x))()

    try:
        found = costs(
            {
                "stub": calls(lambda: plan.run_forward(*inputs)),
                "forward": without,
                "with_grad": calls(lambda: ours.forward(x)),
                "torch_forward": calls(lambda: theirs(x)),
                "backward": _backwards(ours, x, dy),
                "torch_backward": _backwards(theirs, x, dy),
            }
        )
    finally:
        undo()
    stub = found.pop("stub")
    above = {name: found[name] - stub for name in ("forward", "with_grad")}
    return {f"{name}_us": us for name, us in (found | above).items()} | {
        "backward_ratio": found["backward"] / found["torch_backward"]
    }
