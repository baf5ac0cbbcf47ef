"""The moments of a batch, by which batch norm over several processes is made."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, compute_dtype, up
from gpulayers.definition import Rule
from gpulayers.ops._norm import across, require_channels
from gpulayers.ops._op import Op, require_float


def batch_moments_rule(x: Spec, *, needs: tuple = ()) -> Rule:
    require_float("x", x)
    row = Spec((require_channels(x),), compute_dtype(x.dtype))
    return Rule({"mean": row, "var": row})


def batch_moments_forward(x: Any, *, needs: tuple = ()) -> tuple[tuple, dict]:
    """(mean, var) of each channel over N and spatial; var the biased one, both 0 of nothing.

    x: (N, C, *spatial), float. Returns mean and var (C,), float32 (float64 for float64). Raises ShapeError.
    """
    axes, channels, count = across(x)
    v, n = up(x), max(count, 1)
    mean = v.sum(axes) / n
    d = v - mean.reshape(channels)
    return (mean, (d * d).sum(axes) / n), {}


batch_moments = Op(batch_moments_rule, batch_moments_forward, family="norm")
