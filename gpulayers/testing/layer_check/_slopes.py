"""Slopes from finite differences, one-sided ones where there is a kink."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gpulayers.arrays import FLOATS

STEP = 1e-6
_ROUNDING = 256 * 2.2e-16  # of a forward that computes in float64, in each output
_BEND = 2.0  # how much a slope may change over a step of 1, beside a slope of 0: x|x| at 0


class Slope(NamedTuple):
    """d Σ dy·y / dt between ``low`` and ``high``: the one-sided slopes of each output, which differ at a kink."""

    low: float
    high: float
    reach: float
    """Σ |dy · slope|: what does not cancel."""
    noise: float

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    @property
    def kink(self) -> bool:
        return not self.high - self.low <= 1e-3 * self.reach + self.noise

    def agrees(self, mine: float, floor: float = 0.0) -> bool:
        """Whether a gradient of ``mine`` is right. At a kink only its size is known: any slope in between may be meant."""
        if not np.isfinite(self.reach):
            return True
        if not np.isfinite(mine):
            return False
        allowed = 1e-5 * self.reach + self.noise + floor
        if self.low - allowed <= mine <= self.high + allowed:
            return True
        return self.kink and abs(mine) <= 2 * self.reach + allowed


def between(base: Sequence, up: Sequence, down: Sequence, dys: Sequence, step: float) -> Slope:
    """The slope from the outputs at a point, a step above it and a step below."""
    low = high = reach = noise = 0.0
    with np.errstate(all="ignore"):
        for y, above, below, dy in zip(base, up, down, dys):
            if y.dtype not in FLOATS:
                continue
            right, left = dy * ((above - y) / step), dy * ((y - below) / step)
            low += float(np.minimum(right, left).sum())
            high += float(np.maximum(right, left).sum())
            reach += float(np.maximum(np.abs(right), np.abs(left)).sum())
            noise += float((np.abs(dy) * (1 + np.abs(y))).sum()) * (_ROUNDING / step + _BEND * step)
    return Slope(low, high, reach, noise)


def points_of(size: int, most: int, random: np.random.Generator) -> np.ndarray:
    """Flat indices: all of them, or the ends and others spread between."""
    if size <= most:
        return np.arange(size)
    spread = np.linspace(0, size - 1, most // 2).astype(int)
    return np.unique(np.concatenate([spread, random.integers(0, size, most - most // 2)]))


def at_points(
    at: np.ndarray, points: np.ndarray, values: Callable[[np.ndarray], Sequence], dys: Sequence, share: float = 1.0
) -> list[Slope]:
    """The slopes of Σ dy·y along single elements of ``at`` (flat indices), over ``share`` of the usual step."""
    base, found = values(at), []
    for point in points:
        up, down = at.copy(), at.copy()
        step = STEP * share * max(1.0, abs(float(at.reshape(-1)[point])))
        up.reshape(-1)[point] += step
        down.reshape(-1)[point] -= step
        found.append(between(base, values(up), values(down), dys, step))
    return found


def along(
    at: np.ndarray, way: np.ndarray, values: Callable[[np.ndarray], Sequence], dys: Sequence, share: float = 1.0
) -> Slope:
    """The slope along a direction; ``values`` gives the outputs at a point."""
    step = STEP * share
    return between(values(at), values(at + step * way), values(at - step * way), dys, step)


def smooth(slope: Slope, finer: Slope) -> bool:
    """Whether two steps saw one slope: else the layer bends within a step, and differences are no evidence."""
    noise = slope.noise + finer.noise
    most = max(slope.reach, finer.reach)
    if abs(slope.reach - finer.reach) > 0.05 * most + noise:
        return False
    return abs(slope.middle - finer.middle) <= 0.01 * most + noise
