"""Memory: x and dy in Fortran order, reversed, gapped and expanded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpulayers import random
from gpulayers.testing.check_op import CheckError
from gpulayers.testing.layer_check._subject import Result, Subject, close, is_float, said, which


def _fortran(x: np.ndarray) -> np.ndarray:
    return np.asfortranarray(x) if x.ndim else x


def _swapped(x: np.ndarray) -> np.ndarray:
    """The last two axes the other way round in memory."""
    return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2) if x.ndim > 2 else _fortran(x)


def _reversed(x: np.ndarray) -> np.ndarray:
    return np.flip(np.flip(x).copy()) if x.ndim else x


def _gapped(x: np.ndarray) -> np.ndarray:
    """Every second element of a wider array, whose others are NaN."""
    if not x.ndim:
        return x
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan if is_float(x) else 0, x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def _rows_gapped(x: np.ndarray) -> np.ndarray:
    """Rows of a wider array: each row is dense, the next does not follow."""
    if not x.ndim:
        return x
    wide = np.full((*x.shape[:-1], x.shape[-1] + 3), np.nan if is_float(x) else 0, x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def _expanded(x: np.ndarray) -> np.ndarray:
    """One element, seen everywhere: all strides are 0."""
    return np.broadcast_to(x.reshape(-1)[:1].reshape((1,) * x.ndim), x.shape) if x.size else x


def _expanded_rows(x: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x[:1], x.shape) if x.ndim and x.size else x


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "in Fortran order": _fortran,
    "with its last axes swapped in memory": _swapped,
    "reversed (negative strides)": _reversed,
    "gapped (every second element)": _gapped,
    "with gaps between its rows": _rows_gapped,
    "expanded (strides of 0)": _expanded,
    "with one row expanded": _expanded_rows,
}


def of_dy(subject: Subject) -> None:
    """Every dy may lie in memory as it likes."""
    for training in (True, False):
        ys = subject.forward(subject.fresh(training), subject.xs)
        for kind, layout in LAYOUTS.items():
            dys = [None if dy is None else layout(dy) for dy in map(subject.dy, ys)]
            plain = [None if dy is None else np.array(dy, order="C") for dy in dys]
            want = subject.both(subject.xs, plain, training)
            got = subject.both(subject.xs, dys, training)
            _compare(got, want, f"with dy {kind}", "backward ignores the strides of dy", subject, training)


def of_x(subject: Subject) -> None:
    """Every x, too; given integers stay."""
    for training in (True, False):
        for kind, layout in LAYOUTS.items():
            xs = [layout(x) if is_float(x) or "expanded" not in kind else x for x in subject.xs]
            plain = [np.array(x, order="C") for x in xs]
            want = subject.both(plain, training=training)
            got = subject.both(xs, want.dys, training)
            _compare(got, want, f"with x {kind}", "the layer ignores the strides of x", subject, training)


def twice(subject: Subject) -> None:
    """One array given as two inputs gives what two arrays do."""
    if len(subject.xs) < 2:
        return
    first = subject.xs[0]
    if any(x.shape != first.shape or x.dtype != first.dtype for x in subject.xs):
        return
    layer = subject.fresh()
    want = subject.both([first.copy() for _ in subject.xs])
    random.set_state(subject.state)
    ys = layer(*[first] * len(subject.xs))
    dxs = subject.backward(layer, subject.xs, want.dys)
    got = want._replace(ys=ys if isinstance(ys, tuple) else (ys,), dxs=dxs)
    _compare(got, want, "with one array as every input", "the inputs are taken for different arrays", subject, True)


def _compare(got: Result, want: Result, when: str, text: str, subject: Subject, training: bool) -> None:
    mode = "" if training else " in evaluation"
    where = f"{when}{mode}, for {said(subject.xs)}"
    if not all(close(a, b) for a, b in zip(got.ys, want.ys)):
        raise CheckError(f"{text}: {where}, the output is wrong")
    for i, (a, b) in enumerate(zip(got.dxs, want.dxs)):
        if not close(a, b):
            raise CheckError(f"{text}: {where}, d{which(i, subject.xs)} is wrong")
    for name, g in got.weights.items():
        if not close(g, want.weights[name]):
            raise CheckError(f"{text}: {where}, the gradient of {name} is wrong")
