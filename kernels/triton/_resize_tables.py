"""What a resized axis is made of, as kernels read it: made once for a shape, and stays."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gpulayers import arrays

from . import _tile
from ._tracing import thread


class Axis(NamedTuple):
    """The table of an axis's places: (taps, places) each, where a place has fewer the rest are −1 and 0."""

    index: Any
    """int32."""
    weight: Any
    """float32."""
    taps: int
    full: bool
    """Each place has all."""


_known: dict[tuple, Axis] = {}


def _length(taps: int) -> int:
    """Of a kernel's loop over so many: long ones are rounded up, for shapes to share a kernel."""
    return taps if taps <= 6 else -(-taps // 4) * 4 if taps <= 16 else _tile.next_power_of_2(taps)


def axis(make: Any, how: tuple, like: Any) -> Axis:
    """The table that ``make`` (``taps``, ``transposed``) makes of its arguments, where ``like`` is."""
    import torch

    if thread.compiler is not None:
        thread.compiler.refuse("table")
    key = make, how, like.device
    if key not in _known:
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a CUDA graph cannot capture the first resizing to a size: run one before")
        found = make(*how, kind=arrays.float32)
        more = ((0, 0), (0, _length(found.places.shape[1]) - found.places.shape[1]))
        index, weight = np.pad(found.places, more, constant_values=-1), np.pad(found.weights, more)
        # These copies wait for the GPU, once: every stream may read them from then on.
        on = [
            torch.from_numpy(np.ascontiguousarray(a.T.astype(kind))).to(like.device)
            for a, kind in ((index, np.int32), (weight, np.float32))
        ]
        _known[key] = Axis(*on, index.shape[1], bool((index >= 0).all()))
    known = _known[key]
    _tile.lasting(known.index), _tile.lasting(known.weight)
    return known
