"""What norms have in common on every backend."""

from __future__ import annotations

from typing import Any

from ._activation import FROM_Y


def batch_norm_saved(
    activation: str | None, y: Any, mean: Any, rstd: Any, x: Any, weight: Any, bias: Any, residual: Any
) -> dict[str, Any]:
    """What backward computes from: f'(z) from y where that does, else z again from all that made it."""
    saved = {"x": x, "mean": mean, "rstd": rstd, "weight": weight}
    if activation is not None:
        saved |= {"y": y} if activation in FROM_Y else {"bias": bias, "residual": residual}
    return {name: a for name, a in saved.items() if a is not None}


def sum_dtype(x: Any, residual: Any) -> Any:
    """Of x + residual: float32 where one has it and the other 16 bits."""
    return x.dtype if x.dtype == residual.dtype else "float32"


def norms_own(saved: dict[str, Any], inputs: tuple, needs: tuple) -> tuple[dict[str, Any], tuple, tuple]:
    """What the backward of a norm of a sum is given, as the norm of x takes it: x is the sum."""
    return saved | {"x": saved["sum"]}, (inputs[0], *inputs[2:]), (*needs, "x") if "residual" in needs else needs


def for_both(grads: tuple, needs: tuple, dresidual: Any = None) -> tuple:
    """The norm's gradients as those of (x, residual, *weights): the first two are one array, but for a residual of another
    dtype."""
    dh, *others = grads
    second = dh if dresidual is None else dresidual
    return dh if "x" in needs else None, second if "residual" in needs else None, *others


def group_norm_saved(
    activation: str | None, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any, residual: Any
) -> dict[str, Any]:
    """What backward computes from: it reads x anyway, and so f'(z) is from z, made again."""
    saved = {"x": x, "mean": mean, "rstd": rstd, "weight": weight}
    if activation is not None:
        saved |= {"bias": bias, "residual": residual}
    return {name: a for name, a in saved.items() if a is not None}
