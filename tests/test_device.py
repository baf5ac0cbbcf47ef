"""What the lab asks of a device: limits, rotating outputs, samples. The GPU's own code runs here over a stand-in for torch.cuda."""

import contextlib
import gc
import itertools
import types
import weakref

import pytest
import torch
from gpulayers.bench.measuring import device
from gpulayers.bench.measuring.device import Cpu, Cuda


def test_limits_of_a_cpu(monkeypatch):
    monkeypatch.setattr(device, "_SQUARE", 64)
    found = Cpu(large=1 << 20).limits()
    assert found["read"] >= found["copy"] > 1e8 and found["bfloat16"] >= found["float32"] > 1e8
    assert set(found) == {"copy", "read", "float32", "bfloat16", "float16", "tf32"}


def test_inputs_and_outputs_rotate():
    """Sets take turns, and a call's output does not lie where the ones before it lie."""
    given, places = [], []

    def call(x):
        y = torch.zeros(1000)
        given.append(float(x))
        places.append(y.data_ptr())
        return y

    replay = Cpu(turn=0.0, settle=0.0).capture(call, [torch.tensor(i) for i in range(3)]).replay
    replay(), replay()
    assert given == [0, 1, 2, 0, 1, 2, 0]
    assert all(len(set(places[i : i + 3])) == 3 for i in range(len(places) - 2))


def test_sets_leave_the_cache_cold():
    on = Cpu()
    on.cache, on.free_bytes = 50 << 20, lambda: 80 << 30
    assert on.sets(1 << 30, 2 << 30) == 2 and on.sets(30 << 20, 60 << 20) == 5 and on.sets(100, 200) == 64
    on.free_bytes = lambda: 3 << 30
    assert on.sets(30 << 20, 300 << 20) == 3  # as many as there is room for


def test_unknown_device():
    with pytest.raises(ValueError, match="device: the rule is one of cuda, cpu; got 'tpu'"):
        device.device("tpu")


# --- a GPU's own path ------------------------------------------------------------------------------------------------


class Event:
    """Time is the number of calls so far."""

    calls = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.calls

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return float(end.at - self.at) * 1e3 / 1e3  # ms: a call is one


class Graph:
    def __init__(self):
        self.replays = self.captured = 0

    def replay(self):
        Event.calls += self.captured


@pytest.fixture
def cuda(monkeypatch):
    """A Cuda device over the CPU; what it does with streams and memory is written down."""
    seen = types.SimpleNamespace(streams=[], dead=False, graphs=[])

    @contextlib.contextmanager
    def stream(which):
        seen.streams.append(which)
        yield

    @contextlib.contextmanager
    def graph(captured, stream, pool=None):
        assert stream is side
        before = Event.calls
        yield
        captured.captured = Event.calls - before
        Event.calls = before  # a capture runs nothing
        seen.graphs.append(captured.captured)

    def synchronize():
        if seen.dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    side = types.SimpleNamespace(wait_stream=lambda other: None)
    memory = iter(range(100))
    properties = types.SimpleNamespace(
        name="NVIDIA X", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20
    )
    stand_in = types.SimpleNamespace(
        is_available=lambda: True, Stream=lambda: side, current_stream=lambda: side, stream=stream, Event=Event,
        synchronize=synchronize, reset_peak_memory_stats=lambda: None, memory_allocated=lambda: 100,
        max_memory_allocated=lambda: 700, CUDAGraph=Graph, graph=graph, get_device_properties=lambda i: properties,
        graph_pool_handle=lambda: "pool", current_device=lambda: 0, mem_get_info=lambda: (70 << 30, 80 << 30), empty_cache=lambda: next(memory),
    )  # fmt: skip
    monkeypatch.setattr(torch, "cuda", stand_in)
    on = Cuda()
    on.name, on.seen = "cpu", seen
    return on


def test_a_graph_covers_every_set(cuda):
    """Each set has its turn in a replay, and a sample is the time of one call."""
    given = []

    def call(x):
        given.append(x)
        Event.calls += 1
        return torch.zeros(1)

    sets = [torch.zeros(1) for _ in range(64)]
    with cuda.entered():
        captured = cuda.capture(call, sets)
    assert cuda.seen.graphs == [64] and [id(x) for x in given[-64:]] == [id(x) for x in sets]
    assert captured.replay() == [pytest.approx(1e-3)] and captured.peak_bytes == 600
    assert cuda.seen.streams == [cuda.side]
    captured = cuda.capture(call, sets[:2], graph=False)
    assert cuda.seen.graphs == [64] and captured.replay() == [pytest.approx(1e-3)]
    assert cuda.host_seconds(call, sets[:2]) > 0
    assert cuda.sets(30 << 20, 60 << 20) == 5


@pytest.mark.parametrize("graph", [True, False])
def test_what_a_graph_reads_stays_in_memory(cuda, graph):
    """A graph keeps nothing alive: freed, its inputs would be others' memory, or nobody's, when it is replayed."""
    sets = [torch.zeros(1) for _ in range(2)]
    there = [weakref.ref(x) for x in sets]
    replay = cuda.capture(lambda x: torch.zeros(1), sets, graph).replay
    del sets
    gc.collect()
    assert all(x() is not None for x in there)
    del replay
    gc.collect()
    assert not any(x() is not None for x in there)


def test_a_capture_that_fails_leaves_the_allocator_as_it_was(cuda, monkeypatch):
    """torch.cuda.graph leaves without it where ending the capture is an error, too."""
    ended, calls = [], itertools.count()
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *which, name=name: ended.append((name, *which)), raising=False)

    def call(x):
        if next(calls) >= 3:  # warmed up and timed
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="not permitted"):
        cuda.capture(call, [torch.zeros(1)] * 2)
    assert cuda.seen.graphs == [0]  # the empty one that ends it
    assert ended == [("_cuda_endAllocateToPool", 0, "pool"), ("_cuda_releasePool", 0, "pool")]


def test_long_calls_are_no_matter_of_the_host(cuda):
    """An hour of a GPU is not spent on the microseconds that a call of milliseconds takes to return."""
    calls = itertools.count()

    def call(x):
        next(calls)
        Event.calls += 30  # ms

    cuda.host_seconds(call, [None])
    assert next(calls) == 6
    cuda._timed = lambda once: (once(), 1e-5)[1]
    cuda.host_seconds(call, [None])
    assert next(calls) == 7 + 1 + 5 * 32


def test_a_dead_gpu_is_noticed(cuda):
    assert cuda.alive()
    cuda.seen.dead = True
    assert not cuda.alive()


def test_limits_of_a_gpu(cuda, monkeypatch):
    """The fastest of several ways; torch's setting of TF32 is what it was."""
    monkeypatch.setattr(device, "_SQUARES", (16, 32))
    monkeypatch.setattr(device, "_ROWS", 1)
    times = iter([0.002, 0.001, 0.004, 0.003, 0.005, 0.006] + [0.25] * 100)
    monkeypatch.setattr(cuda, "_seconds", lambda call: (call(), next(times))[1])
    before = torch.backends.cuda.matmul.fp32_precision
    found = cuda.limits()
    nbytes = 4 * (1 << 14)
    assert found["copy"] == pytest.approx(2 * nbytes / 0.001) and found["read"] == found["copy"]  # 1 / 0.003 is less
    assert found["bfloat16"] == pytest.approx(2 * 32**3 / 0.25) and found["tf32"] == pytest.approx(2 * 16**3 / 0.25)
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_about_a_gpu(cuda, tmp_path, monkeypatch):
    """With what nvidia-smi says, and without nvidia-smi."""
    monkeypatch.setenv("PATH", str(tmp_path))
    found = cuda.about()
    assert (found["device"], found["arch"]) == ("NVIDIA X", "sm_90") and "driver" not in found
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '580.65.06, 345, 1980, 2619, 700.00, [N/A]'\n")
    smi.chmod(0o755)
    found = cuda.about()
    assert found["driver"] == "580.65.06" and found["sm_mhz_max"] == 1980.0 and found["celsius"] == "[N/A]"
