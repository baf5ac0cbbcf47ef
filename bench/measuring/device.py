"""Where the lab measures: a GPU, or this CPU, which stands in for one so that the whole path runs anywhere."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from gpulayers.bench.measuring.records import processor, read_if_there

from gpulayers import arrays

_COLD = 3  # times the last cache: what rotates through it is gone before its turn comes again
_MOST_SETS = 64
_SQUARE = 384  # a matrix product large enough for a CPU's full rate
_SQUARES = 4096, 8192  # and for a GPU's
_ROWS = 1 << 14
_WARM = 0.3  # seconds in which an idle GPU raises its clocks: limits too low would refuse what is measured later


class Captured(NamedTuple):
    """Calls that are ready to be timed."""

    replay: Callable[[], list[float]]
    """Runs them; gives samples, seconds a call."""
    peak_bytes: int | None
    """Memory that one call takes at its peak, outputs included; None where nobody counts it."""


class Device:
    """What the lab asks of a device."""

    name = ""
    backends: tuple[str, ...] = ()
    """Ours that can compute there."""
    cache = 0
    """Bytes of its last cache."""
    rounds = 9
    """Turns of each provider."""

    def about(self) -> dict[str, Any]:
        """Its name, its driver, its clocks now."""
        raise NotImplementedError

    def limits(self) -> dict[str, float]:
        """Measured now: bytes a second that a copy ("copy", read and written together) and a sum ("read") move, and the
        flops a second of a matrix product for each dtype; "tf32" is float32's under TF32."""
        raise NotImplementedError

    def capture(self, call: Callable[[Any], Any], sets: Sequence[Any], graph: bool = True) -> Captured:
        """Calls on each of ``sets`` in turn, warmed up; their outputs rotate too. graph: in a CUDA graph, if it has them."""
        raise NotImplementedError

    def host_seconds(self, call: Callable[[Any], Any], sets: Sequence[Any]) -> float | None:
        """Seconds until a call returns, its kernels still running; None where a call returns when it is done."""
        return None

    def entered(self) -> contextlib.AbstractContextManager:
        """Inside, everything goes to the stream that calls are captured on."""
        return contextlib.nullcontext()

    def sets(self, nbytes: int, moved: int) -> int:
        """How many sets of inputs (``nbytes`` each) leave none in the cache; ``moved``: what one takes with its results."""
        room = max(2, int(self.free_bytes() / 3 / max(moved, 1)))
        return max(2, min(_MOST_SETS, room, -(-_COLD * self.cache // max(nbytes, 1))))

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.name).manual_seed(seed)

    def free_bytes(self) -> int:
        raise NotImplementedError

    def tidy(self) -> None:
        """Give back memory that nothing uses."""

    def alive(self) -> bool:
        """Whether this process can still use it: not after an illegal access on a GPU, say."""
        return True


class Cpu(Device):
    """This CPU, timed by a clock.

    turn: seconds of calls in each replay (at least two). settle: seconds of rest before: the threads of the provider
    before spin for tens of milliseconds. large: elements of the arrays that limits are measured on.
    """

    name = "cpu"
    backends = ("numpy", "definition")
    rounds = 5

    def __init__(
        self,
        turn: float = 0.05,
        settle: float = 0.12,
        clock: Callable[[], float] = time.perf_counter,
        large: int = 1 << 25,
    ):
        self.turn, self.settle, self.clock, self.large = turn, settle, clock, large
        self.cache = _last_cache()

    def about(self) -> dict[str, Any]:
        return {"device": processor(), "threads": torch.get_num_threads(), "cache_bytes": self.cache}

    def limits(self) -> dict[str, float]:
        source = torch.ones(self.large)
        target, nbytes = torch.empty_like(source), 4 * self.large
        read = nbytes / min(self._seconds(lambda: source.sum()), self._seconds(lambda: source.numpy().sum()))
        copy = 2 * nbytes / self._seconds(lambda: target.copy_(source))
        a = torch.ones(_SQUARE, _SQUARE)
        # Whatever multiplies fastest here: a provider may convert to float32, or use NumPy's library.
        rate = 2 * _SQUARE**3 / min(self._seconds(lambda: a @ a), self._seconds(lambda: a.numpy() @ a.numpy()))
        rates = {"float32": rate}
        for dtype in (torch.bfloat16, torch.float16):
            b = a.to(dtype)
            rates[str(arrays.from_torch_dtype(dtype))] = max(rate, 2 * _SQUARE**3 / self._seconds(lambda b=b: b @ b))
        return {"copy": copy, "read": max(read, copy), **rates, "tf32": rate}

    def _seconds(self, call: Callable[[], Any], repeats: int = 15) -> float:
        """The least of some calls: a limit is what the machine can do."""
        call()
        found = []
        for _ in range(repeats):
            start = self.clock()
            call()
            found.append(self.clock() - start)
        return min(found)

    def capture(self, call: Callable[[Any], Any], sets: Sequence[Any], graph: bool = True) -> Captured:
        rotating = itertools.cycle(sets)
        alive: collections.deque = collections.deque(maxlen=len(sets))  # so that the outputs rotate, too
        alive.append(call(next(rotating)))

        def replay() -> list[float]:
            time.sleep(self.settle)
            alive.append(call(next(rotating)))  # its own threads awake again
            samples: list[float] = []
            begin = self.clock()
            while len(samples) < 2 or self.clock() - begin < self.turn:
                inputs = next(rotating)
                start = self.clock()
                y = call(inputs)
                samples.append(self.clock() - start)
                alive.append(y)
            return samples

        return Captured(replay, None)

    def free_bytes(self) -> int:
        found = re.search(r"MemAvailable:\s+(\d+) kB", read_if_there("/proc/meminfo"))
        return 1024 * int(found[1]) if found else 4 << 30


class Cuda(Device):
    """The current NVIDIA GPU: CUDA graphs, timed by events.

    replay: seconds that one replay of a graph lasts, about.
    """

    name = "cuda"
    backends = ("triton", "cuda")

    def __init__(self, replay: float = 0.01):
        if not torch.cuda.is_available():
            raise RuntimeError("the lab measures kernels on an NVIDIA GPU, and torch sees none here")
        self.seconds, self.side = replay, torch.cuda.Stream()
        self.cache = torch.cuda.get_device_properties(0).L2_cache_size

    def about(self) -> dict[str, Any]:
        p = torch.cuda.get_device_properties(0)
        found = {
            "device": p.name, "arch": f"sm_{p.major}{p.minor}", "sms": p.multi_processor_count, "cuda": torch.version.cuda,
            "memory_bytes": p.total_memory, "cache_bytes": self.cache,
        }  # fmt: skip
        return found | _smi()

    def limits(self) -> dict[str, float]:
        big = torch.randn(_ROWS, 1 << 14, device=self.name)
        out, nbytes = torch.empty_like(big), big.numel() * 4
        begin = time.monotonic()
        while time.monotonic() - begin < _WARM:
            out.copy_(big)
            torch.cuda.synchronize()
        # A limit is what the fastest of several ways reaches.
        copy = 2 * nbytes / self._least(lambda: out.copy_(big), lambda: torch.add(big, 1, out=out))
        flat = big.view(-1)
        read = nbytes / self._least(lambda: big.sum(), lambda: big.sum(1), lambda: big.amax(1), lambda: flat.dot(flat))
        rates, setting = {}, torch.backends.cuda.matmul
        before = setting.fp32_precision
        for name, dtype, precision, sizes in (
            ("bfloat16", torch.bfloat16, before, _SQUARES),
            ("float16", torch.float16, before, _SQUARES),
            ("float32", torch.float32, "ieee", _SQUARES[:1]),
            ("tf32", torch.float32, "tf32", _SQUARES[:1]),
        ):
            setting.fp32_precision = precision
            try:
                rates[name] = max(self._rate(n, dtype) for n in sizes)
            finally:
                setting.fp32_precision = before
        return {"copy": copy, "read": max(read, copy), **rates}

    def _rate(self, n: int, dtype: torch.dtype) -> float:
        a, b = (torch.randn(n, n, device=self.name, dtype=dtype) for _ in range(2))
        return 2 * n**3 / self._least(lambda: a @ b, lambda: a @ b.T)

    def _least(self, *calls: Callable[[], Any]) -> float:
        return min(map(self._seconds, calls))

    def _seconds(self, call: Callable[[], Any], repeats: int = 15) -> float:
        """Median seconds of a call, by events."""
        for _ in range(3):
            call()
        return statistics.median(self._timed(call) for _ in range(repeats))

    def _timed(self, call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def capture(self, call: Callable[[Any], Any], sets: Sequence[Any], graph: bool = True) -> Captured:
        call(sets[0])  # compiled and loaded
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        each = max(1e-7, self._timed(lambda: call(sets[0])))
        peak = torch.cuda.max_memory_allocated() - before
        each = min(each, max(1e-7, self._timed(lambda: call(sets[1]))))
        # Every set has its turn in each replay, or fewer would rotate than were drawn.
        calls = max(len(sets), min(200, round(self.seconds / each)))

        def run() -> None:
            alive: collections.deque = collections.deque(maxlen=len(sets))  # so that the outputs rotate, too
            for inputs in itertools.islice(itertools.cycle(sets), calls):
                alive.append(call(inputs))

        again = self._graph(run).replay if graph else run
        # ``sets`` along with it: a graph reads them in each replay, and keeps none of them alive.
        return Captured(functools.partial(self._replayed, again, calls, sets), peak)

    def _replayed(self, run: Callable[[], Any], calls: int, sets: Sequence[Any]) -> list[float]:
        return [self._timed(run) / calls]

    def _graph(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """``run`` captured. Where that fails, the process goes on as if it had not been tried."""
        captured, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(captured, pool=pool, stream=self.side):
                run()
        except Exception:
            # Of a capture that an error broke torch ends the stream's part alone. Left so, the allocator would free no
            # memory any more; its generator takes no call outside a graph until another capture, an empty one, ends.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
                with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.side):
                    pass
            raise
        return captured

    def host_seconds(self, call: Callable[[Any], Any], sets: Sequence[Any]) -> float | None:
        torch.cuda.synchronize()
        # Far fewer than the queue of launches holds; and calls that last long are no matter of the host's.
        each = max(1e-7, self._timed(lambda: call(sets[0])))
        samples, calls = [], max(1, min(32, round(self.seconds / each)))
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for inputs in itertools.islice(itertools.cycle(sets), calls):
                call(inputs)
            samples.append((time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
        return statistics.median(samples)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            yield
        torch.cuda.current_stream().wait_stream(self.side)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0]

    def tidy(self) -> None:
        torch.cuda.empty_cache()

    def alive(self) -> bool:
        try:
            torch.cuda.synchronize()
        except Exception:
            return False
        return True


def device(name: str) -> Device:
    """The device of this name: "cuda", "cpu". Raises ValueError for another, RuntimeError for "cuda" without a GPU."""
    if name not in ("cuda", "cpu"):
        raise ValueError(f"device: the rule is one of cuda, cpu; got {name!r}")
    return Cuda() if name == "cuda" else Cpu()


def _last_cache() -> int:
    """At least 32 MiB: a virtual machine may show its share of a cache that it has more of."""
    text = read_if_there("/sys/devices/system/cpu/cpu0/cache/index3/size").strip()
    return max(32 << 20, int(text[:-1]) * 1024 if text.endswith("K") else 0)


_SMI = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "sm_mhz_max": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "watts_limit": "power.limit",
    "celsius": "temperature.gpu",
}


def _smi() -> dict[str, Any]:
    """What nvidia-smi says of the first GPU; empty without it."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI.values())}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [v.strip() for v in done.stdout.strip().split(",")]
    if done.returncode or len(values) != len(_SMI):
        return {}
    return {name: float(v) if re.fullmatch(r"[\d.]+", v) and name != "driver" else v for name, v in zip(_SMI, values)}
