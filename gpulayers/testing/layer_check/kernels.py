"""The GPU kernels of the ops inside a layer agree with the definitions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpulayers import dispatch, transfer
from gpulayers.arrays import float32, float64
from gpulayers.ops._op import Op
from gpulayers.testing.arena import arena
from gpulayers.testing.layer_check._subject import Result, Subject, gradients, is_float, which
from gpulayers.testing.layer_check.dtypes import exact_inputs, near


def agree(subject: Subject, backends: Sequence[str]) -> None:
    """Interpreted or emulated where there is no GPU."""
    if not backends:
        return
    ops = _ran(subject)
    xs = [x.astype(float32) if is_float(x) else x for x in exact_inputs(subject)]
    with dispatch.only("definition"):
        truth = subject.both(xs, dtype=float32)
    for backend in backends:
        fused = backend == "triton" and any(layer.fused for layer in subject.layer.layers())
        if not dispatch.installed(backend) or not (fused or any(dispatch.kernels(backend, op) for op in ops)):
            continue
        with arena(backend) as room, dispatch.policy(backends=(backend, "definition"), strict=False):
            if room.library == "numpy":
                got = subject.both(xs, truth.dys, dtype=float32)
            else:
                got = _on_gpu(subject, xs, truth.dys)
        named = [("the output", y, t) for y, t in zip(got.ys, truth.ys)]
        named += [(f"d{which(i, xs)}", g, t) for i, (g, t) in enumerate(zip(got.dxs, truth.dxs))]
        named += [(f"the gradient of {n}", g, truth.weights[n]) for n, g in got.weights.items()]
        for what, g, t in named:
            wide = t.astype(float64) if is_float(t) else t
            near(g, wide, (), xs, float32, f"({backend}) {what}")


def _ran(subject: Subject) -> set[Op]:
    """The ops that a call of the layer runs."""
    layer = subject.fresh()
    subject.forward(layer, subject.xs)
    frames, found = list(layer._waiting.frames), set()
    while frames:
        frame = frames.pop()
        found |= {call.plan.op for calls in frame.calls.values() for call, _ in calls}
        frames += [inner for _, inners in frame.children.values() for inner in inners]
    return found


def _on_gpu(subject: Subject, xs: list, dys: tuple) -> Result:
    layer = subject.fresh(dtype=float32).to("cuda")
    there = [transfer.to_device(x, "cuda") for x in xs]
    y = layer(*there)
    ys = y if isinstance(y, tuple) else (y,)
    dx = layer.backward(*(None if dy is None else transfer.to_device(dy, "cuda") for dy in dys))
    dxs = dx if isinstance(dx, tuple) else (dx,)
    host = tuple(None if d is None else np.asarray(transfer.to_numpy(d)) for d in dxs)
    return Result(tuple(map(transfer.to_numpy, ys)), dys, host, *gradients(layer))
