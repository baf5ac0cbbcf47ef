"""Shapes: batches of 0, 1, 20 and many, odd and unequal sizes, more than 1,000 elements."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from gpulayers import random
from gpulayers.definition import RuleError
from gpulayers.layers._layer import Layer
from gpulayers.testing.check_op import CheckError
from gpulayers.testing.layer_check import gradients
from gpulayers.testing.layer_check._subject import Failed, Subject, close, is_float, said

_MANY = 1100  # elements: more than a block of 1,024
_MODES = ((True, ""), (False, " in evaluation"))


def batches(subject: Subject) -> None:
    """Every batch is right; a rule that refuses one says so."""
    if not all(subject.shapes) or len({s[0] for s in subject.shapes}) > 1:
        return
    labels = any(g is not None and not is_float(x) for g, x in zip(subject.given, subject.xs))
    for training, when in _MODES:
        rows = _by_rows(subject, training)
        for batch in (1, 0, 2, 3, 20, _many_rows(subject.shapes)):
            xs = subject.draw(subject.with_batch(batch))
            try:
                if batch == 0:
                    _empty(subject, xs, training)
                    continue
                text = gradients.wrong(subject, xs, training, quick=True)
                if text is None and rows and batch > 3:
                    text = _same_rows(subject, xs, training)
            except Failed as failed:
                if labels or isinstance(failed.cause, RuleError):
                    continue
                raise CheckError(f"it is wrong for a batch of {batch}{when}: {failed}") from failed.cause
            if text is not None:
                size = f" of {_most(xs):,} elements" if batch > 20 else ""
                right = subject.shapes[0][0]
                raise CheckError(
                    f"it is wrong for a batch of {batch}{size}{when}: {text} (it is right for a batch of {right})"
                )


def _many_rows(shapes: Sequence[tuple]) -> int:
    row = max(math.prod(s[1:]) for s in shapes)
    return max(21, -(-_MANY // max(1, row))) | 1


def _most(xs: Sequence[np.ndarray]) -> int:
    return max(x.size for x in xs)


def _empty(subject: Subject, xs: list, training: bool) -> None:
    """Nothing in, nothing out: the gradients of the weights are zero. The mean of no rows is NaN, and so may be all."""
    got = subject.both(xs, training=training)
    if any(not y.ndim for y in got.ys):
        return
    named = {"the output": got.ys, "dx": got.dxs} | {f"the gradient of {n}": (g,) for n, g in got.weights.items()}
    for what, values in named.items():
        if any(is_float(v) and not np.isfinite(v).all() for v in values):
            raise CheckError(
                f"it is wrong for a batch of 0{'' if training else ' in evaluation'}: {what} is not finite"
            )


def _by_rows(subject: Subject, training: bool) -> bool:
    """Whether each row's output depends on that row alone, as seen on a few rows."""
    xs = subject.draw(subject.with_batch(3))
    try:
        ys = subject.forward(subject.fresh(training), xs, record=False)
        if random.get_state() != subject.state:
            return False  # a row alone has other random numbers
        return _rows_alone(subject, xs, ys, training, range(3)) is None
    except CheckError:
        return False


def _rows_alone(subject: Subject, xs: list, ys: tuple, training: bool, rows: Sequence[int]) -> int | None:
    """The first of the rows that alone gives another output."""
    if any(y.shape[:1] != (len(xs[0]),) for y in ys):
        return 0
    for row in rows:
        alone = subject.forward(subject.fresh(training), [x[row : row + 1] for x in xs], record=False)
        if not all(close(y[row : row + 1], a) for y, a in zip(ys, alone)):
            return row
    return None


def _same_rows(subject: Subject, xs: list, training: bool) -> str | None:
    count = len(xs[0])
    ys = subject.forward(subject.fresh(training), xs, record=False)
    rows = sorted({0, 1, count // 2, count - 2, count - 1, *subject.random.integers(0, count, 6).tolist()})
    row = _rows_alone(subject, xs, ys, training, rows)
    return (
        None if row is None else f"the output of row {row} is another than that of the same row alone, for {said(xs)}"
    )


def sizes(subject: Subject) -> None:
    """Odd, unequal and large sizes of every other axis, where the layer takes them."""
    for shapes in _other_sizes(subject):
        try:
            layer = _for_shapes(subject, shapes)
            xs = subject.draw(shapes)
            subject.forward(subject.fresh(of=layer), xs)
        except Failed as failed:
            if "output_shape(x.shape)" in str(failed):
                raise CheckError(f"output_shape is wrong for other sizes: {failed}") from failed.cause
            continue  # it does not take this size
        except Exception:
            continue
        for training, _ in _MODES:
            try:
                text = gradients.wrong(subject, xs, training, of=layer, quick=True)
            except Failed:
                if subject.layer.children():
                    break  # one of the layers inside does not take it, and had no say
                raise
            if text is not None:
                raise CheckError(f"it is wrong for other sizes: {text} (it is right for {said(subject.xs)})")


def _other_sizes(subject: Subject) -> Iterator[list[tuple]]:
    fixed = set() if subject.builds else {n for w in subject.layer.weights for n in w.shape}
    axes = sorted({(a, s[a]) for s in subject.shapes for a in range(1, len(s))})
    if any(g is not None for g in subject.given):
        return
    for axis, size in axes:
        if size in fixed or size == 0:
            continue
        rest = max(math.prod(s) // size for s in subject.shapes if axis < len(s) and s[axis] == size)
        many = -(-_MANY // max(1, rest)) + 1 | 1
        for other in dict.fromkeys((size + 1, size - 1, 2 * size + 1, max(many, size + 3))):
            if other > 0:
                yield [
                    (*s[:axis], other, *s[axis + 1 :]) if axis < len(s) and s[axis] == size else s
                    for s in subject.shapes
                ]


def _for_shapes(subject: Subject, shapes: list[tuple]) -> Layer:
    return subject.moved(subject.built(shapes), shapes) if subject.builds else subject.layer
