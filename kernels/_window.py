"""The geometry of windows that slide over images of one to three spatial axes; sequences have an entry for each axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from gpulayers.arrays import spec


class Window(NamedTuple):
    """A window's options in their normal form."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    """Before the image."""
    dilation: tuple[int, ...]

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def tap_dtype(self) -> str:
        """The smallest integer that numbers the taps; −1 says that none of them lay on the image."""
        return "int8" if self.taps <= 127 else "int16" if self.taps <= 32767 else "int32"

    @property
    def spans(self) -> tuple[int, ...]:
        """Pixels from a window's first tap to its last, both included."""
        return tuple([d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation)])

    @property
    def laps(self) -> tuple[int, ...]:
        """How many windows a pixel may lie under."""
        return tuple([-(-span // s) for span, s in zip(self.spans, self.stride)])

    def output_size(self, image: Sequence[int], after: Sequence[int], ceil: bool = False) -> tuple[int, ...]:
        """How many windows an image takes, with ``after`` pixels of padding behind it; with ``ceil`` a last one that
        starts on the image or on the padding before it counts, too."""
        found = []
        for n, a, span, s, p in zip(image, after, self.spans, self.stride, self.padding):
            out = (n + p + a - span + (s - 1 if ceil else 0)) // s + 1
            found.append(out - 1 if ceil and (out - 1) * s >= n + p else out)
        return tuple(found)

    def reach(self, size: Sequence[int]) -> tuple[int, ...]:
        """Pixels, padding included, that so many windows reach over."""
        return tuple([s * (o - 1) + span for o, span, s in zip(size, self.spans, self.stride)])


def channels_last(ndim: int) -> tuple[int, ...]:
    """The memory order of (N, C, …) in which channels are neighbours."""
    return (0, *range(2, ndim), 1)


def output_order(x: Any) -> tuple[int, ...] | None:
    """The memory order of an output over x (an array or its spec): channels-last for a dense channels-last x, else
    row-major."""
    of = spec(x)
    return of.order if of.contiguous and of.order == channels_last(of.ndim) else None


def image(x: Any) -> Any:
    """A sequence as an image of one row, a view; images and volumes as they are."""
    return x[:, :, None] if x.ndim == 3 else x
