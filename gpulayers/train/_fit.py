"""The training loop, and evaluation and prediction beside it."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpulayers import arrays, random, transfer
from gpulayers.layers._calls import no_grad
from gpulayers.layers._files import (
    CONFIG,
    NAMES,
    STATE,
    TRAINING,
    WEIGHTS,
    model_config,
    read_arrays,
    read_json,
    write_arrays,
    write_json,
)
from gpulayers.layers._folder import recovered, whole_folder
from gpulayers.layers._layer import Layer
from gpulayers.layers.loss import CrossEntropyLoss
from gpulayers.train.callbacks import Callback, Checkpoint
from gpulayers.train.data import batches, columns, require_size
from gpulayers.train.history import History
from gpulayers.train.optimizers import Optimizer
from gpulayers.train.optimizers import optimizer as as_optimizer

Metric = Callable[[Any, Any], Any]


def accuracy(prediction: Any, target: Any) -> Any:
    """The share of rows whose largest value along axis 1 stands at the target's index."""
    return arrays.cast(prediction.argmax(1) == target, arrays.float32).mean()


METRICS: dict[str, Metric] = {"accuracy": accuracy}


def _precision(name: str | None) -> np.dtype | None:
    dtype = arrays.dtype(name) if name else None
    if dtype not in (None, *arrays.FLOATS):
        raise ValueError(f"precision: the rule is bfloat16, float16, float32 or float64; got {name!r}")
    return dtype


def _own(model: Layer) -> np.dtype | None:
    """The dtype of the model's weights; None where it has none."""
    return next((w.dtype for w in model.weights if w.dtype in arrays.FLOATS), None)


def _cast(x: Any, dtype: np.dtype | None) -> Any:
    """``x`` in another dtype if it holds floating-point numbers: integers are labels or indices."""
    return x if dtype is None or arrays.library(x).dtype(x) not in arrays.FLOATS else arrays.cast(x, dtype)


def _judged(prediction: Any, target: Any) -> tuple[Any, Any]:
    """(prediction, target) as a loss takes them: of one dtype, 16-bit ones in float32."""
    dtype = arrays.compute_dtype(arrays.library(prediction).dtype(prediction))
    return _cast(prediction, dtype), _cast(target, dtype)


class LossScale:
    """Keeps float16 gradients from vanishing: the loss is multiplied by ``value``, the gradients divided by it.

    It halves when a gradient overflows (that step is left out) and doubles after 2,000 steps without one
    (Micikevicius et al. 2018).
    """

    def __init__(self, on: bool):
        self.on, self.value, self.good = on, 2.0**16 if on else 1.0, 0

    def update(self, finite: bool) -> None:
        if not self.on:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good % 2000 == 0:
            self.value = min(self.value * 2, 2.0**24)


class Run:
    """One training: everything that a checkpoint keeps, and one step."""

    def __init__(
        self,
        model: Layer,
        loss: Layer,
        optimizer: Optimizer,
        metrics: Mapping[str, Metric],
        callbacks: Sequence[Callback],
        precision: str | None,
        clip_norm: float | None,
    ):
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.metrics, self.callbacks, self.clip_norm = metrics, callbacks, clip_norm
        self.dtype = _precision(precision)
        self.scale = LossScale(self.dtype == arrays.float16)
        self.history, self.epoch, self.stop = History(), 0, False
        self.shuffle_seed = int(random.draw()[0])

    @functools.cached_property
    def computing(self) -> np.dtype | None:
        """The dtype to compute in; to be asked for once the model is built."""
        return self.dtype or _own(self.model)

    @np.errstate(all="ignore")  # NaN and Inf pass in silence, as they do on a GPU
    def step(self, xs: list[Any], target: Any) -> dict[str, Any]:
        """Forward, backward and update on one batch; the loss and metrics as 0-dim arrays where the model is."""
        self.model.zero_grad()
        y = self.model(*(_cast(x, self.computing) for x in xs))
        dtype = arrays.library(y).dtype(y)
        wide, target = _judged(y, target)
        loss = self.loss(wide, target)
        if loss.shape:
            raise ValueError(f"{self.loss.name}: the rule is one loss a batch, shape []; got {list(loss.shape)}")
        one = arrays.zeros_like(loss) + self.scale.value
        dy = self.loss.backward(one)
        self.model.backward(arrays.cast(dy[0] if isinstance(dy, tuple) else dy, dtype))
        loss = loss + self._regularize()
        self._update()
        with no_grad():
            return {"loss": loss} | {name: metric(wide, target) for name, metric in self.metrics.items()}

    def _regularize(self) -> Any:
        penalty: Any = 0.0
        for w in self.model.trainable_weights:
            if w.regularizer is not None:
                value, grad = w.regularizer(w.data)
                penalty = penalty + value
                w.add_grad(grad * self.scale.value)
        return penalty

    def _update(self) -> None:
        weights = self.model.named_weights()
        factor, finite = 1 / self.scale.value, True
        if self.scale.on or self.clip_norm is not None:
            norm = global_norm(w.grad for w in weights.values() if w.has_grad) * factor
            finite = math.isfinite(norm)
            if self.clip_norm is not None and finite:
                factor *= min(1.0, self.clip_norm / (norm + 1e-6))
        if finite or not self.scale.on:
            self.optimizer.step(weights, factor)
            for w in weights.values():
                if w.trainable and w.constraint is not None:
                    w.data[...] = w.constraint(w.data)
                    w.changed()
        self.scale.update(finite)

    def order(self, rows: int, shuffle: bool) -> np.ndarray | None:
        """The order of the rows in this epoch; it follows from the seed and the epoch alone."""
        return np.random.default_rng([self.shuffle_seed, self.epoch]).permutation(rows) if shuffle else None

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write a checkpoint: a saved model with the state of its training beside it."""
        values, kept = [], {f"optimizer/{k}": v for k, v in self.optimizer.state_dict().items()}
        for i, callback in enumerate(self.callbacks):
            value, state = callback.state()
            values.append(value)
            kept |= {f"callback/{i}/{k}": v for k, v in state.items()}
        training = {
            "epoch": self.epoch + 1,
            "stop": self.stop,
            "history": dict(self.history),
            "random": random.get_state(),
            "shuffle_seed": self.shuffle_seed,
            "scale": [self.scale.value, self.scale.good],
            "optimizer": type(self.optimizer).__name__,
            "buffers": list(self.optimizer.buffers),
            "callbacks": [[type(c).__name__, value] for c, value in zip(self.callbacks, values)],
        }
        weights = self.model.state_dict()
        with whole_folder(path, NAMES) as folder:
            write_json(folder / CONFIG, model_config(self.model))
            write_arrays(folder / WEIGHTS, weights)
            write_json(folder / TRAINING, training)
            write_arrays(folder / STATE, kept)

    def resume(self, path: str | os.PathLike) -> None:
        """Go on from a checkpoint, as if training had never stopped.

        Nothing changes if the checkpoint is damaged, or of another training: then it raises ValueError.
        """
        folder = recovered(path)
        training, weights = read_json(folder / TRAINING), read_arrays(folder / WEIGHTS)
        kept = read_arrays(folder / STATE)
        try:
            epoch, stop, seed = int(training["epoch"]), bool(training["stop"]), int(training["shuffle_seed"])
            scale, good = training["scale"]
            history = History({str(name): list(values) for name, values in training["history"].items()})
            drawn = {name: int(training["random"][name]) for name in random.get_state()}
            optimizer, buffers = training["optimizer"], tuple(training["buffers"])
            names, values = [str(name) for name, _ in training["callbacks"]], [v for _, v in training["callbacks"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            kind = type(error).__name__
            raise ValueError(f"{folder / TRAINING}: it is damaged, or of another version ({kind}: {error})") from error
        mine = f"{type(self.optimizer).__name__} with the state {list(self.optimizer.buffers)}"
        if mine != (came := f"{optimizer} with the state {list(buffers)}"):
            raise ValueError(f"{folder}: the rule is the same optimizer, {mine}; the checkpoint has {came}")
        if names != (here := [type(c).__name__ for c in self.callbacks]):
            raise ValueError(f"{folder}: the rule is the same callbacks, {here}; the checkpoint has {names}")
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(_under(kept, "optimizer/"), self.model.device)
        for i, (callback, value) in enumerate(zip(self.callbacks, values)):
            callback.load_state(value, _under(kept, f"callback/{i}/"))
        self.history, self.epoch, self.stop, self.shuffle_seed = history, epoch, stop, seed
        self.scale.value, self.scale.good = float(scale), int(good)
        random.set_state(drawn)


def _under(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def global_norm(grads: Iterator[Any]) -> float:
    """√ Σ g² over all gradients, in float32 (one wait for the GPU)."""
    total: Any = 0.0
    for g in grads:
        wide = arrays.cast(g, arrays.float32) if arrays.library(g).dtype(g) in arrays.HALVES else g
        total = total + (wide * wide).sum()
    return math.sqrt(float(total)) if math.isfinite(float(total)) else math.inf


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
    resume: str | os.PathLike | None = None,
    progress: bool = True,
) -> History:
    """Train ``model`` on rows of ``x`` (an array, or a tuple of them for several inputs) and targets ``y``.

    loss: a layer of (prediction, target); default CrossEntropyLoss(). optimizer: default AdamW().
    metrics: names ("accuracy"), or {name: function of (prediction, target)}.
    validation: (x, y), or the share of rows at the end to hold out.
    precision: "bfloat16" or "float16" computes in 16 bit with float32 weights; float16 scales the loss. None: in the
        dtype of the weights, whatever that of x is.
    clip_norm: the gradients of all weights together are at most this long.
    resume: a checkpoint's folder; training goes on from it, up to ``epochs`` in all.

    Returns the history: loss, metrics, val_…, lr and seconds of each epoch.
    """
    xs, y = columns(x, y)
    xs, y, held_out = _hold_out(xs, y, validation)
    if len(y) == 0 or epochs < 0:
        raise ValueError(f"fit: the rule is at least one row and epochs ≥ 0; got {len(y)} rows and {epochs} epochs")
    require_size(batch_size)
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"fit: clip_norm: the rule is clip_norm > 0; got {clip_norm}")
    for i, callback in enumerate(callbacks):
        if not isinstance(callback, Callback):
            raise TypeError(f"fit: callbacks[{i}]: the rule is a Callback; got {callback!r}")
    callbacks = sorted(callbacks, key=lambda c: isinstance(c, Checkpoint))  # it keeps what the others did
    run = Run(model, _loss(loss), as_optimizer(optimizer), _metrics(metrics), callbacks, precision, clip_norm)
    model.ensure_built(*((None, *a.shape[1:]) for a in xs))
    for callback in callbacks:
        callback.on_train_begin(run)
    if resume is not None:
        run.resume(resume)
    waiting = [(layer, len(layer._frames)) for whole in (model, run.loss) for layer in whole.layers()]
    model.skip_input_grad()
    try:
        while run.epoch < epochs and not run.stop:
            start = time.perf_counter()
            means = _epoch(run, xs, y, batch_size, shuffle, epochs, progress)
            if held_out is not None:
                scores = evaluate(
                    model, *held_out, batch_size=batch_size, loss=run.loss, metrics=run.metrics, precision=precision
                )
                means |= {f"val_{k}": v for k, v in scores.items()}
            run.history.add(means | {"lr": run.optimizer.rate(), "seconds": time.perf_counter() - start})
            for callback in callbacks:
                callback.on_epoch_end(run)
            run.epoch += 1
        for callback in callbacks:
            callback.on_train_end(run)
    finally:
        for layer, frames in waiting:
            del layer._frames[frames:]  # of a step that failed half-way
        model.skip_input_grad(False)
        model.zero_grad()
    return run.history


def _epoch(
    run: Run, xs: list, y: np.ndarray, size: int, shuffle: bool, epochs: int, progress: bool
) -> dict[str, float]:
    """One pass over the data; the mean of the loss and of each metric."""
    from tqdm.auto import tqdm

    run.model.train()
    means = _Means()
    total = math.ceil(len(y) / size)
    label = f"epoch {run.epoch + 1}/{epochs}"
    with tqdm(total=total, desc=label, disable=not progress, unit="batch", leave=run.epoch + 1 == epochs) as bar:
        for inputs, target in batches(xs, y, size, run.model.device, run.order(len(y), shuffle)):
            means.add(run.step(inputs, target), len(inputs[0]))
            if bar.update():  # drawn just now, a few times a second: only then is the GPU waited for
                bar.set_postfix(means.read(), refresh=False)
        bar.set_postfix(means.read())
    return means.read()


class _Means:
    """Means weighted by rows, summed where the values are (no wait for the GPU) until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.rows = 0

    def add(self, values: Mapping[str, Any], rows: int) -> None:
        self.rows += rows
        for name, value in values.items():
            if getattr(value, "shape", ()) != ():
                raise ValueError(f"{name}: the rule is one number a batch, shape []; got {list(value.shape)}")
            wide = float(value) if isinstance(value, bool | int | float) else arrays.cast(value, arrays.float64)
            self.sums[name] = self.sums.get(name, 0.0) + wide * rows

    def read(self) -> dict[str, float]:
        return {name: float(total) / self.rows for name, total in self.sums.items()}


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
    """The mean loss and metrics over the rows, in evaluation mode."""
    xs, y = columns(x, y)
    if not len(xs[0]):
        raise ValueError("evaluate: the rule is at least one row; got 0 rows")
    judge = _loss(loss)
    means = _Means()
    for inputs, target, prediction in _predictions(model, xs, y, batch_size, precision):
        wide, target = _judged(prediction, target)
        with no_grad():
            scores = {"loss": judge(wide, target)} | {n: m(wide, target) for n, m in _metrics(metrics).items()}
        means.add(scores, len(inputs[0]))
    return means.read()


def predict(model: Layer, x: Any, *, batch_size: int = 32, precision: str | None = None) -> np.ndarray:
    """The model's output for every row, in evaluation mode, as a NumPy array."""
    xs, _ = columns(x)
    return np.concatenate([transfer.to_numpy(p) for _, _, p in _predictions(model, xs, None, batch_size, precision)])


def _predictions(model: Layer, xs: list, y: Any, size: int, precision: str | None) -> Iterator[tuple[list, Any, Any]]:
    modes = [(layer, layer.training) for layer in model.layers()]
    dtype = _precision(precision) or _own(model)
    model.eval()
    try:
        for inputs, target in batches(xs, y, size, model.device):
            with no_grad(), np.errstate(all="ignore"):
                prediction = model(*(_cast(a, dtype) for a in inputs))
            yield inputs, target, prediction
    finally:
        for layer, mode in modes:
            layer.training = mode


def _loss(loss: Layer | None) -> Layer:
    if loss is not None and not isinstance(loss, Layer):
        raise TypeError(f"loss: the rule is a layer of (prediction, target), as gl.CrossEntropyLoss(); got {loss!r}")
    return loss or CrossEntropyLoss()


def _metrics(metrics: Sequence[str] | Mapping[str, Metric]) -> dict[str, Metric]:
    if isinstance(metrics, Mapping):
        return dict(metrics)
    metrics = [metrics] if isinstance(metrics, str) else metrics
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics: the rule is one of {', '.join(METRICS)}, or {{name: function}}; got {name!r}")
    return {name: METRICS[name] for name in metrics}


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
