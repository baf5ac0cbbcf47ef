"""A GPU hour, or any part of one, in one command: ``python bench/run.py --gpu-suite --minutes N --out DIR``.

The most valuable first: the tests on the device (parity in every dtype, the same bits in 20 runs, side streams), its
memory checked by compute-sanitizer, whole models, the benchmarks, tuning of the kernels furthest from their limit.
Every step is a process of its own, keeps its part of the time, and has on disk what it knows: the same command on the same
folder goes on. The folder holds eight files at most: suite.json, log.txt, models.json, tests.jsonl, tests.json and bench.json
(``bench/report.py --add`` takes these two into docs/performance.md, with plots), tune.json and the tuned table (sm_90.json,
for kernels/configs).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gpulayers.bench.cases.case import BESIDE
from gpulayers.bench.measuring.lab import DIED, stoppable
from gpulayers.bench.measuring.records import load, machine, now, write_json
from gpulayers.bench.suite.device_tests import OUT_OF_TIME
from tqdm.auto import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[2]
MINUTES = 9.0
GRACE = 15.0
"""Seconds that a step is asked to end before its time, and again that it has to do so."""
MOST = 0.4
"""Of the time that is left, for a step that needs a certain time."""
RESTARTS = 10
"""Of a step whose process died."""
LOG_BYTES = 8 << 20
_SANITIZERS = (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer")


class Suite(NamedTuple):
    """What was asked for."""

    out: pathlib.Path
    minutes: float = MINUTES
    family: Sequence[str] = ()
    device: str = "cuda"
    tests: Sequence[str] = ()
    """Test files; by default those worth running on a device."""


class Step(NamedTuple):
    """A part of the suite."""

    name: str
    share: float
    """Of the time that is left when it begins."""
    command: Callable[[Suite, float], list[str] | str]
    """(suite, its seconds) → what to run, or why there is nothing to run."""
    least: float = 0.0
    """Seconds that it needs; it is not begun where these are more than ``MOST`` of what is left."""
    after: str = ""
    """The step that must have ended by itself before."""
    once: bool = False
    """Not run again where it was done before, at the same commit."""


# --- the steps -------------------------------------------------------------------------------------------------------


def _python(*words: Any) -> list[str]:
    return [sys.executable, "-u", *map(str, words)]


def _test(suite: Suite, seconds: float) -> list[str]:
    return _python("-m", "gpulayers.bench.suite.device_tests", suite.out, seconds, *suite.tests)


def _sanitize(tool: str) -> Callable[[Suite, float], list[str] | str]:
    def command(suite: Suite, seconds: float) -> list[str] | str:
        found = next((p for p in _SANITIZERS if p and pathlib.Path(p).exists()), None)
        if suite.device != "cuda":
            return "it checks a GPU's memory"
        if found is None:
            return "compute-sanitizer is not installed"
        # Every op at a small shape, forward and backward, on the default stream and on another.
        small = [ROOT / "tests/test_gpu.py", "-k", "on_a_stream_of_torch", "-o", "addopts=--import-mode=importlib"]
        check = [found, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        if tool == "memcheck":
            # torch's allocator cuts small arrays out of 2 MB, and beyond an array's end there is another. Its libraries,
            # and Triton, call the driver for things that it may not have: no fault of a kernel.
            check = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *check, "--report-api-errors", "no"]
        return [*check, *_python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *small)]

    return command


def _models(suite: Suite, seconds: float) -> list[str] | str:
    if suite.device != "cuda":
        return "models of their real size need a GPU"
    limit = [f"--minutes={seconds / 60}", f"--out={suite.out}"]
    return _python(ROOT / "bench/run.py", "--models", "--gpu", "--resume", "--no-plots", *limit)


def _bench(suite: Suite, seconds: float) -> list[str]:
    where = [] if suite.device == "cuda" else ["--device", suite.device]
    limit = [f"--minutes={seconds / 60}", f"--out={suite.out}"]
    return _python(ROOT / "bench/run.py", *suite.family, "--gpu", "--resume", "--no-plots", *limit, *where)


def _tune(suite: Suite, seconds: float) -> list[str] | str:
    families = furthest(suite.out / "bench.json")
    if suite.device != "cuda":
        return "tuning needs a GPU"
    if not families:
        return "no kernel was measured"
    return _python("-m", "gpulayers.cli", "tune", *families, f"--minutes={seconds / 60}", f"--out={suite.out}")


def furthest(path: pathlib.Path) -> list[str]:
    """The families whose kernels were measured, the furthest from their limit first."""
    shares: dict[str, list[float]] = {}
    for row in load(path)["rows"] if path.exists() else ():
        if row["ours"] and row["share"] is not None and row["family"] not in BESIDE:
            shares.setdefault(row["family"], []).append(row["share"])
    return sorted(shares, key=lambda family: statistics.geometric_mean(shares[family]))


STEPS = (
    Step("tests", 0.4, _test),
    Step("memcheck", 0.1, _sanitize("memcheck"), least=180, after="tests", once=True),
    Step("racecheck", 0.05, _sanitize("racecheck"), least=150, after="tests", once=True),
    Step("models", 0.35, _models),
    Step("bench", 0.7, _bench),
    Step("tune", 1.0, _tune),
)


# --- running them ----------------------------------------------------------------------------------------------------


class _Journal:
    """``suite.json``: every invocation, and how each of its steps ended."""

    def __init__(self, suite: Suite):
        self.path = suite.out / "suite.json"
        earlier = json.loads(self.path.read_text())["runs"] if self.path.exists() else []
        about = machine()
        self.run: dict[str, Any] = {"began": now(), "commit": about["commit"], "minutes": suite.minutes, "steps": []}
        self.whole = {"schema": 1, "machine": about, "runs": [*earlier, self.run]}

    def status(self, step: str) -> str:
        """How a step of this run ended; empty where there was none."""
        return next((s["status"] for s in self.run["steps"] if s["name"] == step), "")

    def was_done(self, step: str) -> bool:
        """In an earlier run of this commit."""
        runs = [r for r in self.whole["runs"][:-1] if r.get("commit") == self.run["commit"]]
        return any(s["name"] == step and s["status"] in ("done", _BEFORE) for r in runs for s in r["steps"])

    def note(self, step: str, status: str, seconds: float) -> None:
        """A step began or ended."""
        steps = [s for s in self.run["steps"] if s["name"] != step]
        self.run["steps"] = [*steps, {"name": step, "status": status, "seconds": round(seconds, 1)}]
        write_json(self.path, self.whole)


def run(suite: Suite, steps: Sequence[Step] = STEPS, grace: float = GRACE) -> int:
    """Run the steps within ``suite.minutes``; 1 if one of them failed, else 0. RuntimeError outside a checkout."""
    if not (ROOT / "tests").is_dir():
        raise RuntimeError(f"the GPU suite: the rule is a checkout with its tests; {ROOT} is none")
    suite.out.mkdir(parents=True, exist_ok=True)
    _tidy(suite.out)
    until = time.monotonic() + 60 * suite.minutes
    journal, bad = _Journal(suite), 0
    often = 0.5 if sys.stderr.isatty() else 30.0
    with stoppable(), tqdm(total=60 * suite.minutes, desc="suite", bar_format=_BAR, mininterval=often) as bar:
        for step in steps:
            begin = time.monotonic()
            left = until - begin
            end = begin + max(left * step.share, step.least)
            command = _command(step, suite, journal, end - begin - 2 * grace, left)
            status = command if isinstance(command, str) else "running"
            journal.note(step.name, status, 0.0)
            bar.set_postfix_str(step.name, refresh=False)
            if not isinstance(command, str):
                status = _finish(command, suite.out / "log.txt", end, grace, bar)
                bad += status not in ("done", "out of time")
                journal.note(step.name, status, time.monotonic() - begin)
            bar.write(f"{step.name}: {status}, {time.monotonic() - begin:.0f} s")
    _tidy(suite.out)
    return int(bad > 0)


def _command(step: Step, suite: Suite, journal: _Journal, seconds: float, left: float) -> list[str] | str:
    """What to run, or why not."""
    if step.once and journal.was_done(step.name):
        return _BEFORE
    if step.after and journal.status(step.after) == "out of time":
        return f"out of time: {step.after} first"
    return step.command(suite, seconds) if seconds > 0 and step.least <= MOST * left else "out of time"


_BEFORE = "done before"
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s{postfix}"


def _finish(command: Sequence[str], log: pathlib.Path, end: float, grace: float, bar: Any) -> str:
    """Run a command until it ends, or its time does; again where its GPU died, or it did. How it ended."""
    for _ in range(1 + RESTARTS):
        begin = log.stat().st_size if log.exists() else 0
        code = _once(command, log, end, grace, bar)
        bar.write("\n".join(log.read_bytes()[begin:].decode(errors="replace").splitlines()[-40:]))
        if code in (None, OUT_OF_TIME):
            return "out of time"
        if code != DIED and code >= 0:  # not of a signal: what that ended is known, and left out in the end
            break
    return "done" if code == 0 else f"failed, exit status {code}"


def _once(command: Sequence[str], log: pathlib.Path, end: float, grace: float, bar: Any) -> int | None:
    """The command's exit status; None where it had to be stopped."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with open(log, "ab") as file:
        # A group, to end it with all it started; not a session, or it would outlive a shell that ends this process.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            if _wait(process, end - grace, bar):
                return process.returncode
            os.killpg(process.pid, signal.SIGINT)  # asked to stop, it still says what it knows
            _wait(process, end, bar)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # itself, or what it left running
            process.wait()


def _wait(process: subprocess.Popen, until: float, bar: Any) -> bool:
    """Whether the process ended by then."""
    while process.poll() is None:
        before = time.monotonic()
        if before > until:
            return False
        time.sleep(0.1)
        bar.update(time.monotonic() - before)
    return True


def _tidy(out: pathlib.Path) -> None:
    """Leave the end of a log that grew too long, and no half-written file of a process that was killed."""
    for half in out.glob(".*.json*"):
        half.unlink()
    log = out / "log.txt"
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.write_bytes(log.read_bytes()[-LOG_BYTES:])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench/run.py --gpu-suite", description=__doc__)
    parser.add_argument("family", nargs="*", help="benchmarks of these families only")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time limit of all of it")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("bench-results"), help="a folder; go on with it"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu stands in for a GPU")
    parser.add_argument("--tests", nargs="*", default=(), help="test files; by default those worth running on a device")
    asked = parser.parse_args(argv)
    return run(Suite(asked.out.resolve(), asked.minutes, asked.family, asked.device, asked.tests))
