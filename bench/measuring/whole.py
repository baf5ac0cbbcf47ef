"""One model, trained or run one way: whether it is right, how long a step takes, and where the time goes."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from gpulayers.bench.models.kind import OPTIONS, Kind, WithLoss, stepping
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import gpulayers.torch as gt
from gpulayers import arrays
from gpulayers.testing.tolerance import allowed

WAYS = ("plain", "patched", "compiled", "patched+compiled")
MODES = ("training", "inference")
WIDER = {"bfloat16": torch.float32, "float32": torch.float64}
"""What the truth about a precision is computed in. bfloat16 is autocast's."""
CHECKED, TIMED, TURNS, PROFILED = 3, 5, 3, 2
"""Steps after which results are compared, in a turn, and under the profiler; turns."""
OTHERS_TIMES = 100.0
"""Others than ours are not held to our bound; this many times it is no rounding any more."""
MOST_COMPARED = 1 << 20
COPY_KERNELS = ("_copy_kernel", "_nhwc_kernel")
"""Ours that do nothing but bring an array into another layout."""


class Job(NamedTuple):
    model: str
    mode: str
    way: str
    precision: str

    @property
    def ours(self) -> bool:
        return self.way.startswith("patched")

    def __str__(self) -> str:
        return ", ".join(self)


class Ready(NamedTuple):
    """A model that can be run."""

    run: Callable[[], Tensor]
    """A step of training, or a forward; gives the loss, or what the network gives."""
    outputs: Callable[[], Tensor]
    """What the network, with the weights that it has now, makes of the batch."""
    loss: Callable[[Tensor], float]
    """Of what ``run`` gave."""
    home: str
    """The module that the network's class is from: torchvision's, timm's or ours."""


def prepared(kind: Kind, job: Job, device: str, wider: bool = False) -> Ready:
    """The job's model, each time from the same weights, and on the same batch. wider: for the truth."""
    model, batch = kind.made(device)
    cast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    if wider:
        model, batch = _in(WIDER[job.precision], model, batch)
    elif job.precision == "bfloat16":
        cast = functools.partial(torch.autocast, device, torch.bfloat16)
    compiled: Callable = torch.compile if "compiled" in job.way else lambda m: m
    *inputs, target = batch
    home = type(model.net).__module__
    if job.ours:
        gt.patch(model, fuse=True)

    def forward(net: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad(), cast():
            return net(*inputs)

    outputs = functools.partial(forward, model.net)
    if job.mode == "inference":
        model.eval()
        run = functools.partial(forward, compiled(model.net))

        def loss(y: Tensor) -> float:
            return float(model.loss(y.to(torch.promote_types(y.dtype, torch.float32)), target))

        return Ready(run, outputs, loss, home)
    options: dict[str, Any] = OPTIONS[kind.optimizer] | ({"fused": True} if device == "cuda" and not job.ours else {})
    optimizer = getattr(gt.optim if job.ours else torch.optim, kind.optimizer)(model.parameters(), **options)
    return Ready(stepping(compiled(model), batch, optimizer, cast), outputs, float, home)


def _in(dtype: torch.dtype, model: WithLoss, batch: tuple[Tensor, ...]) -> tuple[WithLoss, tuple[Tensor, ...]]:
    return model.to(dtype), tuple([t.to(dtype) if t.is_floating_point() else t for t in batch])


# --- whether it is right ---------------------------------------------------------------------------------------------


class Truth(NamedTuple):
    """What the network must give after the first steps, and how far from it a result may be: elements of it."""

    outputs: np.ndarray
    allowed: np.ndarray

    def times(self, y: Tensor) -> float:
        """The largest error, as a multiple of what is allowed there."""
        with np.errstate(invalid="ignore"):
            return float(np.nan_to_num(np.abs(_compared(y) - self.outputs) / self.allowed, nan=np.inf).max())


def truth(kind: Kind, job: Job, device: str) -> Truth:
    """Of plain torch in a wider dtype; the bound is ``testing/tolerance.py``'s, from plain torch in the job's own."""
    plain = job._replace(way="plain")
    with _ieee():
        true = _compared(_after_steps(prepared(kind, plain, device, wider=True)))
    y = _after_steps(prepared(kind, plain, device))
    error, largest = np.abs(_compared(y) - true).max(), np.abs(true).max()
    return Truth(true, allowed(error, largest, true, arrays.from_torch_dtype(y.dtype)))


def _after_steps(ready: Ready) -> Tensor:
    for _ in range(CHECKED):
        ready.run()
    return ready.outputs()


def _compared(y: Tensor) -> np.ndarray:
    return y.flatten()[:: -(-y.numel() // MOST_COMPARED)].double().cpu().numpy()


@contextlib.contextmanager
def _ieee() -> Iterator[None]:
    """Within, float32 is no TF32."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [s.fp32_precision for s in settings]
    try:
        for s in settings:
            s.fp32_precision = "ieee"
        yield
    finally:
        for s, precision in zip(settings, before):
            s.fp32_precision = precision


# --- how long it takes -----------------------------------------------------------------------------------------------


def measured(kind: Kind, job: Job, device: str, true: Truth | None) -> dict[str, Any]:
    """What a row says beside its job. No time where the results are wrong; ``true`` None: they are not compared."""
    begin = time.perf_counter()
    ready = prepared(kind, job, device)
    losses = [ready.loss(ready.run()) for _ in range(CHECKED)]
    found: dict[str, Any] = {"home": ready.home, "ready_s": time.perf_counter() - begin, "losses": losses}
    if true is not None:
        found["error"] = times = true.times(ready.outputs())
        if times > (1.0 if job.ours else OTHERS_TIMES):
            reason = f"{times:.3g} times the allowed error after {CHECKED} steps"
            return found | {"status": "wrong", "reason": reason}
    found |= _timed(ready.run, device) | _profiled(ready.run, device)
    return found | {"status": "ok", "losses": [*losses, ready.loss(ready.run())]}


def _timed(run: Callable[[], Any], device: str) -> dict[str, Any]:
    """ms a step (median turn, and the shortest and longest), ms until the host has given a step to the GPU, peak bytes."""
    on_gpu = device == "cuda"
    wait: Callable[[], Any] = torch.cuda.synchronize if on_gpu else lambda: None
    run()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    host, turns = [], []
    for _ in range(TIMED if on_gpu else 0):  # from an idle GPU on, so that the host does not wait for it
        wait()
        begin = time.perf_counter()
        run()
        host.append((time.perf_counter() - begin) * 1e3)
    for _ in range(TURNS):
        wait()
        begin = time.perf_counter()
        for _ in range(TIMED):
            run()
        wait()
        turns.append((time.perf_counter() - begin) / TIMED * 1e3)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    spread = {"ms": statistics.median(turns), "least_ms": min(turns), "most_ms": max(turns)}
    return spread | {"host_ms": min(host, default=None), "peak_bytes": peak}


def _profiled(run: Callable[[], Any], device: str) -> dict[str, Any]:
    """Kernels of a step and the ms that they take, on a GPU; passes that bring an array into another layout."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as found:
        for _ in range(PROFILED):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
    raw = found.profiler.kineto_results  # type: ignore[union-attr]
    kernels = [e for e in raw.events() if "CUDA" in str(e.device_type()) and not e.is_user_annotation()]
    ours = sum(e.name().startswith(COPY_KERNELS) for e in kernels)
    copies = (ours + sum(map(turns_memory, every(raw.experimental_event_tree())))) / PROFILED
    if device != "cuda":
        return {"busy_ms": None, "launches": None, "copies": copies}
    busy = sum(e.duration_ns() for e in kernels) / 1e6 / PROFILED
    return {"busy_ms": busy, "launches": len(kernels) / PROFILED, "copies": copies}


def every(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from every(event.children)


def turns_memory(event: Any) -> bool:
    """Whether it is a copy of torch's whose result lies otherwise in memory than its source."""
    if event.name != "aten::copy_":
        return False
    to, source = event.typed[1].inputs[:2]
    if not hasattr(source, "strides") or list(to.sizes) != list(source.sizes):
        return False
    pairs = [(a, b) for a, b, n in zip(to.strides, source.strides, to.sizes) if n != 1]
    return all(b for _, b in pairs) and any(a != b for a, b in pairs)
