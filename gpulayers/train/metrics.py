"""What is reported of predictions, the loss included: sums and counts over batches, so that their sizes do not matter."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gpulayers import arrays
from gpulayers.layers._layer import Layer

Metric = Callable[[Any, Any], Any]

RESERVED = ("loss", "lr", "seconds")
"""Columns of a history that no metric may be called."""
LARGER = re.compile(
    ".*accuracy|acc|auc|auroc|precision|recall|sensitivity|specificity|f1|fbeta|iou|dice|jaccard|map|ndcg|bleu|rouge|r2"
    "|psnr|ssim|score|reward|similarity|correlation|kappa|mcc"
)
SMALLER = re.compile(
    "loss|error|err|mse|mae|rmse|mape|nll|perplexity|ppl|entropy|divergence|distance|fid|wer|cer|lr|seconds"
)
"""Words in a metric's name that say which way is better."""


def mode(name: str, given: str | None = None) -> str:
    """ "min" or "max": which values of a metric are better, as given or by the last word of its name that says it.

    Raises ValueError where neither does.
    """
    if given in ("min", "max"):
        return given
    if given is None:
        for word in reversed(re.split(r"[\W_]+", name.lower())):
            if SMALLER.fullmatch(word):
                return "min"
            if LARGER.fullmatch(word):
                return "max"
    raise ValueError(
        f'{name}: mode: the rule is "min" or "max" where the name does not say which is better; got {given!r}'
    )


# --- accuracy --------------------------------------------------------------------------------------------------------


def accuracy(prediction: Any, target: Any, ignore_index: int | None = None) -> Any:
    """The share of places where the largest of the classes is the target's.

    prediction: (N, C, *d), C ≥ 2. target: class indices (N, *d) or (N, 1, *d), those equal to ``ignore_index`` left
    out, or one-hot or probabilities (N, C, *d). Raises ValueError for other shapes.
    """
    hits, count = _hits(prediction, target, ignore_index)
    return hits / count


def _hits(prediction: Any, target: Any, ignore_index: int | None) -> tuple[Any, Any]:
    """(places where the class is right, places that count)."""
    shape, came = (tuple(getattr(a, "shape", ())) for a in (prediction, target))
    places = (*shape[:1], *shape[2:])
    if len(shape) < 2 or shape[1] < 2 or came not in (places, (*shape[:1], 1, *shape[2:]), shape):
        rule = "prediction (N, C, *d) with C ≥ 2, target (N, *d), (N, 1, *d) or (N, C, *d)"
        raise ValueError(f"accuracy: the rule is {rule}; got {list(shape)} and {list(came)}")
    if came == shape:
        return (prediction.argmax(1) == target.argmax(1)).sum(), math.prod(places)
    target = target.reshape(places)
    right = prediction.argmax(1) == target
    if ignore_index is None:
        return right.sum(), math.prod(places)
    counted = target != ignore_index
    return (right & counted).sum(), counted.sum()


def resolved(metrics: Sequence[str] | Mapping[str, Metric], loss: Layer) -> dict[str, Metric]:
    """Metrics by name, checked; the loss says which targets are left out of an accuracy."""
    if isinstance(metrics, Mapping):
        for name, metric in metrics.items():
            if not isinstance(name, str) or name in RESERVED or name.startswith("val_"):
                rule = f"a name other than {', '.join(RESERVED)} and val_…"
                raise ValueError(f"metrics: the rule is {rule}; got {name!r}")
            if not callable(metric):
                raise TypeError(f"metrics: {name}: the rule is a function of (prediction, target); got {metric!r}")
        return dict(metrics)
    known = {"accuracy": functools.partial(_hits, ignore_index=getattr(loss, "ignore_index", None))}
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    for name in names:
        if name not in known:
            raise ValueError(f"metrics: the rule is one of {', '.join(known)}, or {{name: function}}; got {name!r}")
    return {name: known[name] for name in names}


# --- sums over batches -----------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """A sum over a batch, and what it is to be divided by; None: it is the sum that is asked for."""

    total: Any
    count: Any

    @property
    def value(self) -> Any:
        return self.total if self.count is None else self.total / self.count


def mean_of(name: str, value: Any, count: Any) -> Score:
    """The score of a mean over ``count`` things (which is nothing if there were none), or of a sum (None)."""
    _require_number(name, value)
    if count is None:
        return Score(value, None)
    if isinstance(count, int):
        return Score(_wide(value) * count if count else 0.0, count)
    return Score(arrays.namespace(count).where(count != 0, _wide(value) * count, 0.0), count)


def scored(metrics: Mapping[str, Metric], prediction: Any, target: Any, rows: int) -> dict[str, Score]:
    """What each metric says of a batch: a mean over its rows, or (sum, count)."""
    found = {}
    for name, metric in metrics.items():
        value = metric(prediction, target)
        if isinstance(value, tuple) and len(value) == 2:
            for part in value:
                _require_number(name, part)
            found[name] = Score(*value)
        else:
            found[name] = mean_of(name, value, rows)
    return found


def loss_score(loss: Layer, value: Any, ys: Sequence[Any], target: Any, rows: int) -> Score:
    """The loss of a batch, by what its mean divides by: its ``mean_over(*ys, target)`` if it has one, else its rows."""
    if getattr(loss, "reduction", None) == "sum":
        return mean_of("loss", value, None)
    mean_over = getattr(loss, "mean_over", None)
    return mean_of("loss", value, rows if mean_over is None else mean_over(*ys, target))


def _require_number(name: str, value: Any) -> None:
    if getattr(value, "shape", ()) != ():
        raise ValueError(f"{name}: the rule is one number a batch, shape []; got {list(value.shape)}")


class Scores:
    """Scores added up over batches, where the values are (no wait for the GPU), until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Score] = {}

    def add(self, scores: Mapping[str, Score]) -> None:
        for name, (total, count) in scores.items():
            before = self.sums.get(name, Score(0.0, None if count is None else 0.0))
            self.sums[name] = Score(before.total + _wide(total), None if count is None else before.count + _wide(count))

    def read(self) -> dict[str, float]:
        """The mean of each over all that was counted (NaN over nothing), or its sum."""
        return {name: _quotient(*score) for name, score in self.sums.items()}


def _wide(value: Any) -> Any:
    return float(value) if isinstance(value, bool | int | float) else arrays.cast(value, arrays.float64)


def _quotient(total: Any, count: Any) -> float:
    if count is None:
        return float(total)
    return float(total) / float(count) if float(count) else math.nan
