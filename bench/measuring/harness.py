"""One case: check every provider, then time those that are right, taking turns.

What a speed is worth: limits measured in the same process, inputs and outputs that rotate through three times the last
cache, CUDA graphs, providers interleaved and reversed, and no speed of a wrong result or above the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gpulayers.bench.cases.case import Case
from gpulayers.bench.cases.providers import Function, Ours, Provider
from gpulayers.bench.judging import judge
from gpulayers.bench.judging.judge import Error
from gpulayers.bench.measuring.device import Captured, Device, device
from gpulayers.bench.measuring.records import Row, Status
from gpulayers.bench.measuring.timing import quantiles, take_turns
from torch import Tensor

from gpulayers import arrays, dispatch
from gpulayers.arrays import float32

ABOVE = 1.05
"""A reading may be this many times the limit: both are measured."""


class DeviceDied(RuntimeError):
    """This process cannot use the device any more; ``rows`` is what was measured of the case."""

    def __init__(self, rows: list[Row]):
        super().__init__("the device does not answer any more")
        self.rows = rows


def least_seconds(read: float, written: float, flops: float, limits: dict[str, float], rate: str) -> float:
    """The limit: what the memory takes (bytes read and written), or the arithmetic if that is longer.

    A copy and a sum, as measured, say what reading and what writing a byte takes. rate: of limits, the flops' own.
    """
    reading = 1 / limits["read"]
    writing = 2 / limits["copy"] - reading
    return max(read * reading + written * writing, flops / limits[rate])


class _Set(NamedTuple):
    """One of the sets that rotate."""

    inputs: list
    dys: list[Tensor]


class _Contender(NamedTuple):
    """A provider whose results are right."""

    provider: Provider
    function: Function
    errors: dict[str, Error]


class Measurement:
    """One case in one dtype on a device: its inputs, its truth, its limits."""

    def __init__(
        self, family: str, case: Case, dtype: np.dtype, on: Device, limits: dict[str, float], process: int = 0
    ):
        self.family, self.case, self.dtype, self.on, self.process = family, case, dtype, on, process
        self.traffic, self.work = case.traffic(dtype), case.work()
        rate = "tf32" if dtype == float32 and on.name == "cuda" and judge.allows_tf32(case) else str(dtype)
        self.limit, self.possible = {}, {}
        for d in case.directions():
            t = self.traffic[d]
            self.limit[d] = least_seconds(t.read + t.saved, t.written, self.work[d], limits, rate)
            self.possible[d] = least_seconds(t.read, t.written, self.work[d] / case.saving, limits, rate)
        self.generator, self.judge = on.generator(0), ""

    def draw(self) -> _Set:
        """Fresh inputs, and gradients of the outputs laid out as the outputs are."""
        outputs = self.case.rule(self.dtype).outputs.values() if self.case.wanted() else ()
        dys = [
            torch.randn(o.shape, generator=self.generator, device=self.generator.device, dtype=arrays.to_torch_dtype(o.dtype))
            for o in outputs
        ]  # fmt: skip
        put = self.case.put
        return _Set(self.case.draw_tensors(self.generator, self.dtype), dys if put is None else [*map(put, dys)])

    def sets(self) -> list[_Set]:
        forward, both = self.traffic["forward"], self.traffic["both"]
        return [self.draw() for _ in range(self.on.sets(forward.total, both.total))]

    def row(
        self, provider: Provider, direction: Any, status: Status, reason: str = "", error: Error | None = None
    ) -> Row:
        """A row without a time."""
        return Row(
            family=self.family, op=self.case.op.name, case=self.case.name, dtype=str(self.dtype), direction=direction,
            provider=provider.name, ours=provider.ours, headline=self.case.headline, sweep=self.case.sweep,
            size=self.case.size, status=status, reason=reason, us=None, samples=0, limit_us=self.limit[direction] * 1e6,
            share=None, bytes=self.traffic[direction].total, flops=self.work[direction],
            error=error and _finite(error.relative), ulp=error and _finite(error.ulp), bound=error and _finite(error.times),
            judge="", sets=0, peak_bytes=None, host_us=None, process=self.process,
        )  # fmt: skip


def _finite(x: float) -> float | None:
    """JSON has no infinity."""
    return x if np.isfinite(x) else None


def measure(
    m: Measurement,
    chosen: Sequence[Provider],
    rounds: int | None = None,
    trying: Callable[[Provider], None] = lambda provider: None,
) -> list[Row]:
    """A row for each direction of each provider: its time, or why there is none.

    trying: told whose code runs next. Raises DeviceDied.
    """
    rows: list[Row] = []
    with m.on.entered():
        right = _checked(m, chosen, rows, trying)
        m.on.tidy()
        sets = m.sets() if right else []
        for direction in m.case.directions():
            ready = [c for c in right if direction in c.errors]
            _timed(m, direction, ready, sets, rounds or m.on.rounds, rows, trying)
            m.on.tidy()
    return rows


def _checked(m: Measurement, chosen: Sequence[Provider], rows: list[Row], trying: Callable) -> list[_Contender]:
    """The providers whose results are right; rows for the others."""
    inputs, dys = m.draw()
    true, right = judge.truth(m.case, m.dtype, inputs, dys), []
    for provider in chosen:
        trying(provider)
        try:
            function = provider.function()
            with function.entered():
                found = judge.results(m.case, function, function.put(inputs), dys)
            errors = judge.judge(true, function, found, provider.ours)
        except Exception as error:
            _note(m, provider, provider.directions, error, rows)
            continue
        allowed = 1.0 if provider.ours else judge.OTHERS_TIMES
        if all(e.times <= allowed for e in errors.values()):
            right.append(_Contender(provider, function, errors))
            continue
        for direction, e in errors.items():
            wrong = e.times > allowed
            reason = f"{e.times:.3g} times the allowed error: {e.where}" if wrong else "its other results are wrong"
            rows.append(m.row(provider, direction, "wrong", reason, e) | {"judge": true.by})  # type: ignore[arg-type]
    m.judge = true.by
    return right


def _note(m: Measurement, provider: Provider, directions: Sequence[str], error: Exception, rows: list[Row]) -> None:
    """Rows for a provider that raised; raises DeviceDied if that was the end."""
    status: Status = "refused" if isinstance(error, dispatch.Refused) else "raised"
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    rows += [m.row(provider, d, status, reason) for d in directions]
    if not m.on.alive():
        raise DeviceDied(rows) from error


def _call(direction: str, function: Function, sets: Sequence[_Set]) -> tuple[Callable[[Any], Any], Sequence[Any]]:
    """(call, what it is called on in turn)."""
    given = [_Set(function.put(s.inputs), s.dys) for s in sets]
    if function.in_place:
        given = [_Set([x if x is None else x.clone() for x in s.inputs], s.dys) for s in given]
    if direction == "forward":
        return function.forward, [s.inputs for s in given]
    if direction == "both":
        return lambda s: function.both(*s), given
    recorded = [(function.record(s.inputs)[1], s.dys) for s in given]
    return lambda s: s[0](s[1], True), recorded


def _timed(
    m: Measurement, direction: Any, ready: list[_Contender], sets: list[_Set], rounds: int, rows: list[Row], trying: Callable
) -> None:  # fmt: skip
    """Rows of one direction: all that are ready take turns."""
    captured: dict[str, tuple[_Contender, Captured, float | None]] = {}
    for c in ready:
        trying(c.provider)
        try:
            with c.function.entered():
                call, given = _call(direction, c.function, sets)
                taken = m.on.capture(call, given, graph=not c.function.no_graph)
                captured[c.provider.name] = c, taken, m.on.host_seconds(call, given)
        except Exception as error:
            _note(m, c.provider, [direction], error, rows)
    samples = take_turns({name: _inside(c.function, taken.replay) for name, (c, taken, _) in captured.items()}, rounds)
    for name, (c, taken, host) in captured.items():
        row = _judged_row(m, direction, c, samples[name])
        row |= {"judge": m.judge, "sets": len(sets), "peak_bytes": taken.peak_bytes, "host_us": host and host * 1e6}
        if c.function.no_graph and row["status"] == "ok":
            row["reason"] = f"timed without a CUDA graph: {c.function.no_graph}"
        rows.append(row)


def _inside(function: Function, replay: Callable[[], list[float]]) -> Callable[[], list[float]]:
    def inside() -> list[float]:
        with function.entered():
            return replay()

    return inside


def _judged_row(m: Measurement, direction: Any, c: _Contender, samples: list[float]) -> Row:
    """With the time, unless nothing can be that fast."""
    found, error = quantiles(samples), c.errors[direction]
    median, possible = found["p50"], m.possible[direction]
    if median * ABOVE < possible:
        reason = (
            f"{median * 1e6:.3g} µs, and the limit is {possible * 1e6:.3g}: not all was computed, or a limit is wrong"
        )
        return m.row(c.provider, direction, "impossible", reason, error)
    row = m.row(c.provider, direction, "ok", "", error)
    row["us"], row["samples"] = {name: s * 1e6 for name, s in found.items()}, len(samples)
    row["share"] = m.limit[direction] / median
    return row


class Timer:
    """For who searches a kernel's configurations: whether one backend is right on a case, and how fast.

    Whatever is in force when it is called (a forced configuration, say) is what is checked and timed. Inputs are drawn
    once for a case.
    """

    def __init__(self, on: Device | None = None, rounds: int = 5):
        self.on, self.rounds = on or device("cuda"), rounds
        self.limits = self.on.limits()
        self._last: tuple[Any, Any] = None, None

    def _prepared(self, case: Case, dtype: np.dtype) -> tuple[Measurement, Any, _Set, list[_Set]]:
        key = case.op.name, case.name, str(dtype)
        if self._last[0] != key:
            self._last = None, None  # its memory first
            m = Measurement("", case, dtype, self.on, self.limits)
            drawn = m.draw()
            self._last = key, (m, judge.truth(case, dtype, *drawn), drawn, m.sets())
        return self._last[1]

    def check(self, case: Case, dtype: np.dtype, backend: str = "triton") -> str | None:
        """None if all outputs and gradients are within the derived bound, else what is wrong. Raises what a kernel raises."""
        _, true, drawn, _ = self._prepared(case, dtype)
        function = Ours(case, backend)
        with self.on.entered(), function.entered():
            errors = judge.judge(true, function, judge.results(case, function, *drawn), ours=True)
        worst = max(errors.values(), key=lambda e: e.times)
        return None if worst.times <= 1 else f"{worst.times:.3g} times the allowed error: {worst.where}"

    def capture(self, case: Case, dtype: np.dtype, direction: str, backend: str = "triton") -> Captured:
        """The call ready to be timed; ``_timing.take_turns`` compares several."""
        _, _, _, sets = self._prepared(case, dtype)
        function = Ours(case, backend)
        with self.on.entered(), function.entered():
            return self.on.capture(*_call(direction, function, sets))

    def seconds(self, case: Case, dtype: np.dtype, direction: str, backend: str = "triton") -> float:
        """Median seconds of a call: "forward", "backward" or "both"."""
        with self.on.entered():
            found = take_turns({backend: self.capture(case, dtype, direction, backend).replay}, self.rounds)
        return quantiles(found[backend])["p50"]

    def limit(self, case: Case, dtype: np.dtype, direction: str) -> float:
        """The least seconds that the device's limits allow."""
        return self._prepared(case, dtype)[0].limit[direction]
