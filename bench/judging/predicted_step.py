"""What a training step of a patched model should take on an H200, in bfloat16 autocast and channels_last: no GPU is asked.

    python -m gpulayers.bench.judging.predicted_step [ResNet-50 ConvNeXt-T U-Net]

Convolutions as ``predicted.py`` has them; all else takes as long as the bytes that it moves or its products, and a launch's
start. ``SHARE`` and ``PRODUCT`` are what the families' kernels are held to, not measured. To be held against the next run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import NamedTuple

from gpulayers.bench.judging.predicted import COPY, PRODUCTS, SHARE, predicted
from gpulayers.bench.judging.step import Call, Part, parts, torchs
from gpulayers.bench.models.zoo import kinds
from gpulayers.kernels.triton import _conv_tiles_weight

from gpulayers._table import table

PRODUCT = 0.85
"""Of the rate of a large matrix product."""
LAUNCH = 2e-6
"""Seconds from one kernel's end to the next's first bytes."""
VECTOR = 30e12
"""Flops a second of what no tensor core multiplies: depthwise kernels."""
ATTENTION = 350e12
MEASURED = {"ResNet-50": "torch 29.5–32.2 ms, torch.compile 29.4 ms; the goal is 0.7 times that, 20.6 ms"}
"""Of steps there, by others."""
ASKED = ("ResNet-50", "ConvNeXt-T", "U-Net")


class Line(NamedTuple):
    kind: str
    launches: int
    gigabytes: float
    teraflops: float
    ms: float


def seconds(part: Part) -> float:
    """What a part should take; launches that follow each other do not overlap."""
    if (
        part.call is not None
        and part.kind.startswith("conv")
        and (found := _by_tiles(part.call, part.kind)) is not None
    ):
        return found
    rate = PRODUCT * PRODUCTS
    for word, other in (("depthwise", VECTOR), ("attention", ATTENTION)):
        rate = other if word in part.kind else rate
    return max(part.flops / rate, part.nbytes / (SHARE * COPY)) + part.launches * LAUNCH


def _by_tiles(call: Call, kind: str) -> float | None:
    """None where the kernels on tiles do not serve it."""
    (n, c, h, w), (_, o, oh, ow), layer = call.x, call.y, call.layer
    k, stride = layer.kernel_size[0], layer.stride[0]  # type: ignore[index]
    square = h == w and (oh, ow) == (h // stride, w // stride)
    if not square or o < 32 or o % 8 or (c >= 16 and (c < 32 or c % 8)) or stride > 2:
        return None
    pixels = (n * oh * ow, 1, 1) if k == stride == 1 else (n, oh, ow)
    if all(_conv_tiles_weight.whole_box(count, *pixels) is None for count in (64, 32, 16)):
        return None
    found = predicted(c, h, o, k, stride, n)
    seconds = {"forward": found.forward, "dx": found.dx, "dweight": found.dweight}[kind.rpartition(" ")[2]]
    if seconds is not None and call.joined and kind.endswith("dx"):
        seconds += 2 * math.prod(call.x) / (SHARE * COPY)  # read where dx is written
    return seconds


def lines(name: str) -> list[Line]:
    """By kind of layer, in the order of the first of each; what they have in all comes last."""
    kind = kinds("full", [name])[name]
    found: dict[str, Line] = {}
    for part in [*parts(kind, half=True), *torchs(kind)]:
        before = found.get(part.kind, Line(part.kind, 0, 0.0, 0.0, 0.0))
        more = part.launches, part.nbytes / 1e9, part.flops / 1e12, seconds(part) * 1e3
        found[part.kind] = Line(part.kind, *(a + b for a, b in zip(before[1:], more)))  # type: ignore[arg-type]
    return [*found.values(), Line("a step", *map(sum, list(zip(*found.values()))[1:]))]  # type: ignore[arg-type]


def shown(name: str) -> str:
    """A model's table, and what others take."""
    head = (name, "launches", "GB", "TFLOP", "ms", "ms at the limit")
    rows = [(*x[:2], *(f"{n:.2f}" for n in (*x[2:], _limit(x)))) for x in lines(name)]
    return table(head, rows) + (f"\nmeasured there: {MEASURED[name]}" if name in MEASURED else "")


def _limit(line: Line) -> float:
    """ms that the bytes or the flops take at the measured rates."""
    return max(line.gigabytes * 1e9 / COPY, line.teraflops * 1e12 / PRODUCTS) * 1e3


def main(names: Iterable[str]) -> None:
    print("\n\n".join(map(shown, names)))


if __name__ == "__main__":
    main(sys.argv[1:] or ASKED)
