"""Whole models in every way, the most telling first: each row is on disk as soon as it exists, and what fails is one."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from gpulayers.bench.measuring import whole
from gpulayers.bench.measuring.device import Device
from gpulayers.bench.measuring.lab import DIED, DONE, FAILED, stoppable
from gpulayers.bench.measuring.records import machine, write_json
from gpulayers.bench.measuring.whole import MODES, Job, Truth
from gpulayers.bench.models.kind import Kind
from tqdm.auto import tqdm

SCHEMA = 1
LIMIT = 150.0
"""Seconds that a row may take, compiling included."""
EMPTY = dict.fromkeys(
    (
        "ms",
        "least_ms",
        "most_ms",
        "busy_ms",
        "host_ms",
        "launches",
        "copies",
        "peak_bytes",
        "losses",
        "error",
        "ready_s",
    )
)
"""What a row knows that failed."""


def ordered(models: Sequence[str], ways: Sequence[str], precisions: Sequence[str]) -> list[Job]:
    """The first model's training in every way; then the others', what need not be compiled first; then inference. Later
    precisions come after all that."""
    found: dict[Job, None] = {}
    for precision in precisions:
        first = [Job(m, "training", way, precision) for m, way in itertools.product(models[:1], ways)]
        found |= dict.fromkeys(first)
        for mode, slow in itertools.product(MODES, (False, True)):
            some = [way for way in ways if ("compiled" in way) == slow]
            found |= dict.fromkeys(Job(m, mode, way, precision) for m, way in itertools.product(models, some))
    return list(found)


class Store:
    """``models.json``, whole at any moment. resume: go on with what is there, of this commit."""

    def __init__(self, folder: pathlib.Path, about: dict[str, Any], size: str, resume: bool):
        self.path = folder / "models.json"
        self.whole: dict[str, Any] = {
            "schema": SCHEMA, "machine": machine(), "about": about, "size": size, "trying": [], "rows": []
        }  # fmt: skip
        if resume and self.path.exists():
            self._go_on(json.loads(self.path.read_text()))

    def _go_on(self, there: dict[str, Any]) -> None:
        held, here = ((w["about"].get("device"), w["size"]) for w in (there, self.whole))
        if held != here:
            raise ValueError(f"{self.path} holds {held[1]} models on {held[0]}: name another folder (--out)")
        if there["machine"]["commit"] != self.whole["machine"]["commit"]:
            return  # what another commit took says nothing of this one
        self.whole["rows"] = there["rows"]
        if there["trying"]:
            self.add(Job(*there["trying"]), {"status": "crashed", "reason": "the process died of it"})

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.whole["rows"]

    def has(self, job: Job) -> bool:
        return any(job == tuple(row[name] for name in Job._fields) for row in self.rows)

    def trying(self, job: Job | None) -> None:
        """From here on, a death of the process is this job's; None: nobody's."""
        self.whole["trying"] = list(job or ())
        write_json(self.path, self.whole)

    def add(self, job: Job, found: dict[str, Any]) -> None:
        self.rows.append(job._asdict() | {"status": "", "reason": ""} | EMPTY | found)
        self.trying(None)


def failed(row: Mapping[str, Any]) -> bool:
    """Whether it fails a run: wrong results, or an error of ours."""
    return row["status"] == "wrong" or (row["way"].startswith("patched") and row["status"] in ("raised", "crashed"))


def run(
    on: Device, store: Store, kinds: Mapping[str, Kind], jobs: Sequence[Job], until: float = float("inf"), progress: bool = True,
    prepare: Callable[[Kind, bool, float], None] | None = None,
) -> int:  # fmt: skip
    """Measure what the store does not have yet; the exit status. until: of ``time.monotonic``. prepare: told each model that
    is patched next, whether it is in bfloat16, and until when it may compile what that will launch."""
    truths, ready = _Truths(kinds, on), set()
    todo = [job for job in jobs if not store.has(job)]
    try:
        with stoppable(), tqdm(todo, unit="row", disable=not progress, file=sys.stderr) as bar:
            for job in bar:
                if (left := until - time.monotonic()) <= 0:
                    bar.write(f"out of time: {len(todo) - bar.n} of {len(todo)} were not measured; --resume goes on")
                    break
                bar.set_postfix_str(str(job))
                if prepare is not None and job.ours and job[::3] not in ready:
                    ready.add(job[::3])
                    try:
                        prepare(kinds[job.model], job.precision == "bfloat16", time.monotonic() + min(left, LIMIT) / 2)
                    except Exception as error:  # it is compiled when it is launched
                        bar.write(f"{job.model}: not compiled ahead: {_words(error)}")
                store.trying(job)
                found = _row(on, kinds[job.model], job, truths, min(left, LIMIT))
                store.add(job, found)
                bar.write(f"{job}: {told(store.rows[-1])}")
                if not on.alive():
                    return DIED
    finally:
        store.trying(None)
    return FAILED if any(map(failed, store.rows)) else DONE


def told(row: Mapping[str, Any]) -> str:
    if row["ms"] is None:
        return f"{row['status']}: {row['reason']}"
    return f"{row['ms']:.1f} ms, loss {row['losses'][-1]:.4f}"


def _row(on: Device, kind: Kind, job: Job, truths: _Truths, seconds: float) -> dict[str, Any]:
    if "compiled" in job.way:
        torch.compiler.reset()
    begin, found = time.monotonic(), {}
    try:
        with _within(seconds):
            true, reason = truths.of(job)
            left = seconds - (time.monotonic() - begin)
        with _within(max(left, 1.0)):
            found = {"reason": reason, **whole.measured(kind, job, on.name, true)}
    except Exception as error:  # the others are worth their time
        found = {"status": "raised", "reason": _words(error)}
    _tidy(on)
    return found


def _tidy(on: Device) -> None:
    """Models are full of circles."""
    if on.name == "cuda":
        gc.collect()
    on.tidy()


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


class _Truths:
    """The latest truth: ways of one model mostly follow each other."""

    def __init__(self, kinds: Mapping[str, Kind], on: Device):
        self.kinds, self.on = kinds, on
        self.known: dict[tuple[str, str, str], tuple[Truth | None, str]] = {}

    def of(self, job: Job) -> tuple[Truth | None, str]:
        """(the truth, why there is none)"""
        key = job.model, job.mode, job.precision
        if key not in self.known:
            try:
                self.known[key] = whole.truth(self.kinds[job.model], job, self.on.name), ""
            except torch.OutOfMemoryError as error:
                self.known[key] = None, f"results were not compared: {_words(error)}"[:200]
            _tidy(self.on)
        return self.known[key]


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """TimeoutError in what takes longer; in the main thread, where there are signals for it."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"more than {seconds:.0f} s")

    before: Any = None
    with contextlib.suppress(ValueError, AttributeError):
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if before is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
