"""Evaluation and prediction, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpulayers import transfer
from gpulayers.layers._frames import mode, no_grad
from gpulayers.layers._layer import Layer
from gpulayers.layers._weight import casts_kept
from gpulayers.layers.loss import CrossEntropyLoss
from gpulayers.train import _precision
from gpulayers.train.data import batches, columns
from gpulayers.train.metrics import Metric, Scores, loss_score, resolved, scored


def as_loss(loss: Layer | None) -> Layer:
    """A loss as it is; None is CrossEntropyLoss()."""
    if loss is not None and not isinstance(loss, Layer):
        raise TypeError(f"loss: the rule is a layer of (prediction, target), as gl.CrossEntropyLoss(); got {loss!r}")
    return loss or CrossEntropyLoss()


def evaluate(
    model: Layer,
    x: Any,
    y: Any,
    *,
    batch_size: int = 32,
    loss: Layer | None = None,
    metrics: Sequence[str] | Mapping[str, Metric] = (),
    precision: str | None = None,
) -> dict[str, float]:
    """The loss and metrics over all rows, in evaluation mode, as if they were one batch; arguments as in ``fit``."""
    xs, y = columns(x, y)
    if not len(xs[0]):
        raise ValueError("evaluate: the rule is at least one row; got 0 rows")
    judge = as_loss(loss)
    functions = resolved(metrics, judge)
    scores = Scores()
    for inputs, target, ys in _outputs(model, xs, y, batch_size, precision):
        wide, target = _precision.judged(ys, target)
        rows = len(inputs[0])
        with mode(False), no_grad(), np.errstate(all="ignore"):
            found = {"loss": loss_score(judge, judge(*wide, target), wide, target, rows)}
            scores.add(found | scored(functions, wide if len(wide) > 1 else wide[0], target, rows))
    return scores.read()


def predict(model: Layer, x: Any, *, batch_size: int = 32, precision: str | None = None) -> Any:
    """The model's output for every row, in evaluation mode, as a NumPy array; a tuple of them for several outputs."""
    xs, _ = columns(x)
    parts = []
    for inputs, _, ys in _outputs(model, xs, None, batch_size, precision):
        parts.append([transfer.to_numpy(y) for y in ys])
        wrong = [list(y.shape) for y in ys if y.shape[:1] != inputs[0].shape[:1]]
        if wrong:
            raise ValueError(f"predict: the rule is outputs of a row for each of {len(inputs[0])} rows; got {wrong[0]}")
    whole = tuple(np.concatenate(column) for column in zip(*parts))
    return whole if len(whole) > 1 else whole[0]


def _outputs(model: Layer, xs: list, y: Any, size: int, precision: str | None) -> Iterator[tuple[list, Any, tuple]]:
    """(inputs, target, outputs) of each batch."""
    dtype = _precision.named(precision) or _precision.of_weights(model)
    kept: dict = {}
    for inputs, target in batches(xs, y, size, model.device):
        with mode(False), no_grad(), casts_kept(kept), np.errstate(all="ignore"):
            found = model(*(_precision.cast(a, dtype) for a in inputs))
        yield inputs, target, found if isinstance(found, tuple) else (found,)
