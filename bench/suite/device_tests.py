"""The test suite on a device, by several processes that share its tests; each outcome is on disk as it comes.

They take them in the turn of ``order.py``. A process whose GPU stopped answering, or that died or hangs, is replaced; what
it was at counts as crashed. Tests that ``tests.jsonl`` has are not run again: a run that was cut off goes on.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from gpulayers.bench.measuring.records import machine, write_json
from gpulayers.bench.suite.outcomes import Outcome, Tail, adding, forget_failures, read
from gpulayers.bench.suite.reach import in_words, never

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIRST = ("test_gpu", "test_softmax", "test_norm", "test_linear", "test_conv", "test_loss", "test_activation")
"""Files in the order of their worth on a GPU; the others follow."""
ELSEWHERE = (
    "house",
    "audit",
    "sweep",
    "bench",
    "lab",
    "judge",
    "device",
    "suite",
    "tune",
    "search",
    "configs",
    "cli",
    "examples",
    "emulator",
    "interpreter",
    "memory",
    "mutation",
    "blocks",
    "files",
)
"""Tests that a GPU adds nothing to: names of files (their beginnings), without "test_"."""
SILENCE = 240.0
"""Seconds without an outcome after which a process hangs."""
START = 60.0
"""Seconds more for its first: it imports torch, and every test file."""
RESTARTS = 20
PROCESSES = min(16, os.cpu_count() or 1)
"""Most of their time goes into compiling kernels, on the CPU."""
PASSED, FAILED, OUT_OF_TIME = 0, 1, 75
"""Exit status."""
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1"
)
"""The processes share the CPU; each would take all of it."""


def files(root: pathlib.Path | None = None) -> list[pathlib.Path]:
    """The test files of a checkout that are worth running on a device, the most valuable first."""
    there = [
        p
        for p in ((root or ROOT) / "tests").glob("test_*.py")
        if not p.stem.removeprefix("test_").startswith(ELSEWHERE)
    ]
    return sorted(there, key=lambda p: (FIRST.index(p.stem) if p.stem in FIRST else len(FIRST), p.stem))


class _Worker:
    """A pytest process that takes its tests in turn with the others."""

    def __init__(self, name: str, command: Sequence[str], silence: float):
        self.name, self.command, self.silence = name, command, silence
        self.left, self.process = RESTARTS, self._start()

    def _start(self) -> subprocess.Popen:
        self.heard, self.at = time.monotonic() + START, ""
        environment = os.environ | _ONE_THREAD | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(self.command, cwd=ROOT, env=environment)

    def hear(self, news: Iterable[Outcome]) -> None:
        """Take in what was recorded since: when it last said something, and the test that it is at."""
        for o in news:
            if o.worker == self.name:
                self.heard, self.at = time.monotonic(), o.id if o.outcome == "started" else ""

    def going(self) -> bool:
        """Whether it runs; replaces a process that died or hangs."""
        if self.process.poll() is None:
            if time.monotonic() - self.heard < self.silence:
                return True
            self.kill()
        if self.process.returncode in (0, 1, 5) or not self.left:  # pytest ended: passed, failed, nothing to do
            return False
        self.left -= 1
        self.process = self._start()
        return True

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def run(
    out: pathlib.Path, seconds: float, processes: int = PROCESSES, paths: Sequence[Any] = (), silence: float = SILENCE
) -> int:
    """Run the tests for at most ``seconds``; the exit status. paths: test files, by default those worth it.

    Writes ``out``/tests.jsonl, and what came of it to ``out``/tests.json.
    """
    until = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    record = out / "tests.jsonl"
    forget_failures(record)
    before = read(record)
    tail, command = Tail(record), _command(record, paths or files())
    workers = [_Worker(name, [*command, f"--worker={name}"], silence) for name in map(str, range(1, processes + 1))]
    while any([w.going() for w in workers]) and time.monotonic() < until:
        time.sleep(0.2)
        _heard(tail, workers)
    stopped = [w for w in workers if w.process.poll() is None]
    for worker in stopped:
        worker.kill()
    _heard(tail, workers)
    with adding(record) as file:
        file.writelines(before.get(w.at, Outcome(w.at, "cut off")).line for w in stopped if w.at)
    found = read(record)
    _show(found, len(stopped))
    write_json(out / "tests.json", summary(found))
    if not found or any(o.outcome in _BAD for o in found.values()):
        return FAILED if found or not stopped else OUT_OF_TIME
    return OUT_OF_TIME if stopped else PASSED


def _command(record: pathlib.Path, targets: Sequence[Any]) -> list[str]:
    plugins = ["-p", "gpulayers.bench.suite.recording", "-p", "no:cacheprovider", "--record", str(record)]
    chosen = ["--continue-on-collection-errors", "-k", "not machine_code", "--tb=short", "-o"]
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        *plugins,
        *chosen,
        "addopts=--import-mode=importlib",
        *map(str, targets),
    ]


def summary(found: dict[str, Outcome]) -> dict[str, Any]:
    """What a run came to: how many tests ended how, which failed, what their kernels were, and which never ran."""
    reached = sorted({cell for o in found.values() for cell in o.reached})
    return {
        "schema": 1,
        "machine": machine(),
        "outcomes": dict(Counter(o.outcome for o in found.values())),
        "failed": [o.id for o in found.values() if o.outcome in _BAD],
        "reached": reached,
        "never": never(reached),
    }


_BAD = {"failed": "FAILED", "started": "CRASHED", "again": "FAILED BEFORE"}


def _heard(tail: Tail, workers: Sequence[_Worker]) -> None:
    news = tail.news()
    for worker in workers:
        worker.hear(news)


def _show(found: dict[str, Outcome], stopped: int) -> None:
    counts = Counter(o.outcome for o in found.values())
    counts["crashed"], counts["failed before"] = counts.pop("started", 0), counts.pop("again", 0)
    print(", ".join(f"{n} {what}" for what, n in counts.items() if n) or "no test ran")
    reached = {cell for o in found.values() for cell in o.reached}
    print(f"kernels, each dtype counted: {len(reached)} ran; never: {in_words(never(reached), most=20)}")
    if stopped:
        print(f"out of time: {stopped} processes were stopped; the same command goes on")
    for o in found.values():
        if o.outcome in _BAD:
            last = o.text.strip().splitlines()[-1:] or ["its process ended or hung"]
            print(f"{_BAD[o.outcome]} {o.id}: {last[0][:200]}")


if __name__ == "__main__":
    folder, seconds, *paths = sys.argv[1:]
    raise SystemExit(run(pathlib.Path(folder), float(seconds), paths=paths))
