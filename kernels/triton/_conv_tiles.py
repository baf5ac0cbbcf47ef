"""Convolution on tiles of pixels that the tensor memory accelerator (TMA) loads: 16-bit NHWC, on sm_90 and newer.

Under a filter's tap the whole image is read shifted. So a tile of NB images × HB rows × WB columns × BK channels under a
tap is one box of a 4-D descriptor: one instruction, no addresses, no masks, and the zeros that it delivers from outside
the array are the padding. The product is transposed, acc(channels, pixels) += w(channels, BK) · xᵀ(BK, pixels), so that
both operands stay in shared memory. Programs walk many tiles, so that one tile's store overlaps the next one's loads.

- With a stride, pixels that are neighbours in a box are neighbours in one of the views x[:, i::S, j::S]; a tap picks the
  view. Picking a descriptor is picking an address; a branch around the loads would end their pipelining.
- Of a volume, frames are images, and a box lies in one of them: a plane of the kernel is another frame, or none.
- dx with stride 1 is the same sum with the shift's sign turned and w transposed; with a stride, one for each view of dx.
- The first operand of a product is read from shared memory only if no reshape stands between load and product. So w is
  a matrix (O, taps · C) to its descriptor; a third axis is there only where blocks of channels overhang.
- A loop that may be empty makes ptxas run the products one after another: ``tl.assume`` says where it isn't.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._budget import Budget
from . import _configs, _tile
from ._configs import Tile
from ._conv import Walk
from ._conv_product import remainder
from ._epilogue import Epilogue, in_boxes, put_box, tile_for
from ._image import in_line
from ._tracing import thread

BUDGETS = {"_conv_tiles_kernel": Budget(registers=224, blocks=1)}


@triton.jit
def _picked(v0, v1, v2, v3, i):
    """The i-th of four descriptors."""
    view = v0
    if i == 1:
        view = v1
    if i == 2:
        view = v2
    if i == 3:
        view = v3
    return view


@triton.jit
def under_tap(
    x, v1, v2, v3, n, h, w, down, right, c, SH: tl.constexpr, SW: tl.constexpr, PIXELS: tl.constexpr, BK: tl.constexpr
):
    """(PIXELS, BK): channels c … of the pixels (n, SH · h + down, SW · w + right) … of an image in SH · SW views.

    down, right: not negative where there are views, since ``//`` and ``%`` floor in the interpreter alone. No views: x is
    (images, rows, rows of a patch, columns, channels of a row of a patch).
    """
    if SH * SW == 0:
        box = x.load([n, h, down, w, c])
    elif SH * SW == 1:
        box = x.load([n, h + down, w + right, c])
    else:
        view = _picked(x, v1, v2, v3, down % SH * SW + right % SW)
        box = view.load([n, h + down // SH, w + right // SW, c])
    return box.reshape(PIXELS, BK)


@triton.jit
def frame_under(n, s, DY, DX, SD, D0, DD, TURNED: tl.constexpr):
    """The frame of x under the s-th of a kernel's planes for frame n of y, both counted over all images; −1 outside."""
    z = n % DY
    if TURNED:
        back = z + D0 - s * DD
        there = (back >= 0) & (back % SD == 0) & (back // SD < DX)
        return tl.where(there, n // DY * DX + back // SD, -1)
    else:
        ahead = z * SD + D0 + s * DD
        return tl.where((ahead >= 0) & (ahead < DX), n // DY * DX + ahead, -1)


@triton.jit
def _merge(value, n, i, j, N, H, W, count, mean, squares, EXACT: tl.constexpr, HB: tl.constexpr, WB: tl.constexpr):
    """Chan's merge of a tile's columns, the pixels that exist, into (count, mean, Σ (value − mean)²) of each row."""
    here = value.shape[1] * 1.0
    if not EXACT:
        m = tl.arange(0, value.shape[1])
        real = (n + m // (HB * WB) < N) & (i + m // WB % HB < H) & (j + m % WB < W)
        here = tl.sum(real.to(tl.float32))
        value = tl.where(real[None, :], value, 0.0)
    centre = tl.sum(value, 1) / here
    off = value - centre[:, None]
    if not EXACT:
        off = tl.where(real[None, :], off, 0.0)
    delta = centre - mean
    share = here / (count + here)
    return count + here, mean + delta * share, squares + tl.sum(off * off, 1) + delta * delta * count * share


@triton.jit
def _conv_tiles_kernel(
    x, w, bias, scale, residual, kept, y, v1, v2, v3, counts, means, squares,
    N, H, W, C, O, KH, KW, H0, W0, UP, LEFT, DH, DW, DIL_H, DIL_W, GCD_H, GCD_W, INV_H, INV_W, DY, DX, KD, SD, D0, DD,
    DEEP: tl.constexpr, TURNED: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr, IN_H: tl.constexpr, IN_W: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr,
    PARTS: tl.constexpr, NB: tl.constexpr, HB: tl.constexpr, WB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[n, i, j, o] = Σ_{tap, c} x[n, IN · (i + (H0, W0)) + (UP, LEFT) + tap · D, c] · weight[o, tap, c], and its epilogue.

    x, w, residual, kept (y before f), y, v1 … v3: descriptors; the views are x's where it is read in steps of IN, y's where
    it is written in steps of OUT (dx of a strided convolution; H0 and W0 are then its padding); 0: in patches, as
    ``under_tap`` says. N, H, W: y's images and pixels. C, O: channels in a group of x and y. DEEP: images are frames, DY and
    DX (of y and x) one after the other, under the KD planes of a kernel, and a box lies in one frame. TURNED: w is (C,
    taps · O), not (O, taps · C). WIDE: w is (O, taps, C). EXACT: no box overhangs.
    counts, means, squares: where given, (programs / tiles of channels, O) float32, the moments of what a program wrote;
    the grid is then a multiple of the tiles of channels, so that each program keeps its own.
    """
    BM: tl.constexpr = NB * HB * WB
    group = tl.program_id(1)
    taps_h = KH
    taps_w = KW
    first_r = 0
    first_q = 0
    if OUT_H * OUT_W > 1:  # a grid's axis: an inner loop whose length changes would not be flattened into the outer one
        ph = tl.program_id(2) // OUT_W
        pw = tl.program_id(2) % OUT_W
        H, first_r, taps_h, H0 = remainder(H, ph, KH, H0, OUT_H, DIL_H, GCD_H, INV_H)
        W, first_q, taps_w, W0 = remainder(W, pw, KW, W0, OUT_W, DIL_W, GCD_W, INV_W)
        y = _picked(y, v1, v2, v3, tl.program_id(2))
    if OUT_H == 0:
        first_r = tl.program_id(2)
    blocks = tl.cdiv(C, BK)
    plane = taps_h * taps_w
    steps = KD * plane * blocks if DEEP else plane * blocks
    width = tl.maximum(taps_w, 1)  # divided by before it is asked whether there are any steps
    plane = tl.maximum(plane, 1)
    tiles_o = tl.cdiv(O, BN)
    tiles_h = tl.cdiv(H, HB)
    tiles_w = tl.cdiv(W, WB)
    tiles = tl.cdiv(N, NB) * tiles_h * tiles_w * tiles_o
    count = 0.0
    mean = tl.zeros((BN,), tl.float32)
    spread = tl.zeros((BN,), tl.float32)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        o = tile % tiles_o * BN
        pixels = tile // tiles_o
        n = pixels // tiles_w // tiles_h * NB
        i = pixels // tiles_w % tiles_h * HB
        j = pixels % tiles_w * WB
        if OUT_H * OUT_W <= 1:
            tl.assume(steps > 0)
        acc = tl.zeros((BN, BM), tl.float32)
        for k in range(steps):
            tap = k // blocks
            c = k % blocks * BK
            frame = n
            t = 0
            if DEEP:
                frame = frame_under(n, tap // plane, DY, DX, SD, D0, DD, TURNED)
                t = tap // plane * KH * KW
                tap = tap % plane
            r = tap // width
            q = tap % width
            px = under_tap(
                x, v1, v2, v3, frame, i + H0, j + W0, UP + r * DH, LEFT + q * DW, group * C + c, IN_H, IN_W, BM, BK
            )
            t += (first_r + r * (OUT_H // GCD_H)) * KW + first_q + q * (OUT_W // GCD_W)
            if TURNED:
                wt = w.load([group * C + c, t * O + o]).T
            elif WIDE:
                wt = w.load([o, t, c]).reshape(BN, BK)
            else:
                wt = w.load([group * O + o, t * C + c])
            acc = tl.dot(wt, px.T, acc)
        if scale is not None:
            at = o + tl.arange(0, BN)
            acc *= tl.load(scale + group * O + at, at < O, other=0.0).to(tl.float32)[:, None]
        if bias is not None:
            at = o + tl.arange(0, BN)
            acc += tl.load(bias + group * O + at, at < O, other=0.0).to(tl.float32)[:, None]
        if OUT_H == 0:
            out = acc.to(y.dtype)
            y.store([n, i, first_r, j, group * O + o], out.T.reshape(NB, HB, 1, WB, BN))
        else:
            out = put_box(
                acc, residual, kept, y, n, i, j, group * O + o, PARTS, NB, HB, WB, ACTIVATION, NUMBER_A, NUMBER_B
            )  # fmt: skip
        if counts is not None:  # of the rounded values, which a normalisation reads
            count, mean, spread = _merge(out.to(tl.float32), n, i, j, N, H, W, count, mean, spread, EXACT, HB, WB)
    if counts is not None:
        channel = tl.program_id(0) % tiles_o * BN + tl.arange(0, BN)
        at = tl.program_id(0) // tiles_o * O + channel
        tl.store(counts + at, tl.zeros((BN,), tl.float32) + count, channel < O)
        tl.store(means + at, mean, channel < O)
        tl.store(squares + at, spread, channel < O)


# --- choices ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def box(pixels: int, n: int, h: int, w: int) -> tuple[int, int, int]:
    """(images, rows, columns) of a tile: of the boxes with so many pixels that hang over least the one with fewest images."""
    sides = [1 << i for i in range(pixels.bit_length())]
    boxes = [(pixels // (a * b), a, b) for a in sides for b in sides if a * b <= pixels]
    return min(boxes, key=lambda s: (boxes_of(s, n, h, w), s[0], abs(s[1] - s[2])))


def boxes_of(box: Sequence[int], *sizes: int) -> int:
    return math.prod(map(_tile.cdiv, sizes, box))


def fitted(tile: Tile, c: int, exact: bool) -> Tile | None:
    """The tile with a BK for so many channels in a group: with ``exact`` one that divides them, if any does."""
    blocks = [b for b in (64, 32, 16) if b <= tile.BK and (c % b == 0 if exact else 4 * c >= 3 * _tile.cdiv(c, b) * b)]
    return tile._replace(BK=blocks[0]) if blocks else None if exact else tile._replace(BK=16)


def _choose(
    entries: Sequence[Tile], device: _tile.Device, n: int, h: int, w: int, c: int, o: int, others: int, grouped: bool
) -> tuple[int, Tile] | None:
    """The tile that ends first: by its rounds of the GPU, or by what its boxes load from L2, whichever takes longer.

    others: products of pixels (n, h, w) and channels (c, o) beside this one; grouped: no block of theirs may overhang.
    """
    best, least = None, math.inf
    for i, entry in enumerate(entries):
        tile = fitted(entry, c, grouped)
        if tile is None or 2 * max(o, 64) <= tile.BN or (grouped and o % tile.BN):
            continue
        shared = tile.shared(2) + tile.BM * tile.BN * 2
        if shared > device.shared - 2048:
            continue
        tiles = boxes_of(box(tile.BM, n, h, w), n, h, w) * _tile.cdiv(o, tile.BN) * others
        cost = cost_of(tile, tiles, resident(device, shared, tile.warps))
        if cost < least:
            best, least = (i, tile), cost
    return best


def cost_of(tile: Tile, tiles: int, held: int) -> int:
    """Products that fit into the time that so many tiles take, of which a GPU holds ``held`` at once."""
    return max(_tile.cdiv(tiles, held) * held * tile.BM * tile.BN, PRODUCTS_A_LOAD * tiles * (tile.BM + tile.BN))


PRODUCTS_A_LOAD = 80
"""Products that an H200's tensor cores add while L2 delivers one of their operands' numbers."""


def resident(device: _tile.Device, shared: int, warps: int) -> int:
    """Programs that a GPU holds at once: two a multiprocessor of one group of warps, where both have shared memory."""
    return device.sms * (2 if warps <= 4 and 2 * (shared + 1024) <= device.shared + 1024 else 1)


HALF = _configs.tiles("conv_tiles.half", _choose, inner=(64,))


# --- what it serves --------------------------------------------------------------------------------------------------


def machine_refusal(x: Any, y: Any) -> str | None:
    """Why no kernel of descriptors computes y from x, whatever their geometry."""
    if _tile.device(x).arch < 90:
        return "tensor memory accelerators came with sm_90"
    if thread.compiler is not None:
        return "a compiler that traces has no descriptors of views"
    if x.element_size() != 2:
        return "operands of 32 bits"
    if 0 in x.shape or 0 in y.shape:
        return "nothing to compute"
    return None


def refusal(x: Any, taps: Any, y: Any, walk: Walk, turned: bool = False) -> str | None:
    """Why y = conv(x, taps), or ``turned`` the gradient y of an image from x, takes the kernels of pointers; None if it
    does not. All of three spatial axes; taps: (O, C / groups, *kernel), channels last."""
    stride, _, dilation, groups = walk
    of_groups = x.shape[1] // groups, y.shape[1] // groups
    if reason := machine_refusal(x, y):
        return reason
    if any(c % 8 for c in of_groups):
        return "channels that are no multiple of 8: a descriptor steps in 16 bytes"
    if min(of_groups) < FEW:
        return f"fewer than {FEW} channels in a group: most of a tile would be empty"
    if groups > 1 and any(c % 64 for c in of_groups):
        return "groups whose channels are no multiple of 64: a block would reach into the next group"
    if any(n < s for n, s in zip((y if turned else x).shape[3:], stride[1:])):
        return "an image smaller than its stride"
    views = [s if turned or (k > 1 and d % s) else 1 for k, s, d in zip(taps.shape[3:], stride[1:], dilation[1:])]
    if math.prod(views) > VIEWS:
        return f"more than {VIEWS} views of an image in steps of its stride"
    if not (in_rows(x) and in_rows(y) and _tile.begins_aligned(taps)):
        return "channels that are not neighbours in memory, or do not begin at multiples of 16 bytes"
    return None


FEW = 16
"""Channels in a group that a tile wants at least."""
VIEWS = 4
"""Descriptors that the kernel picks from, at most."""


def is_deep(kernel: Sequence[int], walk: Walk) -> bool:
    """Whether frames of an image meet; else each is an image."""
    return kernel[0] > 1 or walk.stride[0] > 1 or walk.before[0] > 0


def depth_of(x: Any, y: Any, kernel: Sequence[int], walk: Walk) -> tuple | None:
    """DY … DD of a kernel whose frames meet, from x to y."""
    if not is_deep(kernel, walk):
        return None
    return y.shape[2], x.shape[2], kernel[0], walk.stride[0], -walk.before[0], walk.dilation[0]


def rows_of(x: Any) -> Any:
    """(N · D, H, W, C); where that is dense, with the strides of axes of one element as if they had more."""
    rows = x.permute(0, 2, 3, 4, 1)
    return rows.reshape(-1).view(-1, *rows.shape[2:]) if rows.is_contiguous() else rows.flatten(0, 1)


def in_rows(x: Any) -> bool:
    """Whether descriptors can describe ``x`` (N, C, D, H, W): channels neighbouring, pixels at multiples of 16 bytes."""
    if x.shape[2] > 1 and not x.permute(0, 2, 3, 4, 1).is_contiguous():
        return False
    *steps, last = rows_of(x).stride()
    return last == 1 and all(s > 0 and s % 8 == 0 for s in steps) and _tile.begins_aligned(x)


# --- launches --------------------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """How output pixels walk an image's rows or columns: i reads pixel steps · (i + start) + first + tap · dilation."""

    start: int
    first: int
    dilation: int
    steps: int

    @classmethod
    def of(cls, taps: int, stride: int, pad: int, dilation: int) -> Axis:
        """In floor(−pad / stride) and what is left, so that no place within the steps is negative."""
        start, first = divmod(-pad, stride)
        return cls(start, first, dilation if taps > 1 else 0, stride)

    @property
    def views(self) -> int:
        """How many of the views of every steps-th pixel the taps read."""
        return 1 if self.dilation % self.steps == 0 else self.steps

    @property
    def picks(self) -> range:
        """The pixels that those views begin at."""
        return range(self.steps) if self.views > 1 else range(self.first, self.first + 1)

    @property
    def offset(self) -> int:
        """Of the first tap, in pixels of all views; where one view is read, in its own."""
        return self.first if self.views > 1 else 0

    @property
    def jump(self) -> int:
        """From tap to tap, likewise."""
        return self.dilation if self.views > 1 else self.dilation // self.steps


def moments_refusal(x: Any, groups: int) -> str | None:
    """Why ``forward`` leaves the moments of y to a pass of their own; None if it takes them along."""
    if _tile.device(x).arch >= 100:
        return "sm_100's compiler fails on sums over a product that stands in tensor memory"
    return "programs of several groups" if groups > 1 else None


def forward(x: Any, taps: Any, end: Epilogue, y: Any, walk: Walk, plain: bool, moments: Any = None) -> list[Any]:
    """y of a convolution for which nothing is refused. plain: one tap takes every pixel as it is.

    moments: the ``empty`` that gives memory for [counts, means, Σ (y − mean)²], (shares, O) in float32, of each channel of
    y, which batch norm merges (``_batch_norm.py``); returned where nothing refuses them, else, and for None, [].
    """
    (o, c, kd, kh, kw), source, target, groups = taps.shape, rows_of(x), rows_of(y), walk.groups
    if plain:
        source, target = as_images(source, target)
    walks = [Axis.of(*along) for along in list(zip(taps.shape[2:], *walk[:3]))[1:]]
    weights = taps.permute(0, 2, 3, 4, 1).reshape(o, kd * kh * kw, c)
    return summed(source, weights, end, target, walks, (kh, kw), groups, moments, depth_of(x, y, taps.shape[2:], walk))


def summed(
    source: Any, weights: Any, end: Epilogue, target: Any, walks: Sequence[Axis], kernel: tuple[int, int], groups: int,
    moments: Any = None, depth: tuple | None = None,
) -> list[Any]:  # fmt: skip
    """target = the sum that ``_conv_tiles_kernel`` states. source, target: (N, H, W, C). weights: (O, taps, C / groups),
    dense; in ``source`` there may be fewer channels, which read as zero. moments: as in ``forward``. depth: DY … DD of a deep kernel."""
    (o, taps, c), (n, h, w, _) = weights.shape, target.shape
    frames, n = (n, 1) if depth else (1, n)
    tile = tile_for(end, HALF(_tile.device(source), n, h, w, c, o // groups, groups * frames, groups > 1))
    moments = None if moments_refusal(source, groups) else moments
    if moments and tile.BM > 128:  # sums over more pixels spill
        tile = tile._replace(BM=128, warps=4)
    pixels = box(tile.BM, n, h, w)
    part, ends, constants = in_boxes(end, tile, pixels, target)
    views = views_of(source, [a.picks for a in walks], [a.steps for a in walks], (*pixels, tile.BK))
    wide = c % tile.BK != 0
    block = (tile.BN, 1, tile.BK) if wide else (tile.BN, tile.BK)
    geometry = (*(a.start for a in walks), *(a.offset for a in walks), *(a.jump for a in walks), 1, 1, 1, 1, 0, 0)
    return launch(
        tile, pixels, groups, 1, views[0], _tile.described(weights if wide else weights.view(o, taps * c), block),
        ends, _tile.described(target, part), views[1:],
        (n * frames, h, w, c, o // groups, *kernel), geometry, moments, depth, **constants,
        TURNED=False, WIDE=wide, IN_H=walks[0].views, IN_W=walks[1].views, OUT_H=1, OUT_W=1,
    )  # fmt: skip


def input_gradient(dy: Any, taps: Any, end: Epilogue, dx: Any, walk: Walk, plain: bool) -> None:
    """dx of a convolution for which nothing is refused, and its epilogue."""
    (o, c, kd, kh, kw), source, target, groups = taps.shape, rows_of(dy), rows_of(dx), walk.groups
    depth = None
    if is_deep(taps.shape[2:], walk):
        depth = dx.shape[2], dy.shape[2], kd, walk.stride[0], walk.before[0], walk.dilation[0]
    stride, before, dilation = (of[1:] for of in walk[:3])
    if plain:
        source, target = as_images(source, target)
    (n, h, w, _), phases = target.shape, math.prod(stride)
    frames = n if depth else 1
    each = (n // frames, _tile.cdiv(h, stride[0]), _tile.cdiv(w, stride[1]))
    tile = tile_for(end, HALF(_tile.device(dy), *each, o // groups, c, groups * phases * frames, groups > 1))
    pixels = box(tile.BM, *each)
    common = tuple(map(math.gcd, stride, dilation))
    inverse = (pow(d // g, -1, s // g) if s > g else 0 for d, s, g in zip(dilation, stride, common))
    part, ends, constants = in_boxes(end, tile, pixels, target)
    views = views_of(target, list(map(range, stride)), stride, part)
    back = (-d // g for d, g in zip(dilation, common))
    geometry = (*before, 0, 0, *back, *dilation, *common, *inverse)
    weights = _tile.described(taps.permute(0, 2, 3, 4, 1).reshape(o, kd * kh * kw * c), (tile.BK, tile.BN))
    launch(
        tile, pixels, groups, phases, _tile.described(source, (*pixels, tile.BK)), weights, ends, views[0], views[1:],
        (n, h, w, o // groups, c, kh, kw), geometry, None, depth, **constants,
        TURNED=True, WIDE=False, IN_H=1, IN_W=1, OUT_H=stride[0], OUT_W=stride[1],
    )  # fmt: skip


def as_images(*rows: Any) -> tuple[Any, ...]:
    """For a matrix product, each pixel an image, so that any tile fits; as they are where that is no view."""
    viewed = all(in_line(a.shape[:3], a.stride()[:3]) and math.prod(a.shape[:3]) < 2**31 for a in rows)
    return tuple(a.view(-1, 1, 1, a.shape[3]) for a in rows) if viewed else rows


def views_of(rows: Any, picks: Sequence[range], steps: Sequence[int], block: Sequence[int]) -> list[Any]:
    """Descriptors of the views that begin at these rows and columns: four, with Nones after one and the first after more,
    since a kernel picks among descriptors alone. Of patches, one."""
    if rows.ndim == 5:
        return [_tile.described(rows, (*block[:2], 1, *block[2:])), *[None] * (VIEWS - 1)]
    found = [_tile.described(rows[:, i :: steps[0], j :: steps[1]], block) for i in picks[0] for j in picks[1]]
    return [*found, *[found[0] if len(found) > 1 else None] * (VIEWS - len(found))]


def launch(
    tile: Tile, pixels: tuple, groups: int, phases: int, x: Any, w: Any, ends: tuple, y: Any, views: Sequence[Any],
    sizes: tuple, geometry: tuple, moments: Any, depth: tuple | None, **constants: Any,
) -> list[Any]:  # fmt: skip
    n, h, w_, _, o, *_ = sizes
    each = (n, *(_tile.cdiv(size, constants[step] or 1) for size, step in ((h, "OUT_H"), (w_, "OUT_W"))))
    wide = _tile.cdiv(o, tile.BN)
    room = resident(_tile.device(y.base), tile.shared(2) + tile.BM * tile.BN * 2, tile.warps) // (groups * phases)
    rounds = boxes_of(pixels, *each)
    if moments:
        rows = min(rounds, max(1, room // wide))
        programs, found = rows * wide, [moments((rows, o), "float32") for _ in range(3)]
    else:
        programs, found = min(rounds * wide, max(1, room)), []
    _tile.launch(
        _conv_tiles_kernel, (programs, groups, phases), x, w, *ends, y, *views, *(found or [None] * 3), *sizes,
        *geometry, *(depth or [1] * 6), **constants, DEEP=depth is not None,
        EXACT=moments is None or not any(a % b for a, b in zip(each, pixels)),
        NB=pixels[0], HB=pixels[1], WB=pixels[2], BN=tile.BN, BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return found
