"""What may happen at the end of each epoch: stop early, write a checkpoint, or anything of your own."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from gpulayers.layers._config import Configurable
from gpulayers.train import metrics
from gpulayers.train._run import Run


class Callback(Configurable):
    """``on_epoch_end(run)`` is called after each epoch, validation included; ``run.stop = True`` ends training.

    A callback that remembers something between epochs gives it in ``state`` and takes it back in ``load_state``.
    """

    def on_train_begin(self, run: Run) -> None:
        """Before the first epoch, and before a checkpoint's state is loaded: forget what another training left."""

    def on_epoch_end(self, run: Run) -> None:
        """run.history, run.scores (of this epoch), run.model, run.epoch (from 0), run.optimizer, run.checkpoint(path)."""

    def on_train_end(self, run: Run) -> None:
        """After the last epoch."""

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(JSON values, arrays) that a checkpoint must keep."""
        return {}, {}

    def load_state(self, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Take back what ``state`` gave. Raises ValueError if it is another callback's."""


class _Best:
    """The best value of a metric so far; ``mode`` as in ``metrics.mode``."""

    def __init__(self, owner: str, monitor: str, mode: str | None, min_delta: float = 0.0):
        self.owner, self.monitor, self.min_delta = owner, monitor, min_delta
        self.mode = metrics.mode(monitor, mode)
        self.value = math.inf

    def improves(self, run: Run) -> bool:
        """Whether this epoch is better than all before it by more than ``min_delta``."""
        if self.monitor not in run.scores:
            came = ", ".join(run.scores)
            raise KeyError(f"{self.owner}: monitor: the rule is one of {came}; got {self.monitor!r}")
        value = run.scores[self.monitor] * (1 if self.mode == "min" else -1)
        better = value < self.value - self.min_delta
        self.value = value if better else self.value
        return better

    def state(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "mode": self.mode, "best": self.value}

    def load_state(self, values: dict[str, Any]) -> None:
        if (mine := (self.monitor, self.mode)) != (came := (values["monitor"], values["mode"])):
            raise ValueError(f"{self.owner}: the rule is the same monitor and mode, {mine}; the checkpoint has {came}")
        self.value = float(values["best"])


class EarlyStopping(Callback):
    """Ends training when ``monitor`` has not improved by ``min_delta`` for ``patience`` epochs.

    restore_best: at the end, the model (and the loss) gets the weights of its best epoch back.
    mode: "min" or "max", whichever is better; None: as the monitor's name says (losses and errors fall, accuracies
        rise), ValueError if it does not.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        patience: int = 3,
        min_delta: float = 0.0,
        restore_best: bool = True,
        mode: str | None = None,
    ):
        self.monitor, self.patience, self.min_delta, self.restore_best = monitor, patience, min_delta, restore_best
        self.mode = mode
        self._forget()

    def _forget(self) -> None:
        self._best, self._waited = _Best("EarlyStopping", self.monitor, self.mode, self.min_delta), 0
        self._weights: dict[str, np.ndarray] = {}

    def on_train_begin(self, run: Run) -> None:
        self._forget()

    def on_epoch_end(self, run: Run) -> None:
        if self._best.improves(run):
            self._waited = 0
            if self.restore_best:
                self._weights = run.state_dict()
        else:
            self._waited += 1
            run.stop |= self._waited >= self.patience

    def on_train_end(self, run: Run) -> None:
        if self._weights:
            run.load_state_dict(self._weights)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return self._best.state() | {"waited": self._waited}, self._weights

    def load_state(self, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self._best.load_state(values)
        self._waited, self._weights = int(values["waited"]), arrays


class Checkpoint(Callback):
    """Writes a checkpoint to the folder ``path`` every ``every`` epochs; ``fit(…, resume=path)`` goes on from it.

    It has the model, the optimizer, the random state and the history, and is written whole or not at all.
    monitor: a metric; then only what is the best epoch so far is written. mode: as in EarlyStopping.
    """

    def __init__(self, path: str | os.PathLike, every: int = 1, monitor: str | None = None, mode: str | None = None):
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"Checkpoint: every: the rule is an integer ≥ 1; got {every!r}")
        self.path, self.every, self.monitor, self.mode = os.fspath(path), every, monitor, mode
        self._forget()

    def _forget(self) -> None:
        self._best = None if self.monitor is None else _Best("Checkpoint", self.monitor, self.mode)

    def on_train_begin(self, run: Run) -> None:
        self._forget()

    def on_epoch_end(self, run: Run) -> None:
        if (run.epoch + 1) % self.every == 0 and (self._best is None or self._best.improves(run)):
            run.checkpoint(self.path)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {} if self._best is None else self._best.state(), {}

    def load_state(self, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        if self._best is not None and values:
            self._best.load_state(values)
