"""Which declared shapes ask for which choice of the kernels' tables: what the tuner measures a choice on."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from gpulayers.bench.cases.case import Case, every_case
from gpulayers.kernels.triton import _configs, _tile

from gpulayers import arrays
from gpulayers.inventory import families
from gpulayers.testing import _launches
from gpulayers.testing.audit_op import launchers

DTYPES = ("bfloat16", "float32", "tf32")
"""tf32: float32 whose products may use TF32. A choice is measured in the first in which anything asks for it."""


class Use(NamedTuple):
    """One direction of a declared case in one dtype."""

    family: str
    number: int
    """Of the case in its family's ``cases()``."""
    dtype: str
    direction: str
    """forward (without what a backward needs), or backward."""

    @property
    def case(self) -> Case:
        return _cases(self.family)[self.number]

    @property
    def numbers(self) -> np.dtype:
        """The dtype of its arrays."""
        return arrays.dtype("float32" if self.dtype == "tf32" else self.dtype)

    @property
    def text(self) -> str:
        return f"{self.case.op.name}: {self.case.name}, {self.dtype}, {self.direction}"


@cache
def _cases(family: str) -> list[Case]:
    return [case for _, case in every_case([family])]


def declare() -> None:
    """Load every launcher, so that every choice is declared."""
    for family in families():
        importlib.import_module(f"gpulayers.kernels.triton.{family}")


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Within, torch allows TF32 if the dtype is "tf32", and does not if not."""
    import torch

    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [s.fp32_precision for s in settings]
    try:
        for s in settings:
            s.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        yield
    finally:
        for s, value in zip(settings, before):
            s.fp32_precision = value


def directions(use: Use) -> tuple[Callable[[], tuple], Callable[[dict], Any]]:
    """The case's launchers on torch's meta device: forward(), and backward(what it saved)."""
    case = use.case
    needs = case.wanted() if use.direction == "backward" else ()
    return launchers(case.op, _placed(case, use.numbers), needs, case.options)


def _placed(case: Case, dtype: np.dtype) -> list:
    """The case's specs, in the memory order that it puts its tensors in."""

    def place(s: Any) -> Any:
        if isinstance(s, list):
            return [place(each) for each in s]
        if case.put is None or s is None or s.dtype not in arrays.FLOATS:
            return s
        return arrays.spec(case.put(arrays.TORCH.empty(s, "meta")))

    return [place(s) for s in case.specs(dtype)]


@contextlib.contextmanager
def dry(device: _tile.Device, dtype: str) -> Iterator[None]:
    """Within, launches on meta tensors choose as on this device, and nothing else happens."""
    before = _tile.pretend
    _tile.pretend = device
    try:
        with _launches.catching("meta", lambda *launch: None), precision(dtype):
            yield
    finally:
        _tile.pretend = before


def chosen(use: Use, device: _tile.Device) -> list[_configs.Asked]:
    """What a use's launches choose on this device."""
    forward, backward = directions(use)
    with dry(device, use.dtype):
        with _configs.asked() as found:
            _, saved = forward()
        if use.direction == "forward":
            return found
        with _configs.asked() as found:
            backward(saved)
        return found


def uses(only: Sequence[str], device: _tile.Device) -> dict[str, dict[Use, tuple]]:
    """Choice → the uses that ask for it → the keys they ask with. only: families; all, if none.

    Raises ValueError for an unknown family.
    """
    found: dict[str, dict[Use, tuple]] = {}
    for dtype in DTYPES:
        earlier = set(found)
        for use in _every(only or families(), dtype):
            asked = [a for a in chosen(use, device) if a.index is not None]
            for name in dict.fromkeys(a.choice for a in asked):
                if name not in earlier:
                    keys = tuple(dict.fromkeys(a.key for a in asked if a.choice == name))
                    found.setdefault(name, {})[use] = keys
    return found


def _every(only: Sequence[str], dtype: str) -> Iterator[Use]:
    for family in only:
        for case in _cases(family):
            yield from uses_of(family, case, dtype)


def uses_of(family: str, case: Case, dtype: str) -> list[Use]:
    """One for each direction of a case of the family's."""
    number = [(c.op.name, c.name) for c in _cases(family)].index((case.op.name, case.name))
    return [Use(family, number, dtype, d) for d in ("forward", "backward")[: 1 + bool(case.wanted())]]
