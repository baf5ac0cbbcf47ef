"""What ops that update lists of arrays ask of them."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import FLOATS, Spec
from gpulayers.definition import KindError, ShapeError, UnsupportedTypeError


def check_lists(**lists: Any) -> None:
    """Each is a list of float arrays, as many and of the same shapes as the first."""
    first = next(iter(lists))
    for name, arrays in lists.items():
        if not isinstance(arrays, list | tuple) or isinstance(arrays, Spec):
            raise KindError(name, "a list of arrays", arrays)
        if len(arrays) != len(lists[first]):
            raise ShapeError(name, f"one array for each parameter: {len(lists[first])}", len(arrays))
        for i, (x, p) in enumerate(zip(arrays, lists[first])):
            if x.dtype not in FLOATS:
                raise UnsupportedTypeError(f"{name}[{i}]", "dtype ∈ {float64, float32, float16, bfloat16}", x.dtype)
            if tuple(x.shape) != tuple(p.shape):
                raise ShapeError(
                    f"{name}[{i}]", f"{name}[{i}].shape = {first}[{i}].shape = {list(p.shape)}", list(x.shape)
                )
