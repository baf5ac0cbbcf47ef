"""Local response norm."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, compute_dtype, namespace, up
from gpulayers.definition import ArgumentError, KindError, Rule, ShapeError
from gpulayers.ops._op import Op, require_float
from gpulayers.ops._window import ordered_as, output_order


def local_response_norm_rule(
    x: Spec, *, needs: tuple = (), size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Rule:
    require_float("x", x)
    if x.ndim < 3:
        raise ArgumentError("x", "x.shape = (N, C, *spatial) with a spatial axis at least", list(x.shape))
    if not hasattr(size, "__index__") or isinstance(size, bool):
        raise KindError("size", "an integer", repr(size))
    if size < 1:
        raise ShapeError("size", "size ≥ 1", size)
    y = Spec(x.shape, x.dtype, output_order(x))
    saved = {"x": x, "scale": Spec(x.shape, compute_dtype(x.dtype), y.order)}
    options = {"size": int(size), "alpha": float(alpha), "beta": float(beta), "k": float(k)}
    return Rule({"y": y}, saved if needs else {}, options, {"x": y})


def _summed(v: Any, before: int, after: int) -> Any:
    """Σ v over the channels c − before … c + after, of those that there are."""
    channels, total = v.shape[1], v.copy()
    for d in range(-before, after + 1):
        if d and abs(d) < channels:
            here = slice(max(0, -d), channels - max(0, d))
            total[:, here] += v[:, slice(here.start + d, here.stop + d)]
    return total


def local_response_norm_forward(
    x: Any, *, needs: tuple = (), size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> tuple[tuple, dict]:
    """y = x · scale^(−beta), with scale = k + alpha / size · Σ x² over ``size`` neighbouring channels.

    x: (N, C, *spatial), float, with a spatial axis at least. The neighbours of channel c are c − ⌊size / 2⌋ … c +
    ⌊(size − 1) / 2⌋; those outside of x count as 0. Returns y with x's shape, dtype and memory order (channels-last or
    row-major). Krizhevsky, Sutskever, Hinton: ImageNet Classification with Deep Convolutional Neural Networks (2012).
    Raises ShapeError and ArgumentError.
    """
    v = up(x)
    scale = _summed(v * v, size // 2, (size - 1) // 2) * (alpha / size) + k
    y = (v * namespace(x).power(scale, -beta)).astype(x.dtype, copy=False)
    return (ordered_as(y, x),), {"x": x, "scale": ordered_as(scale, x)} if needs else {}


def local_response_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
) -> tuple:
    """dx = dy · scale^(−beta) − 2 alpha beta / size · x · Σ dy x scale^(−beta − 1), over the channels that x is a
    neighbour of."""
    (dy,), x, scale = dys, saved["x"], saved["scale"]
    xp, v, g = namespace(x), up(x), up(dy)
    near = _summed(g * v * xp.power(scale, -beta - 1), (size - 1) // 2, size // 2)
    dx = g * xp.power(scale, -beta) - v * near * (2 * alpha * beta / size)
    return (ordered_as(dx.astype(x.dtype, copy=False), x),)


local_response_norm = Op(
    local_response_norm_rule, local_response_norm_forward, local_response_norm_backward, family="norm"
)
