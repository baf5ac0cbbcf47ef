"""Saved models: a folder with config.json and weights.safetensors, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from gpulayers.layers._config import from_config
from gpulayers.layers._layer import Layer

CONFIG, WEIGHTS = "config.json", "weights.safetensors"
TRAINING, STATE = "training.json", "training.safetensors"
"""What a checkpoint has beside them."""
_FORMAT = 1


def save(layer: Layer, path: str | os.PathLike) -> None:
    """Write the model to the folder ``path``: what it is (config.json) and its weights (weights.safetensors).

    A folder that is there already is replaced only when the new one is complete.
    """
    config = model_config(layer)
    state = layer.state_dict()
    with whole_folder(path) as folder:
        write_json(folder / CONFIG, config)
        write_arrays(folder / WEIGHTS, state)


def model_config(layer: Layer) -> dict[str, Any]:
    """What config.json says of a model. Raises TypeError for a layer that is not registered."""
    return {"format": _FORMAT, "model": layer.get_config(), "input_shapes": layer._input_shapes}


def load(path: str | os.PathLike) -> Layer:
    """The model that ``save`` wrote, on the CPU. Raises ValueError for a folder that is damaged or no model."""
    folder = recovered(path)
    config = read_json(folder / CONFIG)
    if not {"model", "input_shapes"} <= config.keys() or config.get("format") != _FORMAT:
        came = f"{config.get('format')} with {', '.join(config) or 'nothing'}"
        raise ValueError(f"{folder / CONFIG}: the rule is a gpulayers model of format {_FORMAT}; got {came}")
    state = read_arrays(folder / WEIGHTS)
    layer = from_config(config["model"])
    if config["input_shapes"] is not None:
        layer.ensure_built(*map(tuple, config["input_shapes"]))
    for name, w in layer.named_weights().items():
        if name in state:
            w.data = w.data.astype(state[name].dtype)  # a model of another dtype comes back in it
    layer.load_state_dict(state)
    return layer


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A fresh folder to write into; it takes the place of ``path`` when the block ends well, else it is removed.

    Raises FileExistsError where that would remove what is no saved model.
    """
    target = _real(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file():
        raise FileExistsError(f"{target} is a file; a model is saved as a folder")
    others = {f.name for f in target.iterdir()} - {CONFIG, WEIGHTS, TRAINING, STATE} if target.is_dir() else set()
    if others:
        came = ", ".join(sorted(others)[:3])
        raise FileExistsError(f"{target}: the rule is a new folder, or one with a saved model alone; it holds {came}")
    fresh, old = _beside(target, "new"), _beside(target, "old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        for file in fresh.iterdir():
            _sync(file)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)  # a crash between the two renames leaves the old one, which `recovered` finds
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def recovered(path: str | os.PathLike) -> pathlib.Path:
    """``path``, or what a crash in the middle of replacing it left behind. Raises FileNotFoundError."""
    target = _real(path)
    if target.is_dir():
        return target
    if _beside(target, "old").is_dir():
        return _beside(target, "old")
    raise FileNotFoundError(f"{target}: no such folder")


def _real(path: str | os.PathLike) -> pathlib.Path:
    """A link stays one: what it points to is replaced."""
    return pathlib.Path(os.path.realpath(path))


def _beside(target: pathlib.Path, what: str) -> pathlib.Path:
    return target.with_name(f".{target.name}.{what}")


def _sync(file: pathlib.Path) -> None:
    with open(file, "rb") as f:
        os.fsync(f.fileno())


def write_json(file: pathlib.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1))


def read_json(file: pathlib.Path) -> dict:
    def read() -> dict:
        value = json.loads(file.read_text())
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, no object")
        return value

    return _read(file, read)


def write_arrays(file: pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file({k: np.ascontiguousarray(v).reshape(v.shape) for k, v in state.items()}, file)


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
