"""Every gradient against finite differences, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gpulayers.layers._layer import Layer
from gpulayers.testing.check_op import CheckError
from gpulayers.testing.layer_check import _slopes
from gpulayers.testing.layer_check._subject import Result, Subject, is_float, said
from gpulayers.testing.layer_check._words import pattern

POINTS = 48  # of one array at which a slope is measured
FINER = 1 / 64  # of a step, where it must be the same


class Target(NamedTuple):
    """What a gradient is of: an input or a weight."""

    name: str
    at: np.ndarray
    grad: np.ndarray | None
    values: Callable[[np.ndarray], Sequence]
    """The outputs where it has another value."""
    reached: bool
    equal: np.ndarray | None = None
    """Which elements have the value of another, where there are any."""


def in_training(subject: Subject) -> None:
    """Of all inputs and weights, where they were given or drawn."""
    _everywhere(subject, True)


def in_evaluation(subject: Subject) -> None:
    """The same in evaluation."""
    _everywhere(subject, False)


def _everywhere(subject: Subject, training: bool) -> None:
    text = wrong(subject, subject.xs, training)
    if text is None:
        return
    for batch in (1, 2):
        xs = subject.draw(subject.with_batch(batch))
        try:
            shown = wrong(subject, xs, training) is not None
        except CheckError:
            continue
        if shown and said(xs) != said(subject.xs):
            right = f" (it is right for a batch of {batch - 1})" if batch > 1 else ""
            raise CheckError(f"{text}; the smallest input that shows it: {said(xs)}{right}")
    raise CheckError(text)


def wrong(
    subject: Subject,
    xs: Sequence[np.ndarray],
    training: bool = True,
    of: Layer | None = None,
    quick: bool = False,
    points: int = POINTS,
) -> str | None:
    """What is wrong with the gradients of this call; None if nothing is.

    of: the layer whose copy is called. quick: first along one direction for each array, and closer only where that fails.
    points: of each array, at most.
    """
    layer = subject.layer if of is None else of
    got = subject.both(xs, layer=subject.fresh(training, of=layer))
    if not all(np.isfinite(y).all() for y in got.ys if is_float(y)):
        return _not_finite(subject, xs, training, got)
    for target in targets(subject, xs, training, layer, got):
        text, way = None, _way(subject, target)
        if not quick:
            some = _slopes.points_of(target.at.size, points, subject.random)
            text = _wrong_at_points(target, got, xs, some)
        if text is None and (quick or target.at.size > points == POINTS) and _wrong_along(target, got, way):
            text = _wrong_at_points(target, got, xs, _search(target, got, way))
            text = text or "along a random direction it is not what finite differences give"
        if text is None and target.equal is not None:
            text = _wrong_along_ties(target, got)
        if text is not None:
            mode = "" if training else " in evaluation"
            return f"{target.name} is {'' if text.startswith('missing') else 'wrong: '}{text}{mode}, for {said(xs)}"
    return None


def _not_finite(subject: Subject, xs: Sequence, training: bool, got: Result) -> str:
    y = next(y for y in got.ys if is_float(y) and not np.isfinite(y).all())
    value = y[~np.isfinite(y)][0]
    mode = "" if training else " in evaluation"
    return (
        f"forward gives {value}{mode} for {said(xs)}, random and finite; "
        "if the layer is not made for them, give check_layer an array"
    )


def targets(subject: Subject, xs: Sequence, training: bool, layer: Layer, got: Result) -> list[Target]:
    """The inputs and the trainable weights of a call, with their gradients."""
    probe = subject.fresh(training, of=layer)
    weights = probe.named_weights()
    buffers = {n: np.array(w.data) for n, w in weights.items() if not w.trainable}

    def outputs(xs: Sequence) -> Sequence:
        for n, data in buffers.items():  # running statistics start from the same place
            weights[n].data = data.copy()
        return subject.forward(probe, xs, record=False)

    def of_input(i: int) -> Callable:
        return lambda x: outputs([*xs[:i], x, *xs[i + 1 :]])

    def of_weight(name: str) -> Callable:
        start = np.array(weights[name].data)

        def values(data: np.ndarray) -> Sequence:
            weights[name].data = data
            ys = outputs(xs)
            weights[name].data = start.copy()
            return ys

        return values

    names = ["dx" if len(xs) == 1 else f"dx[{i}]" for i in range(len(xs))]
    found = [Target(names[i], x, got.dxs[i], of_input(i), True, _equal(x)) for i, x in enumerate(xs) if is_float(x)]
    for n, g in got.weights.items():
        found.append(Target(f"the gradient of {n}", np.array(weights[n].data), g, of_weight(n), n in got.touched))
    return found


def _equal(x: np.ndarray) -> np.ndarray | None:
    _, at, counts = np.unique(x, return_inverse=True, return_counts=True)
    return None if (counts == 1).all() else (counts > 1)[at].reshape(x.shape)


def _along_ties(target: Target, got: Result) -> Iterator[tuple[float, np.ndarray, _slopes.Slope]]:
    """(value, direction, slope) where all elements of a value move together: then they stay equal."""
    for value in np.unique(target.at[target.equal])[:4]:
        way = np.where(target.at == value, 1.0, 0.0)
        yield float(value), way, _slopes.along(target.at, way, target.values, _dys(got))


def _wrong_along_ties(target: Target, got: Result) -> str | None:
    """Which of equal values is chosen does not matter; that one is chosen does."""
    for value, way, slope in _along_ties(target, got):
        if _wrong_along(target, got, way):
            mine = 0.0 if target.grad is None else float((np.asarray(target.grad) * way).sum())
            return (
                f"where the elements that are {value:.4g} move together it gives {mine:.6g}, finite differences give "
                f"{slope.middle:.6g}; it does not share dy among equal values, or is wrong for this value"
            )
    return None


def _dys(got: Result) -> list:
    return [0 if dy is None else dy for dy in got.dys]


def _way(subject: Subject, target: Target) -> np.ndarray:
    """A random direction, no part of which is small; one that keeps equal elements equal, where there are any."""
    if target.equal is not None:
        return np.sin(37.0 * target.at + 1.0) + 1.5
    return subject.random.uniform(0.5, 1.5, target.at.shape) * subject.random.choice([-1, 1], target.at.shape)


def _wrong_along(target: Target, got: Result, way: np.ndarray) -> bool:
    if not target.at.size:
        return False
    slope = _slopes.along(target.at, way, target.values, _dys(got))
    mine = 0.0 if target.grad is None else float((np.asarray(target.grad) * way).sum())
    if slope.agrees(mine):
        return False
    return _slopes.smooth(slope, _slopes.along(target.at, way, target.values, _dys(got), FINER))


def _search(target: Target, got: Result, way: np.ndarray) -> np.ndarray:
    """Flat indices among which the gradient is wrong, a few others for comparison: halves, until they are few."""
    first, last = 0, target.at.size
    while last - first > POINTS // 2:
        middle = (first + last) // 2
        part = np.zeros_like(way)
        part.reshape(-1)[first:middle] = way.reshape(-1)[first:middle]
        if _wrong_along(target, got, part):
            last = middle
        else:
            first = middle
    others = np.linspace(0, target.at.size - 1, POINTS // 2).astype(int)
    return np.unique(np.concatenate([np.arange(first, last), others]))


def _wrong_at_points(target: Target, got: Result, xs: Sequence, points: np.ndarray) -> str | None:
    slopes = _slopes.at_points(target.at, points, target.values, _dys(got))
    if target.grad is None or not target.reached:
        depends = any(not s.agrees(0.0) for s in slopes)
        if depends and target.grad is None:
            return "missing: backward returns None for it, yet the output depends on it"
        if depends:
            return "missing: backward never adds to it, yet the output depends on it"
        return None
    mine = np.asarray(target.grad).reshape(-1)[points]
    true = np.array([s.middle for s in slopes])
    bad = np.array([not s.agrees(float(m), 1e-8) for s, m in zip(slopes, mine)], bool)
    if target.equal is not None:  # moved alone, it may be passed over for another that equals it
        together = (s.reach for _, _, s in _along_ties(target, got))
        most = 2 * max((*together, *(s.reach for s in slopes)), default=0.0)
        bad &= ~(target.equal.reshape(-1)[points] & (np.abs(mine) <= most))
    if not bad.any():
        return None
    finer = _slopes.at_points(target.at, points[bad], target.values, _dys(got), FINER)
    bad[bad] = [_slopes.smooth(slopes[k], f) for k, f in zip(np.flatnonzero(bad), finer)]
    if not bad.any():
        return None
    with np.errstate(all="ignore"):
        off = np.where(bad, np.nan_to_num(np.abs(mine - true), nan=np.inf), -1)
    worst = int(off.argmax())
    index = tuple(map(int, np.unravel_index(points[worst], target.at.shape)))
    batch = xs[0].shape[0] if xs[0].ndim else 1
    return (
        f"at {int(bad.sum())} of {len(points)} points, the worst at {index}: got {mine[worst]:.6g}, "
        f"finite differences give {true[worst]:.6g}{_used(target, got)}"
        f"{_repeated(xs, points[bad], target.at) or pattern(mine, true, bad, points, target.at, batch)}"
    )


def _used(target: Target, got: Result) -> str:
    """Whether it is right for a dy of ones: then backward leaves dy out."""
    if all(dy is None or (dy == 1).all() for dy in got.dys):
        return ""
    points = _slopes.points_of(target.at.size, POINTS, np.random.default_rng(0))
    ones = [0 if dy is None else np.ones_like(dy) for dy in got.dys]
    slopes = _slopes.at_points(target.at, points, target.values, ones)
    at = np.asarray(target.grad).reshape(-1)[points]
    if at.any() and all(s.agrees(float(m), 1e-8) for s, m in zip(slopes, at)):
        return "; it is right where dy is all ones: backward does not use dy"
    return ""


def _repeated(xs: Sequence, wrong: np.ndarray, at: np.ndarray) -> str:
    """Whether the wrong rows are those that integers among the inputs name more than once."""
    for x in xs:
        if is_float(x) or not at.ndim:
            continue
        numbers, counts = np.unique(x, return_counts=True)
        if np.isin(np.unravel_index(wrong, at.shape)[0], numbers[counts > 1]).all():
            return "; it is wrong where a number comes more than once: their gradients must add up (np.add.at)"
    return ""
