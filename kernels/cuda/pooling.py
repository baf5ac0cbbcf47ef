"""Pooling in CUDA C++: what ``pooling.cu`` is launched with. Arrays are CuPy's (NumPy's while emulated).

They serve where Triton or torch is not installed; where both are, Triton's kernels are faster and stand first.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpulayers.arrays import Spec

from .._budget import Budget
from .._pooling import Divisor, adaptive_avg_pool, avg_pool, max_pool
from .._window import Window
from . import _launch

THREADS = 256
REFUSALS = {
    "volume": "volumes, of three spatial axes, are left to Triton's kernels and the definition",
    "image": "one image has 2^30 elements or more: its pixels are counted in 32 bits, with room for one step more",
}

BUDGETS = {
    "max_pool_forward_*": Budget(registers=56, blocks=4, threads=THREADS),
    # For sm_100 the compiler reads packs of float16 in pieces.
    "max_pool_backward_*": Budget(registers=72, blocks=3, threads=THREADS, narrow="loads"),
    "avg_pool_forward_*": Budget(registers=56, blocks=4, threads=THREADS),
    "avg_pool_backward_*": Budget(registers=64, blocks=4, threads=THREADS),
    "adaptive_avg_pool_forward_*": Budget(registers=64, blocks=4, threads=THREADS),
    "adaptive_avg_pool_backward_*": Budget(registers=88, blocks=2, threads=THREADS),
    "global_avg_pool_forward_*": Budget(registers=32, blocks=6, threads=THREADS, shared=4 * THREADS),
    # One dy serves a whole image.
    "global_avg_pool_backward_*": Budget(registers=40, blocks=6, threads=THREADS, narrow="loads"),
}


def _refuses(x: Spec) -> str | None:
    if x.ndim == 5:
        return REFUSALS["volume"]
    return REFUSALS["image"] if math.prod(x.shape[1:]) >= 2**30 else None


def max_pool_refuses(x: Spec, *, needs: tuple, **options: Any) -> str | None:
    return _refuses(x)


def avg_pool_refuses(x: Spec, *, needs: tuple, **options: Any) -> str | None:
    return _refuses(x)


def adaptive_avg_pool_refuses(x: Spec, *, needs: tuple, output_size: tuple) -> str | None:
    return _refuses(x) or _refuses(Spec((*x.shape[:2], *output_size), x.dtype))


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
    given = (*args, *walk, *map(np.int32, after))
    _launch.launch("pooling", kernel, grid, (wide, high), given, only=str(result.dtype))


def _options(window: Window) -> tuple[int, ...]:
    return (*window.kernel, *window.stride, *window.padding, *window.dilation)


def _max_forward(x: Any, y: Any, tap: Any, indices: Any, window: Window, empty: Any) -> None:
    pointers = [empty((0,), kind) if a is None else a for a, kind in ((tap, window.tap_dtype), (indices, "int64"))]
    packed = (x, y) if tap is None else (x, y, tap)
    given = (x, y, *pointers, tap is not None, indices is not None)
    _launch_over("max_pool_forward", y, x, given, packed, _options(window), window.tap_dtype)


def _max_backward(dy: Any, tap: Any, dx: Any, window: Window) -> None:
    given = (dy, tap, dx, *_steps(tap))
    _launch_over("max_pool_backward", dx, dy, given, (dy, tap, dx), _options(window), window.tap_dtype)


def _avg_forward(x: Any, y: Any, window: Window, divisor: Divisor) -> None:
    given = (x, y, float(divisor.override or 0), divisor.include_pad)
    _launch_over("avg_pool_forward", y, x, given, (x, y), _options(window))


def _avg_backward(dy: Any, dx: Any, window: Window, divisor: Divisor) -> None:
    given = (dy, dx, float(divisor.override or 0), divisor.include_pad)
    _launch_over("avg_pool_backward", dx, dy, given, (dy, dx), _options(window))


def _adaptive_forward(x: Any, y: Any, empty: Any) -> None:
    if y.shape[2:] == (1, 1):
        _global_mean(x, y)
    else:
        _launch_over("adaptive_avg_pool_forward", y, x, (x, y), (x, y))


def _adaptive_backward(dy: Any, dx: Any) -> None:
    if dy.shape[2:] == (1, 1):
        # One pixel stands for all: dy is read with its strides over images and channels alone.
        _launch_over("global_avg_pool_backward", dx, dy, (dy, dx), (dx,))
    else:
        _launch_over("adaptive_avg_pool_backward", dx, dy, (dy, dx), (dy, dx))


def _global_mean(x: Any, y: Any) -> None:
    n, c, h, w = x.shape
    wide = 32 if _steps(x)[1] == 1 and c > 1 else 1
    high = min(THREADS // wide, 1 << max(h * w - 1, 0).bit_length())
    args = (x, y, *map(np.int32, (c, h * w, w)), *_steps(x))
    name = f"global_avg_pool_forward_{x.dtype}"
    shared, only = 4 * wide * high, str(x.dtype)
    _launch.launch("pooling", name, (n * -(-c // wide),), (wide, high), args, shared, only)


max_pool_forward, max_pool_backward = max_pool(_max_forward, _max_backward)
avg_pool_forward, avg_pool_backward = avg_pool(_avg_forward, _avg_backward)
adaptive_avg_pool_forward, adaptive_avg_pool_backward = adaptive_avg_pool(
    (avg_pool_forward, avg_pool_backward), _adaptive_forward, _adaptive_backward
)
