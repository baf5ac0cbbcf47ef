"""What may happen at the end of each epoch: stop early, write a checkpoint, or anything of your own."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from gpulayers.layers._config import Configurable

if TYPE_CHECKING:
    from gpulayers.train._fit import Run


class Callback(Configurable):
    """``on_epoch_end(run)`` is called after each epoch, validation included; ``run.stop = True`` ends training.

    A callback that remembers something between epochs gives it in ``state`` and takes it back in ``load_state``.
    """

    def on_train_begin(self, run: Run) -> None:
        """Before the first epoch, and before a checkpoint's state is loaded: forget what another training left."""

    def on_epoch_end(self, run: Run) -> None:
        """run.history, run.model, run.epoch (from 0), run.optimizer."""

    def on_train_end(self, run: Run) -> None:
        """After the last epoch."""

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(JSON values, arrays) that a checkpoint must keep."""
        return {}, {}

    def load_state(self, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Take back what ``state`` gave."""


class EarlyStopping(Callback):
    """Ends training when ``monitor`` has not improved by ``min_delta`` for ``patience`` epochs.

    restore_best: at the end, the model gets the weights of its best epoch back.
    """

    def __init__(self, monitor: str = "val_loss", patience: int = 3, min_delta: float = 0.0, restore_best: bool = True):
        self.monitor, self.patience, self.min_delta, self.restore_best = monitor, patience, min_delta, restore_best
        self._best, self._waited = math.inf, 0
        self._weights: dict[str, np.ndarray] = {}

    def on_train_begin(self, run: Run) -> None:
        self._best, self._waited, self._weights = math.inf, 0, {}

    def on_epoch_end(self, run: Run) -> None:
        if self.monitor not in run.history:
            raise KeyError(f"EarlyStopping: monitor: the rule is one of {', '.join(run.history)}; got {self.monitor!r}")
        value = run.history[self.monitor][-1] * (-1 if "accuracy" in self.monitor else 1)
        if value < self._best - self.min_delta:
            self._best, self._waited = value, 0
            if self.restore_best:
                self._weights = run.model.state_dict()
        else:
            self._waited += 1
            run.stop |= self._waited >= self.patience

    def on_train_end(self, run: Run) -> None:
        if self._weights:
            run.model.load_state_dict(self._weights)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"best": self._best, "waited": self._waited}, self._weights

    def load_state(self, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self._best, self._waited, self._weights = values["best"], values["waited"], arrays


class Checkpoint(Callback):
    """Writes a checkpoint to the folder ``path`` every ``every`` epochs; ``fit(…, resume=path)`` goes on from it.

    It has the model, the optimizer, the random state and the history, and is written whole or not at all.
    """

    def __init__(self, path: str | os.PathLike, every: int = 1):
        self.path, self.every = os.fspath(path), every

    def on_epoch_end(self, run: Run) -> None:
        if (run.epoch + 1) % self.every == 0:
            run.save(self.path)
