"""What ``gpulayers check`` checks: a class in a file, made with arguments, for inputs of some shape."""

from __future__ import annotations

import copy
import inspect
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

import gpulayers as gl
from gpulayers.authoring.file import module_in
from gpulayers.ops._op import Op

USUAL = {
    "in_features": 6,
    "out_features": 5,
    "features": 6,
    "num_features": 6,
    "hidden_features": 7,
    "units": 5,
    "dim": 6,
    "in_channels": 4,
    "out_channels": 6,
    "channels": 4,
    "num_channels": 4,
    "kernel_size": 2,
    "num_heads": 2,
    "heads": 2,
    "groups": 2,
}
"""Sizes for arguments of these names: small, and no two that meet in a product alike."""
FEATURES = ("in_features", "num_features", "features", "dim")
CHANNELS = ("in_channels", "num_channels", "channels")


def found(target: str) -> type[gl.Layer] | Op:
    """The layer's class (registered), or the op, that FILE.py:name names. Raises ValueError, or ImportError for a broken file."""
    path, _, name = target.rpartition(":")  # a path may have colons
    if not name or not path:
        raise ValueError(f"the rule is FILE.py:Class; got {target!r}")
    if not pathlib.Path(path).is_file():
        raise ValueError(f"{path}: no such file; the rule is FILE.py:Class; got {target!r}")
    module = module_in(pathlib.Path(path).resolve())
    value = getattr(module, name, None)
    if isinstance(value, Op):
        return value
    if not _is_layer(value):
        own = [n for n, v in vars(module).items() if _is_layer(v) and v.__module__ == module.__name__]
        raise ValueError(f"{path} has no layer {name!r}" + (f"; it has {', '.join(own)}" if own else ""))
    return gl.register(value)


def _is_layer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, gl.Layer)


def made(cls: type[gl.Layer], args: tuple, kwargs: dict[str, Any]) -> tuple[gl.Layer, str]:
    """(a layer, the call that made it): arguments that have no default and were not given are guessed by their names."""
    given = list(map(repr, args))
    signature = inspect.signature(cls.__init__)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [p for p in list(signature.parameters.values())[1:] if p.kind in kinds]
    missing = [p.name for p in parameters[len(args) :] if p.default is p.empty and p.name not in kwargs]
    if unknown := [n for n in missing if n not in USUAL]:
        say = ", ".join(f"{n}=…" for n in unknown)
        raise ValueError(f"{cls.__name__}: its arguments must be said, as in --args '{say}'")
    kwargs = {n: USUAL[n] for n in missing} | kwargs
    call = f"{cls.__name__}({', '.join([*given, *(f'{n}={v!r}' for n, v in kwargs.items())])})"
    try:
        return cls(*args, **kwargs), call
    except Exception as error:
        raise ValueError(f"{call}: {type(error).__name__}: {error}") from error


def input_shapes(layer: gl.Layer) -> list[tuple]:
    """Shapes that the layer takes, batch first: the first usual ones that it can be called with, else simply the first."""
    candidates = list(_usual(layer))
    return next((shapes for shapes in candidates if _takes(layer, shapes)), candidates[0])


def _usual(layer: gl.Layer) -> Iterator[list[tuple]]:
    parameters = list(inspect.signature(layer.forward).parameters.values())
    count = sum(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters) or 1
    features, channels = _size(layer, FEATURES), _size(layer, CHANNELS)
    sizes = (5, 8, 6)[-(getattr(layer, "spatial", None) or 2) :]
    rows, images, sequences = (4, features or 6), (4, channels or 4, *sizes), (4, 5, features or 6)
    first = [images, rows] if channels or layer.neuron_type in ("convolutional", "pooling") else [rows, images]
    for shape in (*first, sequences, (4,)):
        yield [shape] * count


def _size(layer: gl.Layer, names: tuple[str, ...]) -> int | None:
    sizes = (getattr(layer, name, None) for name in names)
    return next((n for n in sizes if isinstance(n, int)), None)


def _takes(layer: gl.Layer, shapes: list[tuple]) -> bool:
    with gl.no_grad(), np.errstate(all="ignore"):
        try:
            copy.deepcopy(layer)(*(np.ones(shape, np.float32) for shape in shapes))
        except Exception:
            return False
    return True
