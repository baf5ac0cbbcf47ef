"""Activations that are straight between their kinks, as chains of in-place ufuncs.

A value takes float32 blocks (x, o, *numbers); o may be x. A gradient takes (dy, s, o, *numbers), s what the forward
kept; o is neither. dy passes NaN where it does in torch.
"""

from __future__ import annotations

import numpy as np

from . import _blocks
from ._select import choose, keep

_ZEROS = np.zeros(_blocks.CHAIN, np.float32)


def relu(x: np.ndarray, o: np.ndarray) -> None:
    np.maximum(x, _ZEROS[: x.size], out=o)


def relu_gradient(dy: np.ndarray, y: np.ndarray, o: np.ndarray) -> None:
    lost = y <= 0
    keep(np.logical_not(lost, out=lost), dy, o)  # NaN lets dy through


def leaky_relu(x: np.ndarray, o: np.ndarray, slope: float) -> None:
    t = x * slope
    if slope == 0:  # 0 · Inf
        o[...] = np.where(x > 0, x, t)
    else:
        (np.maximum if slope <= 1 else np.minimum)(x, t, out=o)


def leaky_relu_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray, slope: float) -> None:
    np.multiply(dy, slope, out=o)
    choose(x > 0, dy, o)


def relu6(x: np.ndarray, o: np.ndarray) -> None:
    np.clip(x, 0, 6, out=o)


def relu6_gradient(dy: np.ndarray, y: np.ndarray, o: np.ndarray) -> None:
    hardtanh_gradient(dy, y, o, 0.0, 6.0)


def relu_squared(x: np.ndarray, o: np.ndarray) -> None:
    np.maximum(x, _ZEROS[: x.size], out=o)
    o *= o


def relu_squared_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    lost = x <= 0
    t = dy * x
    t *= 2
    keep(np.logical_not(lost, out=lost), t, o)


def hardtanh(x: np.ndarray, o: np.ndarray, min_val: float, max_val: float) -> None:
    np.clip(x, min_val, max_val, out=o)


def hardtanh_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray, min_val: float, max_val: float) -> None:
    lost = x <= min_val
    lost |= x >= max_val
    keep(np.logical_not(lost, out=lost), dy, o)


def hardsigmoid(x: np.ndarray, o: np.ndarray) -> None:
    np.add(x, 3, out=o)
    np.clip(o, 0, 6, out=o)
    np.divide(o, 6, out=o)


def hardsigmoid_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    inside = x > -3
    inside &= x < 3
    keep(inside, dy, o)
    np.divide(o, 6, out=o)


def hardswish(x: np.ndarray, o: np.ndarray) -> None:
    t = x + 3
    np.clip(t, 0, 6, out=t)
    t *= x
    np.divide(t, 6, out=o)


def hardswish_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray) -> None:
    np.divide(x, 3, out=o)
    o += 0.5
    o *= dy
    slope = x < 3
    choose(np.logical_not(slope, out=slope), dy, o)
    none = x <= -3
    keep(np.logical_not(none, out=none), o, o)


def hardshrink(x: np.ndarray, o: np.ndarray, lambd: float) -> None:
    inside = x >= -lambd
    inside &= x <= lambd
    keep(np.logical_not(inside, out=inside), x, o)


def softshrink(x: np.ndarray, o: np.ndarray, lambd: float) -> None:
    np.subtract(x, np.clip(x, -lambd, lambd), out=o)


def hardshrink_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray, lambd: float) -> None:
    inside = x >= -lambd
    inside &= x <= lambd
    keep(np.logical_not(inside, out=inside), dy, o)


softshrink_gradient = hardshrink_gradient


def threshold(x: np.ndarray, o: np.ndarray, threshold: float, value: float) -> None:
    low = x <= threshold
    o[...] = x
    choose(low, np.full_like(x, value), o)


def threshold_gradient(dy: np.ndarray, x: np.ndarray, o: np.ndarray, threshold: float, value: float) -> None:
    low = x <= threshold
    keep(np.logical_not(low, out=low), dy, o)
