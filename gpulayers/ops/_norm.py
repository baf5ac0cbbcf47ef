"""Rules that norms share."""

from __future__ import annotations

import math
from typing import Any

from gpulayers.arrays import HALVES, Spec, float32
from gpulayers.definition import ArgumentError, ShapeError
from gpulayers.ops._op import require_same_dtype, require_shape


def require_parameter(x: Spec, **parameters: Spec | None) -> None:
    """A norm's weights and statistics have x's dtype, or float32 where x has 16 bits."""
    for name, p in parameters.items():
        if p is not None and p.dtype != x.dtype and not (p.dtype == float32 and x.dtype in HALVES):
            raise ShapeError(
                name, f"{name}.dtype = x.dtype, or float32 for 16-bit x", f"{name} {p.dtype} with x {x.dtype}"
            )


def require_channels(x: Spec, **parameters: Spec | None) -> Any:
    """The number C of channels of (N, C, *spatial), which a norm's parameters have one number each for."""
    if x.ndim < 2:
        raise ArgumentError("x", "x.shape = (N, C, *spatial)", list(x.shape))
    require_parameter(x, **parameters)
    for name, p in parameters.items():
        if p is not None:
            require_shape(name, p, (x.shape[1],), f"{name}.shape = (C,)")
    return x.shape[1]


def require_residual(x: Spec, residual: Spec | None) -> None:
    """What is added to a norm of channels."""
    if residual is not None:
        require_shape("residual", residual, x.shape, "residual.shape = x.shape")
        require_same_dtype(x, residual=residual)


def require_running(running_mean: Spec | None, running_var: Spec | None) -> None:
    if (running_mean is None) != (running_var is None):
        raise ArgumentError("running_mean, running_var", "both or neither", "one of them")


def across(x: Any) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(the axes that statistics are taken over, the shape of a channel vector against x, values per channel)."""
    axes = (0, *range(2, x.ndim))
    return axes, (1, -1, *[1] * (x.ndim - 2)), math.prod(x.shape[a] for a in axes)
