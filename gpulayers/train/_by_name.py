"""Optimizers by name."""

from __future__ import annotations

from gpulayers.train._layerwise import LAMB, LARS
from gpulayers.train._muon import Muon
from gpulayers.train.optimizers import SGD, Adagrad, Adam, Adamax, AdamW, Lion, NAdam, Optimizer, RAdam, RMSprop

_KINDS = (SGD, AdamW, Adam, NAdam, RAdam, Adamax, Adagrad, RMSprop, Lion, Muon, LARS, LAMB)
BY_NAME = {kind.__name__.lower(): kind for kind in _KINDS}


def optimizer(value: Optimizer | str | None) -> Optimizer:
    """An optimizer as it is or by name ("sgd", "adamw", "lion", …); None is AdamW()."""
    if value is None:
        return AdamW()
    if isinstance(value, str):
        if value.lower() not in BY_NAME:
            raise ValueError(f"optimizer: the rule is one of {', '.join(BY_NAME)} or an Optimizer; got {value!r}")
        return BY_NAME[value.lower()]()
    if not isinstance(value, Optimizer):
        raise TypeError(f"optimizer: the rule is one of {', '.join(BY_NAME)} or an Optimizer; got {value!r}")
    return value
