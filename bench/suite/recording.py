"""A pytest plugin (``-p gpulayers.bench.suite.recording``): a part of the tests, and each outcome on disk as it comes."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import pytest
from gpulayers.bench.suite.device_tests import read


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--shard", default="1/1", metavar="I/N", help="run every N-th test, from the I-th on")
    parser.addoption("--record", type=pathlib.Path, help="a JSON line for each outcome; tests it has are left out")


def pytest_collection_modifyitems(config: Any, items: list) -> None:
    index, of = map(int, config.option.shard.split("/"))
    known = read(config.option.record)
    again = {o.id for o in known.values() if o.outcome in ("again", "cut off")}
    chosen = [item for item in items[index - 1 :: of] if item.nodeid not in known or item.nodeid in again]
    chosen.sort(key=lambda item: item.nodeid in again)  # what crashes or hangs again costs no other its turn
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(_Record(config.option.record, config.option.shard))


class _Record:
    """Ends the run when the GPU no longer answers this process."""

    def __init__(self, path: pathlib.Path, shard: str):
        self.path, self.shard = path, shard

    def _add(self, **line: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line | {"shard": self.shard}) + "\n")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._add(id=report.nodeid, outcome="failed", text=report.longreprtext[-4000:])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._add(id=nodeid, outcome="started")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        self._add(id=report.nodeid, outcome=report.outcome, seconds=report.duration, text=report.longreprtext[-4000:])
        torch = sys.modules.get("torch")
        if report.failed and torch is not None and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except Exception as error:
                pytest.exit(f"the GPU does not answer this process any more: {error}", returncode=3)
