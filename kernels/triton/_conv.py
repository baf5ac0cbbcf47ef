"""What convolution's kernels share: how a kernel walks over pixels, tiles for a product, where a tap is never outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from . import _configs, _tile
from ._configs import Tile

FEW_CHANNELS = 16
"""With fewer channels than this in a group, taps and channels make one inner axis (a tile would be mostly empty)."""


class Walk(NamedTuple):
    """A convolution's options, for three spatial axes."""

    stride: tuple[int, int, int]
    before: tuple[int, int, int]
    """Zeros before x."""
    dilation: tuple[int, int, int]
    groups: int


def walk_of(stride: tuple, padding: tuple, dilation: tuple, groups: int) -> Walk:
    """From options in their normal form, of one to three axes."""
    more = 3 - len(stride)
    before = tuple([before for before, _ in padding])
    return Walk((*(1,) * more, *stride), (*(0,) * more, *before), (*(1,) * more, *dilation), groups)  # type: ignore[arg-type]


def volume(x: Any) -> Any:
    """``x`` (N, C, *sizes) with three spatial axes: a view."""
    while x.ndim < 5:
        x = x.unsqueeze(2)
    return x


def narrow_accesses(c: dict[str, Any]) -> str:
    """Taps and few channels in one run begin anywhere, as pixels do where the output's rows lie along the width; TF32 is
    multiplied with K neighbouring, so what lies along the other axis is read number by number."""
    loads = c["FLAT"] or c["PRECISION"] == "tf32"
    stores = c["FLAT"] or c.get("y_w") == 1
    return ("loads " if loads else "") + ("stores" if stores else "")


def channels_first(y: Any) -> bool:
    """Whether pixels, not channels, are neighbours in memory."""
    return y.shape[1] > 1 and y.stride(1) != 1


def unit_of(x: Any, channels: int) -> int:
    """What divides the places in x where a run of neighbours begins: pixels of a channel, or of a pixel so many channels."""
    first = channels_first(x)
    along = x.ndim - 1 if first else 1
    each = enumerate(zip(x.shape, x.stride()))
    steps = [step for axis, (size, step) in each if size > 1 and not (axis == along and step == 1)]
    return _tile.unit_of(*steps) if first else _tile.unit_of(channels, *steps)


def bounded(out: tuple, size: tuple, kernel: tuple, stride: tuple, start: tuple, dilation: tuple) -> bool:
    """Whether every pixel under a tap exists."""
    return all(
        b + min(0, d * (k - 1)) >= 0 and b + s * (o - 1) + max(0, d * (k - 1)) < n
        for o, n, k, s, b, d in zip(out, size, kernel, stride, start, dilation)
    )


# --- configurations --------------------------------------------------------------------------------------------------


LEAST_SUMS = 8
"""Sums that a thread holds at least: a narrow tile shared by more warps spilled, with addresses beside so few sums."""


def _choose(
    entries: Sequence[Tile], device: _tile.Device, m: int, n: int, k: int, others: int, flat: bool, itemsize: int
) -> tuple[int, Tile] | None:
    """The first tile that still gives every multiprocessor a program, for ``others`` products of (m, k) · (k, n)."""
    narrow = max(16, _tile.next_power_of_2(n))
    fitting = []
    for i, t in enumerate(entries):
        t = t._replace(BN=min(t.BN, narrow), BK=_inner_block(k, min(t.BK, 32) if flat else t.BK))
        t = t._replace(warps=min(t.warps, t.BM * t.BN // (32 * LEAST_SUMS)))
        if t.shared(itemsize) <= device.shared:
            if _tile.cdiv(m, t.BM) * _tile.cdiv(n, t.BN) * others >= device.sms:
                return i, t
            fitting.append((i, t))
    return fitting[-1] if fitting else None


def _fit_weight(
    entries: Sequence[Tile], device: _tile.Device, o: int, columns: int, itemsize: int
) -> tuple[int, Tile] | None:
    """For dweight: splitting the pixels makes programs enough, so only the result (o, columns) limits the tile."""
    rows, width = max(16, _tile.next_power_of_2(o)), max(16, _tile.next_power_of_2(columns))
    fitting = [(i, t._replace(BM=min(t.BM, rows), BN=min(t.BN, width))) for i, t in enumerate(entries)]
    fitting = [(i, t) for i, t in fitting if t.shared(itemsize) <= device.shared]
    filled = (f for f in fitting if o > entries[f[0]].BM // 2 and columns > entries[f[0]].BN // 2)
    return next(filled, fitting[-1] if fitting else None)


# No 128 × 256 in sm_80's table: sums in registers, as before Hopper, spill beside the addresses of such a tile.
HALF = _configs.tiles("conv.half", _choose, inner=(32, 64))
TF32 = _configs.tiles("conv.tf32", _choose, inner=(16, 32))
SINGLE = _configs.tiles("conv.single", _choose, inner=(16, 32))
WEIGHT_HALF = _configs.tiles("conv_weight.half", _fit_weight, inner=(32, 64))
WEIGHT_FLAT = _configs.tiles("conv_weight.half_flat", _fit_weight, inner=(32, 64))
WEIGHT_TF32 = _configs.tiles("conv_weight.tf32", _fit_weight, inner=(16, 32))
WEIGHT_SINGLE = _configs.tiles("conv_weight.single", _fit_weight, inner=(16, 32))


def tile_for(x: Any, m: int, n: int, k: int, others: int, flat: bool) -> Tile:
    choice = HALF if x.element_size() == 2 else TF32 if precision(x) == "tf32" else SINGLE
    return choice(_tile.device(x), m, n, k, others, flat, x.element_size())


def weight_tile(x: Any, o: int, columns: int, flat: bool) -> Tile:
    if x.element_size() == 2:
        choice = WEIGHT_FLAT if flat else WEIGHT_HALF
    else:
        choice = WEIGHT_TF32 if precision(x) == "tf32" else WEIGHT_SINGLE
    return choice(_tile.device(x), o, columns, x.element_size())


def _inner_block(k: int, most: int) -> int:
    """The longest block that leaves at most a quarter of the last one empty; 16 if none does."""
    blocks = [b for b in (64, 32, 16) if b <= most]
    return next((b for b in blocks if 4 * k >= 3 * _tile.cdiv(k, b) * b), blocks[-1])


def precision(x: Any) -> str:
    """TF32 only where torch allows it for convolutions and for matrix products."""
    return "tf32" if x.element_size() == 4 and _tile.tf32("cudnn.conv", "cuda.matmul") else "ieee"
