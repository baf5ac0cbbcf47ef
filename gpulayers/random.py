"""gpulayers' own source of random numbers: one seed and one counter, which checkpoints store.

Weights are drawn from NumPy generators, and what layers draw in their calls (dropout masks, ``uniform``, ``normal``) from
Philox, both keyed by (seed, counter): the same seed gives the same run, on the CPU and on a GPU.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpulayers import arrays, transfer
from gpulayers.ops._random import normals, random_bits, shares

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
def drawn_from(source: Callable[[], int] | None) -> Iterator[None]:
    """Seeds come from ``source()`` inside: from torch's generator, where a layer runs in a torch model. None: from here."""
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


def bits(shape: Sequence[int], like: Any = None, drawn: Any = None) -> Any:
    """Random words: uint32, of this shape; the same ones from NumPy, CuPy and a fused kernel.

    like: an array; the words live where it does (NumPy without it). drawn: what ``draw()`` gave, which names the words,
    to have them again; a fresh draw without it. Raises TypeError for a tensor of torch's.
    """
    if like is not None and arrays.library(like) is arrays.TORCH:
        raise TypeError("gl.random: like: the rule is an array of NumPy's or CuPy's; got a tensor (torch.rand_like)")
    name = draw() if drawn is None else drawn
    name = name if like is None else transfer.beside(name, like)
    return random_bits(name, math.prod(shape)).reshape(shape)


def uniform(shape: Sequence[int], like: Any = None, drawn: Any = None) -> Any:
    """Numbers in [0, 1): float32, multiples of 2⁻²⁴; the same ones from NumPy, CuPy and a fused kernel.

    ``gl.random.uniform(x.shape, like=x) >= p`` is a dropout mask. like, drawn: as ``bits`` takes them.
    """
    return shares(bits(shape, like, drawn), np.float32)


def normal(shape: Sequence[int], like: Any = None, drawn: Any = None) -> Any:
    """Numbers of the standard normal distribution: float32, at most 5.4 from 0; from NumPy, CuPy and a fused kernel the
    same but for the rounding of a logarithm and a root. like, drawn: as ``bits`` takes them.
    """
    return normals(bits(shape, like, drawn))


def generator() -> np.random.Generator:
    """A fresh NumPy generator, for weights, shuffles and what a layer draws itself on the CPU."""
    stand_in = _stand_in.get()
    return np.random.default_rng(draw()) if stand_in is None else stand_in.generator()


def get_state() -> dict[str, int]:
    """What ``set_state`` needs to go on from here."""
    return {"seed": _seed, "count": _count}


def set_state(state: dict[str, int]) -> None:
    global _seed, _count
    _seed, _count = int(state["seed"]), int(state["count"])
