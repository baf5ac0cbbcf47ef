"""What a saved model says beside the values of its weights, and the model that this makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpulayers.layers._config import from_config, to_config
from gpulayers.layers._layer import Layer
from gpulayers.layers._tokens import token
from gpulayers.layers._weight import Weight

FORMAT = 1


def model_config(layer: Layer) -> dict[str, Any]:
    """What config.json says of a model: its layers, which weights are shared, frozen, regularized, and the modes.

    Raises TypeError for a layer that is not registered, or a setting that cannot be saved as it is now.
    """
    config = {"format": FORMAT, "model": layer.get_config(), "input_shapes": layer._input_shapes}
    parts = {name: _of_layer(part) for name, part in layer.named_layers()}
    weights = {name: _of_weight(name, w) for name, w in layer.named_weights().items()}
    more: dict[str, dict] = {"ties": layer.ties(), "layers": parts, "weights": weights}
    kept = {key: {name: v for name, v in values.items() if v} for key, values in more.items()}
    return config | {key: values for key, values in kept.items() if values}


def _of_layer(layer: Layer) -> dict[str, bool]:
    flags = {"training": layer._training, "trainable": not layer._frozen}
    return {name: False for name, value in flags.items() if not value}


def _of_weight(name: str, w: Weight) -> dict[str, Any]:
    """Where it is not as ``add_weight`` made it."""
    found: dict[str, Any] = {} if w.trainable == w.learned else {"trainable": w.trainable}
    for what, made in w.made.items():
        if token(getattr(w, what)) != made:
            found[what] = to_config(getattr(w, what), f"{name}: {what}")
    return found


def model_of(config: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> Layer:
    """The model that ``model_config`` described, with the weights of ``state``, in their dtypes."""
    layer = from_config(config["model"])
    if config["input_shapes"] is not None:
        layer.ensure_built(*map(tuple, config["input_shapes"]))
    for name, first in config.get("ties", {}).items():
        places = {place: (owner, w) for place, owner, w in layer._places()}
        if not {name, first} <= places.keys():
            raise ValueError(
                f"{layer.name}: the rule is that {name} and {first} are weights of the model; they are not"
            )
        (owner, w), (_, shared) = places[name], places[first]
        if w is not shared:
            owner._exchange(w, shared)
    weights = layer.named_weights()
    for name, changes in config.get("weights", {}).items():
        for what, value in changes.items():
            setattr(weights[name], what, from_config(value))
    for name, w in weights.items():
        if name in state:
            w.data = w.data.astype(state[name].dtype)
    layer.load_state_dict(state)
    parts = dict(layer.named_layers())
    for name, flags in config.get("layers", {}).items():
        parts[name]._training, parts[name]._frozen = flags.get("training", True), not flags.get("trainable", True)
    return layer
