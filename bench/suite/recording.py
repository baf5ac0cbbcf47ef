"""A pytest plugin (``-p gpulayers.bench.suite.recording``): takes tests in turn with other processes, and each outcome is on
disk as it comes."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
from gpulayers.bench.suite.order import Queue, Test, in_turn
from gpulayers.bench.suite.outcomes import Outcome, Tail, adding
from gpulayers.bench.suite.reach import DTYPES, Watch

from gpulayers.ops._op import Op
from gpulayers.testing import arena


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--worker", default="1", help="this process's name")
    parser.addoption("--record", type=pathlib.Path, help="a JSON line for each outcome; tests it has are left out")


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(_Worker(config.option.record, config.option.worker))


def group_of(item: Any) -> tuple[str, ...]:
    """The test function, and the op, backend, dtype and class that its parameters name."""
    params = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return (item.nodeid.partition("[")[0], *filter(None, map(_named, params)))


def _named(value: Any) -> str:
    if isinstance(value, Op):
        return value.name
    text = (
        str(value).removeprefix("torch.") if isinstance(value, str) or "dtype" in type(value).__name__.lower() else ""
    )
    return text if text in _names() else ""


@functools.cache
def _names() -> frozenset[str]:
    """After the collection: who has tests of drop-ins has imported them."""
    drop_ins = vars(sys.modules["gpulayers.torch"]) if "gpulayers.torch" in sys.modules else ()
    return frozenset({*arena.BACKENDS, *DTYPES, "float64", "tf32", *drop_ins})


ON_THE_DEVICE = {"check_op", "check_layer", "arena", "DEVICE", "cuda"}
"""By these names, and by the word "cuda", a test comes to a device."""


def can_launch(item: Any) -> bool:
    """Whether the test, or a function of its file that it needs, says so."""
    seen, todo = set(), [item.function]
    while todo:
        function = todo.pop()
        names = {*_words(function.__code__)}
        if names & ON_THE_DEVICE:
            return True
        there = {n: function.__globals__.get(n) for n in names - seen}
        seen |= names
        todo += [f for f in there.values() if isinstance(f, types.FunctionType) and f.__module__ == function.__module__]
    return False


def _words(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _words(constant)
        elif constant == "cuda":
            yield constant


class _Worker:
    """Ends the run when the GPU no longer answers this process."""

    def __init__(self, path: pathlib.Path, name: str):
        self.path, self.name, self.tail = path, name, Tail(path, whole=True)
        self.watch: Watch | None = None

    def _add(self, name: str, outcome: str, **more: Any) -> None:
        with adding(self.path) as file:
            file.write(Outcome(name, outcome, worker=self.name, **more).line)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._add(report.nodeid, "failed", text=report.longreprtext[-4000:])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> bool:
        """One test after the other, as long as any is left."""
        items = {item.nodeid: item for item in session.items}
        queue = Queue(in_turn((name, group_of(item), can_launch(item)) for name, item in items.items()))
        gpu = "torch" in sys.modules and arena.has_gpu()  # tests that need it have imported it
        self.watch = watch = Watch(gpu)
        with arena.recording_all() if gpu else contextlib.nullcontext():
            while (test := self._take(queue)) is not None:
                with watch.one():
                    item = items[test.id]
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                if session.shouldfail or session.shouldstop:
                    raise session.Interrupted(session.shouldfail or session.shouldstop)
        return True

    def _take(self, queue: Queue) -> Test | None:
        with adding(self.path, alone=True) as file:
            queue.learn(self.tail.news())
            test = queue.next()
            if test is not None:
                file.write(Outcome(test.id, "started", worker=self.name).line)
                file.flush()
        return test

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        more = {"text": report.longreprtext[-4000:], "reached": self.watch.reached() if self.watch else ()}
        self._add(report.nodeid, report.outcome, seconds=report.duration, **more)
        torch = sys.modules.get("torch")
        if report.failed and torch is not None and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except Exception as error:
                pytest.exit(f"the GPU does not answer this process any more: {error}", returncode=3)
