"""TensorFlow.js: a folder with a layers model, for Node.js and for a browser."""

from __future__ import annotations

import importlib.resources
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpulayers.export._error import ExportError
from gpulayers.export.tfjs._custom import Classes
from gpulayers.export.tfjs._model import Walk
from gpulayers.export.tfjs._topology import Tensor, Topology
from gpulayers.export.tfjs._weights import shards
from gpulayers.layers._folder import whole_folder
from gpulayers.layers._layer import Layer

GENERATOR = "gpulayers"
AS_THEY_ARE = ("predict.mjs", "index.html", "page.js", "page.css", "package.json")
MODEL, CLASSES = "model.json", "custom_layers.js"


def write(model: Layer, path: str | os.PathLike, input_shapes: Sequence[tuple]) -> None:
    """The folder ``path``: model.json, weights, custom_layers.js, predict.mjs, package.json and index.html.

    A folder that is there must be one of these; what else is in it (node_modules) stays. Raises ExportError.
    """
    files = _files(model, input_shapes)
    target = pathlib.Path(path)
    _require_ours(target)
    with whole_folder(target, frozenset(files) | _shards_in(target), alone=False) as folder:
        for name, data in files.items():
            (folder / name).write_bytes(data)


def _files(model: Layer, input_shapes: Sequence[tuple]) -> dict[str, bytes]:
    """All files by name. Raises ExportError."""
    top = Topology(model)
    names = ["input"] if len(input_shapes) == 1 else [f"input_{i + 1}" for i in range(len(input_shapes))]
    inputs = [top.input(shape, name) for shape, name in zip(input_shapes, names)]
    classes = Classes(top)
    outputs = _ends(top, [top.first(y) for y in Walk(top, classes)(model, *inputs)])
    _refuse_weights(top, model)
    if top.refusals:
        raise ExportError(f"{model.name} cannot be exported to TF.js", top.refusals)
    manifest, files = shards({name: v.value() for name, v in top.variables.items()})
    described = {
        "format": "layers-model",
        "generatedBy": GENERATOR,
        "convertedBy": None,
        "modelTopology": {"model_config": top.config(top.name_of(model, "model"), inputs, outputs)},
        "weightsManifest": manifest,
        "userDefinedMetadata": {"gpulayers": _about(top, model, inputs, outputs)},
    }
    texts = {name: _own(name) for name in AS_THEY_ARE}
    texts |= {MODEL: json.dumps(described, indent=1, ensure_ascii=False), CLASSES: classes.module()}
    return files | {name: text.encode() for name, text in texts.items()}


def _ends(top: Topology, ys: Sequence[Tensor]) -> list[Tensor]:
    """The model's outputs, each one of a layer and of no other output: TF.js looks them up by that."""
    ends: list[Tensor] = []
    for y in ys:
        plain = y not in ends and top.layers[y.layer]["class_name"] != "InputLayer"
        ends.append(y if plain else top.one(None, "Activation", {"activation": "linear"}, y, y.shape, name="output"))
    return ends


def _refuse_weights(top: Topology, model: Layer) -> None:
    """Weights that cannot travel: not a number, or one weight of several layers."""
    owners = {id(w): layer for layer in model.layers() for w in layer.own_weights().values()}
    places: dict[int, list[str]] = {}
    for name, v in top.variables.items():
        places.setdefault(id(v.weight), []).append(name)
        value = v.value()
        if value.dtype.kind == "f" and (bad := int(np.isnan(value).sum())):
            reason = f"{top.weight_name(v)} is not a number (NaN) at {bad} of {value.size} places"
            top.refuse(owners.get(id(v.weight), model), reason)
    for v in top.variables.values():
        if len(places[id(v.weight)]) > 1:
            shared = ", ".join(places[id(v.weight)])
            reason = f"{top.weight_name(v)} is one weight of several layers ({shared}), which TF.js would train apart"
            top.refuse(owners.get(id(v.weight), model), reason)


def _about(top: Topology, model: Layer, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> dict[str, Any]:
    """What predict.mjs and index.html want to know of the model, in gpulayers' words."""
    weights = [
        {"name": top.weight_name(v), "variable": name, "trainable": v.weight.trainable, **v.way_back()}
        for name, v in top.variables.items()
    ]
    return {
        "name": model.name,
        "inputs": [{"shape": list(x.shape), "dtype": top.layers[x.layer]["config"]["dtype"]} for x in inputs],
        "outputs": [{"shape": list(y.shape), "dtype": "float32"} for y in outputs],
        "weights": weights,
    }


def _own(name: str) -> str:
    return importlib.resources.files(__name__).joinpath(name).read_text("utf-8")


def _shards_in(target: pathlib.Path) -> frozenset[str]:
    return frozenset(p.name for p in target.glob("group1-shard*of*.bin")) if target.is_dir() else frozenset()


def _require_ours(target: pathlib.Path) -> None:
    """Raises FileExistsError for a folder that holds anything, and no model that was exported before."""
    there = [p for p in target.iterdir() if not p.name.startswith(".")] if target.is_dir() else []
    if not there or (
        (target / MODEL).is_file() and f'"generatedBy": "{GENERATOR}"' in (target / MODEL).read_text("utf-8")
    ):
        return
    came = ", ".join(sorted(p.name for p in there)[:3])
    raise FileExistsError(f"{target}: the rule is a new folder, or one with an exported model; it holds {came}")
