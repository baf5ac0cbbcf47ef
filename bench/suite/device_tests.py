"""The test suite on a device, by several processes that share its tests; each outcome is on disk as it comes.

A process whose GPU stopped answering, or that died or hangs, is replaced; what it was at counts as crashed. Tests that
``tests.jsonl`` has are not run again: a run that was cut off goes on.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from gpulayers.bench.measuring.records import write_text

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
)
"""Tests that a GPU adds nothing to: names of files (their beginnings), without "test_"."""
SILENCE = 240.0
"""Seconds without an outcome after which a process hangs."""
RESTARTS = 20
PROCESSES = min(12, os.cpu_count() or 1)
"""Most of their time goes into compiling kernels, on the CPU."""
PASSED, FAILED, OUT_OF_TIME = 0, 1, 75
"""Exit status."""
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1"
)
"""The processes share the CPU; each would take all of it."""


class Outcome(NamedTuple):
    """One line of ``tests.jsonl``.

    outcome: "started", "passed", "failed", "skipped"; "again" for what did not pass before and has not had its turn since;
    "cut off" for what was at work when the time was over. text: of a failure. shard: who ran it.
    """

    id: str
    outcome: str
    seconds: float = 0.0
    text: str = ""
    shard: str = ""


def read(path: pathlib.Path) -> dict[str, Outcome]:
    """The latest outcome of each test; a line cut off by a crash is left out."""
    return {o.id: o for o in _parsed(path.read_text() if path.exists() else "")}


def _parsed(text: str) -> Iterator[Outcome]:
    for line in text.splitlines():
        try:
            yield Outcome(**json.loads(line))
        except (ValueError, TypeError):
            continue


def files() -> list[pathlib.Path]:
    """The test files worth running on a device, the most valuable first."""
    there = [p for p in (ROOT / "tests").glob("test_*.py") if not p.stem.removeprefix("test_").startswith(ELSEWHERE)]
    return sorted(there, key=lambda p: (FIRST.index(p.stem) if p.stem in FIRST else len(FIRST), p.stem))


def forget_failures(path: pathlib.Path) -> None:
    """Mark in the record what did not pass, so that it is run again, after the others."""
    if path.exists():
        as_it_is = "passed", "skipped", "cut off"
        kept = [o if o.outcome in as_it_is else o._replace(outcome="again") for o in read(path).values()]
        write_text(path, "".join(json.dumps(o._asdict()) + "\n" for o in kept))


class _Tail:
    """What is added to a file, line by line."""

    def __init__(self, path: pathlib.Path):
        self.path, self.read = path, path.stat().st_size if path.exists() else 0

    def news(self) -> list[Outcome]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.read)
            whole = file.read().rpartition(b"\n")[0]
        self.read += len(whole) + bool(whole)
        return list(_parsed(whole.decode()))


class _Shard:
    """A pytest process with every n-th test. name: "1/12" for the first of twelve."""

    def __init__(self, name: str, command: Sequence[str], silence: float):
        self.name, self.command, self.silence = name, command, silence
        self.left, self.process = RESTARTS, self._start()

    def _start(self) -> subprocess.Popen:
        self.heard, self.at = time.monotonic(), ""
        environment = os.environ | _ONE_THREAD | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(self.command, cwd=ROOT, env=environment)

    def hear(self, news: Iterable[Outcome]) -> None:
        """Take in what was recorded since: when it last said something, and the test that it is at."""
        for o in news:
            if o.shard == self.name:
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

    Writes ``out``/tests.jsonl.
    """
    until = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    record = out / "tests.jsonl"
    forget_failures(record)
    before = read(record)
    chosen = [
        "--continue-on-collection-errors",
        "-k",
        "not machine_code",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=--import-mode=importlib",
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "gpulayers.bench.suite.recording",
        *chosen,
        "--record",
        str(record),
    ]
    targets = [str(p) for p in (paths or files())]
    tail, shards = _Tail(record), []
    for name in (f"{i + 1}/{processes}" for i in range(processes)):
        shards.append(_Shard(name, [*command, f"--shard={name}", *targets], silence))
    while any([s.going() for s in shards]) and time.monotonic() < until:
        time.sleep(0.2)
        _heard(tail, shards)
    stopped = [s for s in shards if s.process.poll() is None]
    for shard in stopped:
        shard.kill()
    _heard(tail, shards)
    with open(record, "a") as file:
        for shard in stopped:
            if shard.at:
                known = before.get(shard.at, Outcome(shard.at, "cut off"))
                file.write(json.dumps(known._asdict()) + "\n")
    found = read(record)
    _show(found, len(stopped))
    if not found or any(o.outcome in _BAD for o in found.values()):
        return FAILED if found or not stopped else OUT_OF_TIME
    return OUT_OF_TIME if stopped else PASSED


_BAD = {"failed": "FAILED", "started": "CRASHED", "again": "FAILED BEFORE"}


def _heard(tail: _Tail, shards: Sequence[_Shard]) -> None:
    news = tail.news()
    for shard in shards:
        shard.hear(news)


def _show(found: dict[str, Outcome], stopped: int) -> None:
    counts = Counter(o.outcome for o in found.values())
    counts["crashed"], counts["failed before"] = counts.pop("started", 0), counts.pop("again", 0)
    print(", ".join(f"{n} {what}" for what, n in counts.items() if n) or "no test ran")
    if stopped:
        print(f"out of time: {stopped} processes were stopped; the same command goes on")
    for o in found.values():
        if o.outcome in _BAD:
            last = o.text.strip().splitlines()[-1:] or ["its process ended or hung"]
            print(f"{_BAD[o.outcome]} {o.id}: {last[0][:200]}")


if __name__ == "__main__":
    folder, seconds, *paths = sys.argv[1:]
    raise SystemExit(run(pathlib.Path(folder), float(seconds), paths=paths))
