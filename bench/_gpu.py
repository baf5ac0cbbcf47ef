"""Kernels on a GPU: share of the limit, against torch eager, error against float64 beside the speed.

Limits (copy bandwidth, matrix product) are measured in the same process. Each call is captured in a CUDA graph over
rotating copies of its inputs (more than three times L2, so the cache is cold) and replayed; providers take turns.
A speed is only kept if the result is right, and if it is not above the limit.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from gpulayers.bench._case import Case

from gpulayers import arrays, dispatch
from gpulayers.testing.tolerance import excess

_COLD = 3  # times L2


def limits() -> dict[str, float]:
    """Measured: bytes a second of a device copy, and bf16 and float32 flops a second of torch's matrix product."""
    import torch

    big = torch.randn(1 << 28, device="cuda")
    out = torch.empty_like(big)
    copied = 2 * big.numel() * 4 / _seconds(lambda: out.copy_(big))
    rates = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        rates[str(arrays.from_torch_dtype(dtype))] = 2 * 8192**3 / _seconds(lambda a=a, b=b: a @ b)
    return {"copy": copied, **rates}


def _seconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median seconds of a call, by events."""
    import torch

    for _ in range(3):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(s.elapsed_time(e) for s, e in events) / 1e3


def _rotated(make: Callable[[], list], nbytes: int) -> list[list]:
    """Enough copies of the inputs that using them in turn leaves none in L2."""
    import torch

    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return [make() for _ in range(max(2, min(64, -(-_COLD * l2 // max(nbytes, 1)))))]


def _replayed(call: Callable[[list], Any], sets: list[list], calls: int = 64) -> Callable[[], float]:
    """A function that replays ``calls`` captured calls and gives seconds a call."""
    import torch

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for inputs in sets[:3]:
            call(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in itertools.islice(itertools.cycle(sets), calls):
            call(inputs)

    def replay() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return replay


def measure(case: Case, dtype: np.dtype, limit: dict[str, float], rounds: int = 7) -> list[dict[str, Any]]:
    """One row for each direction and provider: seconds, share of the limit, ratio to torch, error."""
    import torch

    random = np.random.default_rng(0)
    host = case.draw(random, dtype)
    needs = case.wanted()
    forward_bytes, backward_bytes = case.bytes(dtype)

    def make() -> list:
        return [_there(x) for x in host]

    sets = _rotated(make, forward_bytes)
    rows = []
    wrong = _wrong(case, host, sets[0], needs)
    providers: dict[str, dict[str, Callable]] = {"forward": {}}
    for backend in ("triton", "cuda"):
        if dispatch.installed(backend) and hasattr(dispatch.kernels(backend, case.op), f"{case.op.name}_forward"):
            providers["forward"][backend] = lambda i, b=backend: _only(b, lambda: case.op(*i, **case.options))
    if case.torch is not None:
        providers["forward"]["torch"] = lambda i: case.torch(*i)  # type: ignore[misc]
    if needs:
        providers["both"] = {b: lambda i, b=b: _both(case, i, needs, b) for b in providers["forward"] if b != "torch"}
        if case.torch is not None:
            providers["both"]["torch"] = lambda i: _torch_both(case, i, needs)
    for direction, calls in providers.items():
        replays = {name: _replayed(call, sets) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in replays}
        for turn in range(rounds):
            for name in list(replays) if turn % 2 else reversed(list(replays)):
                samples[name].append(replays[name]())
        moved = forward_bytes + (backward_bytes if direction == "both" else 0)
        flops = case.flops * (3 if direction == "both" else 1)
        least = max(moved / limit["copy"], flops / limit[str(dtype)] if str(dtype) in limit else 0)
        for name, values in samples.items():
            median = statistics.median(values)
            row = {
                "op": case.op.name,
                "case": case.name,
                "dtype": str(dtype),
                "direction": direction,
                "provider": name,
                "us": median * 1e6,
                "p20_us": float(np.quantile(values, 0.2)) * 1e6,
                "p80_us": float(np.quantile(values, 0.8)) * 1e6,
                "share_of_limit": least / median,
                "wrong": wrong if name != "torch" else None,
                "peak_bytes": torch.cuda.max_memory_allocated(),
            }
            if row["share_of_limit"] > 1.1:  # type: ignore[operator]
                row["wrong"] = "a reading above the limit"
            rows.append(row)
    return rows


def _there(x: Any) -> Any:
    if isinstance(x, list):
        return [_there(a) for a in x]
    return None if x is None else arrays.numpy_to_torch(x).cuda()


def _only(backend: str, call: Callable[[], Any]) -> Any:
    with dispatch.only(backend):
        return call()


def _both(case: Case, inputs: list, needs: tuple, backend: str) -> Any:
    with dispatch.only(backend):
        y, call = case.op.record(*inputs, needs=needs, **case.options)
        return call.backward(y)


def _torch_both(case: Case, inputs: list, needs: tuple) -> Any:
    import torch

    leaves = [x.detach().requires_grad_() if n in needs else x for n, x in zip(case.op.inputs, inputs)]
    y = case.torch(*leaves)  # type: ignore[misc]
    return torch.autograd.grad(y, [x for n, x in zip(case.op.inputs, leaves) if n in needs], y.detach())


def _wrong(case: Case, host: list, there: list, needs: tuple) -> str | None:
    """None if the outputs are within the derived bound of the definition in float64."""
    if case.op.updates:
        return None
    wide = [x.astype(np.float64) if x is not None and x.dtype in arrays.FLOATS else x for x in host]
    with dispatch.only("definition"):
        truth, plain = (case.op(*v, **case.options) for v in (wide, host))
    got = case.op(*there, **case.options)
    values = zip(*(v if isinstance(v, tuple) else (v,) for v in (got, truth, plain)))
    return next((w for g, t, p in values if (w := excess(arrays.to_numpy(g), t, p))), None)
