"""The library's own layers, given shapes, and arrays with exact zeros, NaN and Inf."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import numpy as np

import gpulayers as gl

_random = np.random.default_rng(0)


def _arrays(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """(with exact zeros, with NaN and Inf beside them)."""
    zeros = _random.standard_normal(shape)
    zeros[0] = 0
    zeros[1].flat[::2] = 0
    nan = zeros.copy()
    nan[-1].flat[:2] = np.nan, np.inf
    return zeros, nan


_ROWS = ((None, 6), *_arrays(4, 6))
_IMAGES = ((2, 3, 4, 5), *_arrays(2, 3, 4, 5))
_ONE_ARGUMENT = {
    "Threshold": (0.1, 3.0),
    "Dropout": (0.4,),
    "AlphaDropout": (0.4,),
    "FeatureAlphaDropout": (0.4,),
    "LayerNorm": (6,),
    "RMSNorm": (6,),
    "BatchNorm1d": (6,),
}
_OF_IMAGES = {
    "Conv2d": (3, 4, 3), "MaxPool2d": (2,), "AvgPool2d": (2,), "AdaptiveAvgPool2d": ((2, 3),), "GlobalAvgPool2d": (),
    "ReflectionPad2d": (1,), "ReplicationPad2d": (1,), "CircularPad2d": (1,), "ConstantPad2d": (1, 2.5),
    "ZeroPad2d": ((1, -1, 0, 1),), "BatchNorm2d": (3,), "Softmax2d": (), "RotaryEmbedding": (4,), "Upsample": (5,), "UpsamplingNearest2d": (5,),
    "UpsamplingBilinear2d": (6,), "Dropout2d": (0.4,),
}  # fmt: skip
_OF_PAIRS = ("CosineSimilarity", "PairwiseDistance")
_LABELS = _random.integers(0, 6, 4)


def layers() -> Iterator[tuple[str, Callable[[], gl.Layer], tuple]]:
    """(name, what makes the layer, inputs)."""
    cases: list[tuple[Callable, tuple, dict, tuple]] = []
    skipped = {"Dropout1d", "Dropout3d", "Linear", "FullyConnected", "Convolutional", "Pooling", "OpLayer", "Layer"}
    for name, cls in sorted(vars(gl).items()):
        if not (isinstance(cls, type) and issubclass(cls, gl.Layer)) or name in skipped or "Loss" in name:
            continue
        needed = [p for p in inspect.signature(cls).parameters.values() if p.default is p.empty and p.kind < 2]
        args = _OF_IMAGES.get(name, _ONE_ARGUMENT.get(name, ()))
        if len(args) >= len(needed) and name not in ("Sequential", "Residual", "Parallel", "Reshape"):
            each = _IMAGES if name in _OF_IMAGES else _ROWS
            cases += [(cls, args, {}, (x, _other(x)) if name in _OF_PAIRS else (x,)) for x in each]
    for x in _ROWS:
        cases += [
            (gl.Linear, (6, 3), {}, (x,)),
            (gl.Linear, (None, 3), {"bias": False, "activation": "relu"}, (x,)),
            (gl.Reshape, (2, -1), {}, (x,)),
            (_block, (), {}, (x,)),
            (_branches, (), {}, (x,)),
        ]
    cases += [(gl.Dropout1d, (0.4,), {}, ((3, 5, 2),)), (gl.Dropout3d, (0.4,), {}, ((None, 4, 2, 1, 3),))]
    same = {"padding": (2, 1), "padding_mode": "reflect"}
    cases += [(gl.Conv2d, (3, 6, (3, 2)), {"stride": 2, "groups": 3, "bias": False}, (x,)) for x in _IMAGES]
    cases += [(gl.Conv2d, (3, 4, 3), same, (_IMAGES[0],)), (gl.PReLU, (3,), {}, (_IMAGES[1],))]
    cases += [(gl.MaxPool2d, (3, 2, 1), {"return_indices": True, "ceil_mode": True}, (x,)) for x in _IMAGES]
    places = np.arange(20).reshape(4, 5) * 4 + np.zeros((2, 3, 1, 1), np.int64)
    cases += [(gl.MaxUnpool2d, (2,), {}, (x, places)) for x in _IMAGES]
    zeros = _ROWS[1]
    cases += [
        (gl.CrossEntropyLoss, (), {"label_smoothing": 0.1}, ((4, 6), _LABELS)),
        (gl.CrossEntropyLoss, (), {"weight": [1, 2, 3, 1, 1, 1], "reduction": "none"}, (zeros, _LABELS)),
        (gl.CrossEntropyLoss, (), {}, ((4, 6), (4, 6))),
        (gl.LinearCrossEntropyLoss, (6, 6), {"bias": True, "softcap": 2.0}, (zeros, _LABELS)),
        (gl.EmbeddingBag, (6, 3), {}, (_LABELS.reshape(2, 2),)),
        (gl.NLLLoss, (), {}, (zeros, _LABELS)),
        (gl.MSELoss, (), {}, (zeros, zeros[::-1].copy())),
        (gl.MSELoss, ("none",), {}, ((4, 6), (4, 6))),
        (gl.BCEWithLogitsLoss, (), {"pos_weight": [1, 2, 3, 1, 1, 1]}, (zeros, zeros[::-1].copy())),
        (gl.TripletMarginLoss, (0.5,), {"swap": True}, ((4, 6), (4, 6), (4, 6))),
        (gl.HuberLoss, ("none", 0.5), {}, ((4, 6), (4, 6))),
        (gl.MarginRankingLoss, (0.1,), {}, ((4, 6), (4, 6), (4, 6))),
    ]
    for f, args, kwargs, inputs in cases:
        words = [*map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())]
        kind = ", ".join(str(x) if isinstance(x, tuple) else _what(x) for x in inputs)
        yield f"{f.__name__}({', '.join(words)}) of {kind}", lambda f=f, a=args, k=kwargs: f(*a, **k), inputs


def _other(x: tuple | np.ndarray) -> tuple | np.ndarray:
    """What goes with x."""
    return x if isinstance(x, tuple) else x[::-1].copy()


def _what(x: np.ndarray) -> str:
    bad = x.dtype.kind == "f" and not np.isfinite(x).all()
    return "integers" if x.dtype.kind == "i" else "zeros and NaN" if bad else "zeros"


def _block() -> gl.Layer:
    return gl.Residual(gl.Linear(6, 5, bias=False), gl.ReLU(), gl.Dropout(0.3), gl.Linear(5, 6))


def _branches() -> gl.Layer:
    return gl.Parallel(gl.Linear(6, 2), gl.Sequential(gl.LayerNorm(6), gl.GELU()))
