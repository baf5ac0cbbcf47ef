"""Saved models: a folder with config.json and weights.safetensors, written whole or not at all."""

from __future__ import annotations

import json
import os
import pathlib
import stat
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpulayers.layers._folder import recovered, whole_folder
from gpulayers.layers._layer import Layer
from gpulayers.layers._model import FORMAT, model_config, model_of

CONFIG, WEIGHTS = "config.json", "weights.safetensors"
TRAINING, STATE = "training.json", "training.safetensors"
"""What a checkpoint has beside them."""
NAMES = frozenset({CONFIG, WEIGHTS, TRAINING, STATE})


def save(layer: Layer, path: str | os.PathLike) -> None:
    """Write the model to the folder ``path``: what it is (config.json) and its weights (weights.safetensors).

    What a folder that is there already holds is replaced only when the new files are complete.
    """
    config = model_config(layer)
    state = layer.state_dict()
    with whole_folder(path, NAMES) as folder:
        write_json(folder / CONFIG, config)
        write_arrays(folder / WEIGHTS, state)


def load(path: str | os.PathLike) -> Layer:
    """The model that ``save`` wrote, on the CPU. Raises ValueError for a folder that is damaged or no model."""
    folder = recovered(path)
    config = read_json(folder / CONFIG)
    if not {"model", "input_shapes"} <= config.keys() or config.get("format") != FORMAT:
        came = f"{config.get('format')} with {', '.join(config) or 'nothing'}"
        raise ValueError(f"{folder / CONFIG}: the rule is a gpulayers model of format {FORMAT}; got {came}")
    state = read_arrays(folder / WEIGHTS)
    return model_of(config, state)


def write_json(file: pathlib.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1), encoding="utf-8")


def read_json(file: pathlib.Path) -> dict:
    def read() -> dict:
        value = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, no object")
        return value

    return _read(file, read)


def write_arrays(file: pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)  # as the umask has it; save_file makes a file that its owner alone reads
    save_file({k: np.ascontiguousarray(v).reshape(v.shape) for k, v in state.items()}, file)
    file.chmod(mode)


def read_arrays(file: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return _read(file, lambda: load_file(file))


def _read(file: pathlib.Path, read: Callable) -> Any:
    if not file.is_file():
        raise ValueError(f"{file.parent}: {file.name} is missing; this is no saved model, or a damaged one")
    try:
        return read()
    except Exception as error:
        raise ValueError(f"{file}: it is damaged or cut off ({error})") from error
