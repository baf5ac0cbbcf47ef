"""Kernels on a GPU: share of the limit, against torch eager, error against float64 beside the speed.

Limits (copy bandwidth, matrix product) are measured in the same process. Each call is captured in a CUDA graph over
rotating copies of its inputs (more than three times L2, so the cache is cold) and replayed; providers take turns.
A speed is only kept if the result is right, and if it is not above the limit.
"""

from __future__ import annotations

import collections
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from gpulayers.bench._case import Case, Labels, Seeds

from gpulayers import arrays, dispatch
from gpulayers.testing.tolerance import excess

_COLD = 3  # times L2
_REPLAY_SECONDS = 0.02
_MOST_CHECKED = 1 << 22  # elements: the definition runs on the CPU


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


def _rotated(case: Case, dtype: np.dtype, nbytes: int) -> list[list]:
    """Enough sets of inputs that using them in turn leaves none in L2."""
    import torch

    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return [_drawn(case, dtype) for _ in range(max(2, min(64, -(-_COLD * l2 // max(nbytes, 1)))))]


def _drawn(case: Case, dtype: np.dtype) -> list:
    """Random inputs, drawn on the GPU."""
    import torch

    def one(s: Any) -> Any:
        if isinstance(s, list):
            return [one(a) for a in s]
        if isinstance(s, Labels):
            return torch.randint(0, s.high, s.shape, device="cuda")
        if isinstance(s, Seeds):
            return torch.randint(0, 2**40, (2,), device="cuda")
        return None if s is None else torch.randn(s, device="cuda", dtype=arrays.to_torch_dtype(dtype))

    return [one(s) for s in case.shapes]


def _replayed(call: Callable[[list], Any], sets: list[list]) -> tuple[Callable[[], float], int]:
    """(a function that replays captured calls and gives seconds a call, bytes that a call takes at its peak)."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(sets[0])  # compiled and loaded
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        begin = time.perf_counter()
        for inputs in sets[:3]:
            call(inputs)
        torch.cuda.synchronize()
        each = (time.perf_counter() - begin) / len(sets[:3])
        peak = torch.cuda.max_memory_allocated() - before
    torch.cuda.current_stream().wait_stream(side)
    calls = max(2, min(64, round(_REPLAY_SECONDS / each)))
    alive: collections.deque = collections.deque(maxlen=len(sets))  # so that the outputs rotate, too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in itertools.islice(itertools.cycle(sets), calls):
            alive.append(call(inputs))
    alive.clear()

    def replay() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    replay()
    return replay, peak


def _providers(case: Case, needs: tuple) -> dict[str, dict[str, Callable]]:
    """Who computes the case, by direction."""
    forward: dict[str, Callable] = {}
    both: dict[str, Callable] = {}
    for backend in ("triton", "cuda"):
        if dispatch.installed(backend) and hasattr(dispatch.kernels(backend, case.op), f"{case.op.name}_forward"):
            forward[backend] = lambda i, b=backend: _only(b, lambda: case.op(*i, **case.options))
            both[backend] = lambda i, b=backend: _both(case, i, needs, b)
    if case.torch is not None:
        forward["torch"] = lambda i: case.torch(*i)  # type: ignore[misc]
        both["torch"] = lambda i: _torch_both(case, i, needs)
    return {"forward": forward} | ({"both": both} if needs else {})


def measure(case: Case, dtype: np.dtype, limit: dict[str, float], rounds: int = 7) -> list[dict[str, Any]]:
    """One row for each direction and provider: seconds, share of the limit, error, peak memory; or what it raised."""
    needs = case.wanted()
    forward_bytes, backward_bytes = case.bytes(dtype)
    sets = _rotated(case, dtype, forward_bytes)
    rows = []
    for direction, calls in _providers(case, needs).items():
        replays, peaks, wrong = {}, {}, {}
        for name, call in calls.items():
            try:
                if name != "torch" and direction == "forward":
                    wrong[name] = _wrong(case, sets[0], name)
                replays[name], peaks[name] = _replayed(call, sets)
            except Exception as error:
                rows.append(_row(case, dtype, direction, name) | {"wrong": repr(error)[:500]})
                if not alive():
                    return rows
        samples: dict[str, list[float]] = {name: [] for name in replays}
        for turn in range(rounds):
            for name in list(replays) if turn % 2 else reversed(list(replays)):
                samples[name].append(replays[name]())
        moved = forward_bytes + (backward_bytes if direction == "both" else 0)
        flops = case.flops * (3 if direction == "both" else 1)
        least = max(moved / limit["copy"], flops / limit[str(dtype)] if str(dtype) in limit else 0)
        for name, values in samples.items():
            median = statistics.median(values)
            row = _row(case, dtype, direction, name) | {
                "us": median * 1e6,
                "p20_us": float(np.quantile(values, 0.2)) * 1e6,
                "p80_us": float(np.quantile(values, 0.8)) * 1e6,
                "share_of_limit": least / median,
                "wrong": wrong.get(name),
                "peak_bytes": peaks[name],
            }
            if row["share_of_limit"] > 1.1 and name != "torch":
                row["wrong"] = row["wrong"] or "a reading above the limit"
            rows.append(row)
    return rows


def _row(case: Case, dtype: np.dtype, direction: str, provider: str) -> dict[str, Any]:
    return {
        "op": case.op.name, "case": case.name, "dtype": str(dtype), "direction": direction, "provider": provider
    }  # fmt: skip


def alive() -> bool:
    """Whether this process can still use the GPU: not after an illegal access, say."""
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


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


def _wrong(case: Case, there: list, backend: str) -> str | None:
    """None if the outputs are within the derived bound of the definition in float64. Large cases are left to the tests."""
    if case.op.updates or sum(x.numel() for x in arrays.lists(there)) > _MOST_CHECKED:
        return None
    host = [None if x is None else arrays.to_numpy(x) for x in there]
    wide = [x.astype(np.float64) if x is not None and x.dtype in arrays.FLOATS else x for x in host]
    with dispatch.only("definition"), np.errstate(all="ignore"):
        truth, plain = (case.op(*v, **case.options) for v in (wide, host))
    got = _only(backend, lambda: case.op(*there, **case.options))
    values = zip(*(v if isinstance(v, tuple) else (v,) for v in (got, truth, plain)))
    return next((w for g, t, p in values if (w := excess(arrays.to_numpy(g), t, p))), None)
