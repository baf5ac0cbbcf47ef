"""Pooling in CUDA C++: what ``pooling.cu`` is launched with. Arrays are CuPy's (NumPy's while emulated)."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import Spec, spec

from .._budget import Budget
from . import _launch

THREADS = 256
CHANNELS_LAST = (0, 2, 3, 1)
REFUSALS = {
    "image": "one image has 2^30 elements or more: its pixels are counted in 32 bits, with room for one step more"
}

BUDGETS = {
    "max_pool2d_forward_*": Budget(registers=56, blocks=4, threads=THREADS),
    # For sm_100 the compiler reads packs of float16 in pieces.
    "max_pool2d_backward_*": Budget(registers=72, blocks=3, threads=THREADS, narrow="loads"),
    "avg_pool2d_forward_*": Budget(registers=56, blocks=4, threads=THREADS),
    "avg_pool2d_backward_*": Budget(registers=64, blocks=4, threads=THREADS),
    "adaptive_avg_pool2d_forward_*": Budget(registers=64, blocks=4, threads=THREADS),
    "adaptive_avg_pool2d_backward_*": Budget(registers=88, blocks=2, threads=THREADS),
    "global_avg_pool2d_forward_*": Budget(registers=32, blocks=6, threads=THREADS, shared=4 * THREADS),
    # One dy serves a whole image.
    "global_avg_pool2d_backward_*": Budget(registers=40, blocks=6, threads=THREADS, narrow="loads"),
}


def _refuses(x: Spec) -> str | None:
    return REFUSALS["image"] if x.shape[1] * x.shape[2] * x.shape[3] >= 2**30 else None


def max_pool2d_refuses(x: Spec, *, needs: tuple, **options: Any) -> str | None:
    return _refuses(x)


def avg_pool2d_refuses(x: Spec, *, needs: tuple, **options: Any) -> str | None:
    return _refuses(x)


def adaptive_avg_pool2d_refuses(x: Spec, *, needs: tuple, output_size: tuple) -> str | None:
    return _refuses(x) or _refuses(Spec((*x.shape[:2], *output_size), x.dtype))


def _out_size(x: Any, kernel: tuple, stride: tuple, padding: tuple, dilation: tuple, ceil: bool) -> list[int]:
    sizes = []
    for n, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation):
        out = (n + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil else 0)) // s + 1
        sizes.append(out - 1 if ceil and (out - 1) * s >= n + p else out)
    return sizes


def _order(x: Any) -> tuple[int, ...] | None:
    of = spec(x)
    return CHANNELS_LAST if of.contiguous and of.order == CHANNELS_LAST else None  # type: ignore[union-attr]


def _steps(x: Any) -> list[int]:
    """Strides in elements."""
    return [s // x.itemsize for s in x.strides]


def _aligned(x: Any, channels: int) -> bool:
    """Whether packs of this many channels of ``x`` can move as one access."""
    steps = _steps(x)
    pointer = _launch.pointer(x)
    return (
        x.shape[1] % channels == 0
        and steps[1] == 1
        and all(s % channels == 0 for s in (steps[0], steps[2], steps[3]))
        and pointer % (channels * x.itemsize) == 0
    )


def _launch_over(
    name: str, result: Any, read: Any, args: tuple, packed: tuple, after: tuple = (), index: str = ""
) -> None:
    """Launch a kernel that makes every element of ``result`` from ``read``.

    args: what the kernel takes before the walk; after: what it takes after it. packed: the arrays that packs
    of channels must fit.
    """
    n, c, h, w = result.shape
    pack = 16 // result.itemsize
    if _steps(result)[1] != 1 or c == 1:
        layout, inner, outer = "pixels", h * w, n * c
    elif all(_aligned(a, pack) for a in packed):
        layout, inner, outer = "packs", h * w * c // pack, n
    else:
        layout, inner, outer = "channels", h * w * c, n
    wide = min(THREADS, max(32, 1 << (inner - 1).bit_length())) if inner else 32
    high = THREADS // wide
    grid = (-(-inner // wide), min(65535, -(-outer // high)))
    walk = (n, *map(np.int32, (c, h, w, *read.shape[2:])), *_steps(read), *_steps(result))
    kernel = "_".join(filter(None, (name, str(result.dtype), index, layout)))
    _launch.launch("pooling", kernel, grid, (wide, high), (*args, *walk, *map(np.int32, after)))


def max_pool2d_forward(
    x: Any,
    *,
    needs: tuple = (),
    kernel_size: tuple,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    ceil_mode: bool,
    return_indices: bool,
    empty: Any,
) -> tuple[tuple, dict]:
    size, order = _out_size(x, kernel_size, stride, padding, dilation, ceil_mode), _order(x)
    y = empty((*x.shape[:2], *size), x.dtype, order)
    taps = kernel_size[0] * kernel_size[1]
    index = "int8" if taps <= 127 else "int16" if taps <= 32767 else "int32"
    won = empty(y.shape if needs else (0, 0, 0, 0), index, order)
    indices = empty(y.shape if return_indices else (0, 0, 0, 0), "int64", order)
    window = (*kernel_size, *stride, *padding, *dilation)
    packed = (x, y, won) if needs else (x, y)
    given = (x, y, won, indices, bool(needs), return_indices)
    _launch_over("max_pool2d_forward", y, x, given, packed, window, index)
    return (y, indices) if return_indices else (y,), {"tap": won} if needs else {}


def max_pool2d_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    kernel_size: tuple,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    ceil_mode: bool,
    return_indices: bool,
    empty: Any,
) -> tuple:
    dy, (x,), won = dys[0], inputs, saved["tap"]
    dx = empty(x.shape, x.dtype, x.like().order)
    window = (*kernel_size, *stride, *padding, *dilation)
    _launch_over("max_pool2d_backward", dx, dy, (dy, won, dx, *_steps(won)), (dy, won, dx), window, str(won.dtype))
    return (dx,)


def avg_pool2d_forward(
    x: Any,
    *,
    needs: tuple = (),
    kernel_size: tuple,
    stride: tuple,
    padding: tuple,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    empty: Any,
) -> tuple[tuple, dict]:
    y = empty((*x.shape[:2], *_out_size(x, kernel_size, stride, padding, (1, 1), ceil_mode)), x.dtype, _order(x))
    divisor = (float(divisor_override or 0), bool(count_include_pad))
    _launch_over("avg_pool2d_forward", y, x, (x, y, *divisor), (x, y), (*kernel_size, *stride, *padding, 1, 1))
    return (y,), {}


def avg_pool2d_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    kernel_size: tuple,
    stride: tuple,
    padding: tuple,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    empty: Any,
) -> tuple:
    (dy,), (x,) = dys, inputs
    dx = empty(x.shape, x.dtype, x.like().order)
    divisor = (float(divisor_override or 0), bool(count_include_pad))
    _launch_over("avg_pool2d_backward", dx, dy, (dy, dx, *divisor), (dy, dx), (*kernel_size, *stride, *padding, 1, 1))
    return (dx,)


def _divided(x: Any, output_size: tuple) -> dict | None:
    """The options of the ``avg_pool2d`` that does the same, where the parts divide the image."""
    if output_size == (1, 1) or 0 in output_size or any(n % o for n, o in zip(x.shape[2:], output_size)):
        return None
    window = tuple(n // o for n, o in zip(x.shape[2:], output_size))
    plain = {"padding": (0, 0), "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
    return {"kernel_size": window, "stride": window, **plain}


def adaptive_avg_pool2d_forward(x: Any, *, needs: tuple = (), output_size: tuple, empty: Any) -> tuple[tuple, dict]:
    if output_size == (1, 1):
        return (_global_mean(x, empty),), {}
    if divided := _divided(x, output_size):
        return avg_pool2d_forward(x, needs=needs, **divided, empty=empty)
    y = empty((*x.shape[:2], *output_size), x.dtype, _order(x))
    _launch_over("adaptive_avg_pool2d_forward", y, x, (x, y), (x, y))
    return (y,), {}


def adaptive_avg_pool2d_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, output_size: tuple, empty: Any
) -> tuple:
    (dy,), (x,) = dys, inputs
    if divided := _divided(x, output_size):
        return avg_pool2d_backward(dys, saved, inputs=inputs, needs=needs, **divided, empty=empty)
    dx = empty(x.shape, x.dtype, x.like().order)
    if output_size == (1, 1):
        # One pixel stands for all: dy is read with its strides over images and channels alone.
        _launch_over("global_avg_pool2d_backward", dx, dy, (dy, dx), (dx,))
    else:
        _launch_over("adaptive_avg_pool2d_backward", dx, dy, (dy, dx), (dy, dx))
    return (dx,)


def _global_mean(x: Any, empty: Any) -> Any:
    n, c, h, w = x.shape
    y = empty((n, c, 1, 1), x.dtype)
    wide = 32 if _steps(x)[1] == 1 and c > 1 else 1
    high = min(THREADS // wide, 1 << max(h * w - 1, 0).bit_length())
    args = (x, y, *map(np.int32, (c, h * w, w)), *_steps(x))
    name = f"global_avg_pool2d_forward_{x.dtype}"
    _launch.launch("pooling", name, (n * -(-c // wide),), (wide, high), args, 4 * wide * high)
    return y
