"""What becomes of a sum in the kernel that computed it: y = f(scale · sum + bias + residual); and dz = dy f'(z), once for
all gradients, in one pass with the sums that are dbias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._activation import FROM_Y, numbers_of
from .._budget import Budget, channels_first
from . import _configs, _tile
from ._batch_norm import EXACT, in_order
from ._configs import Tile
from ._conv import volume
from ._image import as_images, channel_sums, evenly_spaced, finish, flattened, image_pixel, pixel_tile, run_of, steps
from .activation import gradient, value

BUDGETS = {
    "_epilogue_gradient_kernel": Budget(
        registers=64, blocks=4, narrow=lambda c: "loads, stores" if {"C", "P"} & c["odd"] else channels_first(c)
    ),
}


class Epilogue(NamedTuple):
    """Of an output (N, O, *sizes). bias, scale: (O,), contiguous. residual, z: dense in the output's memory order."""

    bias: Any = None
    scale: Any = None
    residual: Any = None
    z: Any = None
    """Where the output before f is kept."""
    activation: str | None = None

    @property
    def is_bias(self) -> bool:
        """Whether there is nothing but a bias, if that."""
        return self.is_affine and self.scale is None

    @property
    def is_affine(self) -> bool:
        """Whether nothing follows scale and bias."""
        return self.activation is None and self.residual is None

    @property
    def arrays(self) -> tuple[Any, ...]:
        """In the order of kernels' arguments."""
        return self[:4]

    @property
    def constants(self) -> dict[str, Any]:
        """What a kernel that calls ``finished`` is told. Constants: a kernel without an activation has no such arguments."""
        a, b = numbers_of(self.activation, 2)
        return dict(ACTIVATION=self.activation, NUMBER_A=a, NUMBER_B=b)


def epilogue(
    y: Any, order: tuple[int, ...] | None, needs: tuple, empty: Any,
    bias: Any = None, scale: Any = None, residual: Any = None, activation: str | None = None,
) -> Epilogue:  # fmt: skip
    """That of one call, with memory for z where backward computes from it. order: y's memory order."""
    bias, scale = (None if row is None else _tile.dense(row, empty) for row in (bias, scale))
    residual = None if residual is None else in_order(residual, order, empty)
    keeps = needs and activation is not None and activation not in FROM_Y
    return Epilogue(bias, scale, residual, empty(y.shape, y.dtype, order) if keeps else None, activation)


@triton.jit
def finished(
    acc, residual, z, rows, columns, mask, TURNED: tl.constexpr,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr,
):  # fmt: skip
    """f(acc + residual) of a tile at the places rows + columns, where z is kept, too. TURNED: the places are of accᵀ."""
    if residual is not None:
        more = tl.load(residual + rows + columns, mask, other=0.0).to(tl.float32)
        acc += tl.trans(more) if TURNED else more
    if z is not None:
        kept = acc.to(z.dtype.element_ty)
        tl.store(z + rows + columns, tl.trans(kept) if TURNED else kept, mask)
    if ACTIVATION is not None:
        acc = value(acc, ACTIVATION, NUMBER_A, NUMBER_B)
    return acc


# --- of boxes that descriptors load and store -------------------------------------------------------------------------


@triton.jit
def put_box(
    acc, residual, kept, y, n, i, j, o, PARTS: tl.constexpr, NB: tl.constexpr, HB: tl.constexpr, WB: tl.constexpr,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr,
):  # fmt: skip
    """The box (NB, HB, WB) of y at (n, i, j) from acc (channels, pixels), and of what is kept: all at once, and returned
    as it is stored; or in parts, one after the other, where the whole would spill. All but acc are descriptors."""
    if PARTS == 1:
        if residual is not None:
            more = residual.load([n, i, j, o]).reshape(NB * HB * WB, acc.shape[0])
            acc += more.T.to(tl.float32)
        if kept is not None:
            kept.store([n, i, j, o], acc.to(kept.dtype).T.reshape(NB, HB, WB, acc.shape[0]))
        if ACTIVATION is not None:
            acc = value(acc, ACTIVATION, NUMBER_A, NUMBER_B)
        out = acc.to(y.dtype)
        y.store([n, i, j, o], out.T.reshape(NB, HB, WB, out.shape[0]))
        return out
    else:
        first, second = tl.split(acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1))
        IMAGES: tl.constexpr = NB // 2 if NB > 1 else NB
        ROWS: tl.constexpr = HB // 2 if NB == 1 and HB > 1 else HB
        COLUMNS: tl.constexpr = WB // 2 if NB * HB == 1 else WB
        put_box(
            first, residual, kept, y, n, i, j, o, PARTS // 2, IMAGES, ROWS, COLUMNS, ACTIVATION, NUMBER_A, NUMBER_B
        )  # fmt: skip
        return put_box(
            second, residual, kept, y, n + NB - IMAGES, i + HB - ROWS, j + WB - COLUMNS, o, PARTS // 2, IMAGES, ROWS,
            COLUMNS, ACTIVATION, NUMBER_A, NUMBER_B,
        )  # fmt: skip


PART_SUMS = 32
"""Sums of a thread in a part of a box."""
MOST_SUMS = 64
"""Sums of a thread beside an activation's temporaries."""


def tile_for(end: Epilogue, tile: Tile) -> Tile:
    """The tile with warps enough for what becomes of its sums: shared memory leaves a multiprocessor one such tile."""
    many = tile.BM * tile.BN // tile.warps > 32 * MOST_SUMS
    return tile._replace(warps=8) if many and end.activation not in (None, *EXACT) else tile


def in_boxes(end: Epilogue, tile: Tile, pixels: Sequence[int], y: Any) -> tuple[tuple, tuple, dict[str, Any]]:
    """(the block that a tile's box of pixels is put in, a kernel's arguments for the epilogue, its constants).

    y: (N, H, W, C), as the kernel's descriptor has it.
    """
    sides, parts = list(pixels), 1
    if not end.is_affine:
        parts = max(1, tile.BM * tile.BN // (32 * tile.warps * PART_SUMS))
    for _ in range(parts.bit_length() - 1):
        along = next(i for i, side in enumerate(sides) if side > 1)
        sides[along] //= 2
    block = (*sides, tile.BN)
    whole = (a if a is None else _tile.described(_as_rows(a, y), block) for a in (end.residual, end.z))
    return block, (end.bias, end.scale, *whole), end.constants | {"PARTS": parts}


def _as_rows(a: Any, y: Any) -> Any:
    """``a`` (N, C, *sizes), which has y's memory order, in the shape of y (N, H, W, C)."""
    return a.permute(0, *range(2, a.ndim), 1).reshape(-1).view(y.shape)


def boxes_refusal(end: Epilogue, phases: int = 1) -> str | None:
    """Why an epilogue is left to kernels of pointers; None if it is not. phases: of y, where it is written in steps."""
    if phases > 1 and not (end.z is None and end.residual is None):
        return "descriptors of views are y's alone"
    if end.residual is not None and not _tile.begins_aligned(end.residual):
        return "a residual that does not begin at a multiple of 16 bytes"
    return None


# --- dz --------------------------------------------------------------------------------------------------------------


@triton.jit
def _epilogue_gradient_kernel(
    dy, kept, scale, dz, scaled, partial, M, EACH, C, W, P, dy_n, dy_h, dy_w, dy_c, y_n, y_w, y_c,
    EVEN: tl.constexpr, ALIGNED: tl.constexpr,
    ACTIVATION: tl.constexpr, NUMBER_A: tl.constexpr, NUMBER_B: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dz = dy f'(z) and scaled = scale · dz over the s-th EACH of the M = N · P pixels; partial[s, c] = Σ dz, in float32."""
    split = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]  # (1, BC)
    first = split * EACH
    last = tl.minimum(first + EACH, M)
    total = tl.zeros((BP, BC), tl.float32)
    if scaled is not None:
        factor = tl.load(scale + c, c < C, other=0.0).to(tl.float32)
    for start in range(first, last, BP):
        n, pixel = image_pixel(start, P, ALIGNED, BP)
        if EVEN:
            rows = n * dy_n + pixel.to(tl.int64) * dy_w
        else:
            rows = n * dy_n + (pixel // W).to(tl.int64) * dy_h + (pixel % W).to(tl.int64) * dy_w
        mask = (start + tl.arange(0, BP) < last)[:, None] & (c < C)
        g = tl.load(dy + rows[:, None] + c.to(tl.int64) * dy_c, mask, other=0.0).to(tl.float32)
        at = (n * y_n + pixel.to(tl.int64) * y_w)[:, None] + c.to(tl.int64) * y_c
        if ACTIVATION is not None:
            v = tl.load(kept + at, mask, other=0.0).to(tl.float32)
            g = tl.where(mask, gradient(g, v, ACTIVATION, NUMBER_A, NUMBER_B), 0.0)
        if dz is not None:
            tl.store(dz + at, g.to(dz.dtype.element_ty), mask)
        if scaled is not None:
            tl.store(scaled + at, (g * factor).to(scaled.dtype.element_ty), mask)
        if partial is not None:
            total += g
    if partial is not None:
        tl.store(partial + split * C + c, tl.sum(total, 0, keep_dims=True), c < C)


GRADIENT = _configs.rows("epilogue_gradient")


class Before(NamedTuple):
    """What the gradients of an epilogue's inputs are, and of its sum."""

    total: Any
    """scale · dz, of any strides; None where nobody asks."""
    dbias: Any
    dresidual: Any


def before(
    dy: Any, saved: dict, activation: str | None, order: tuple[int, ...] | None, needs: tuple, bias: Any, empty: Any
) -> Before:
    """Where that is dy itself nothing runs. order: y's memory order. bias: its spec."""
    scale = saved.get("scale") if {"x", "weight"} & {*needs} else None
    if activation is None and scale is None:
        dbias = _bias_gradient(dy, bias, empty) if "bias" in needs else None
        return Before(dy, dbias, _tile.copied(dy, order, empty) if "residual" in needs else None)
    kept = None if activation is None else in_order(saved["y" if activation in FROM_Y else "z"], order, empty)
    wanted = "residual" in needs or (scale is None and {"x", "weight"} & {*needs})
    dz = empty(dy.shape, dy.dtype, order) if wanted else None
    scaled = None if scale is None else empty(dy.shape, dy.dtype, order)
    dbias = empty(bias.shape, bias.dtype) if "bias" in needs else None
    scale = None if scale is None else _tile.dense(scale, empty)
    _launch(dy, kept, scale, dz, scaled, dbias, activation, empty)
    return Before(dz if scale is None else scaled, dbias, dz if "residual" in needs else None)


def _bias_gradient(dy: Any, bias: Any, empty: Any) -> Any:
    dbias = empty(bias.shape, bias.dtype)
    channel_sums(volume(dy), dbias, empty)
    return dbias


def _launch(
    dy: Any, kept: Any, scale: Any, dz: Any, scaled: Any, dbias: Any, activation: str | None, empty: Any
) -> None:
    source = as_images(volume(dy), empty)
    laid = flattened(volume(next(a for a in (dz, scaled, kept) if a is not None))).squeeze(2)
    n, c, h, w = source.shape
    device = _tile.device(dy)
    entry = GRADIENT(device, n * h * w)
    pixels, channels = pixel_tile(laid, n * h * w, entry.elements)
    blocks, rounds = _tile.cdiv(c, channels), _tile.cdiv(n * h * w, pixels)
    splits, each = _tile.split(rounds, max(1, min(4 * device.sms // blocks, rounds // 4)))
    partial = None if dbias is None else empty((splits, c, 1, 1), "float32")
    y_n, _, y_w, y_c = steps(laid)
    _tile.launch(
        _epilogue_gradient_kernel, (splits, blocks), source, kept, scale, dz, scaled, partial,
        n * h * w, each * pixels, c, source.shape[3], h * w, *steps(source), y_n, y_w, y_c,
        EVEN=evenly_spaced(source), ALIGNED=run_of(h * w, pixels),
        **Epilogue(activation=activation).constants, BP=pixels, BC=channels, num_warps=entry.warps,
    )  # fmt: skip
    if partial is not None:
        finish(partial, dbias.view(c, 1, 1, 1))
