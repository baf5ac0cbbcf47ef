"""``check_layer``: is a layer right? If not, what is wrong with it, where, and by how much."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpulayers import arrays, random
from gpulayers.layers._layer import Layer
from gpulayers.testing.layer_check import (
    calls,
    contract,
    dtypes,
    gradients,
    kernels,
    memory,
    modes,
    shapes,
    state,
    values,
    weights,
)
from gpulayers.testing.layer_check._causes import explained
from gpulayers.testing.layer_check._subject import Subject
from gpulayers.testing.report import CheckError, Report

CHECKS: dict[str, Callable[[Subject], None]] = {
    # What a later check would report as another fault comes first.
    "output shape": contract.outputs,
    "unknown batch": contract.shapes,
    "gradients returned": contract.gradients,
    "precision": contract.precision,
    "weights kept": modes.weights_kept,
    "randomness": modes.randomness,
    "results stay": calls.results_stay,
    "gradients accumulate": calls.accumulate,
    "two forwards before their backwards": calls.interleaved,
    "two layers": calls.two_layers,
    "weights changed": weights.changed,
    "weights reach forward": weights.reach,
    "running statistics": modes.statistics,
    "gradients, training": gradients.in_training,
    "gradients, evaluation": gradients.in_evaluation,
    "mode changed before backward": modes.changed_between,
    "memory order of dy": memory.of_dy,
    "memory order of x": memory.of_x,
    "one array as every input": memory.twice,
    "NaN and Inf": values.not_numbers,
    "zeros, ties, small and large values": values.special,
    "batches": shapes.batches,
    "sizes": shapes.sizes,
    "weights at their start and zero": weights.special,
    "frozen weights": weights.frozen,
    "overflow": values.limits,
    "float32 far from zero": dtypes.far_from_zero,
    "threads": calls.threads,
    "config and weights": state.round_trip,
}


def check_layer(
    layer: Layer,
    *inputs: Any,
    dtypes: Sequence[Any] = ("float32", "float16", "bfloat16"),
    backends: Sequence[str] = ("triton", "cuda"),
    seed: int = 0,
    raises: bool = True,
) -> Report:
    """Check a layer on random inputs; returns the names of the checks it passed, as a list that is a table in Jupyter.

    inputs: one for each input of the layer: its shape, batch first (None: 4), or an array to use as it is.
    dtypes: what the layer must serve beside float64.
    backends: whose kernels for the layer's ops must agree with the definitions (interpreted where there is no GPU).
    seed: of the inputs, and of the values that the weights are moved to.
    raises: False: a fault is in the report, which is then false, in place of an error.

    The layer itself is not changed. Raises CheckError, whose text names the fault, and whose ``report`` has what passed.
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"check_layer: layer: the rule is a Layer, as MyLayer(); got {layer!r}")
    if not inputs or not all(isinstance(x, tuple | list | np.ndarray | np.generic) for x in inputs):
        raise TypeError(f"check_layer: inputs: the rule is a shape or an array for each input; got {inputs!r}")
    checks = _checks(dtypes, backends)
    report = Report(layer.name, [_words(x) for x in inputs], {name: _about(check) for name, check in checks.items()})
    try:
        _run(layer, inputs, seed, checks, report)
    except CheckError as error:
        report.fault, error.report = error, report
        if raises:
            raise
    return report


def _run(
    layer: Layer, inputs: Sequence, seed: int, checks: dict[str, Callable[[Subject], None]], passed: Report
) -> None:
    with warnings.catch_warnings(), _as_it_was():
        warnings.simplefilter("ignore", RuntimeWarning)  # of NaN and Inf, which are tried on purpose
        with _explained(layer.name, "forward"):
            subject = Subject(layer, inputs, seed)
        for name, check in checks.items():
            with _explained(layer.name, name):
                check(subject)
            random.set_state(subject.state)
            passed.append(name)


def _words(x: Any) -> str:
    """An input in words: its shape, and its dtype where it is an array."""
    return f"{x.dtype}{list(x.shape)}" if isinstance(x, np.ndarray | np.generic) else str(list(x))


def _about(check: Callable) -> str:
    doc = (getattr(check, "func", check).__doc__ or "").strip()
    return doc.partition("\n")[0]


def _checks(names: Sequence[Any], backends: Sequence[str]) -> dict[str, Callable[[Subject], None]]:
    each = {str(d): functools.partial(dtypes.near_float64, dtype=d) for d in map(arrays.dtype, names)}
    return CHECKS | each | {"kernels": functools.partial(kernels.agree, backends=backends)}


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    state = random.get_state()
    try:
        yield
    finally:
        random.set_state(state)


@contextlib.contextmanager
def _explained(layer: str, check: str) -> Iterator[None]:
    """Whatever goes wrong names the layer and the check."""
    try:
        yield
    except CheckError as error:
        own = explained(getattr(error, "cause", None))
        raise CheckError(f"{layer}: {check}: {error}{own}") from error.__cause__
    except Exception as error:
        raise CheckError(f"{layer}: {check}: {type(error).__name__}: {error}{explained(error)}") from error
