"""The lab's run: every case, the most valuable first, within a time limit, each row on disk as soon as it exists."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from gpulayers.bench.cases.case import Case
from gpulayers.bench.cases.providers import Provider, providers
from gpulayers.bench.measuring.device import Device
from gpulayers.bench.measuring.harness import DeviceDied, Measurement, measure
from gpulayers.bench.measuring.records import DEATHS, Job, Row, Store, failed
from tqdm.auto import tqdm

DONE, FAILED, DIED = 0, 1, 3
"""Exit status: all measured or out of time; a check failed; the device died, and a fresh process should go on."""

AHEAD = 64
"""Tasks that are made ready together: enough for all processors, few enough that a run that is cut off used them."""


class Task(NamedTuple):
    """One case's providers of one speed of getting ready."""

    family: str
    case: Case
    dtype: np.dtype
    slow: bool

    def job(self, provider: Provider) -> Job:
        return Job(self.family, self.case.op.name, self.case.name, str(self.dtype), provider.name)


def ordered(cases: Sequence[tuple[str, Case]], dtypes: Sequence[np.dtype]) -> list[Task]:
    """The most valuable first, so that a run that is cut off has something of each.

    Every family's headline in the first dtype, with the providers that are slow to get ready (torch.compile); then, without
    them, the other cases, the headlines in the other dtypes, the sweeps over sizes, and the rest; then these with them.
    Within each, families take turns.
    """
    first, *later = dtypes
    headlines = [(f, c) for f, c in cases if c.headline]
    sweeps = [(f, c) for f, c in cases if c.sweep]
    rest = [(f, c) for f, c in cases if not c.headline and not c.sweep]
    most = [(headlines, first)]
    less = [(rest, first), *((headlines, d) for d in later), (sweeps, first), *((rest, d) for d in later)]
    tasks = []
    for groups in (most, less):
        for slow in (False, True):
            for group, dtype in groups:
                tasks += [Task(family, case, dtype, slow) for family, case in _in_turn(group)]
    return tasks


def _in_turn(cases: Iterable[tuple[str, Case]]) -> list[tuple[str, Case]]:
    """One of each family, then the next of each."""
    by_family: dict[str, list[tuple[str, Case]]] = {}
    for family, case in cases:
        by_family.setdefault(family, []).append((family, case))
    return [found for turn in itertools.zip_longest(*by_family.values()) for found in turn if found is not None]


def run(
    on: Device,
    store: Store,
    tasks: Sequence[Task],
    *,
    until: float = float("inf"),
    only: Sequence[str] = (),
    rounds: int | None = None,
    prepare: Callable[[Sequence[Task]], None] = lambda tasks: None,
    clock: Callable[[], float] = time.monotonic,
    progress: bool = True,
) -> int:
    """Measure what the store does not have yet; the exit status.

    until: of ``clock``; a task begins only if one as long as the longest so far of its speed would end by then. only: names
    of providers. prepare: told the next tasks, ``AHEAD`` at a time, before the first of them begins. Raises ValueError for
    a name that nobody has, and what limits raise where the device does not work at all.
    """
    names = dict.fromkeys(p.name for t in tasks for p in providers(t.case, on))
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"providers: the rule is some of {', '.join(names)}; got {', '.join(unknown)}")
    todo = [t for t in tasks if _missing(t, store, on, only)]
    limits = on.limits()
    process = store.begin(on.about(), limits)  # with the clocks of a device that is warm
    longest = {False: 0.0, True: 0.0}
    with _stopped_cleanly(store), tqdm(todo, unit="case", disable=not progress, file=sys.stderr) as bar:
        for i, task in enumerate(bar):
            if i % AHEAD == 0 and clock() < until:
                bar.set_postfix_str("compiling")
                prepare(todo[i : i + AHEAD])
            begin = clock()
            if begin >= until or begin + longest[task.slow] > until:
                bar.write(f"out of time: {len(todo) - bar.n} of {len(todo)} were not measured; --resume goes on")
                break
            bar.set_postfix_str(f"{task.case.op.name}, {task.case.name}, {task.dtype}")
            m = Measurement(task.family, task.case, task.dtype, on, limits, process)
            if not _measured(task, m, store, only, rounds):
                return DIED
            longest[task.slow] = max(longest[task.slow], clock() - begin)
    return FAILED if any(map(failed, store.results["rows"])) else DONE


def _missing(task: Task, store: Store, on: Device, only: Sequence[str]) -> list[Provider]:
    """The task's own providers that are not measured, in all directions, and did not fail."""

    def missing(p: Provider) -> bool:
        rows = store.of(task.job(p))
        return _is_ok(rows) and {r["direction"] for r in rows} != set(p.directions)

    return [p for p in providers(task.case, on, only) if p.slow == task.slow and missing(p)]


def _measured(task: Task, m: Measurement, store: Store, only: Sequence[str], rounds: int | None) -> bool:
    """Measure one task into the store; whether the device is still there."""
    chosen = _missing(task, store, m.on, only)
    if task.slow:  # those that were measured before take turns with it again, or it would be compared across time
        chosen = [
            *(p for p in providers(task.case, m.on, only) if not p.slow and _is_ok(store.of(task.job(p)))),
            *chosen,
        ]
    dead = [p for p in chosen if store.deaths(task.job(p)) >= DEATHS]
    rows: list[Row] = [m.row(p, d, "crashed", f"{DEATHS} processes died of it") for p in dead for d in p.directions]
    chosen = [p for p in chosen if p not in dead]
    alive = True
    try:
        rows += measure(m, chosen, rounds, trying=lambda p: store.trying(task.job(p)))
    except DeviceDied as died:
        rows, alive = [*rows, *died.rows], False
    except (
        Exception
    ) as error:  # no truth, no memory for the inputs: one case must not cost the others their measurement
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        rows += [m.row(p, d, "raised", reason) for p in chosen if not store.of(task.job(p)) for d in p.directions]
        alive = m.on.alive()
    store.add(rows)
    return alive


def _is_ok(rows: Sequence[Row]) -> bool:
    """Nothing failed so far."""
    return all(r["status"] == "ok" for r in rows)


@contextlib.contextmanager
def _stopped_cleanly(store: Store) -> Iterator[None]:
    """Who asks the process to stop (an interrupt, SIGTERM) does not count as a death of what it was at."""
    try:
        with stoppable():
            yield
    finally:
        store.rest()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within, SIGTERM is an exception, so that what must be put in order is."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        before = None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
