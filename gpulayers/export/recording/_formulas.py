"""What several runs at different batch sizes have in common: numbers that follow the batch size become formulas of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from gpulayers.export.recording._place import Place, refuse
from gpulayers.export.recording.graph import Formula

BATCHES = (4, 7, 9, 12, 4, 1)
"""Four to fit; one again: what differs there is random, or state; one where guards act (max(n − 1, 1))."""
_FITTED = np.array(BATCHES[:4], float)


def common(values: list[Any], at: Place | None, strict: bool = True) -> Any:
    """The one value of all runs, or a Formula that gives each of them; likewise in tuples and dicts.

    strict: raises Unrecordable, else gives None, for what follows the batch size in another way.
    """
    first = values[0]
    if isinstance(first, dict):
        return {key: common([v[key] for v in values], at, strict) for key in first}
    if isinstance(first, tuple | list) and len({len(v) for v in values}) == 1:
        return tuple(common(list(vs), at, strict) for vs in zip(*values))
    if isinstance(first, np.ndarray):
        return _common_array(values, at)
    if all(v == first or (v != v and first != first) for v in values):
        return first
    return _formula(values, 1e-9, at, strict)


def _common_array(values: list[np.ndarray], at: Place | None) -> Any:
    first = values[0]
    if all(v.shape == first.shape and np.array_equal(v, first, equal_nan=v.dtype.kind == "f") for v in values):
        return first
    if not np.array_equal(values[4], first, equal_nan=first.dtype.kind == "f"):
        _refuse_chance(at)
    if first.ndim or any(v.ndim for v in values):
        refuse("a constant array follows the batch size", "an array computed from x: np.ones_like(x[:, :1])", at)
    exact = first.dtype.kind != "f" or first.dtype.itemsize == 8
    return _formula([v.item() for v in values], 1e-9 if exact else 1e-6, at)


def _formula(values: list[Any], tolerance: float, at: Place | None, strict: bool = True) -> Formula | None:
    if values[4] != values[0]:
        _refuse_chance(at)
    found = np.array(values[:4], float)
    whole = all(isinstance(v, int) for v in values)
    formula = _line(found) if whole else _ratio(found, tolerance, False) or _ratio(found**2, tolerance, True)
    if formula is None:
        if not strict:
            return None
        rule = "it follows as (a + b N) / (d + c N), or as the root of that"
        came = ", ".join(f"{v} for N = {n}" for v, n in zip(values[:4], BATCHES))
        refuse(f"a number follows the batch size N in another way: {came}", f"a number that does not, or {rule}", at)
    if len(values) > 5 and not abs(formula(1) - values[5]) <= tolerance * abs(values[5]):
        return dataclasses.replace(formula, one=values[5])
    return formula


def _refuse_chance(at: Place | None) -> None:
    reason = "a constant differs between two equal runs: random numbers that are not gpulayers', or hidden state"
    refuse(reason, "gl.random.generator() for random numbers; add_weight(…, trainable=False) for state", at)


def _line(found: np.ndarray) -> Formula | None:
    b = round((found[1] - found[0]) / (BATCHES[1] - BATCHES[0]))
    a = round(found[0] - b * BATCHES[0])
    return Formula(a, b) if (a + b * _FITTED == found).all() else None


def _ratio(found: np.ndarray, tolerance: float, root: bool) -> Formula | None:
    """(a + b N) / (d + c N), with as few of the four as will do: what a + b N − d v − c v N sends to zero."""
    if not np.isfinite(found).all():
        return None
    terms = np.stack([found * 0 + 1, _FITTED, -found, -found * _FITTED], 1)
    for kept in ([0, 1, 2], [0, 2, 3], [0, 1, 2, 3]):
        coefficients = np.zeros(4)
        coefficients[kept] = np.linalg.svd(terms[:, kept])[2][-1]
        scale = coefficients[3] if abs(coefficients[3]) > 1e-9 else coefficients[2]
        if not scale:
            continue
        digits = 12 if tolerance < 1e-6 else 6
        a, b, d, c = (_rounded(k, digits) for k in coefficients / scale)
        below = d + c * _FITTED
        if below.all() and np.allclose((a + b * _FITTED) / below, found, rtol=max(tolerance, 1e-9), atol=0):
            return Formula(a, b, d, c, root)
    return None


def _rounded(k: float, digits: int) -> float:
    if abs(k) <= 1e-9 or not math.isfinite(k):
        return 0.0
    k = float(f"{k:.{digits}g}")
    return int(k) if k == int(k) and abs(k) < 2**31 else k
