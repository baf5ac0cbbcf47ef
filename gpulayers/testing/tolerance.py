"""How far a result may be from the truth: derived, never picked. The only place that defines it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpulayers.arrays import bfloat16, float16, float32, float64

_MANTISSA = {float64: 52, float32: 23, float16: 10, bfloat16: 7}
_SMALLEST = {float64: -1022, float32: -126, float16: -14, bfloat16: -126}


def ulp(values: np.ndarray, of: np.dtype) -> np.ndarray:
    """The distance between neighbouring numbers of dtype ``of`` at ``values`` (float64); none of integers, which are exact."""
    if of.kind in "iu":
        return np.zeros(values.shape)
    _, exponent = np.frexp(np.where(np.isfinite(values), values, 0.0))
    return np.ldexp(1.0, np.maximum(exponent - 1, _SMALLEST[of]) - _MANTISSA[of])


def bound(truth: np.ndarray, plain: np.ndarray, of: np.dtype, moved: Sequence[np.ndarray] = ()) -> np.ndarray:
    """4 E + 2 ulp, elementwise.

    truth: the definition in float64. plain: the definition in float32 (float64 for float64) from the same inputs,
    rounded once to ``of``. moved: a gradient's plain formula a few times more, from dys that are one rounding away: where
    terms cancel, they show what another order of summation costs. E is the largest error of all, and at least what
    rounding once costs at the largest value: a formula that happens to be exact for one draw is not a promise that
    every order of summation is.
    """
    finite = np.isfinite(truth)
    where = ... if finite.all() else finite
    known = truth[where]
    errors = [np.abs(p.astype(float64)[where] - known) for p in (plain, *moved)]
    error = max(e.max(initial=0.0, where=np.isfinite(e)) for e in errors)
    return allowed(error, np.abs(known).max(initial=0.0), truth, of)


def allowed(error: float, largest: float, truth: np.ndarray, of: np.dtype) -> np.ndarray:
    """The bound at ``truth``, from E's parts: the plain formula's largest ``error``, and the ``largest`` value."""
    once = 0.5 * ulp(np.array(largest), of) if largest else 0.0
    return 4 * np.maximum(error, once) + 2 * ulp(truth, of)


Limits = dict[tuple[int, np.dtype], tuple[np.ndarray, np.ndarray]]
"""(a truth, its bound) by the truth's identity and the result's dtype: each truth comes with one plain formula."""


def excess(
    got: np.ndarray,
    truth: np.ndarray,
    plain: np.ndarray,
    moved: Sequence[np.ndarray] = (),
    limits: Limits | None = None,
) -> str | None:
    """None if ``got`` is within the bound of ``truth`` everywhere (NaN and Inf alike), else what is wrong and where.

    limits: bounds of truths that came before, kept for what else is held against them.
    """
    limits = {} if limits is None else limits
    key = id(truth), got.dtype
    got64 = got.astype(float64)
    most = _largest(got.dtype)
    with np.errstate(invalid="ignore"):
        # What overflows the dtype is Inf there; near the edge rounding decides.
        if key not in limits:
            # The truth stays, or its identity could be another's.
            limits[key] = truth, bound(truth, plain, got.dtype, moved)
        limit = limits[key][1]
        if (np.abs(got64 - truth) <= limit).all():
            return None
        same = (np.isnan(got64) & np.isnan(truth)) | (got64 == truth)
        same |= np.isinf(got64) & (np.abs(truth) + limit >= most) & (np.sign(got64) == np.sign(truth))
        wrong = ~(same | (np.abs(got64 - truth) <= limit))
    if not wrong.any():
        return None
    with np.errstate(invalid="ignore"):
        ratio = np.where(wrong, np.nan_to_num(np.abs(got64 - truth) / limit, nan=np.inf, posinf=np.inf), -1)
    at = np.unravel_index(int(ratio.argmax()), ratio.shape)
    return (
        f"{int(wrong.sum())} of {wrong.size} elements are off, the worst at {tuple(map(int, at))}: got {got64[at]:.9g}, "
        f"true {truth[at]:.9g}, off by {abs(got64[at] - truth[at]):.3g} where {np.broadcast_to(limit, truth.shape)[at]:.3g} is allowed"
    )


def _largest(of: np.dtype) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(of).max)
