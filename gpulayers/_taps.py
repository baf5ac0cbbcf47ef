"""How each place along one axis is made of places along another: a few indices and weights. Metadata, of sizes alone.

``taps`` resamples an axis as torch does; ``transposed`` turns a table around, so that a gradient is gathered, too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

CUBIC = -0.75
"""torch's A of bicubic resampling; its antialiased one has Pillow's."""
_PILLOWS = -0.5


class Taps(NamedTuple):
    """y[o] = Σ_k weights[o, k] · x[places[o, k]]."""

    places: np.ndarray
    """(out, K), int64; −1 where there is no such tap."""
    weights: np.ndarray
    """(out, K); 0 where there is no such tap."""

    @property
    def whole(self) -> bool:
        """Every place has all K taps."""
        return not bool((self.places < 0).any())


def _cubic(x: Any, a: float) -> Any:
    """Keys' kernel."""
    x = abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    return np.where(x < 1, near, np.where(x < 2, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a, 0))


def _triangle(x: Any, _: Any = None) -> Any:
    return np.maximum(1 - abs(x), 0)


def _lanczos(x: Any, _: Any = None) -> Any:
    return np.where(abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


_FILTERS: dict[str, tuple[int, Callable[[Any, float], Any]]] = {
    "linear": (2, _triangle),
    "cubic": (4, _cubic),
    "lanczos": (6, _lanczos),
}
"""(how many places it reaches over, the filter) of the antialiased modes."""


def _step(size: int, out: int, align_corners: bool, scale: float, kind: Any) -> Any:
    """Places of x from one of y to the next."""
    if align_corners:
        return kind(size - 1) / kind(out - 1) if out > 1 else kind(0)
    return kind(1.0 / scale) if scale > 0 else kind(size) / kind(out)


def _nearest(size: int, out: int, scale: float, exact: bool) -> Taps:
    at = np.arange(out, dtype=np.float32)  # in torch, too, whatever x's dtype is
    step = _step(size, out, False, scale, np.float32)
    if not exact and out in (size, 2 * size):  # torch looks no further, at a scale neither
        index = np.arange(out) // (out // max(size, 1))
    else:
        index = np.minimum(np.floor((at + np.float32(0.5) if exact else at) * step).astype(np.int64), size - 1)
    return Taps(index[:, None], np.ones((out, 1), np.float32))


def _area(size: int, out: int, kind: Any) -> Taps:
    at = np.arange(out)
    first, last = at * size // out, -(-(at + 1) * size // out)
    k = np.arange(int((last - first).max(initial=1)))
    index = first[:, None] + k
    there = index < last[:, None]
    return Taps(np.where(there, index, -1), np.where(there, 1 / (last - first).astype(kind)[:, None], kind(0)))


def _smooth(size: int, out: int, align_corners: bool, scale: float, cubic: bool, kind: Any) -> Taps:
    """Linear and cubic: between the 2 or 4 nearest places."""
    step, at = _step(size, out, align_corners, scale, kind), np.arange(out, dtype=kind)
    if align_corners:
        real = step * at
    else:
        real = step * (at + kind(0.5)) - kind(0.5)
        real = real if cubic else np.maximum(real, kind(0))
    if not cubic and size == out:
        real = at
    first = np.minimum(np.floor(real).astype(np.int64), size - 1)
    t = np.clip(real - first.astype(kind), kind(0), kind(1))[:, None]
    if cubic:
        index = first[:, None] + np.arange(-1, 3)
        weight = _cubic(np.concatenate([t + 1, t, 1 - t, 2 - t], 1), CUBIC)
    else:
        index, weight = first[:, None] + np.arange(2) * (size != out), np.concatenate([1 - t, t], 1)
    return Taps(np.clip(index, 0, size - 1), weight.astype(kind))


def _antialiased(size: int, out: int, align_corners: bool, scale: float, mode: str, kind: Any) -> Taps:
    """A filter as wide as the step, cut off at the ends and brought to a sum of 1."""
    reach, function = _FILTERS[mode]
    step, half = _step(size, out, align_corners, scale, kind), kind(0.5)
    support = kind(reach * 0.5) * max(step, kind(1))
    narrow = kind(1) / step if step >= 1 else kind(1)
    center = step * (np.arange(out, dtype=kind) + half)  # where align_corners, too, in torch
    first = np.maximum((center - support + half).astype(np.int64), 0)
    last = np.minimum((center + support + half).astype(np.int64), size)
    count = np.clip(last - first, 0, math.ceil(support) * 2 + 1)
    k = np.arange(max(1, int(count.max(initial=1))))
    there = k < count[:, None]
    place = (k + first[:, None]).astype(kind) - center[:, None] + half
    weight = np.where(there, function(place * narrow, _PILLOWS), 0).astype(kind)
    total = weight.sum(1, keepdims=True)
    weight = np.where(total != 0, weight / np.where(total == 0, 1, total), weight).astype(kind)
    return Taps(np.where(there, first[:, None] + k, -1), weight)


def _frozen(found: Taps) -> Taps:
    for array in found:
        array.flags.writeable = False
    return found


@functools.lru_cache(maxsize=512)
def taps(
    size: int, out: int, mode: str, align_corners: bool = False, antialias: bool = False, scale: float = 0.0, kind: Any = np.float64
) -> Taps:  # fmt: skip
    """The table that makes ``out`` places of ``size``, in dtype ``kind`` (float64, float32) as torch computes it.

    mode: "nearest", "nearest-exact", "linear", "cubic", "area", "lanczos" (antialiased alone). scale: how many places of
    y one of x is, where that is not out / size; 0: it is.
    """
    kind = np.dtype(kind).type
    if mode in ("nearest", "nearest-exact"):
        found = _nearest(size, out, scale, mode == "nearest-exact")
        found = Taps(found.places, found.weights.astype(kind))
    elif mode == "area":
        found = _area(size, out, kind)
    elif antialias and size == out:  # as torch's forward, whatever the scale
        found = Taps(np.arange(out)[:, None], np.ones((out, 1), kind))
    elif antialias:
        found = _antialiased(size, out, align_corners, scale, mode, kind)
    else:
        found = _smooth(size, out, align_corners, scale, mode == "cubic", kind)
    return _frozen(found)


@functools.lru_cache(maxsize=512)
def transposed(
    size: int, out: int, mode: str, align_corners: bool = False, antialias: bool = False, scale: float = 0.0, kind: Any = np.float64
) -> Taps:  # fmt: skip
    """The table that takes a gradient of ``out`` places back to ``size``: for each the run of those that it is a tap of."""
    index, weight = taps(size, out, mode, align_corners, antialias, scale, kind)
    own = np.arange(size)[:, None]
    low = np.where(index < 0, size, index).min(1, initial=size)
    high = index.max(1, initial=-1)
    # What a place is a tap of is a run: the least and the greatest index grow from place to place.
    first, last = np.searchsorted(high, own[:, 0]), np.searchsorted(low, own[:, 0], side="right")
    k = np.arange(max(1, int((last - first).max(initial=1))))
    at = first[:, None] + k
    there = at < last[:, None]
    of = index[np.minimum(at, max(out - 1, 0))] == own[:, :, None]
    weights = np.where(of, weight[np.minimum(at, max(out - 1, 0))], 0).sum(2)
    return _frozen(Taps(np.where(there, at, -1), np.where(there, weights, 0).astype(weight.dtype)))
