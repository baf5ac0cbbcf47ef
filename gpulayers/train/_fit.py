"""The training loop."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpulayers.definition import RuleError
from gpulayers.layers._calls import each_shape
from gpulayers.layers._layer import Layer
from gpulayers.train import _checkpoint
from gpulayers.train._by_name import optimizer as as_optimizer
from gpulayers.train._predict import as_loss, evaluate
from gpulayers.train._run import Run
from gpulayers.train.callbacks import Callback
from gpulayers.train.data import batches, columns, require_size
from gpulayers.train.history import History
from gpulayers.train.metrics import Metric, Scores, resolved
from gpulayers.train.optimizers import Optimizer


def fit(
    model: Layer,
    x: Any,
    y: Any,
    *,
    epochs: int = 1,
    batch_size: int = 32,
    loss: Layer | None = None,
    optimizer: Optimizer | str | None = None,
    metrics: Sequence[str] | Mapping[str, Metric] = (),
    validation: tuple[Any, Any] | float | None = None,
    callbacks: Sequence[Callback] = (),
    precision: str | None = None,
    clip_norm: float | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    steps_per_epoch: int | None = None,
    resume: str | os.PathLike | None = None,
    progress: bool = True,
) -> History:
    """Train ``model`` on rows of ``x`` (an array, or a tuple of them for several inputs) and targets ``y``.

    Parts of the model that were frozen (``bn.trainable = False``) or set to evaluation (``bn.eval()``) stay so; a model
    that is in evaluation mode as a whole trains as a whole.

    loss: a layer of (prediction, target), or of (*outputs, target) for a model of several; default CrossEntropyLoss().
        Weights of its own are trained, too. What is reported is its mean over rows, its sum if its ``reduction`` is
        "sum"; a loss that divides by something else says so in a method ``mean_over(prediction, target)``.
    optimizer: default AdamW().
    metrics: names ("accuracy"), or {name: function of (prediction, target)}, which gives a mean over the rows or a pair
        (sum, count).
    validation: (x, y), or the share of rows at the end to hold out.
    precision: "bfloat16" or "float16" computes in 16 bit with float32 weights; float16 scales the loss. None: in the
        dtype of the weights, whatever that of x is.
    clip_norm: the gradients of all weights together are at most this long.
    drop_last: leave out the last batch of an epoch if it is smaller than the others.
    steps_per_epoch: an epoch is that many batches of rows drawn at random, each anew, in place of all rows once.
    resume: a checkpoint's folder; training goes on from it, up to ``epochs`` in all, with the optimizer's numbers (lr,
        …) as they were there.

    Returns the history: loss, metrics, val_…, lr and seconds of each epoch.
    """
    xs, y = columns(x, y)
    xs, y, held_out = _hold_out(xs, y, validation)
    _require(len(y), epochs, batch_size, clip_norm, callbacks, drop_last)
    _require_steps(steps_per_epoch, shuffle)
    judge = as_loss(loss)
    run = Run(model, judge, as_optimizer(optimizer), resolved(metrics, judge), callbacks, precision, clip_norm)
    _build(run, xs, y)
    for callback in callbacks:
        callback.on_train_begin(run)
    if resume is not None:
        _checkpoint.resume(run, resume)
    run.optimizer.attach(run.named_weights())
    try:
        while run.epoch < epochs and not run.stop:
            start = time.perf_counter()
            run.scores = _epoch(run, xs, y, batch_size, (shuffle, steps_per_epoch), drop_last, epochs, progress)
            if held_out is not None:
                scores = evaluate(
                    model, *held_out, batch_size=batch_size, loss=judge, metrics=run.metrics, precision=precision
                )
                run.scores |= {f"val_{k}": v for k, v in scores.items()}
            run.scores |= {"lr": run.optimizer.rate(), "seconds": time.perf_counter() - start}
            run.history.add(run.scores)
            for callback in callbacks:
                callback.on_epoch_end(run)
            for path in run.checkpoints:  # now all callbacks remember this epoch
                _checkpoint.save(run, path)
            run.checkpoints.clear()
            run.epoch += 1
        for callback in callbacks:
            callback.on_train_end(run)
    finally:
        run.zero_grad()
    return run.history


def _epoch(
    run: Run, xs: list, y: np.ndarray, size: int, rows: tuple, drop_last: bool, epochs: int, progress: bool
) -> dict[str, float]:
    """One pass over the data, or over as many batches as asked for; the loss and each metric of all its rows."""
    from tqdm.auto import tqdm

    shuffle, steps = rows
    order = run.order(len(y), shuffle, steps and steps * size)
    count = len(y) if order is None else len(order)
    with run.mode():
        _require_last(run.model, xs, count, size, drop_last)
    scores = Scores()
    total = count // size if drop_last else math.ceil(count / size)
    label = f"epoch {run.epoch + 1}/{epochs}"
    with tqdm(total=total, desc=label, disable=not progress, unit="batch", leave=run.epoch + 1 == epochs) as bar:
        for inputs, target in batches(xs, y, size, run.model.device, order, drop_last):
            scores.add(run.step(inputs, target))
            if bar.update():  # drawn just now, a few times a second: only then is the GPU waited for
                bar.set_postfix(scores.read(), refresh=False)
        bar.set_postfix(scores.read())
    return scores.read()


def _build(run: Run, xs: list, y: np.ndarray) -> None:
    """The model and, for its outputs, the loss."""
    run.model.ensure_built(*((None, *a.shape[1:]) for a in xs))
    if run.loss.waits():
        shape = run.model.output_shape(*((None, *a.shape[1:]) for a in xs))
        run.loss.ensure_built(*each_shape(shape), (None, *y.shape[1:]))


def _require(rows: int, epochs: int, size: int, clip_norm: float | None, callbacks: Any, drop_last: bool) -> None:
    if rows == 0 or epochs < 0:
        raise ValueError(f"fit: the rule is at least one row and epochs ≥ 0; got {rows} rows and {epochs} epochs")
    require_size(size)
    if drop_last and rows < size:
        raise ValueError(f"fit: drop_last: the rule is at least batch_size = {size} rows; got {rows}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"fit: clip_norm: the rule is clip_norm > 0; got {clip_norm}")
    for i, callback in enumerate(callbacks):
        if not isinstance(callback, Callback):
            raise TypeError(f"fit: callbacks[{i}]: the rule is a Callback; got {callback!r}")


def _require_steps(steps: Any, shuffle: bool) -> None:
    if steps is None:
        return
    if not isinstance(steps, int | np.integer) or steps < 1:
        raise ValueError(f"fit: steps_per_epoch: the rule is an integer ≥ 1 or None; got {steps!r}")
    if not shuffle:
        raise ValueError(f"fit: steps_per_epoch: the rule is shuffle=True, since rows are drawn; got {steps} and False")


def _require_last(model: Layer, xs: list, rows: int, size: int, drop_last: bool) -> None:
    """Raises ValueError before the first step if the model refuses the last batch for its size."""
    rest = rows % size
    if drop_last or not rest or rows < size:
        return
    try:
        model.output_shape(*((rest, *a.shape[1:]) for a in xs))
    except RuleError as error:
        with contextlib.suppress(RuleError):
            model.output_shape(*((size, *a.shape[1:]) for a in xs))
            why = f"the last batch has {rest} of {rows} rows, which drop_last=True leaves out"
            raise ValueError(f"fit: {why}: {error}") from error


def _hold_out(xs: list, y: Any, validation: Any) -> tuple[list, Any, tuple | None]:
    if validation is None:
        return xs, y, None
    if isinstance(validation, tuple | list) and len(validation) == 2:
        held_out = columns(*validation)
        if not len(held_out[0][0]):
            raise ValueError("validation: the rule is at least one row; got 0 rows")
        return xs, y, held_out
    if not isinstance(validation, float | np.floating) or not 0 < validation < 1:
        came = f"{type(validation).__name__} of {len(validation)}" if hasattr(validation, "__len__") else validation
        raise ValueError(f"validation: the rule is (x, y) or a share between 0 and 1; got {came}")
    cut = len(y) - max(1, round(len(y) * validation))
    return [a[:cut] for a in xs], y[:cut], ([a[cut:] for a in xs], y[cut:])
