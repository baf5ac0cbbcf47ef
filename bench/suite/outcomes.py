"""``tests.jsonl``: what became of each test on a device, a line for whatever happens to one, written as it happens."""

from __future__ import annotations

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator
from typing import IO, NamedTuple

from gpulayers.bench.measuring.records import write_text


class Outcome(NamedTuple):
    """One line.

    outcome: "started", "passed", "failed", "skipped"; "again" for what did not pass before and has not had its turn since;
    "cut off" for what was at work when the time was over. text: of a failure. worker: who ran it. reached: the kernels
    that it launched, with their dtypes (``reach.cells``).
    """

    id: str
    outcome: str
    seconds: float = 0.0
    text: str = ""
    worker: str = ""
    reached: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        return json.dumps(self._asdict()) + "\n"


ENDED = "passed", "failed", "skipped"
AT_THE_END = "again", "cut off"
"""Runs again, after all others: what crashes or hangs again costs no other its turn."""


def parsed(text: str) -> Iterator[Outcome]:
    """A line cut off by a crash is left out."""
    for line in text.splitlines():
        try:
            yield Outcome(**json.loads(line))
        except (ValueError, TypeError):
            continue


def read(path: pathlib.Path) -> dict[str, Outcome]:
    """The latest outcome of each test."""
    return {o.id: o for o in parsed(path.read_text() if path.exists() else "")}


def forget_failures(path: pathlib.Path) -> None:
    """Mark in the record what did not pass, so that it is run again."""
    if path.exists():
        as_it_is = "passed", "skipped", "cut off"
        kept = [o if o.outcome in as_it_is else o._replace(outcome="again") for o in read(path).values()]
        write_text(path, "".join(o.line for o in kept))


@contextlib.contextmanager
def adding(path: pathlib.Path, alone: bool = False) -> Iterator[IO[str]]:
    """The record, to add lines to. alone: no other process that asks for the same is inside meanwhile."""
    with open(path, "a") as file:
        if alone:
            fcntl.flock(file, fcntl.LOCK_EX)  # given back with the file, by whatever end the process comes to
        yield file


class Tail:
    """What is added to a record, line by line."""

    def __init__(self, path: pathlib.Path, whole: bool = False):
        """whole: what is there already is news, too."""
        self.path, self.read = path, path.stat().st_size if path.exists() and not whole else 0

    def news(self) -> list[Outcome]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.read)
            whole = file.read().rpartition(b"\n")[0]
        self.read += len(whole) + bool(whole)
        return list(parsed(whole.decode()))
