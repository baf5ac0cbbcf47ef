"""Which calls of layers run in this thread, what each keeps for its backward, and in which mode they run."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator
from typing import Any

from gpulayers.arrays import Spec

recording: contextvars.ContextVar[bool] = contextvars.ContextVar("recording", default=True)
forced_mode: contextvars.ContextVar[bool | None] = contextvars.ContextVar("forced_mode", default=None)


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Forwards made inside keep nothing for a backward."""
    token = recording.set(False)
    try:
        yield
    finally:
        recording.reset(token)


@contextlib.contextmanager
def mode(training: bool | None) -> Iterator[None]:
    """Layers called inside train (True) or not (False), whatever their flags say; None: as their flags say.

    It holds for this thread, and changes no flag: others may use the same layers in another mode at the same time.
    """
    token = forced_mode.set(training)
    try:
        yield
    finally:
        forced_mode.reset(token)


class Frame:
    """What one forward keeps for its backward; a class and its base class each keep their own.

    The frames of the layers that it called are inside it: whatever becomes of them, they end with it.
    """

    __slots__ = ("calls", "children", "data", "inputs", "layer", "outputs", "saved", "scalar", "scopes", "wanted")

    def __init__(self, layer: Any = None, *scopes: type) -> None:
        self.layer = layer
        """Whose call this is, while it runs."""
        self.scopes = list(scopes)
        """The classes whose code runs, from the layer's own to the base class that it called."""
        self.saved: dict[type, tuple] = {}
        self.calls: dict[type, list] = {}
        self.children: dict[int, tuple[Any, list[Frame]]] = {}
        """By the layer's id: the layer, and the frames of its calls in here."""
        self.inputs: list[Spec | None] = []
        self.outputs: list[Spec] = []
        self.wanted: list[bool] = []
        """For each input whether anybody asks for its gradient; empty: for all."""
        self.data: list[Any] = []
        """Arrays in this call whose gradients nobody asks for."""
        self.scalar: Any = None
        """The output, if it is one number (a loss): backward() then starts from dy = 1."""

    def is_data(self, x: Any) -> bool:
        return any(x is d for d in self.data)

    def of(self, layer: Any) -> list[Frame]:
        """The frames of the calls of ``layer`` made in here that wait for their backward."""
        return self.children.setdefault(id(layer), (layer, []))[1]


class _Thread(threading.local):
    """What this thread does: its running calls, outermost first, and how many builds run."""

    def __init__(self) -> None:
        self.running: list[Frame] = []
        self.building: list[Any] = []
        self.data: tuple = ()
        """Arrays that are no result of any layer: nobody asks for their gradients."""


thread = _Thread()


class Waiting(threading.local):
    """The frames of a layer's calls, made outside of other layers, that wait for their backward: each thread its own."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def __reduce__(self) -> tuple:
        return Waiting, ()  # a copy of a layer has made no calls


@contextlib.contextmanager
def as_data(*xs: Any) -> Iterator[None]:
    """Nobody asks for the gradients of these arrays: layers that are called with them inside leave them out."""
    before, thread.data = thread.data, xs
    try:
        yield
    finally:
        thread.data = before


@contextlib.contextmanager
def by_itself() -> Iterator[None]:
    """What is called inside belongs to no call that runs in this thread."""
    before = thread.running, thread.building, thread.data
    thread.running, thread.building, thread.data = [], [], ()
    try:
        yield
    finally:
        thread.running, thread.building, thread.data = before
