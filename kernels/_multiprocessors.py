"""How many of a GPU's multiprocessors launches fill, so that others' kernels (NCCL's) find some free beside them."""

from __future__ import annotations

import contextvars
import operator
import os
from collections.abc import Callable
from typing import Any, NamedTuple

VARIABLE = "GPULAYERS_RESERVE_SMS"
RULE = "the rule is a whole number ≥ 0 of multiprocessors"

_free: contextvars.ContextVar[int] = contextvars.ContextVar("free", default=0)


def checked(n: Any) -> int:
    """``n`` multiprocessors to leave free. TypeError or ValueError where that is no number of them."""
    try:
        number = None if isinstance(n, bool) else operator.index(n)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"sms: reserve: {RULE}; got {type(n).__name__} {n!r}")
    if number < 0:
        raise ValueError(f"sms: reserve: {RULE}; got {n!r}")
    return number


def from_environment() -> int:
    """What GPULAYERS_RESERVE_SMS asks for; -1 where that is no number of multiprocessors."""
    text = os.environ.get(VARIABLE, "").strip() or "0"
    return int(text) if text.isascii() and text.isdigit() else -1


def check_environment(found: int) -> None:
    """ValueError where a policy has this number from GPULAYERS_RESERVE_SMS, and it is none."""
    if found < 0:
        raise ValueError(f"{VARIABLE}: {RULE}; got {os.environ.get(VARIABLE)!r}")


def left(sms: int) -> int:
    """Of a GPU's multiprocessors, those that the launch at hand may fill: at least one."""
    return max(1, sms - _free.get())


class Leaving(NamedTuple):
    """A launcher whose launches leave multiprocessors free, in whatever thread it is called."""

    free: int
    launcher: Callable

    def __call__(self, *args: Any, **options: Any) -> Any:
        token = _free.set(self.free)
        try:
            return self.launcher(*args, **options)
        finally:
            _free.reset(token)
