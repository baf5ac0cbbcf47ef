"""Where in the user's code an operation stands, and the error for what cannot be recorded."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import linecache
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import numpy as np

from gpulayers import arrays

_PACKAGE = str(pathlib.Path(arrays.__file__).parent)
_HERE = str(pathlib.Path(__file__).parent)
_RUNNER = str(pathlib.Path(__file__).with_name("record.py"))
_MACHINERY = (
    _HERE,
    str(pathlib.Path(np.__file__).parent),
    *(f"{_PACKAGE}/{name}" for name in ("layers/_", "ops/_op.py", "arrays.py", "dispatch.py", "transfer.py")),
)


class Place(NamedTuple):
    """A line of source."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{pathlib.Path(self.file).name}:{self.line}: `{self.text}`"


class Unrecordable(ValueError):
    """What an export cannot read: ``place`` (file, line, text; None where no line is to blame), ``reason`` and ``advice``,
    which says what to write instead."""

    def __init__(self, reason: str, advice: str = "", place: Place | None = None):
        super().__init__(reason, advice, place)
        self.reason, self.advice, self.place = reason, advice, place

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place else ""
        return f"{where}{self.reason}" + (f". Write instead: {self.advice}" if self.advice else "")


def place() -> Place | None:
    """The innermost line of the user's that is being run; in a layer of the library's own, the line of that."""
    frame, own = sys._getframe(1), None
    while frame is not None and frame.f_code.co_filename != _RUNNER:
        whose = _whose(frame.f_code.co_filename)
        if whose == "user":
            return _line(frame.f_code.co_filename, frame.f_lineno)
        own = own or (frame if whose == "layer" else None)
        frame = frame.f_back  # type: ignore[assignment]
    return None if own is None else _line(own.f_code.co_filename, own.f_lineno)


def place_of(error: BaseException) -> Place | None:
    """The last line of the user's, or of the library's own layers, that an error came through."""
    found, trace = None, error.__traceback__
    while trace is not None:
        if _whose(trace.tb_frame.f_code.co_filename) != "machinery":
            found = _line(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return found


@functools.cache
def _whose(file: str) -> str:
    """Whose code a file holds: "user", "layer" (of the library's own), or "machinery"."""
    if file.startswith(_MACHINERY):
        return "machinery"
    return "layer" if file.startswith(_PACKAGE) else "user"


def _line(file: str, line: int) -> Place:
    return Place(file, line, linecache.getline(file, line).strip())


_said: contextvars.ContextVar[list[Unrecordable] | None] = contextvars.ContextVar("said", default=None)


@contextlib.contextmanager
def none_swallowed() -> Iterator[None]:
    """A refusal inside is raised at the end, too, where the user's own ``except`` took it: what came instead of the
    refused line is not what the layer does."""
    said: list[Unrecordable] = []
    token = _said.set(said)
    try:
        yield
    finally:
        _said.reset(token)
    if said:
        raise said[0]


def refuse(reason: str, advice: str = "", at: Place | None = None) -> NoReturn:
    error = Unrecordable(reason, advice, at or place())
    if (said := _said.get()) is not None:
        said.append(error)
    raise error
