"""Training: optimizers, the fit loop, progress, history, checkpoints.

``model.fit(x, y, …)`` is ``train.fit(model, x, y, …)``: training knows layers, layers do not know training.
"""

from gpulayers.layers._layer import Layer
from gpulayers.train._fit import fit
from gpulayers.train._layerwise import LAMB, LARS
from gpulayers.train._muon import Muon
from gpulayers.train._predict import evaluate, predict
from gpulayers.train.callbacks import Callback, Checkpoint, EarlyStopping
from gpulayers.train.history import History
from gpulayers.train.metrics import accuracy
from gpulayers.train.optimizers import SGD, Adagrad, Adam, Adamax, AdamW, Lion, NAdam, Optimizer, RAdam, RMSprop

Layer.fit, Layer.evaluate, Layer.predict = fit, evaluate, predict  # type: ignore[method-assign]

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "History",
    "Lion",
    "Muon",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "accuracy",
    "evaluate",
    "fit",
    "predict",
]
