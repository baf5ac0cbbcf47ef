"""What poolings' drop-ins share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from gpulayers.torch import _autocast
from gpulayers.torch._arguments import batched, each

Size = int | Sequence[int]


def of_volumes(axes: int, input: Any) -> Any:
    """``input``; under autocast on a CPU, as torch, in float32 where it is volumes."""
    return _autocast.cast(_autocast.ON_CPU, (input,), 1)[0] if axes == 3 and isinstance(input, Tensor) else input


def in_parts(axes: int, op: Callable, theirs: Callable, input: Any, output_size: Any, *more: Any) -> Any:
    """``op`` with the input's size in the place of each None."""
    sizes = each(output_size, axes)
    if not isinstance(input, Tensor) or len(sizes) != axes or input.dim() < axes or (axes == 1 and None in sizes):
        return theirs(input, output_size, *more)  # raises
    sizes = tuple([n if o is None else o for o, n in zip(sizes, input.shape[-axes:])])
    return batched(op, axes + 2, of_volumes(axes, input), sizes, *more)


def first(found: Any, indices: bool) -> Any:
    """What torch's function returns, of an op's (y, indices) or y."""
    return found[0] if isinstance(found, tuple) and not indices else found


def to_where_it_won(dy: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """The gradient of places that won, in torch's own operations."""
    n, c, *sizes = x.shape
    dx = dy.new_zeros(n, c, math.prod(sizes)).scatter_add(2, index.long().reshape(n, c, -1), dy.reshape(n, c, -1))
    return dx.reshape(n, c, *sizes)


class Pool:
    """A class of torch.nn's that pools: its forward, with ours in the place of torch's function."""

    _function: Callable[..., Any]
    _options: tuple[str, ...]
    """Its attributes that the function takes, in that order."""

    def forward(self, input: Tensor) -> Any:
        return self._function(input, *[getattr(self, name) for name in self._options])
