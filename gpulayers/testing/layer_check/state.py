"""State: a layer made again from its config, with its weights loaded, is the same layer."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from gpulayers import random
from gpulayers.layers import _config
from gpulayers.layers._layer import Layer
from gpulayers.layers._model import model_config, model_of
from gpulayers.testing.check_op import CheckError
from gpulayers.testing.layer_check._subject import Failed, Subject, close, which

_SETTINGS = "keep every setting in __init__'s arguments, and every array that is learned or drawn in add_weight"


def round_trip(subject: Subject) -> None:
    """Outputs, gradients and weights are the same, in training and in evaluation."""
    again = _again(subject)
    for training, mode in ((True, ""), (False, " in evaluation")):
        one = subject.fresh(training)
        other = subject.fresh(training, of=again)
        _same_weights(one, other)
        want = subject.both(subject.xs, layer=one)
        try:
            got = subject.both(subject.xs, want.dys, layer=other)
        except Failed as failed:
            raise CheckError(f"made again from its config and weights, {failed}: {_SETTINGS}") from failed.cause
        where = f"made again from its config and weights it gives another {{}}{mode}: {_SETTINGS}"
        if not all(map(close, got.ys, want.ys)):
            raise CheckError(where.format("output"))
        for i, (a, b) in enumerate(zip(got.dxs, want.dxs)):
            if not close(a, b):
                raise CheckError(where.format(f"d{which(i, subject.xs)}"))
        for n, g in want.weights.items():
            if not close(got.weights[n], g):
                raise CheckError(where.format(f"gradient of {n}"))
        for n, w in other.named_weights().items():
            if not close(np.asarray(w.data), np.asarray(one.named_weights()[n].data)):
                raise CheckError(where.format(n))


def _again(subject: Subject) -> Layer:
    """The layer made again; with other random numbers, or an array that is drawn would be drawn alike."""
    layer = subject.fresh()
    try:
        config = json.loads(json.dumps(model_config(layer)))
    except TypeError as error:
        kind = next((type(x) for x in layer.layers() if _taken(type(x))), None)
        if kind is None:
            raise
        raise CheckError(
            f"two layers are registered under one name, {kind.__name__!r}: a saved model would make the other one; "
            "give one of them another, as in @gl.register(name=…)"
        ) from error
    random.set_state({"seed": 1 + subject.state["seed"] // 2, "count": 77})
    try:
        made = model_of(config, layer.state_dict())
    except (KeyError, ValueError) as error:
        raise CheckError(f"made again from its config, its weights cannot be loaded: {error.args[0]}") from error
    except Exception as error:
        text = f"it cannot be made again from its config: {type(error).__name__}: {error}: {_SETTINGS}"
        raise CheckError(text) from error
    if type(made) is not type(layer):
        raise CheckError(
            f"two layers are registered under one name: the config of {type(layer).__name__} makes a "
            f"{type(made).__module__}.{type(made).__qualname__}"
        )
    made.ensure_built(*((None, *shape[1:]) for shape in subject.shapes))
    mine, theirs = layer.named_weights(), made.named_weights()
    if mine.keys() != theirs.keys():
        raise CheckError(
            f"made again from its config it has the weights {sorted(theirs)}, not {sorted(mine)}: {_SETTINGS}"
        )
    return made


def _taken(cls: Any) -> bool:
    known = _config._registry.get(cls.__name__)
    return known is not None and known is not cls


def _same_weights(one: Layer, other: Layer) -> None:
    """What pulls at a weight and what holds it are settings, too."""
    theirs = other.named_weights()
    for n, w in one.named_weights().items():
        for what in ("regularizer", "constraint"):
            a, b = getattr(w, what), getattr(theirs[n], what)
            if (a is None) != (b is None):
                raise CheckError(
                    f"made again from its config, {n} has {'no' if b is None else 'a'} {what}: {_SETTINGS}"
                )
