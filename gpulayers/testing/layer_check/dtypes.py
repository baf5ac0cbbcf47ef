"""Dtypes: float32 and 16-bit results are those of float64, but for rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpulayers.arrays import FLOATS, HALVES, float32, float64
from gpulayers.testing.check_op import CheckError
from gpulayers.testing.layer_check._subject import Result, Subject, epsilon, exact, is_float, same_bits, which

_MODES = ((True, ""), (False, " in evaluation"))


def exact_inputs(subject: Subject) -> list[np.ndarray]:
    """Random inputs that every dtype has exactly, a few of them large: exp(12) overflows float16."""
    xs = []
    for x, given in zip(subject.draw(), subject.given):
        if is_float(x) and given is None and x.size > 3:
            x.flat[[0, -1]] = 9.0, -12.0
        xs.append(exact(x) if is_float(x) else x)
    return xs


def near_float64(subject: Subject, dtype: np.dtype) -> None:
    """Outputs and gradients in this dtype are as near to float64's as it allows."""
    xs = exact_inputs(subject)
    for training, mode in _MODES:
        truth = subject.both(xs, training=training)
        got = subject.both(xs, truth.dys, training, dtype)
        moved = [_moved(subject, xs, truth.dys, training, dtype) for _ in range(3)]
        for y in got.ys:
            if any(map(is_float, xs)) and is_float(y) and y.dtype != dtype:
                raise CheckError(f"the output of {dtype} is {y.dtype}{mode}")
        for j, y in enumerate(got.ys):
            what = "the output" if len(got.ys) == 1 else f"output {j}"
            near(y, truth.ys[j], [m.ys[j] for m in moved], xs, dtype, what, mode)
        for i, dx in enumerate(got.dxs):
            near(dx, truth.dxs[i], [m.dxs[i] for m in moved], xs, dtype, f"d{which(i, xs)}", mode)
        for n, g in got.weights.items():
            near(g, truth.weights[n], [m.weights[n] for m in moved], xs, dtype, f"the gradient of {n}", mode)


def far_from_zero(subject: Subject) -> None:
    """Inputs with a mean of 4096, where mean x² − (mean x)² has no digit left in float32."""
    if any(g is not None for g in subject.given):
        return
    xs = [np.round(256 * x) / 256 + 4096 for x in subject.xs]
    for training, mode in _MODES:
        truth = subject.both(xs, training=training)
        got = subject.both(xs, truth.dys, training, float32)
        moved = [_moved(subject, xs, truth.dys, training, float32) for _ in range(3)]
        for j, (y, t) in enumerate(zip(got.ys, truth.ys)):
            if not is_float(y) or not np.isfinite(t).all():
                continue
            off = np.abs(y.astype(float64) - t)
            shift = np.max([np.abs(m.ys[j] - t) for m in moved], axis=0)
            if not (off <= 0.02 * np.abs(t).max(initial=0.0) + 8 * shift).all():
                worst = tuple(map(int, np.unravel_index(int(np.nan_to_num(off, nan=np.inf).argmax()), t.shape)))
                raise CheckError(
                    f"the output loses its digits in float32{mode} where the inputs are near 4096: "
                    f"got {y[worst]:.6g} at {worst}, true {t[worst]:.6g}, for x = float32{list(xs[0].shape)}"
                )


def _moved(subject: Subject, xs: list, dys: Sequence, training: bool, dtype: np.dtype) -> Result:
    """The truth where everything is one rounding away: how much the layer makes of a rounding."""

    def off(x: Any) -> Any:
        if not is_float(x):
            return x
        size = np.where(x == 0, _root_mean_square(x), x)
        return x + size * epsilon(dtype) / 2 * subject.random.choice([-1, 1], x.shape)

    layer = subject.fresh(training)
    for w in layer.named_weights().values():
        if w.dtype in FLOATS:
            w.data = np.asarray(off(np.array(w.data)))
    return subject.both(list(map(off, xs)), list(map(off, dys)), layer=layer)


def near(got: Any, truth: Any, moved: Sequence, xs: Sequence, dtype: np.dtype, what: str, end: str = "") -> None:
    """Whether a result is as near to the truth as rounding in ``dtype`` lets it be."""
    if got is None or not is_float(truth):
        if got is not None and truth is not None and not same_bits(got, truth):
            raise CheckError(f"in {dtype} {what}{end} is wrong: it is integers, and others than in float64")
        return
    with np.errstate(all="ignore"):
        wide = np.asarray(got).astype(float64)
        fits = np.isfinite(truth) & (np.abs(truth) < 0.9 * float(np.asarray(_most(dtype))))
        if not fits.any():
            return
        shift = np.max([np.abs(m - truth) for m in moved], axis=0, initial=0.0) if moved else np.zeros_like(truth)
        shift = np.where(np.isfinite(shift), shift, np.inf)[fits]
        off, true = np.abs(wide - truth)[fits], truth[fits]
        sizes = [np.abs(v[np.isfinite(v)]) for v in (truth, *xs) if is_float(v) and v.size]
        largest, usual = (max((1.0, *(float(f(v)) for v in sizes if v.size))) for f in (np.max, _root_mean_square))
        ulps = (8 if dtype in HALVES else 32) * epsilon(dtype)
        bad = ~(off <= ulps * largest + 8 * shift)
        if bad.any():
            worst = np.flatnonzero(fits)[int(np.argmax(np.where(bad, np.nan_to_num(off, nan=np.inf), -1)))]
            at = tuple(map(int, np.unravel_index(worst, truth.shape)))
            raise CheckError(
                f"in {dtype} {what} is wrong{end}, the worst at {at}: got {wide[at]:.6g}, true {truth[at]:.6g}"
            )
        # A few large inputs hide no error that is everywhere.
        if true.size <= 8:
            return
        mean, room = _root_mean_square(off), _root_mean_square(shift)
        if not mean <= ulps * max(_root_mean_square(true), 0.5 * usual) + 8 * room:
            raise CheckError(
                f"in {dtype} {what} is wrong{end}: the root mean square of the error is {mean:.3g}, "
                f"of the true values {_root_mean_square(true):.3g}"
            )


def _most(dtype: np.dtype) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).max)


def _root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt((x * x).mean())) if x.size else 0.0
