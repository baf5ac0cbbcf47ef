"""Calls: what one does to another, before it, after it, and at the same time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpulayers import random, transfer
from gpulayers.layers._layer import Layer
from gpulayers.testing.check_op import CheckError
from gpulayers.testing.layer_check._subject import Failed, Result, Subject, close, gradients, is_float, said, which

_MODES = ((True, ""), (False, " in evaluation"))
_KEEP = "keep what backward needs with self.save, not in attributes"


def accumulate(subject: Subject) -> None:
    """Three calls, three backwards: the gradients of the weights add up."""
    for training, mode in _MODES:
        layer = subject.fresh(training)
        once = subject.both(subject.xs, training=training)
        total = {n: np.zeros_like(g) for n, g in once.weights.items()}
        for count in (1, 2, 3):
            want = subject.both(subject.xs, once.dys, layer=_with_buffers(subject, layer, training))
            ys = subject.forward(layer, subject.xs)
            if not all(map(close, ys, want.ys)):
                raise CheckError(
                    f"call {count} gives another output than a first one{mode}: state leaks between calls, for {said(subject.xs)}"
                )
            subject.backward(layer, subject.xs, once.dys, ys)
            for n, g in gradients(layer)[0].items():
                if close(g, total[n] + want.weights[n]):
                    total[n] = total[n] + want.weights[n]
                    continue
                if close(g, want.weights[n]):
                    raise CheckError(f"the gradient of {n} was overwritten{mode}: backward must add to it (grad += …)")
                raise CheckError(
                    f"after {count} equal backwards the gradient of {n} is not {count} times that of one{mode}: "
                    "backward does not add to it, or state leaks between calls"
                )


def _with_buffers(subject: Subject, layer: Layer, training: bool) -> Layer:
    """A fresh copy whose running statistics are those of ``layer``."""
    made = subject.fresh(training)
    for w, now in zip(made.weights, layer.weights):
        if not w.trainable:
            w.data = np.array(now.data)
    return made


def results_stay(subject: Subject) -> None:
    """A later call changes no output and no gradient of an earlier one."""
    others = subject.draw()
    for training, mode in _MODES:
        layer = subject.fresh(training)
        ys = subject.forward(layer, subject.xs)
        kept = [y.copy() for y in ys]
        _apart(ys, layer, "the output", mode)
        dys = [subject.dy(y) for y in ys]
        dxs = subject.backward(layer, subject.xs, dys, ys)
        _apart(dxs, layer, "dx", mode)
        _grads_apart(layer, subject, dys, dxs, mode)
        first = [None if g is None else g.copy() for g in dxs]
        subject.forward(layer, others)
        if not all(map(_equal, ys, kept)):
            raise CheckError(f"the next forward overwrites the last one's output{mode}: return an array of its own")
        if not all(map(_equal, dxs, first)):
            raise CheckError(f"the next forward overwrites the last dx{mode}: return an array of its own")
        subject.backward(layer, others, dys)
        if not all(map(_equal, ys, kept)):
            raise CheckError(f"the next backward overwrites the last output{mode}: return an array of its own")
        if not all(map(_equal, dxs, first)):
            raise CheckError(f"the next backward overwrites the last one's dx{mode}: return an array of its own")


def _equal(a: Any, b: Any) -> bool:
    return a is None or np.array_equal(a, b, equal_nan=is_float(a))


def _apart(values: Sequence, layer: Layer, what: str, mode: str) -> None:
    """Shares no memory with a weight."""
    for n, w in layer.named_weights().items():
        for v in values:
            if v is None:
                continue
            if np.may_share_memory(v, transfer.to_numpy(w.data)) and v.size:
                raise CheckError(f"{what} shares memory with the weight {n}{mode}: return a copy")
            if w.has_grad and np.may_share_memory(v, transfer.to_numpy(w.grad)) and v.size:
                raise CheckError(f"{what} shares memory with the gradient of {n}{mode}: return a copy")


def _grads_apart(layer: Layer, subject: Subject, dys: list, dxs: Sequence, mode: str) -> None:
    weights = [(n, transfer.to_numpy(w.grad)) for n, w in layer.named_weights().items() if w.has_grad]
    for i, (n, g) in enumerate(weights):
        for dy in dys:
            if dy is not None and g.size and np.may_share_memory(g, dy):
                raise CheckError(f"the gradient of {n} shares memory with dy{mode}: add to it (grad += …)")
        for m, other in weights[:i]:
            if g.size and np.may_share_memory(g, other):
                raise CheckError(f"the gradients of {m} and {n} share memory{mode}: add to each (grad += …)")


def interleaved(subject: Subject) -> None:
    """Two forwards before the backwards, which come in reverse order; and a call without gradients in between."""
    others = subject.draw()
    for training, mode in _MODES:
        one = subject.both(subject.xs, training=training)
        layer = subject.fresh(training)
        first = subject.forward(layer, subject.xs)
        two = subject.both(others, one.dys, layer=_with_buffers(subject, layer, training))
        second = subject.forward(layer, others)
        _same_ys(second, two, f"a second call gives another output than a first one{mode}: state leaks between calls")
        text = f"the later forward changed what the earlier one had kept{mode}"
        _same_dxs(subject, subject.backward(layer, others, one.dys, second), two, text)
        _same_dxs(subject, subject.backward(layer, subject.xs, one.dys, first), one, text)
        for n, g in gradients(layer)[0].items():
            if not close(g, one.weights[n] + two.weights[n]):
                raise CheckError(f"{text}: the gradient of {n} is wrong: state leaks between calls: {_KEEP}")
        layer = subject.fresh(training)
        first = subject.forward(layer, subject.xs)
        subject.forward(layer, others, record=False)
        text = f"with a forward under no_grad before the backward{mode}"
        _same_dxs(subject, subject.backward(layer, subject.xs, one.dys, first), one, text)


def two_layers(subject: Subject) -> None:
    """Another layer of the class, with other weights, called in between."""
    one = subject.both(subject.xs)
    layer, other = subject.fresh(), subject.fresh(of=subject.at_start)
    first = subject.forward(layer, subject.xs)
    subject.both(subject.draw(), layer=other)
    text = "with another layer of the class called before the backward"
    _same_dxs(subject, subject.backward(layer, subject.xs, one.dys, first), one, text, "the layers share state")
    again = subject.forward(layer, subject.xs, record=False)
    if not any(not w.trainable for w in layer.weights):
        _same_ys(again, one, "another layer of the class changes the output of this one: the layers share state")


def _same_ys(ys: tuple, want: Result, text: str) -> None:
    if not all(map(close, ys, want.ys)):
        raise CheckError(text)


def _same_dxs(subject: Subject, dxs: tuple, want: Result, text: str, why: str = "state leaks between calls") -> None:
    for i, (a, b) in enumerate(zip(dxs, want.dxs)):
        if not close(a, b):
            raise CheckError(f"{text}: d{which(i, subject.xs)} is wrong: {why}: {_KEEP}")


def threads(subject: Subject) -> None:
    """Another thread's whole call between any two lines of forward and of backward."""
    others = subject.draw()
    for training, mode in _MODES:
        if any(not w.trainable for w in subject.layer.weights) and training:
            continue  # running statistics are shared by all calls
        want = subject.both(subject.xs, training=training)
        if random.get_state() != subject.state:
            continue  # so are the random numbers
        layer = subject.fresh(training)
        got: list[Any] = []

        def here(layer: Layer = layer, got: list = got, want: Result = want) -> None:
            ys = subject.forward(layer, subject.xs)
            got.append((ys, subject.backward(layer, subject.xs, want.dys)))

        def there(layer: Layer = layer, want: Result = want) -> None:
            subject.forward(layer, others)
            subject.backward(layer, others, want.dys)

        try:
            _between_lines(type(subject.layer), here, there)
        except Failed as failed:
            raise CheckError(f"two threads in one layer{mode}: {failed}: {_KEEP}") from failed.cause
        ys, dxs = got[0]
        text = f"two threads in one layer{mode}"
        _same_ys(ys, want, f"{text}: the output is wrong: state is shared by calls: keep it in local variables")
        _same_dxs(subject, dxs, want, text, "state is shared by calls")


def _between_lines(cls: type, here: Callable, there: Callable) -> None:
    """Run ``here``; before each line of the layer's own code, ``there`` in another thread."""
    files = {
        f.__code__.co_filename
        for base in cls.__mro__
        for f in map(_plain, vars(base).values())
        if hasattr(f, "__code__") and not base.__module__.startswith("gpulayers.")
    }
    failures: list[Exception] = []

    def other() -> None:
        try:
            there()
        except Exception as error:
            failures.append(error)

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line" and not failures:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        here()
    finally:
        sys.settrace(before)
    if failures:
        raise failures[0]


def _plain(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function
