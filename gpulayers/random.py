"""gpulayers' own source of random numbers: one seed and one counter, which checkpoints store.

Weights are drawn from NumPy generators and dropout masks from Philox, both keyed by (seed, counter): the same seed
gives the same run, on the CPU and on a GPU.
"""

from __future__ import annotations

import contextlib
import contextvars
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_seed, _count = secrets.randbits(62), 0
_lock = threading.Lock()
_source: contextvars.ContextVar[Callable[[], int] | None] = contextvars.ContextVar("source", default=None)
_stand_in: contextvars.ContextVar[Any] = contextvars.ContextVar("stand_in", default=None)


def seed(value: int) -> None:
    """Start again from ``value`` (a non-negative integer below 2⁶³)."""
    global _seed, _count
    if not 0 <= value < 2**63:
        raise ValueError(f"seed: the rule is 0 ≤ seed < 2⁶³; got {value}")
    _seed, _count = int(value), 0


def draw() -> np.ndarray:
    """A fresh (seed, offset) for Philox: int64, shape (2,). No two draws overlap in fewer than 2³² numbers."""
    global _count
    source, stand_in = _source.get(), _stand_in.get()
    if stand_in is not None:
        return stand_in.draw()
    if source is not None:
        return np.array([source(), 0], np.int64)
    with _lock:
        _count += 1
        state = _seed, _count
    return mixed(*state)


def mixed(seed: int, count: int) -> np.ndarray:
    """The draw that two numbers name."""
    word = np.random.SeedSequence((seed, count)).generate_state(1, np.uint64)[0]
    return np.array([word >> np.uint64(1), 0], np.int64)


@contextlib.contextmanager
def drawn_from(source: Callable[[], int]) -> Iterator[None]:
    """Seeds come from ``source()`` inside: from torch's generator, where a layer runs in a torch model."""
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


@contextlib.contextmanager
def drawn_by(stand_in: Any) -> Iterator[None]:
    """Inside, ``draw`` and ``generator`` are those of this object: where a layer is recorded."""
    token = _stand_in.set(stand_in)
    try:
        yield
    finally:
        _stand_in.reset(token)


def generator() -> np.random.Generator:
    """A fresh NumPy generator, for weights, shuffles and what a layer draws itself."""
    stand_in = _stand_in.get()
    return np.random.default_rng(draw()) if stand_in is None else stand_in.generator()


def get_state() -> dict[str, int]:
    """What ``set_state`` needs to go on from here."""
    return {"seed": _seed, "count": _count}


def set_state(state: dict[str, int]) -> None:
    global _seed, _count
    _seed, _count = int(state["seed"]), int(state["count"])
