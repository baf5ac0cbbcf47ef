"""Runs tests on a copy of the tree in which one file of a kernel is another."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HEAVY = ("numpy", "ml_dtypes", "pytest", "torch", "triton", "cupy", "cupyx.linalg", "cupy_backends.cuda.libs.nvrtc")
"""What tests import and no fault changes: loaded once, and there in each run's process."""
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def prepare() -> None:
    """Load what every run needs, before the first one is forked off."""
    for name in ONE_THREAD:
        os.environ.setdefault(name, "1")
    sys.dont_write_bytecode = True  # a mutant may have its original's size and second
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a run's processes end with this one
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert not any(name.startswith("gpulayers.") for name in sys.modules), "gpulayers must come from the copied tree"
    gc.freeze()  # what processes inherit, none collects


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """A tree of links to this one, with a folder of kernels of its own."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        tree = Path(scratch)
        for path in ROOT.iterdir():
            if path.name not in ("kernels", ".git", ".pytest_cache"):
                (tree / path.name).symlink_to(path)
        shutil.copytree(ROOT / "kernels", tree / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
        yield tree


@contextlib.contextmanager
def changed(tree: Path, file: str, text: bytes) -> Iterator[None]:
    path = tree / "kernels" / file
    before = path.read_bytes()
    path.write_bytes(text)
    try:
        yield
    finally:
        path.write_bytes(before)


def run(tree: Path, tests: list[str], limit: float, *, tracing: bool = False) -> dict[str, Any]:
    """Run tests on the tree up to the first failure: {"by": what noticed a fault, or None, "passed": {test: seconds}, …}.

    limit: seconds, after which the run counts as noticed: the fault made it endless. So does a crash.
    """
    report, log = tree / "report.json", tree / "log.txt"
    report.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        os._exit(_inside(tree, tests, report, log, tracing))
    try:
        status = _wait(child, limit)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # with all that it started
    found = json.loads(report.read_text()) if report.exists() else {"failed": [], "passed": {}, "reached": {}}
    failed = found["failed"]
    by = failed[0] if failed else None
    if status is None:
        by = f"no end within {limit:.0f} s"
    elif by is None and not report.exists():
        by = f"crash (status {status})"
    return found | {"by": by, "log": log.read_text(errors="replace")[-4000:] if by else ""}


def _wait(child: int, limit: float) -> int | None:
    """The child's status; None if it had to be killed."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _inside(tree: Path, tests: list[str], report: Path, log: Path, tracing: bool) -> int:
    """The forked process: pytest on the tree."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path.insert(0, str(tree))
    import pytest

    from mutation.plugin import Watch

    watch = Watch(tree, tracing)
    without = [f"-pno:{plugin}" for plugin in ("cacheprovider", "xdist", "logging", "anyio")]
    options = ["-q", *without, "--rootdir", str(tree), "--tb=line", "--assert=plain"]
    options += ["-o", "addopts=--import-mode=importlib"] + ([] if tracing else ["-x"])
    code = pytest.main([*options, *tests], plugins=[watch])
    reached = {test: sorted(names) for test, names in watch.reached.items()}
    failed = watch.failed or ([] if code in (0, 5) else [f"pytest: exit {int(code)}"])
    report.write_text(json.dumps({"failed": failed, "passed": watch.passed, "reached": reached}))
    sys.stdout.flush()
    return 0
