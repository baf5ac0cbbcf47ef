"""What pytest is told in a run on a seeded fault: whose kernels ran, which test failed, which functions each test reached."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest


class Watch:
    """The tests of one run; with ``reached``, the kernels' functions that each of them enters."""

    def __init__(self, tree: Path, tracing: bool = False):
        self.kernels, self.tracing = f"{tree}/kernels/", tracing
        self.failed: list[str] = []
        self.passed: dict[str, float] = {}
        self.reached: dict[str, set[str]] = {}
        self._here: set[str] = set()

    def pytest_collection_finish(self) -> None:
        """The tests run on this tree's kernels, not on those that are installed."""
        for name, module in sys.modules.items():
            if name.startswith("gpulayers.kernels"):
                assert module.__file__.startswith(self.kernels), f"{name} comes from {module.__file__}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        self._here = self.reached.setdefault(item.nodeid, set())
        if self.tracing:
            threading.settrace(self._trace)
            sys.settrace(self._trace)
        began = time.process_time()
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            self.passed[item.nodeid] = time.process_time() - began

    def _trace(self, frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if code.co_filename.startswith(self.kernels):
            file = code.co_filename[len(self.kernels) :]
            self._here.add(f"{file}:{code.co_name}")
            if file == "cuda/_launch.py" and code.co_name == "launch":
                self._here.add(f"cuda/{frame.f_locals['family']}.cu:{frame.f_locals['name']}")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid or "collection")
