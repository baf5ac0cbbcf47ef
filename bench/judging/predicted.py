"""What networks' convolutions should take on an H200, reckoned from flops, bytes and rounds of tiles: no GPU is asked.

    python -m gpulayers.bench.judging.predicted

A kernel takes as long as the slowest of three: its products (rounds of the GPU's tiles), the bytes that its tiles load from L2,
and the bytes that memory must move. ``COPY`` and ``PRODUCTS`` were measured on an H200; ``L2`` and ``START`` are such that four
times measured there with an earlier text of the forward kernel come out (``MEASURED``). To be held against the next run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from gpulayers.bench.cases.case import every_case
from gpulayers.kernels.triton import _conv_first, _conv_tiles, _conv_tiles_weight, _tables, _tile

H200 = _tile.Device(90, 132, 232448)
COPY, PRODUCTS, L2, START = 4.2e12, 740e12, 9.3e12, 5e-6
"""Bytes of memory, flops in bfloat16 and bytes of L2 a second; seconds until the first tile, and after the last."""
CLOCK = 1.755e9
"""Cycles a second."""
SHARE = 0.85
"""Of the copy's bandwidth, which kernels bound by memory are held to. Not measured."""
L1, SECTOR = H200.sms * 128 * CLOCK, 32
"""Bytes of L1 a second, by its width and the clock; bytes that it hands over at least. Not measured."""
STORE = 2e-6
"""Seconds that the store of a 256 × 128 tile stands in the way of a multiprocessor that holds one program."""
BATCH = 128
MEASURED = {(64, 56): 74.6e-6, (128, 28): 50.1e-6, (256, 14): 49.7e-6, (512, 7): 56.4e-6}
"""Forward, 3×3, as many channels out as in: (channels, size) -> seconds."""
CUDNN = {(64, 56): (74.0, 85.0), (128, 28): (48.8, 58.5), (256, 14): (45.9, 62.1), (512, 7): (52.8, 54.9)}
"""Forward and dweight of the same layers by cuDNN, in µs."""


class Times(NamedTuple):
    forward: float
    dx: float | None
    """None: nobody wants the image's."""
    dweight: float | None
    """None: not reckoned."""


def _product(n: int, h: int, w: int, c: int, o: int, taps: int, phases: int, moved: float) -> float:
    """Forward, or dx in so many phases of (n, h, w) pixels and ``taps`` taps in all; c, o: channels read and made."""
    tile = _conv_tiles.HALF(H200, n, h, w, c, o, phases, False)
    boxes = math.prod(map(_tile.cdiv, (n, h, w), _conv_tiles.box(tile.BM, n, h, w))) * _tile.cdiv(o, tile.BN)
    inner = _tile.cdiv(c, tile.BK) * tile.BK * taps / phases
    return of_tiles(tile, boxes * phases, inner, moved)


def of_tiles(tile: _tables.Tile, tiles: int, inner: float, moved: float) -> float:
    """So many tiles of sums over ``inner`` products each."""
    at_once = _conv_tiles.resident(H200, tile.shared(2) + tile.BM * tile.BN * 2, tile.warps) // H200.sms
    rounds = _tile.cdiv(tiles, H200.sms * at_once) * at_once
    store = STORE * tile.BM * tile.BN / 2**15 if at_once == 1 else 0.0
    products = rounds * (2 * tile.BM * tile.BN * inner * H200.sms / PRODUCTS + store)
    loaded = tiles * (tile.BM + tile.BN) * inner * 2
    return max(products, loaded / L2, moved / COPY) + START


def _first(n: int, pixels: int, c: int, o: int, moved: float) -> float:
    """A product with pixels last in memory."""
    step = _conv_first.step_of(pixels)
    tile = _conv_first.HALF(H200, n, pixels, c // step, o)
    tiles = n * _tile.cdiv(pixels, tile.BN) * _tile.cdiv(o, tile.BM)
    return of_tiles(tile, tiles, step * _tile.cdiv(c // step, tile.BK) * tile.BK, moved)


def _first_weight(n: int, pixels: int, c: int, o: int, moved: float) -> float:
    step = _conv_first.step_of(pixels)
    tile = _conv_first.WEIGHT_HALF(H200, pixels, o // step, c // step)
    blocks = _tile.cdiv(o // step, tile.BM) * _tile.cdiv(c // step, tile.BN) * step * step
    splits = max(1, H200.sms // blocks)
    inner = _tile.cdiv(n * _tile.cdiv(pixels, tile.BK), splits) * tile.BK
    return of_tiles(tile, blocks * splits, inner, moved) + 2 * 4 * splits * o * c / COPY + START


def first(c: int, size: int, o: int) -> Times:
    """Seconds of a layer of one tap, row-major in bfloat16."""
    pixels = size * size
    moved, copy = 2 * BATCH * pixels * (c + o) + 2 * c * o, 0.0
    if _conv_first.step_of(pixels) > 1:  # of the weight
        copy = 4 * c * o / COPY + START
    forward = _first(BATCH, pixels, c, o, moved) + copy
    return Times(forward, _first(BATCH, pixels, o, c, moved), _first_weight(BATCH, pixels, c, o, moved))


def patches(c: int, size: int, o: int, k: int) -> Times:
    """Seconds of a layer that cuts images into patches, channels-last in bfloat16."""
    out, run = size // k, k * c
    moved = 2 * BATCH * out * out * (k * run + o) + 2 * o * k * run
    forward, dx = (_product(BATCH, out, out, *of, k, phases, moved) for of, phases in (((run, o), 1), ((o, run), k)))
    return Times(forward, dx, _weight(BATCH, out, out, run, o, k, moved))


def runs(c: int, size: int, o: int, k: int) -> float:
    """Seconds of the kernel of pointers, forward, for patches whose rows do not fill 16 bytes."""
    out = size // k
    moved = 2 * BATCH * out * out * (k * k * c + o)
    return max(BATCH * out * out * k * max(SECTOR, 2 * k * c) * _tile.cdiv(o, 128) / L1, moved / COPY) + START


def grouped(width: int, size: int, groups: int) -> float:
    """Seconds of a 3×3 kernel of pointers, forward or dx, of groups of so few channels: each pixel of a group lies in a
    sector of its own, which L1 hands over once for each tap."""
    pixels = BATCH * size * size
    moved = 2 * 2 * pixels * width * groups
    return max(9 * pixels * groups * max(SECTOR, 2 * width) / L1, moved / COPY) + START


def _weight(n: int, h: int, w: int, c: int, o: int, taps: int, moved: float) -> float:
    """dweight of (n, h, w) pixels of dy, and the sum of its shares."""
    tile = _conv_tiles_weight.HALF(H200, n, h, w, c, o, taps, False)
    found = _conv_tiles_weight.whole_box(tile.BK, n, h, w)
    assert found is not None, "a tile that was chosen has a box"
    at_once = _conv_tiles_weight.taps_at_once(tile, taps, H200.arch)
    blocks = _tile.cdiv(o, tile.BM) * _tile.cdiv(c, tile.BN) * _tile.cdiv(taps, at_once)
    steps = blocks * math.prod(map(_tile.cdiv, (n, h, w), found[0]))
    products = _tile.cdiv(steps, H200.sms) * 2 * tile.BM * tile.BN * at_once * tile.BK * H200.sms / PRODUCTS
    loaded = steps * (tile.BM + at_once * tile.BN) * tile.BK * 2
    shares = 2 * 4 * (blocks + H200.sms) * tile.BM * tile.BN * at_once / COPY
    return max(products, loaded / L2, moved / COPY) + shares + 2 * START


def predicted(c: int, size: int, o: int, k: int, stride: int, n: int = BATCH) -> Times:
    """Seconds of a layer on n square images, channels-last in bfloat16."""
    out = _tile.cdiv(size, stride)
    x, y, w = 2 * n * size * size * c, 2 * n * out * out * o, 2 * o * c * k * k
    pixels = (n, out, out) if k > 1 or stride > 1 else (n * out * out, 1, 1)
    spread, taps, run = 0.0, k * k, c
    if c < 16:  # windows: a copy, then a kernel of one column
        padded = 2 * n * size * (size + k) * 4
        spread, taps, run, x = (x + padded) / COPY + START, k, _tile.cdiv(k * 4, 16) * 16, padded
    forward = _product(*pixels, run, o, taps, 1, x + y + w) + spread
    dweight = _weight(*pixels, run, o, taps, x + y) + spread
    if c < 16:
        return Times(forward, None, dweight)
    each = (n, _tile.cdiv(size, stride), _tile.cdiv(size, stride)) if pixels[1] > 1 else pixels
    return Times(forward, _product(*each, o, c, taps, stride * stride, x + y + w), dweight)


def layers() -> list[tuple[int, int, int, int, int]]:
    """(channels, size, channels out, kernel, stride) of ResNet-50's convolutions."""
    found = []
    for _, case in every_case(["conv"]):
        if case.name.startswith("ResNet-50") and case.shapes[0][0] == BATCH:
            (_, c, size, _), (o, _, k, _) = case.shapes[:2]
            found.append((c, size, o, k, case.options["stride"][0]))
    return list(dict.fromkeys(found))


def _line(name: str, times: Times, beside: str = "") -> str:
    shown = " ".join(f"{'–' if t is None else f'{t * 1e6:.1f}':>8s}" for t in times)
    return f"{name:32s} {shown}   {beside}".rstrip()


def table() -> str:
    lines = [f"{'layer, batch 128':32s} {'forward':>8s} {'dx':>8s} {'dweight':>8s}   cuDNN forward, dweight (µs)"]
    for c, size, o, k, stride in layers():
        theirs = CUDNN.get((c, size)) if (c, k, stride) == (o, 3, 1) else None
        beside = "" if theirs is None else f"{theirs[0]:.1f}, {theirs[1]:.1f}"
        lines.append(_line(f"{k}×{k}/{stride} {c}→{o}, {size}²", predicted(c, size, o, k, stride), beside))
    for c, size, o, k, stride in layers():
        if k == stride == 1:
            lines.append(_line(f"{k}×{k}/{stride} {c}→{o}, {size}², row-major", first(c, size, o)))
    for c, size, o, k in ((3, 224, 768, 16), (96, 56, 192, 2), (192, 28, 384, 2), (384, 14, 768, 2)):
        lines.append(_line(f"{k}×{k}/{k} {c}→{o}, {size}², patches", patches(c, size, o, k)))
    lines.append(_line("4×4/4 3→96, 224², runs", Times(runs(3, 224, 96, 4), None, None)))
    for width, size in ((4, 56), (8, 28), (16, 14), (32, 7)):
        seconds = grouped(width, size, 32)
        lines.append(_line(f"3×3/1 32 groups of {width}, {size}²", Times(seconds, seconds, None)))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
