"""``gpulayers tune FILE.py:Class``: measures how a fused layer's work is best divided, and with which tiles, on this GPU.

Counted bytes choose where nothing was measured. Here each other way to divide the work (what forward keeps for backward),
then each other tile of either direction, takes turns with the best so far; only what is right within the derived bound is
timed. What gained is kept in the folder of fused kernels, by the kernels' text and the GPU's name, for inputs as large as
these but for a factor of two; ``gl.fuse`` takes it from there. Nothing is measured in a call, so its bits stay.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from gpulayers.bench.cases.case import Case, Seeds
from gpulayers.bench.measuring.device import Device
from gpulayers.bench.measuring.harness import Timer
from gpulayers.bench.tuning.search import WORTH
from gpulayers.bench.tuning.tune import in_turns

from gpulayers import arrays
from gpulayers.fusing import Fusion, _measured, fusion
from gpulayers.fusing._launch import Tile, size_class, tiles
from gpulayers.fusing._layer import forget
from gpulayers.fusing._measured import Choice
from gpulayers.layers._layer import Layer


class Lab(Protocol):
    """What measures a call of a fused layer's op."""

    gpu: str
    """The GPU's name."""

    def check(self, case: Case, dtype: np.dtype) -> str | None:
        """What is wrong with its results; None if nothing is. Raises what a kernel raises."""

    def capture(self, case: Case, dtype: np.dtype, direction: str) -> Callable[[], float]:
        """The call made ready; each call of the result gives its seconds."""


class Harness(Lab):
    """The lab's own: cold caches, CUDA graphs."""

    def __init__(self, on: Device | None = None, backend: str = "triton"):
        self.timer, self.backend = Timer(on), backend
        self.gpu = str(_measured.gpu())

    def check(self, case: Case, dtype: np.dtype) -> str | None:
        return self.timer.check(case, dtype, self.backend)

    def capture(self, case: Case, dtype: np.dtype, direction: str) -> Callable[[], float]:
        captured = self.timer.capture(case, dtype, direction, self.backend)

        def replay() -> float:
            with self.timer.on.entered():
                return float(np.median(captured.replay()))

        return replay


class Search:
    """From what counted bytes chose to what is fastest. shapes: of the layer's inputs, with the batch."""

    def __init__(
        self, layer: Layer, shapes: Sequence[tuple], dtype: np.dtype, lab: Lab, say: Callable[[str], None] = print
    ):
        self.layer, self.shapes, self.dtype, self.lab, self.say = layer, list(shapes), dtype, lab, say
        recorded = fusion(layer, *((None, *s[1:]) for s in shapes))
        if not isinstance(recorded, Fusion):
            raise ValueError(f"tune: the rule is a layer that is one kernel each way; {layer.name} is cut into pieces")
        self.counted = Fusion(recorded.recording, recorded.title)
        self.best = Choice(_name_of(self.counted))

    def run(self) -> Choice:
        """What is best; kept on disk if it gains more than noise."""
        start = self.best
        for name in self.counted.ways:
            self._try(self.best._replace(saving=name), f"forward keeps {name}", "both")
        for direction in ("forward", "backward"):
            for tile in self._tiles(direction):
                choice = self.best._replace(**{direction: {self._size(direction): tile}})
                self._try(choice, f"{direction} in tiles {tuple(tile)}", direction)
        ratio = 1.0 if self.best == start else self._ratio(self.best, start, "both")
        if ratio > 1 - WORTH:
            self.say("what counted bytes chose stays")
            return start
        about = {"gpu": self.lab.gpu, "date": datetime.date.today().isoformat(), "gain": round(1 / ratio, 3)}
        self.best = self.best._replace(**about)
        self.say(f"{self.best.said()}\nwritten: {_measured.write(self.counted.key, self.best)}")
        forget(self.layer)
        return self.best

    def _made(self, choice: Choice) -> Fusion:
        return Fusion(self.counted.recording, self.counted.title, choice)

    def _case(self, choice: Choice) -> Case:
        made = self._made(choice)
        weights = [w.shape for w in self.layer.named_weights().values()]
        shapes = (*self.shapes, *weights, *[Seeds()] * len(made.draws))
        return Case(made.op, " and ".join(map(str, self.shapes)), shapes)

    def _kernels(self, direction: str) -> tuple[Any, int, int]:
        """(kernels, rows, columns) of a direction as it is best so far."""
        made = self._made(self.best)
        program = made.forward if direction == "forward" else made.backward
        return made.kernels[program], *program.extents(self.shapes[0][0])

    def _tiles(self, direction: str) -> list[Tile]:
        kernels, _, columns = self._kernels(direction)
        return tiles(kernels, columns)

    def _size(self, direction: str) -> int:
        _, rows, columns = self._kernels(direction)
        return size_class(rows, columns)

    def _try(self, choice: Choice, what: str, direction: str) -> None:
        """Takes its place if it is right, and faster by more than noise."""
        if choice == self.best:
            return
        try:
            if wrong := self.lab.check(self._case(choice), self.dtype):
                self.say(f"{what}: left out: {wrong}")
                return
            ratio = self._ratio(choice, self.best, direction)
        except Exception as error:  # too much shared memory, registers that do not suffice
            self.say(f"{what}: left out: {type(error).__name__}: {error}"[:300])
            return
        self.say(f"{what}: {ratio:.3f} of the time")
        if ratio < 1 - WORTH:
            self.best = choice

    def _ratio(self, choice: Choice, present: Choice, direction: str) -> float:
        """Median seconds of one over those of the other, in turns."""
        captured = [self.lab.capture(self._case(c), self.dtype, direction) for c in (choice, present)]
        return in_turns(*captured)


def _name_of(made: Fusion) -> str:
    return next(name for name, way in made.ways.items() if way is made.saving)


def command(layer: Layer, shapes: Sequence[tuple], dtype: Any) -> int:
    """``gpulayers tune`` of a layer in a file; the exit status. RuntimeError without a GPU."""
    if _measured.gpu() is None:
        raise RuntimeError("gpulayers tune times kernels on a GPU, and torch sees none here: counted bytes choose")
    print(f"{layer.name} on {' and '.join(str(list(s)) for s in shapes)}, {dtype}")
    Search(layer, shapes, arrays.dtype(dtype), Harness()).run()
    return 0
