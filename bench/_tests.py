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
from collections.abc import Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIRST = ("test_gpu", "test_softmax", "test_norm", "test_linear", "test_conv", "test_loss", "test_activation")
"""Files in the order of their worth on a GPU; the others follow."""
ELSEWHERE = (
    "house",
    "audit",
    "sweep",
    "bench",
    "lab",
    "suite",
    "tune",
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


class Outcome(NamedTuple):
    """One line of ``tests.jsonl``. outcome: "started", "passed", "failed" or "skipped"; text: of a failure."""

    id: str
    outcome: str
    seconds: float = 0.0
    text: str = ""


def read(path: pathlib.Path) -> dict[str, Outcome]:
    """The latest outcome of each test; a line cut off by a crash is left out."""
    found: dict[str, Outcome] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            one = Outcome(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[one.id] = one
    return found


def files() -> list[pathlib.Path]:
    """The test files worth running on a device, the most valuable first."""
    there = [p for p in (ROOT / "tests").glob("test_*.py") if not p.stem.removeprefix("test_").startswith(ELSEWHERE)]
    return sorted(there, key=lambda p: (FIRST.index(p.stem) if p.stem in FIRST else len(FIRST), p.stem))


def forget_failures(path: pathlib.Path) -> None:
    """Leave out of the record what did not pass, so that it is run again."""
    if path.exists():
        kept = [o for o in read(path).values() if o.outcome in ("passed", "skipped")]
        path.write_text("".join(json.dumps(o._asdict()) + "\n" for o in kept))


class _Shard:
    """A pytest process with every n-th test."""

    def __init__(self, command: Sequence[str], record: pathlib.Path, silence: float):
        self.command, self.record, self.silence = command, record, silence
        self.left, self.process = RESTARTS, self._start()

    def _start(self) -> subprocess.Popen:
        self.heard, self.size = time.monotonic(), -1
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(self.command, cwd=ROOT, env=environment)

    def going(self) -> bool:
        """Whether it runs; replaces a process that died or hangs."""
        size = self.record.stat().st_size if self.record.exists() else 0
        if size != self.size:
            self.heard, self.size = time.monotonic(), size
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
) -> bool:
    """Run the tests for at most ``seconds``; whether none failed. paths: test files, by default those worth it.

    Writes ``out``/tests.jsonl.
    """
    until = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    record = out / "tests.jsonl"
    forget_failures(record)
    chosen = ["-k", "not machine_code", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "gpulayers.bench._recording",
        *chosen,
        "--record",
        str(record),
    ]
    targets = [str(p) for p in (paths or files())]
    shards = [_Shard([*command, f"--shard={i + 1}/{processes}", *targets], record, silence) for i in range(processes)]
    while any([s.going() for s in shards]) and time.monotonic() < until:
        time.sleep(0.2)
    stopped = [s for s in shards if s.process.poll() is None]
    for shard in stopped:
        shard.kill()
    found = read(record)
    _show(found, len(stopped))
    return bool(found) and not any(o.outcome in ("failed", "started") for o in found.values())


def _show(found: dict[str, Outcome], stopped: int) -> None:
    counts = Counter(o.outcome for o in found.values())
    counts["crashed"] = counts.pop("started", 0)
    print(", ".join(f"{n} {what}" for what, n in counts.items() if n) or "no test ran")
    if stopped:
        print(f"out of time: {stopped} processes were stopped; the same command goes on")
    for o in found.values():
        if o.outcome in ("failed", "started"):
            last = o.text.strip().splitlines()[-1:] or ["crashed, or cut off"]
            print(f"{'FAILED' if o.outcome == 'failed' else 'CRASHED'} {o.id}: {last[0][:200]}")


if __name__ == "__main__":
    folder, seconds, *paths = sys.argv[1:]
    raise SystemExit(not run(pathlib.Path(folder), float(seconds), paths=paths))
