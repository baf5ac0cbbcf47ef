"""A wrong gradient in words: what its numbers have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pattern(
    mine: np.ndarray, true: np.ndarray, wrong: np.ndarray, points: np.ndarray, at: np.ndarray, batch: int
) -> str:
    """What wrong gradients have in common, as the end of a sentence; "" where nothing is seen.

    mine, true, wrong: at flat indices ``points`` of ``at``, which is what the gradient is of.
    """
    if not np.isfinite(mine).all():
        return "; it is not finite"
    return (
        _transposed(mine, true, points, at.shape)
        or _factor(mine, true, wrong, batch)
        or _values(wrong, at.reshape(-1)[points])
        or _places(wrong, points, at.shape)
        or _factor(mine[wrong], true[wrong], wrong[wrong], batch)
    )


def _factor(mine: np.ndarray, true: np.ndarray, wrong: np.ndarray, batch: int) -> str:
    there = np.abs(true) > 1e-3 * np.abs(true).max(initial=0.0)
    if not there.any() or not wrong[there].all():
        return ""
    if not mine.any():
        return "; it is zero there, and must not be"
    ratios = mine[there] / true[there]
    if np.ptp(ratios) > 1e-3 * abs(ratios.mean()) or len(ratios) < 2 <= len(true):
        return ""
    ratio = float(ratios.mean())
    if abs(ratio + 1) < 1e-3:
        return "; it has the wrong sign"
    why = ""
    if batch > 1 and abs(ratio * batch - 1) < 1e-3:
        why = ": it is the mean over the batch, and must be the sum"
    elif batch > 1 and abs(ratio / batch - 1) < 1e-3:
        why = ": it counts the batch twice"
    return f"; everywhere it is off by a factor of {ratio:.4g}{why}"


def _transposed(mine: np.ndarray, true: np.ndarray, points: np.ndarray, shape: tuple) -> str:
    if len(points) != np.prod(shape, dtype=int) or len(shape) < 2 or len(points) < 2:
        return ""
    for a, b in ((-1, -2), (0, 1)):
        turned = true.reshape(shape).swapaxes(a, b)
        if turned.shape == tuple(shape) and np.allclose(mine.reshape(shape), turned, rtol=1e-4, atol=1e-9):
            return f"; it is transposed (axes {a % len(shape)} and {b % len(shape)})"
    return ""


def _values(wrong: np.ndarray, values: np.ndarray) -> str:
    if wrong.all() or len(wrong) < 4:
        return ""
    tests = {"< 0": values < 0, "> 0": values > 0, "= 0": values == 0, "not 0": values != 0}
    for name, side in tests.items():
        if side.any() and not side.all() and not wrong[~side].any() and wrong[side].any() and wrong[side].mean() > 0.5:
            return f"; it is wrong only where the value is {name}"
    size = np.abs(values)
    if size[wrong].min() > size[~wrong].max():
        return f"; it is wrong only where the value is large, above {size[~wrong].max():.3g} in size"
    if size[wrong].max() < size[~wrong].min():
        return f"; it is wrong only where the value is small, below {size[~wrong].min():.3g} in size"
    return ""


def _places(wrong: np.ndarray, points: np.ndarray, shape: Sequence[int]) -> str:
    """Wrong only at some index of an axis."""
    if wrong.all():
        return ""
    where = np.unravel_index(points, shape)
    for axis, index in enumerate(where):
        bad, good = set(index[wrong].tolist()), set(index[~wrong].tolist())
        if shape[axis] > 1 and not bad & good:
            ends = {(0,): "the first", (shape[axis] - 1,): "the last"}
            name = ends.get(tuple(sorted(bad)), f"{len(bad)} of {shape[axis]} (from {min(bad)})")
            return f"; it is wrong only at {name} along axis {axis}"
    return ""
