"""Checkpoints: a saved model with the state of its training beside it, from which training goes on to the same bits."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpulayers import random
from gpulayers.layers._files import (
    CONFIG,
    NAMES,
    STATE,
    TRAINING,
    WEIGHTS,
    read_arrays,
    read_json,
    write_arrays,
    write_json,
)
from gpulayers.layers._folder import recovered, whole_folder
from gpulayers.layers._model import model_config
from gpulayers.train._run import LOSS, Run
from gpulayers.train.history import History

OPTIMIZER = "optimizer/"


def save(run: Run, path: str | os.PathLike) -> None:
    """Write a checkpoint to the folder ``path``, whole or not at all."""
    optimizer = run.optimizer.state_dict()
    weights = run.state_dict()
    kept = {OPTIMIZER + name: a for name, a in optimizer.pop("arrays").items()}
    kept |= {name: a for name, a in weights.items() if name.startswith(LOSS)}
    callbacks = []
    for i, callback in enumerate(run.callbacks):
        value, state = callback.state()
        callbacks.append([type(callback).__name__, value])
        kept |= {f"callback/{i}/{name}": a for name, a in state.items()}
    training = {
        "epoch": run.epoch + 1,
        "stop": run.stop,
        "history": dict(run.history),
        "random": random.get_state(),
        "shuffle_seed": run.shuffle_seed,
        "scale": [run.scale.value, run.scale.good] if run.scale.on else None,
        "optimizer": optimizer,
        "frozen": [name for name, w in run.named_weights().items() if not w.trainable],
        "callbacks": callbacks,
    }
    with whole_folder(path, NAMES) as folder:
        write_json(folder / CONFIG, model_config(run.model))
        write_arrays(folder / WEIGHTS, {name: a for name, a in weights.items() if not name.startswith(LOSS)})
        write_json(folder / TRAINING, training)
        write_arrays(folder / STATE, kept)


def resume(run: Run, path: str | os.PathLike) -> None:
    """Go on from a checkpoint, as if training had never stopped.

    Nothing changes if the checkpoint is damaged, or of another training: then it raises ValueError or KeyError.
    """
    folder = recovered(path)
    training, weights = read_json(folder / TRAINING), read_arrays(folder / WEIGHTS)
    kept = read_arrays(folder / STATE)
    try:
        epoch, stop, seed = int(training["epoch"]), bool(training["stop"]), int(training["shuffle_seed"])
        scale, good = (None, 0) if training["scale"] is None else map(int, training["scale"])
        history = History({str(name): list(values) for name, values in training["history"].items()})
        drawn = {name: int(training["random"][name]) for name in random.get_state()}
        optimizer = {**training["optimizer"], "arrays": _under(kept, OPTIMIZER)}
        frozen = set(training["frozen"])
        names, values = [str(name) for name, _ in training["callbacks"]], [v for _, v in training["callbacks"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder, error) from error
    if names != (here := [type(c).__name__ for c in run.callbacks]):
        raise ValueError(f"{folder}: the rule is the same callbacks, {here}; the checkpoint has {names}")
    try:
        run.optimizer.require_state(optimizer, run.named_weights())
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    for i, (callback, value) in enumerate(zip(run.callbacks, values)):
        try:
            callback.load_state(value, _under(kept, f"callback/{i}/"))
        except (KeyError, TypeError) as error:
            raise _damaged(folder, error) from error
    run.load_state_dict(weights | {LOSS + name: a for name, a in _under(kept, LOSS).items()})
    run.optimizer.load_state_dict(optimizer, run.named_weights())
    for name, w in run.named_weights().items():
        w.trainable = name not in frozen
    run.history, run.epoch, run.stop, run.shuffle_seed = history, epoch, stop, seed
    if scale is not None and run.scale.on:
        run.scale.value, run.scale.good = float(scale), good
    random.set_state(drawn)


def _damaged(folder: pathlib.Path, error: Exception) -> ValueError:
    kind = type(error).__name__
    return ValueError(f"{folder / TRAINING}: it is damaged, or of another version ({kind}: {error})")


def _under(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
