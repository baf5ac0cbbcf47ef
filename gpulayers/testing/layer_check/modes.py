"""Modes: training and evaluation, and the mode changed between forward and backward."""

from __future__ import annotations

import numpy as np

from gpulayers import random
from gpulayers.arrays import FLOATS
from gpulayers.layers._layer import Layer
from gpulayers.testing.check_op import CheckError
from gpulayers.testing.layer_check._subject import Subject, close, said, same_bits, which


def randomness(subject: Subject) -> None:
    """The same seed gives the same bits, and evaluation has no randomness."""
    for training, mode in ((True, ""), (False, " in evaluation")):
        first = subject.both(subject.xs, training=training)
        second = subject.both(subject.xs, first.dys, training)
        for what, a, b in (("output", first.ys, second.ys), ("dx", first.dxs, second.dxs)):
            if not all(map(same_bits, a, b)):
                text = "draw random numbers from gl.random, and keep nothing from call to call"
                if not training:
                    text = "evaluation must have no randomness"
                raise CheckError(f"the same input gave another {what} the second time{mode}: {text}")
        for name, g in first.weights.items():
            if not same_bits(g, second.weights[name]):
                raise CheckError(f"the same input gave another gradient of {name} the second time{mode}")
    ys = subject.forward(subject.fresh(False), subject.xs, record=False)
    drew = random.get_state() != subject.state
    kept, subject.state = subject.state, {**subject.state, "seed": (subject.state["seed"] + 1) % 2**62}
    try:
        again = subject.forward(subject.fresh(False), subject.xs, record=False)
    finally:
        subject.state = kept
    if not all(map(same_bits, ys, again)):
        raise CheckError("another seed gave another output in evaluation: evaluation must have no randomness")
    if drew:
        raise CheckError("evaluation draws random numbers: it must have no randomness")


def weights_kept(subject: Subject) -> None:
    """Calls change no weight, but for running statistics in a training forward."""
    for training, record in ((False, True), (False, False), (True, True), (True, False)):
        layer = subject.fresh(training)
        before = _data(layer)
        ys = subject.forward(layer, subject.xs, record)
        _same(layer, before, subject, "forward", training)
        if record:
            between = _data(layer)
            subject.backward(layer, subject.xs, [subject.dy(y) for y in ys], ys)
            _same(layer, between, subject, "backward", training)


def _data(layer: Layer) -> dict[str, np.ndarray]:
    return {n: np.array(w.data) for n, w in layer.named_weights().items()}


def _same(layer: Layer, before: dict, subject: Subject, where: str, training: bool) -> None:
    for n, w in layer.named_weights().items():
        statistic = where == "forward" and training and not w.trainable
        if n in before and not statistic and not same_bits(np.asarray(w.data), before[n]):
            kind = "" if w.trainable else ": running statistics are for the forwards of training"
            raise CheckError(f"{where}{subject.when(layer)} changes {n}{kind}")


def changed_between(subject: Subject) -> None:
    """A backward belongs to its forward, whatever the mode is by then."""
    for training in (True, False):
        want = subject.both(subject.xs, training=training)
        layer = subject.fresh(training)
        ys = subject.forward(layer, subject.xs)
        layer.train(not training)
        dxs = subject.backward(layer, subject.xs, want.dys, ys)
        way = "training, backward after eval()" if training else "evaluation, backward after train()"
        for i, (a, b) in enumerate(zip(dxs, want.dxs)):
            if not close(a, b):
                raise CheckError(f"forward in {way}: d{which(i, subject.xs)} is wrong: save the mode in forward")
        for n, w in layer.named_weights().items():
            if n in want.weights and not close(np.asarray(w.grad), want.weights[n]):
                raise CheckError(f"forward in {way}: the gradient of {n} is wrong: save the mode in forward")


def statistics(subject: Subject) -> None:
    """A layer with running statistics does not look at the other rows in evaluation."""
    layer = subject.fresh()
    before = _data(layer)
    subject.forward(layer, subject.xs, record=False)
    moved = [
        n
        for n, w in layer.named_weights().items()
        if not w.trainable and w.dtype in FLOATS and not same_bits(np.asarray(w.data), before[n])
    ]
    xs = subject.xs
    if not moved or not all(x.ndim and len(x) == len(xs[0]) > 1 for x in xs):
        return
    ys = subject.forward(subject.fresh(False), xs, record=False)
    alone = subject.forward(subject.fresh(False), [x[:1] for x in xs], record=False)
    if any(len(y) != len(xs[0]) or not close(y[:1], a, 1e-7) for y, a in zip(ys, alone) if y.ndim):
        raise CheckError(
            f"evaluation uses the batch's statistics, not {' and '.join(moved)}: "
            f"a row alone gives another output than among others, for {said(xs)}"
        )
