"""Values: zeros, ties and kinks, NaN and ±Inf, near a type's limit and near 0."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from gpulayers.arrays import FLOATS, float16, float32, float64
from gpulayers.testing.check_op import CheckError
from gpulayers.testing.layer_check import _slopes, gradients
from gpulayers.testing.layer_check._subject import Subject, close, is_float, said, same_bits, which

_MODES = (True, False)


def _drawn(subject: Subject) -> bool:
    """Whether there is an input that was not given, whose values are ours to choose."""
    return any(g is None for g in subject.given)


def _filled(subject: Subject, value: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """Inputs with other values; given arrays stay."""
    return [x if g is not None else np.asarray(value(x)) for x, g in zip(subject.xs, subject.given)]


def special(subject: Subject) -> None:
    """Zeros, ties, small and large values: results stay finite, gradients are right where there is one."""
    if not _drawn(subject):
        return
    few = np.array([-1.5, -0.5, 0.75, 2.0])
    random = subject.random
    sets: dict[str, Callable] = {
        "exact zeros": lambda x: np.where(random.random(x.shape) < 0.5, 0.0, x),
        "ties": lambda x: random.choice(few, x.shape),
        "zeros alone": np.zeros_like,
        "equal values": lambda x: np.full_like(x, 0.75),
        "small values": lambda x: 1e-3 * x,
        "large values": lambda x: 10 * x,
        "values near 1e-30": lambda x: 1e-30 * np.sign(x),
    }
    for name, value in sets.items():
        xs = _filled(subject, value)
        for training in _MODES:
            _finite(subject, xs, name, training)
            smooth = name in ("equal values", "small values", "large values")
            text = (
                gradients.wrong(subject, xs, training, quick=smooth, points=12) if name != "values near 1e-30" else None
            )
            if text is not None:
                raise CheckError(f"it is wrong with {name}: {text}")


def _finite(subject: Subject, xs: list, name: str, training: bool) -> None:
    """0/0 is a fault, a pole is none; so NaN anywhere, and Inf in a gradient, unless the slope itself is infinite."""
    got = subject.both(xs, training=training)
    mode = "" if training else " in evaluation"
    for y in got.ys:
        if is_float(y) and np.isnan(y).any():
            raise CheckError(f"forward gives NaN{mode} for {name}, {said(xs)}: 0/0, Inf − Inf or 0 · Inf inside")


def not_numbers(subject: Subject) -> None:
    """NaN shows in the output, and so does Inf where large values grow; NaN in dy shows in dx."""
    for training in _MODES:
        mode = "" if training else " in evaluation"
        base = subject.both(subject.xs, training=training)
        for i, (x, given) in enumerate(zip(subject.xs, subject.given)):
            if given is None and x.size:
                _nan(subject, i, base.ys, training, mode)
                _inf(subject, i, training, mode)
        _nan_in_dy(subject, base, training, mode)


def _with(subject: Subject, i: int, at: int, value: float) -> list[np.ndarray]:
    xs = [x.copy() for x in subject.xs]
    xs[i].reshape(-1)[at] = value
    return xs


def _nan(subject: Subject, i: int, ys: tuple, training: bool, mode: str) -> None:
    base = [y for y in ys if is_float(y)]
    for at in _slopes.points_of(subject.xs[i].size, 6, subject.random):
        # Three other values of either sign: does the output depend on this element at all?
        moved = [subject.outputs(_with(subject, i, at, v), training) for v in (-2.3, 0.4, 1.9)]
        if all(all(close(a, b) for a, b in zip(base, m)) for m in moved):
            continue
        xs = _with(subject, i, at, np.nan)
        found = subject.outputs(xs, training)
        if any(np.isnan(y).any() for y in found):
            continue
        where = tuple(map(int, np.unravel_index(at, xs[i].shape)))
        text = f"forward hides NaN{mode}: {which(i, xs)}{list(where)} = nan, and the output is finite, for {said(xs)}"
        if not _left_out(subject, i, at, found, training):
            raise CheckError(text)
        warnings.warn(f"{subject.name}: {text}: np.maximum, np.clip and torch pass it on", UserWarning, stacklevel=2)
        return


def _left_out(subject: Subject, i: int, at: int, found: list, training: bool) -> bool:
    """Whether NaN is taken for a value that is cut off or not chosen, as a comparison with it is false."""
    for far in (-40.0, 40.0):
        near, further = (subject.outputs(_with(subject, i, at, v), training) for v in (far / 2, far))
        if all(map(same_bits, near, further)) and all(map(same_bits, further, found)):
            return True
    return False


def _inf(subject: Subject, i: int, training: bool, mode: str) -> None:
    for at in _slopes.points_of(subject.xs[i].size, 8, subject.random):
        for sign in (1, -1):
            grows = [_largest(subject.outputs(_with(subject, i, at, sign * v), training)) for v in (1e10, 1e30)]
            if not (grows[0] > 1e5 and grows[1] > 1e5 * grows[0]):
                continue
            xs = _with(subject, i, at, sign * np.inf)
            if all(np.isfinite(y).all() for y in subject.outputs(xs, training)):
                where = tuple(map(int, np.unravel_index(at, xs[i].shape)))
                raise CheckError(
                    f"forward hides Inf{mode}: {which(i, xs)}{list(where)} = {sign * np.inf}, and the output is finite, for {said(xs)}"
                )


def _largest(ys: Sequence[np.ndarray]) -> float:
    return max((float(np.nan_to_num(np.abs(y), nan=0.0).max(initial=0.0)) for y in ys), default=0.0)


def _nan_in_dy(subject: Subject, base: Any, training: bool, mode: str) -> None:
    """dx is linear in dy: it scales with it, is zero where it is zero, and NaN where it is NaN."""
    for scale in (2.0**20, 2.0**-20, 0.0):
        dys = [None if dy is None else dy * scale for dy in base.dys]
        got = subject.both(subject.xs, dys, training)
        named = [(which(i, subject.xs), g, b) for i, (g, b) in enumerate(zip(got.dxs, base.dxs))]
        named = [(f"d{n}", g, b) for n, g, b in named]
        named += [(f"the gradient of {n}", g, base.weights[n]) for n, g in got.weights.items()]
        for name, g, b in named:
            if is_float(g) and is_float(b) and not close(g / (scale or 1.0), b * bool(scale)):
                raise CheckError(
                    f"{name} does not scale with dy{mode}: with {scale:.3g} · dy it is not {scale:.3g} times what it was, "
                    f"for {said(subject.xs)}"
                )
    for j, dy in enumerate(base.dys):
        if dy is None or not dy.size:
            continue
        bad = dy.copy()
        bad.reshape(-1)[dy.size // 2] = np.nan
        one = np.zeros_like(dy)
        one.reshape(-1)[dy.size // 2] = 1.0
        rest = [None if d is None else np.zeros_like(d) for d in base.dys]
        alone = subject.both(subject.xs, [*rest[:j], one, *rest[j + 1 :]], training)
        if not any(is_float(g) and g.any() for g in alone.dxs):
            continue
        got = subject.both(subject.xs, [*base.dys[:j], bad, *base.dys[j + 1 :]], training)
        if not any(is_float(g) and np.isnan(g).any() for g in got.dxs):
            raise CheckError(f"backward hides NaN{mode}: dy has one and dx is finite, for {said(subject.xs)}")


def limits(subject: Subject) -> None:
    """Large and small inputs overflow nothing on the way to a result that the dtype holds."""
    if not _drawn(subject):
        return
    random = subject.random
    sets: dict[str, Callable] = {
        "inputs of ±30": lambda x: random.choice([-30.0, 30.0, 0.5], x.shape),
        "inputs of ±300": lambda x: random.choice([-300.0, 300.0, 0.5], x.shape),
        "inputs of 300": lambda x: np.full_like(x, 300.0),
        "inputs of −300": lambda x: np.full_like(x, -300.0),
        "zeros": np.zeros_like,
        "inputs near 1e-30": lambda x: 2.0**-100 * np.sign(x),
        "inputs of ±8192": lambda x: 8192.0 * np.sign(x),
    }
    for name, value in sets.items():
        xs = _filled(subject, value)
        for training in _MODES:
            truth = subject.both(xs, training=training)
            for dtype in (float32, float16):
                if dtype == float16 and not _for_halves(subject, name, xs, truth, training):
                    continue
                got = subject.both(xs, truth.dys, training, dtype)
                _within(subject, got, truth, dtype, name, training)


def _for_halves(subject: Subject, name: str, xs: list, truth: Any, training: bool) -> bool:
    """float16 ends at 65,504: a square of 300 may overflow, unless the output is of the input's own order."""
    if "8192" not in name:
        return name in ("inputs of ±30", "zeros")
    half = subject.both([x / 2 if is_float(x) else x for x in xs], truth.dys, training)
    return all(np.allclose(2 * a, b, rtol=0.01, atol=0) for a, b in zip(half.ys, truth.ys) if is_float(b))


def _within(subject: Subject, got: Any, truth: Any, dtype: np.dtype, name: str, training: bool) -> None:
    most = float(ml_dtypes.finfo(dtype).max) / 16
    if not all(np.isfinite(y).all() and (np.abs(y) < most).all() for y in truth.ys if is_float(y)):
        return  # what overflows is Inf
    named = [("the output", y, t) for y, t in zip(got.ys, truth.ys)]
    named += [(f"d{which(i, got.dxs)}", g, t) for i, (g, t) in enumerate(zip(got.dxs, truth.dxs))]
    named += [(f"the gradient of {n}", g, truth.weights[n]) for n, g in got.weights.items()]
    for what, g, t in named:
        if not is_float(g) or g.dtype not in FLOATS or not is_float(t):
            continue
        wide = np.asarray(g).astype(float64)
        bad = ~np.isfinite(wide) & np.isfinite(t) & (np.abs(t) < most)
        if bad.any():
            at = tuple(map(int, np.argwhere(bad)[0]))
            mode = "" if training else " in evaluation"
            raise CheckError(f"{what} overflows in {dtype}{mode} with {name}: {wide[at]} at {at}, true {t[at]:.6g}")
