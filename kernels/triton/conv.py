"""Convolution over one to three spatial axes, and transposed: three kernels (forward, dx, dweight) in two sets of roles.

Kernels see three axes: those that are not there have one pixel. They read channels as neighbours in memory (NHWC): an NCHW
array is turned first, since one pass over it costs less than gathering 2-byte elements kernel-many times; but a kernel of
one tap needs no gathering and reads NCHW as it is. Outputs are written in any order.

- of one tap over NCHW arrays: ``_conv_first.py``, on sm_90 and newer.
- dense and grouped: implicit matrix products, ``_conv_product.py`` (forward, dx) and ``_conv_weight.py``, through
  ``_conv_runs.py``; on sm_90 and newer ``_conv_tiles.py`` and ``_conv_tiles_weight.py``, which load tiles of pixels, for what
  they do not refuse.
- of windows that do not overlap: ``_conv_patches.py``, on those tiles.
- of few channels: ``_conv_windows.py``, on those tiles.
- of one tap over channels-last arrays: what those refuse is ``_matmul.py``'s.
- depthwise: ``_depthwise.py``.

All have the epilogue of ``_epilogue.py``; backward begins with dz = dy f'(z), which all gradients read.
"""

from __future__ import annotations

import math
from typing import Any

from .._activation import numbers_of
from .._conv import conv_saved
from .._window import Window
from . import (
    _conv_first,
    _conv_patches,
    _conv_runs,
    _conv_tiles,
    _conv_tiles_weight,
    _conv_windows,
    _depthwise,
    _matmul,
    _tile,
)
from ._batch_norm import in_order
from ._conv import Walk, volume, walk_of
from ._epilogue import Epilogue, before, boxes_refusal, epilogue
from ._image import evenly_spaced, nhwc, output_order


def _is_plain(x: Any, y: Any, weight: Any, walk: Walk) -> bool:
    """A kernel of one tap that takes every pixel as it is, of images with fewer than 2^31 elements. Arrays or specs."""
    taps, pixels = math.prod(weight.shape[2:]), math.prod(x.shape[2:])
    as_it_is = taps == math.prod(walk.stride) == 1 and not any(walk.before) and x.shape[2:] == y.shape[2:]
    return as_it_is and max(x.shape[1], y.shape[1]) * pixels < 2**31


def _is_depthwise(weight: Any, walk: Walk) -> bool:
    return weight.shape[1] == 1 < walk.groups


def _source(x: Any, weight: Any, walk: Walk, plain: bool, empty: Any) -> Any:
    """x (or dy) as the kernels read it: channels last in memory, or a part of such an array, as torch.cat's gradients are;
    NCHW for a plain kernel, anything for a depthwise one."""
    x = volume(x)
    if _is_depthwise(weight, walk) or (plain and x.is_contiguous()) or _is_part(x):
        return x
    return nhwc(x, empty)


def _is_part(x: Any) -> bool:
    """Whether neighbouring channels are neighbours, and one step leads from each pixel of an image to the next. In 16 bits
    they are descriptors' to load."""
    return x.stride(1) == 1 and evenly_spaced(x) and (x.element_size() != 2 or _conv_tiles.in_rows(x))


def _taps(weight: Any, empty: Any) -> Any:
    """(O, C / groups, *kernel) with channels last in memory: itself, or a copy."""
    return _tile.dense(volume(weight).permute(0, 2, 3, 4, 1), empty).permute(0, 4, 1, 2, 3)


def _as_matrices(x: Any, y: Any, end: Epilogue, walk: Walk, plain: bool) -> tuple[Any, Any] | None:
    """x and y (pixels, channels), where the convolution is a product of 16-bit matrices; float32 has TF32 rules of its own."""
    if not plain or walk.groups > 1 or x.element_size() != 2 or x.numel() >= 2**31 * x.shape[1]:
        return None
    if end.scale is not None or end.residual is not None:
        return None
    rows = [t.permute(0, 2, 3, 4, 1) for t in (x, y)]
    return tuple(r.reshape(-1, r.shape[4]) for r in rows) if all(r.is_contiguous() for r in rows) else None  # type: ignore[return-value]


def _multiply(matrices: tuple[Any, Any], weight: Any, end: Epilogue, empty: Any) -> None:
    numbers, z = numbers_of(end.activation, 2), end.z
    if z is not None:
        z = z.permute(0, *range(2, z.ndim), 1).reshape(matrices[1].shape)
    _matmul.matmul(matrices[0], weight, matrices[1], empty, bias=end.bias, z=z, f=end.activation, numbers=numbers)


# --- the three roles: x and dy are sources ---------------------------------------------------------------------------


def _forward(
    x: Any, weight: Any, end: Epilogue, y: Any, walk: Walk, plain: bool, empty: Any, moments: Any = None
) -> list[Any]:
    """Writes y; gives its moments where they are asked for and come along (``_conv_tiles.forward``), else []."""
    if _is_depthwise(weight, walk):
        _depthwise.forward(x, volume(weight), end, volume(y), walk)
        return []
    taps, y = _taps(weight, empty), volume(y)
    tiled = boxes_refusal(end) is None
    if end.is_bias and _conv_first.refusal(x, y, plain, walk.groups) is None:
        _conv_first.product(x, taps[..., 0, 0, 0], end.bias, y, empty)
        return []
    if tiled and _conv_tiles.refusal(x, taps, y, walk) is None:
        return _conv_tiles.forward(x, taps, end, y, walk, plain, moments)
    if tiled and _conv_patches.refusal(x, taps, y, walk) is None:
        return _conv_patches.forward(x, taps, end, y, walk, moments)
    if tiled and _conv_windows.refusal(x, y, taps.shape[2:], walk) is None:
        return _conv_windows.forward(x, taps, end, y, walk, empty, moments)
    if matrices := _as_matrices(x, y, end, walk, plain):
        _multiply(matrices, taps[..., 0, 0, 0], end, empty)
    else:
        _conv_runs.forward(x, taps, end, y, walk, plain)
    return []


def _input_gradient(dy: Any, weight: Any, end: Epilogue, dx: Any, walk: Walk, plain: bool, empty: Any) -> None:
    if _is_depthwise(weight, walk):
        _depthwise.input_gradient(dy, volume(weight), end, volume(dx), walk)
        return
    taps, dx = _taps(weight, empty), volume(dx)
    tiled = boxes_refusal(end, math.prod(walk.stride)) is None
    if end.is_bias and _conv_first.refusal(dy, dx, plain, walk.groups) is None:
        _conv_first.product(dy, taps[..., 0, 0, 0], end.bias, dx, empty, turned=True)
    elif tiled and _conv_tiles.refusal(dy, taps, dx, walk, turned=True) is None:
        _conv_tiles.input_gradient(dy, taps, end, dx, walk, plain)
    elif end.is_bias and _conv_patches.refusal(dx, taps, dy, walk, whole=True) is None:
        _conv_patches.input_gradient(dy, taps, end.bias, dx, walk, empty)
    elif matrices := _as_matrices(dy, dx, end, walk, plain):
        _multiply(matrices, taps[..., 0, 0, 0].T, end, empty)
    else:
        _conv_runs.input_gradient(dy, taps, end, dx, walk, plain, empty)


def _no_box(dy: Any) -> str | None:
    return _conv_tiles_weight.box_refusal(_conv_tiles.rows_of(dy))


def _weight_gradient(dy: Any, x: Any, dweight: Any, walk: Walk, plain: bool, empty: Any) -> None:
    if _is_depthwise(dweight, walk):
        _depthwise.weight_gradient(dy, x, volume(dweight), walk, empty)
        return
    dweight = volume(dweight)
    if _conv_first.refusal(dy, x, plain, walk.groups) is None:
        _conv_first.weight_gradient(dy, x, dweight, empty)
    elif _conv_tiles_weight.refusal_of_weight(dy, x, dweight, walk) is None:
        _conv_tiles_weight.weight_gradient(dy, x, dweight, walk, plain, empty)
    elif (_conv_patches.refusal(x, dweight, dy, walk) or _no_box(dy)) is None:
        _conv_patches.weight_gradient(dy, x, dweight, walk, empty)
    elif (_conv_windows.refusal(x, dy, dweight.shape[2:], walk) or _no_box(dy)) is None:
        _conv_windows.weight_gradient(dy, x, dweight, walk, empty)
    elif matrices := _as_matrices(dy, x, Epilogue(), walk, plain):
        _matmul.matmul(matrices[0].T, matrices[1].T, dweight[..., 0, 0, 0], empty)
    else:
        _conv_runs.weight_gradient(dy, x, dweight, walk, plain, empty)


# --- launchers -------------------------------------------------------------------------------------------------------


def conv_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    scale: Any = None,
    residual: Any = None,
    *,
    needs: tuple = (),
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
    activation: str | None = None,
    empty: Any,
) -> tuple[tuple, dict]:
    how = stride, padding, dilation, groups
    y, z, _ = convolved(x, weight, bias, scale, residual, how, needs, activation, empty)
    return (y,), conv_saved(needs, activation, y, z, x, weight, bias, scale, residual)


def convolved(
    x: Any, weight: Any, bias: Any, scale: Any, residual: Any, how: tuple, needs: tuple, activation: str | None, empty: Any,
    with_moments: bool = False,
) -> tuple[Any, Any, list[Any]]:  # fmt: skip
    """(y and z of conv_forward, the moments of y that ``_forward`` gives). how: its stride, padding, dilation, groups."""
    stride, padding, dilation, groups = how
    front, behind = zip(*padding)
    size = Window(tuple(weight.shape[2:]), stride, front, dilation).output_size(x.shape[2:], behind)
    order = output_order(x)
    y = empty((x.shape[0], weight.shape[0], *size), x.dtype, order)
    walk = walk_of(stride, padding, dilation, groups)
    plain = _is_plain(x, y, weight, walk)
    end = epilogue(y, order, needs, empty, bias, scale, residual, activation)
    source = _source(x, weight, walk, plain, empty)
    return y, end.z, _forward(source, weight, end, y, walk, plain, empty, empty if with_moments else None)


def conv_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
    activation: str | None = None,
    empty: Any,
) -> tuple:
    x, weight, bias = inputs[:3]
    walk = walk_of(stride, padding, dilation, groups)
    total, dbias, dresidual = before(dys[0], saved, activation, output_order(x), needs, bias, empty)
    dx = dweight = None
    if total is not None:
        plain = _is_plain(x, total, weight, walk)
        total = _source(total, weight, walk, plain, empty)
    if "x" in needs:
        order = x.like().order
        dx = empty(x.shape, x.dtype, order)
        end = Epilogue(residual=in_order(dys[1], order, empty)) if len(dys) > 1 else Epilogue()
        _input_gradient(total, saved["weight"], end, dx, walk, plain, empty)
    if "weight" in needs:
        dweight = empty(weight.shape, weight.dtype, weight.like().order)
        _weight_gradient(total, _source(saved["x"], weight, walk, plain, empty), dweight, walk, plain, empty)
    return dx, dweight, dbias, None, dresidual


def conv_transpose_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    needs: tuple = (),
    stride: tuple,
    padding: tuple,
    output_padding: tuple,
    dilation: tuple,
    groups: int,
    activation: str | None = None,
    empty: Any,
) -> tuple[tuple, dict]:
    """A convolution's dx, of x in dy's place."""
    front, behind = zip(*padding)
    window, order = Window(tuple(weight.shape[2:]), stride, front, dilation), output_order(x)
    size = [r - b - a + m for r, b, a, m in zip(window.reach(x.shape[2:]), front, behind, output_padding)]
    y = empty((x.shape[0], weight.shape[1] * groups, *size), x.dtype, order)
    walk = walk_of(stride, padding, dilation, groups)
    plain = _is_plain(y, x, weight, walk)
    end = epilogue(y, order, needs, empty, bias, activation=activation)
    _input_gradient(_source(x, weight, walk, plain, empty), weight, end, y, walk, plain, empty)
    return (y,), conv_saved(needs, activation, y, end.z, x, weight, bias)


def conv_transpose_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    stride: tuple,
    padding: tuple,
    output_padding: tuple,
    dilation: tuple,
    groups: int,
    activation: str | None = None,
    empty: Any,
) -> tuple:
    """A convolution's forward and dweight, of dy in x's place and x in dy's."""
    x, weight, bias = inputs
    walk = walk_of(stride, padding, dilation, groups)
    dz, dbias, _ = before(dys[0], saved, activation, output_order(x), needs, bias, empty)
    dx = dweight = None
    if dz is not None:
        plain = _is_plain(dz, x, weight, walk)
        dz = _source(dz, weight, walk, plain, empty)
    if "x" in needs:
        dx = empty(x.shape, x.dtype, x.like().order)
        _forward(dz, saved["weight"], Epilogue(), dx, walk, plain, empty)
    if "weight" in needs:
        dweight = empty(weight.shape, weight.dtype, weight.like().order)
        _weight_gradient(_source(saved["x"], weight, walk, plain, empty), dz, dweight, walk, plain, empty)
    return dx, dweight, dbias
