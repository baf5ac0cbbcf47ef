"""One training while it goes on: what it has reached, and one step of it."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gpulayers import arrays, random
from gpulayers.layers._calls import no_leftovers
from gpulayers.layers._frames import as_data, mode, no_grad
from gpulayers.layers._layer import Layer
from gpulayers.layers._weight import Weight
from gpulayers.ops import optim as ops
from gpulayers.train import _precision, data
from gpulayers.train._precision import LossScale
from gpulayers.train.history import History
from gpulayers.train.metrics import Metric, Score, loss_score, scored
from gpulayers.train.optimizers import Optimizer

LOSS = "loss/"
"""Before the names of a loss's own weights, beside those of the model."""


class Remembers(Protocol):
    """What a checkpoint keeps of each callback."""

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]: ...

    def load_state(self, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> None: ...


class Run:
    """One training: everything that a checkpoint keeps, and one step.

    history: of all epochs. scores: of the last one. epoch: from 0. stop: set it, and training ends after this epoch.
    """

    def __init__(
        self,
        model: Layer,
        loss: Layer,
        optimizer: Optimizer,
        metrics: Mapping[str, Metric],
        callbacks: Sequence[Remembers],
        precision: str | None,
        clip_norm: float | None,
    ):
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.metrics, self.callbacks, self.clip_norm = metrics, callbacks, clip_norm
        self.dtype = _precision.named(precision)
        self.scale = LossScale(self.dtype == arrays.float16)
        self.history, self.epoch, self.stop = History(), 0, False
        self.scores: dict[str, float] = {}
        self.checkpoints: set[str] = set()
        self._stepped: dict[str, Weight] = {}
        self.shuffle_seed = int(random.draw()[0])

    def checkpoint(self, path: str | os.PathLike) -> None:
        """Ask for a checkpoint in the folder ``path``; it is written when all callbacks have seen the epoch."""
        self.checkpoints.add(os.fspath(path))

    @functools.cached_property
    def computing(self) -> np.dtype | None:
        """The dtype to compute in; to be asked for once the model is built."""
        return self.dtype or _precision.of_weights(self.model)

    # --- weights: the model's, and those that a loss has of its own --------------------------------------------------

    def named_weights(self) -> dict[str, Weight]:
        """Every weight once, by name."""
        named = self.model.named_weights()
        known = {id(w) for w in named.values()}
        own = self.loss.named_weights().items()
        return named | {LOSS + name: w for name, w in own if id(w) not in known}

    def zero_grad(self) -> None:
        """Forget the gradients of the weights of the latest step."""
        for w in self._stepped.values():
            w.zero_grad()

    def state_dict(self) -> dict[str, np.ndarray]:
        return self.model.state_dict() | {LOSS + name: a for name, a in self.loss.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Raises ValueError or KeyError before anything is changed."""
        of_loss = {name.removeprefix(LOSS): a for name, a in state.items() if name.startswith(LOSS)}
        mine = {name: w.shape for name, w in self.loss.named_weights().items()}
        if mine != (came := {name: a.shape for name, a in of_loss.items()}):
            raise ValueError(f"{self.loss.name}: the rule is a loss with the weights {mine}; got {came}")
        self.model.load_state_dict({name: a for name, a in state.items() if not name.startswith(LOSS)})
        self.loss.load_state_dict(of_loss)

    def mode(self) -> contextlib.AbstractContextManager:
        """Training, for the calls inside; parts of the model that were set to evaluation (``bn.eval()``) stay so.

        A model that is in evaluation mode as a whole trains as a whole.
        """
        return mode(None if self.model.training else True)

    # --- one step ----------------------------------------------------------------------------------------------------

    @np.errstate(all="ignore")  # NaN and Inf pass in silence, as they do on a GPU
    def step(self, xs: list[Any], target: Any) -> dict[str, Score]:
        """Forward, backward and update on one batch; the scores of the loss and of each metric, where the model is."""
        self.zero_grad()  # of the weights that are known: their memory is free for the forward
        xs = [_precision.cast(x, self.computing) for x in xs]
        with self.mode(), no_leftovers(self.model, self.loss):
            with as_data(*xs):
                y = self.model(*xs)
            ys = y if isinstance(y, tuple) else (y,)
            wide, target = _precision.judged(ys, target)
            with as_data(target):
                loss = self.loss(*wide, target)
            if loss.shape:
                raise ValueError(f"{self.loss.name}: the rule is one loss a batch, shape []; got {list(loss.shape)}")
            weights = self._stepped = self.named_weights()
            self.zero_grad()  # of those that this forward made
            self._backward(loss, ys)
        loss = loss + self._regularize(weights)
        self._update(weights)
        rows = len(xs[0])
        with no_grad():
            mine = {"loss": loss_score(self.loss, loss, wide, target, rows)}
            return mine | scored(self.metrics, wide if isinstance(y, tuple) else wide[0], target, rows)

    def _backward(self, loss: Any, ys: tuple) -> None:
        found = self.loss.backward(arrays.zeros_like(loss) + self.scale.value)
        dys = found if isinstance(found, tuple) else (found,)
        if len(dys) < len(ys):
            raise RuntimeError(
                f"{self.loss.name}: the rule is a gradient for each of {len(ys)} outputs; got {len(dys)}"
            )
        self.model.backward(
            *(None if dy is None else arrays.cast(dy, arrays.library(y).dtype(y)) for dy, y in zip(dys, ys))
        )

    def _regularize(self, weights: Mapping[str, Weight]) -> Any:
        penalty: Any = 0.0
        for w in weights.values():
            if w.trainable and w.regularizer is not None:
                value, grad = w.regularizer(w.data)
                penalty = penalty + value
                w.add_grad(grad * self.scale.value)
        return penalty

    def _update(self, weights: Mapping[str, Weight]) -> None:
        factor, finite, clipping = 1 / self.scale.value, True, None
        grads = [w.grad for w in weights.values() if w.trainable and w.has_grad]
        if grads and (self.scale.on or self.clip_norm is not None):
            norm, clipping = ops.grad_norm(grads, max_norm=self.clip_norm or math.inf, grad_scale=factor)
            if self.scale.on:
                finite = math.isfinite(float(norm[0]))  # the next loss's scale is the host's: it waits
            if not self.optimizer.takes_scale:
                factor, clipping = factor * float(clipping[0]), None
        if finite:
            self.optimizer.step(weights, factor, *([] if clipping is None else [clipping]))
            for name, w in weights.items():
                if w.trainable and w.constraint is not None:
                    w.assign(w.constraint(w.data))
                    self.optimizer.assigned(name, w)
        self.scale.update(finite)

    def order(self, rows: int, shuffle: bool, drawn: int | None = None) -> np.ndarray | None:
        """The order of the rows in this epoch, or ``drawn`` of them; it follows from the seed and the epoch alone."""
        return data.order(self.shuffle_seed, self.epoch, rows, shuffle, drawn)
