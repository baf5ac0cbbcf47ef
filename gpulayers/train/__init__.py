"""Training: optimizers, the fit loop, progress, history, checkpoints.

``model.fit(x, y, …)`` is ``train.fit(model, x, y, …)``: training knows layers, layers do not know training.
"""

from gpulayers.layers._layer import Layer
from gpulayers.train._fit import fit
from gpulayers.train._predict import evaluate, predict
from gpulayers.train.callbacks import Callback, Checkpoint, EarlyStopping
from gpulayers.train.history import History
from gpulayers.train.metrics import accuracy
from gpulayers.train.optimizers import SGD, AdamW, Optimizer

Layer.fit, Layer.evaluate, Layer.predict = fit, evaluate, predict  # type: ignore[method-assign]

__all__ = [
    "SGD",
    "AdamW",
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "History",
    "Optimizer",
    "accuracy",
    "evaluate",
    "fit",
    "predict",
]
